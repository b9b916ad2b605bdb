"""The planned figures against real ones: a few updates on this machine, in processes of their own.

Every rank is ``python -m erniesearch.planning.trial JOB RANK``. It trains the stage through the
ordinary engine and update, on random weights and full-length batches.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from erniesearch import exiting
from erniesearch.config.keys import RunConfig, TrainingConfig
from erniesearch.config.yaml_file import from_dict
from erniesearch.errors import UserError
from erniesearch.run_folder import memory_status
from erniesearch.stages import Stage

UPDATES = {3: 4}
"""Updates per ZeRO stage, else 2: the first creates the optimizer's state. ZeRO-3 records in the
first two what it fetches when, and keeps parameters for their next use from the third on."""


RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
"""glibc raises this limit by itself, and then keeps much of what is freed. With it fixed the peak
is that of allocated memory, as CUDA's max_memory_allocated is."""


@dataclass(frozen=True)
class Measured:
    """Bytes of the rank that needed most.

    Attributes:
        base: what the process held before it made the model (on a CPU: resident; on a GPU: 0).
        peak: the most that it held, ``base`` included.
        seconds: of the last update, on the slowest rank.
    """

    base: int
    peak: int
    seconds: float

    @property
    def own(self) -> int:
        """Bytes above ``base``: what a plan foretells."""
        return self.peak - self.base


def measure(stage: Stage, num_queries: int) -> Measured:
    """Train a few updates of a stage on this machine, with that many queries on each of its ranks.

    Raises:
        UserError: if a rank ends without a result, with the end of what it wrote.
    """
    from erniesearch import distributed

    ranks = stage.ranks
    job = {"config": asdict(stage.config), "stage": stage.name, "queries": num_queries}
    with tempfile.TemporaryDirectory(prefix="erniesearch-plan-") as folder:
        file = Path(folder) / "job.json"
        file.write_text(json.dumps(job))
        environment = os.environ | {
            "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(distributed.free_port()), **RETURN_FREED_MEMORY,
        }  # fmt: skip
        processes = []
        for rank in range(ranks):
            own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with (Path(folder) / f"{rank}.log").open("w") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", __name__, str(file)],
                        env=own,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        try:
            failed = [rank for rank, process in enumerate(processes) if process.wait()]
        finally:
            for process in processes:
                process.kill()
        if failed:
            said = (Path(folder) / f"{failed[0]}.log").read_text()[-600:]
            raise UserError(
                f"--measure: stage {stage.name} does not run here with {num_queries} queries per"
                f" rank on {ranks} ranks (rank {failed[0]} ended with status"
                f" {processes[failed[0]].returncode}): {said}"
            )
        results = [
            Measured(**json.loads((Path(folder) / f"{rank}.json").read_text()))
            for rank in range(ranks)
        ]
    largest = max(results, key=lambda result: result.own)
    return Measured(largest.base, largest.peak, max(result.seconds for result in results))


def main(job_file: str) -> None:
    """One rank: train, and write what it took beside the job."""
    import gc
    from time import monotonic

    import torch

    from erniesearch import distributed
    from erniesearch.models.backbone import without_weights
    from erniesearch.models.precision import tune_for_device, use_bf16
    from erniesearch.training.build import assemble_model, base_teacher
    from erniesearch.training.engine import build_engine, zero_section
    from erniesearch.training.update import update

    job = json.loads(Path(job_file).read_text())
    config: RunConfig = from_dict(RunConfig, job["config"])
    stage, num_queries = Stage(config, job["stage"]), job["queries"]
    device = distributed.initialize()
    torch.set_num_threads(config.training.threads_per_process)
    with without_weights():
        with torch.device("meta"):  # imports what making the model imports
            assemble_model(stage, config.student, base_teacher(config))
        _warm_up(config.training, device)
        gc.collect()
        base = memory_status("VmRSS") if device.type == "cpu" else 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        model, tokenizer = assemble_model(stage, config.student, base_teacher(config))
    bf16 = use_bf16(config.training.precision, device)
    tune_for_device(model, config, device, bf16)
    engine, _ = build_engine(model, config.training, stage.settings, num_queries, bf16)
    engine.train()
    updates = UPDATES.get(zero_section(config.training).get("stage", 0), 2)
    batches = full_batches(stage, num_queries, tokenizer)
    seconds = 0.0
    for _ in range(updates):
        began = monotonic()
        update(engine, batches, stage.settings, device, lambda what: None)
        seconds = monotonic() - began
    peak = (
        memory_status("VmHWM") if device.type == "cpu" else torch.cuda.max_memory_allocated(device)
    )
    result = asdict(Measured(base, peak, seconds))
    Path(job_file).with_name(f"{distributed.rank()}.json").write_text(json.dumps(result))
    distributed.barrier()
    torch.distributed.destroy_process_group()


def full_batches(stage: Stage, num_queries: int, tokenizer: Any) -> Iterator[Any]:
    """Batches as planned, micro-step after micro-step, without end."""
    from erniesearch.planning.full_batch import full_batch

    step = 0
    while True:
        for micro_step in range(stage.settings.accumulation_steps):
            yield full_batch(stage, num_queries, tokenizer, step, micro_step)
        step += 1


def _warm_up(training: TrainingConfig, device: Any) -> None:
    """A step of a small engine, so that what libraries load and keep counts as base."""
    import deepspeed
    import torch

    from erniesearch.models.precision import use_bf16
    from erniesearch.training.engine import zero_section

    layer = torch.nn.TransformerEncoderLayer(256, 4, 1024, 0.0, "gelu")
    engine, *_ = deepspeed.initialize(
        model=layer, optimizer=torch.optim.AdamW(layer.parameters(), fused=True),
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": 1, "zero_optimization": zero_section(training),
            "zero_allow_untested_optimizer": True, "gradient_clipping": 1.0,
            "bf16": {"enabled": use_bf16(training.precision, device)}, "steps_per_print": 1 << 31,
        },
    )  # fmt: skip
    dtype = next(layer.parameters()).dtype
    engine.backward(engine(torch.randn(32, 64, 256, device=device, dtype=dtype)).square().mean())
    engine.step()
    engine.destroy()


if __name__ == "__main__":
    exiting.run(lambda: main(sys.argv[1]))
