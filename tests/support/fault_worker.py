"""Started by tests on every rank: trains as `erniesearch train` does, with a fault built in.

Usage: fault_worker.py FAULT.json train-arguments…; or, with "jobs" in the file, no arguments: the
stages whose configs are listed there. FAULT.json: {"kind": …, "rank": …, "steps": […]}, steps
from 1; the kinds are the functions below.
"""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from support.unvalidated import train as train_stage

from erniesearch import distributed, exiting
from erniesearch.cli import main
from erniesearch.config.keys import RunConfig
from erniesearch.config.yaml_file import from_dict
from erniesearch.models.joint import JointModel

Terms = dict[str, torch.Tensor]


def nan_loss(model: JointModel, terms: Terms) -> None:
    terms["loss"] = terms["loss"] * float("nan")


def infinite_loss_without_gradient(model: JointModel, terms: Terms) -> None:
    terms["loss"] = terms["loss"] + float("inf")


def nan_gradient(model: JointModel, terms: Terms) -> None:
    parameter = next(p for p in model.parameters() if p.requires_grad)
    terms["loss"] = terms["loss"] + (0 * parameter).sum().sqrt()  # 0, with gradient 0 · ∞


def hang(model: JointModel, terms: Terms) -> None:
    time.sleep(1000)


def stop(model: JointModel, terms: Terms) -> None:
    time.sleep(1.5)  # its watchdog notes where it is a few times a second
    os.kill(os.getpid(), signal.SIGSTOP)


def kill_self(model: JointModel, terms: Terms) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_data_worker(model: JointModel, terms: Terms) -> None:
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            os.kill(int(pid), signal.SIGKILL)


def small_files_only(model: JointModel, terms: Terms) -> None:
    """Writing past 20,000 bytes fails from now on, as on a disk without room."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def install(fault: dict[str, Any]) -> None:
    whole = JointModel.forward
    strike = globals()[fault["kind"]]

    def forward(model: JointModel, batch: Any, chunk: Any = None) -> Any:
        terms = whole(model, batch, chunk)
        if (
            chunk is None
            and distributed.rank() == fault["rank"]
            and batch.step + 1 in fault["steps"]
        ):
            strike(model, terms)
        return terms

    JointModel.forward = forward


def train() -> int:
    fault = json.loads(Path(sys.argv[1]).read_text())
    install(fault)
    for stage, config in fault.get("jobs", []):
        train_stage(from_dict(RunConfig, config), stage)
    return 0 if "jobs" in fault else main(["train", *sys.argv[2:]])


if __name__ == "__main__":
    exiting.run(train)
