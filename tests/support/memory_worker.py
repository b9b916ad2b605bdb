"""Started by test_memory.py on every rank: what one update, or one exchange, needs at its peak.

Usage: memory_worker.py update CONFIG.json
       memory_worker.py exchange EXCHANGE QUERIES PASSAGES
Rank 0 prints one JSON line: the largest growth of resident memory over the ranks, in MiB, from
just before the work to its peak, and the loss or the norm of a gradient.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support.unvalidated import train

from erniesearch import distributed, exiting
from erniesearch.config.keys import RunConfig
from erniesearch.config.yaml_file import from_dict
from erniesearch.objectives import scores
from erniesearch.objectives.exchange import TokenGather
from erniesearch.training import trainer

QUERY_LENGTH, PASSAGE_LENGTH, DIM = 32, 128, 128


class Peak:
    """Resident memory while the context is open (Linux: the high-water mark is reset first)."""

    mib = 0.0
    seconds = 0.0

    def __enter__(self) -> "Peak":
        Path("/proc/self/clear_refs").write_text("5")
        self._before, self._began = _status("VmRSS"), time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.monotonic() - self._began
        self.mib = (_status("VmHWM") - self._before) / 1024


def _status(key: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{key}:")[1].split()[0])


def tell(peak: Peak, **figures: float) -> None:
    most = max(distributed.gather_objects(peak.mib))
    if distributed.is_main():
        line = {"mib": round(most, 1), "seconds": round(peak.seconds, 1), **figures}
        sys.stdout.write(json.dumps(line) + "\n")


def measure_update(config: RunConfig) -> None:
    """The first update of the cascade, as the training loop does it."""
    whole, found = trainer.update, {}

    def update(*arguments: Any) -> trainer.Update:
        with Peak() as found["peak"]:
            made = whole(*arguments)
        found["loss"] = float(made.terms["loss"])
        found["grad_norm"] = float(arguments[0].get_global_grad_norm())
        return made

    trainer.update = update
    train(config, "cascade")
    tell(found.pop("peak"), **found)


def measure_exchange(exchange: scores.Exchange, num_queries: int, num_passages: int) -> None:
    """Late-interaction scores of random tokens against every rank's, and their gradient."""
    distributed.initialize()
    torch.manual_seed(distributed.rank())

    def run(queries: int, passages: int) -> tuple[float, Peak]:
        q = torch.randn((queries, QUERY_LENGTH, DIM), requires_grad=True)
        p = torch.randn((passages, PASSAGE_LENGTH, DIM), requires_grad=True)
        q_mask, p_mask = (torch.ones(x.shape[:2], dtype=torch.bool) for x in (q, p))
        with Peak() as peak:
            made = scores.cross_batch_late_interaction_scores(
                q, q_mask, p, p_mask, TokenGather(p_mask, p.device), 1.0, "torch", exchange
            )
            made.pow(2).mean().backward()
        assert p.grad is not None
        return float(p.grad.norm()), peak

    run(2, 2)  # connections and buffers of the libraries
    norm, peak = run(num_queries, num_passages)
    tell(peak, grad_norm=norm)


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1] == "update":
        measure_update(from_dict(RunConfig, json.loads(Path(sys.argv[2]).read_text())))
    else:
        measure_exchange(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))  # type: ignore[arg-type]
    dist.destroy_process_group()


if __name__ == "__main__":
    exiting.run(main)
