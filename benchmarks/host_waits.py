"""How often an update makes the host wait for a GPU, and how much it launches there, counted
without one.

    python benchmarks/host_waits.py --out docs/results/host-waits.json

An update of a small model, all terms, runs on a pretended GPU (pretend_gpu.py): forward and
backward passes of the micro-step, the exchange between ranks, everything but DeepSpeed's step.
Launches are operators, of which some start more than one kernel; they grow with the layers.
DeepSpeed's step (bf16, ZeRO 1) is a real one on the CPU: the numbers that it reads, and what it
copies to the host at once.
"""

import argparse
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from acceptance import material
from pretend_gpu import GPU, Engine, PretendGpu, move, pass_on
from torch.utils._python_dispatch import TorchDispatchMode

from erniesearch import distributed
from erniesearch.config.keys import RunConfig
from erniesearch.config.yaml_file import from_dict
from erniesearch.models.backbone import without_weights
from erniesearch.models.precision import tune_for_device
from erniesearch.planning.accounting import fake_world
from erniesearch.planning.trial import full_batches
from erniesearch.report.benchmark_report import tell_figures
from erniesearch.stages import Stage
from erniesearch.training.build import assemble_model, base_teacher
from erniesearch.training.engine import build_engine
from erniesearch.training.update import update

QUERIES = 8
CASES: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    "cascade, one GPU": ("cascade", 1, {}, {}),
    "cascade, 8 GPUs": ("cascade", 8, {}, {}),
    "cascade, 8 GPUs, ring": ("cascade", 8, {}, {"late_interaction_exchange": "ring"}),
    "cascade, 8 GPUs, chunks of 4": ("cascade", 8, {"chunk_size": 4}, {}),
    "post-training, 8 GPUs": ("post_train", 8, {"weights": {"mlm": 1.0, "de": 1.0, "li": 1.0}}, {}),
}
"""Stage, ranks, and settings of the stage and of the objective."""


def count(folder: Path, case: tuple[str, int, dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    """Waits and launches of one update, after one that is not counted."""
    name, ranks, settings, objective = case
    base = material.tiny(folder)
    own = base["stages"]["cascade"]
    if name == "post_train":
        own = {"steps": own["steps"]}
    base["stages"] = {name: own | settings | {"queries_per_rank": QUERIES}}
    base |= {"run_dir": str(folder / "run"), "objective": objective}
    config: RunConfig = from_dict(RunConfig, base)
    stage = Stage(config, name)
    with without_weights():
        model, tokenizer = assemble_model(stage, config.student, base_teacher(config))
    model.bfloat16()
    tune_for_device(model, config, GPU, True)
    move(model)
    engine: Any = Engine(model.train())
    engine.optimizer.overflow = False  # ZeRO's optimizers check by themselves
    batches = full_batches(stage, QUERIES, tokenizer)
    with (
        patch("torch.distributed.batch_isend_irecv", pass_on),
        fake_world(ranks, "cuda") if ranks > 1 else nullcontext(),
    ):
        for _ in range(2):
            with PretendGpu():
                update(engine, batches, stage.settings, GPU, lambda what: None)
    return {
        "waits": PretendGpu.waits.total(), "launches": PretendGpu.launches.total(),
        "waits_by_place": dict(PretendGpu.waits.most_common()),
    }  # fmt: skip


class _OnHost(torch.Tensor):
    """What a number becomes that has been copied to the host, and what is computed from it."""


class _Reads(TorchDispatchMode):
    """Counts numbers that are read from where a GPU's would be."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.total += not isinstance(args[0], _OnHost)
        return func(*args, **(kwargs or {}))


def count_step(folder: Path) -> int:
    """Waits of DeepSpeed's step after the passes of :func:`count`'s cascade on one GPU."""
    base = material.tiny(folder) | {"run_dir": str(folder / "run")}
    config: RunConfig = from_dict(RunConfig, base)
    stage = Stage(config, "cascade")
    device = distributed.initialize()
    with without_weights():
        model, tokenizer = assemble_model(stage, config.student, base_teacher(config))
    engine, _ = build_engine(model, config.training, stage.settings, QUERIES, True)
    engine.train()
    batches, step, reads = full_batches(stage, QUERIES, tokenizer), engine.step, _Reads()

    def to_host(tensor: torch.Tensor) -> torch.Tensor:
        reads.total += 1
        return tensor.clone().as_subclass(_OnHost)

    def counted() -> None:
        with reads, patch.object(torch.Tensor, "cpu", to_host):
            step()

    for engine.step in (step, counted):
        update(engine, batches, stage.settings, device, lambda what: None)
    engine.destroy()
    return reads.total


def main() -> None:
    """Count and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = count(Path(folder), case)
    with tempfile.TemporaryDirectory() as folder:
        step = count_step(Path(folder))
    results = {"queries": QUERIES, "model": material.TINY, "cases": found,
               "waits_of_deepspeeds_step": step}  # fmt: skip
    tell_figures(results, given.out, " ".join(["python", *sys.argv]))


if __name__ == "__main__":
    main()
