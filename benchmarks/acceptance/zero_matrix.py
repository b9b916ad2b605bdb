"""A tiny model with all terms under every engine, against one on the CPU in fp32.

Started with a file, it is the process that trains: ``python -m acceptance.zero_matrix JOBS.json``.
"""

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

from acceptance import material
from acceptance.check import Context, require
from erniesearch import exiting

TOLERANCE = {"fp32": 2e-3, "bf16": 2e-2}
"""Largest difference of any term in any update, relative to the total loss there. On a CPU fp32
differs by 1e-6 and bf16 by up to 1e-2; a GPU adds up in another order."""

HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
ZERO, PATHS, PRECISIONS = (0, 1, 2, 3), ("plain", "cached"), ("fp32", "bf16")
CHUNK = 5
"""Cuts through groups of three passages."""


def check(context: Context) -> None:
    """ZeRO 0 to 3, plain and with gradient caching, fp32 and bf16."""
    base = material.tiny(context.folder)
    reference = material.changed(base, context.folder / "reference",
                                 training={"precision": "fp32", "zero_stage": 0})  # fmt: skip
    _train(context, {"reference": reference}, HIDDEN)
    wanted = material.losses(context.folder / "reference")
    require(wanted[-1]["loss"] < wanted[0]["loss"], "the reference does not learn")
    jobs = {}
    for zero, path, precision in product(ZERO, PATHS, PRECISIONS):
        name = f"zero{zero}-{path}-{precision}"
        jobs[name] = material.changed(
            base, context.folder / name, training={"precision": precision, "zero_stage": zero},
            cascade={"chunk_size": CHUNK if path == "cached" else None},
        )  # fmt: skip
    refused = _train(context, jobs)
    differences = {
        name: float(f"{material.largest_difference(_comparable(context, name), wanted):.2g}")
        for name in jobs if name not in refused
    }  # fmt: skip
    rounded = {
        name: share for name in differences
        if (share := rounded_share(context.folder / name / "stages/cascade/model")) > 0.5
    }  # fmt: skip
    context.tell(
        largest_difference=differences, tolerance=TOLERANCE, refused=refused,
        rounded_weights=rounded, updates=len(wanted), final_loss=wanted[-1]["loss"],
    )  # fmt: skip
    wrong = [
        name for name, value in differences.items() if not value <= TOLERANCE[name.split("-")[2]]
    ]
    require(not wrong, f"differ from the CPU's fp32 trace: {', '.join(wrong)}")
    unexpected = {n: why for n, why in refused.items() if not n.startswith("zero0-")}
    require(not unexpected, f"refused: {unexpected}")
    require(not rounded, f"saved weights are rounded to bf16: {', '.join(rounded)}")


def _comparable(context: Context, name: str) -> list[dict[str, float]]:
    """Terms of the loss; without ZeRO the engine does not tell a gradient norm."""
    kept = [
        {k: v for k, v in line.items() if k != "grad_norm"}
        for line in material.losses(context.folder / name)
    ]
    return kept


def _train(
    context: Context, jobs: dict[str, Any], environment: dict[str, str] | None = None
) -> dict[str, str]:
    """Train each configuration in one process; returns those that were refused, and why."""
    file = context.folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    context.python("-m", "acceptance.zero_matrix", str(file), environment=environment)
    refused: dict[str, str] = json.loads(file.with_suffix(".refused").read_text())
    return refused


def rounded_share(model: Path) -> float:
    """Share of a saved model's numbers that bf16 holds exactly: by chance about 1 in 65,536."""
    import torch
    from safetensors.torch import load_file

    equal = total = 0
    for file in sorted(model.glob("*/model.safetensors")):
        for tensor in load_file(file).values():
            if tensor.ndim > 1:  # biases and scales begin as 0 and 1
                equal += int((tensor == tensor.to(torch.bfloat16)).sum())
                total += tensor.numel()
    return round(equal / total, 4)


def main(file: Path) -> None:
    """Train the cascade of each configuration."""
    from unittest.mock import patch

    import torch.distributed as dist

    from erniesearch.config.keys import RunConfig
    from erniesearch.config.yaml_file import from_dict
    from erniesearch.errors import UserError
    from erniesearch.training.trainer import Trainer

    refused = {}
    for name, config in json.loads(file.read_text()).items():
        try:
            # dual_reg without dropout is refused elsewhere: here it is one term more to compare.
            with patch("erniesearch.training.trainer.validate"):
                Trainer(from_dict(RunConfig, config), "cascade").train()
        except UserError as error:
            refused[name] = str(error)
    file.with_suffix(".refused").write_text(json.dumps(refused))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    exiting.run(lambda: main(Path(sys.argv[1])))
