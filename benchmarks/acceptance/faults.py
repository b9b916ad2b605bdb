"""Kills, signals, NaN and other ranks: the real commands on this machine's device.

Losses are compared between a training that was interrupted and one that was not. On a CPU they are
the same to the bit; a GPU's sums may come in another order.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from acceptance import material
from acceptance.check import ROOT, Context, Failed, last_lines, require

STEPS = 40
TOLERANCE = {"cpu": 0.0, "gpu": 1e-2}
"""Largest difference relative to the loss, in the size's default precision (bf16 on a GPU)."""
STOPPED = 75


def _whole_and_other(context: Context, **training: Any) -> tuple[list[str], list[str], Path]:
    """Arguments that train the cascade, once for a run left alone and once for one that is not."""
    base = material.tiny(context.folder)
    arguments = []
    for name in ("whole", "other"):
        config = material.changed(
            base, context.folder / name, training={"save_every": 4, **training},
            cascade={"steps": STEPS}, student={"dropout": 0.1}, teacher={"dropout": 0.1},
        )  # fmt: skip
        file = material.write_config(config, context.folder / f"{name}.yaml")
        arguments.append(["train", "--config", file, "--stage", "cascade"])
    return arguments[0], arguments[1], context.folder / "other"


def _interrupt(
    context: Context, arguments: list[str], run_dir: Path, step: int, number: signal.Signals
) -> None:
    """Start a command and send a signal once the update is logged.

    Raises:
        Failed: if it ends before, or does not end within a minute.
    """
    metrics = run_dir / "stages" / "cascade" / "metrics.jsonl"
    expected = STOPPED if number == signal.SIGUSR1 else -number
    with (context.folder / "interrupted.log").open("a+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "erniesearch.cli", *arguments], cwd=ROOT, stdout=log, stderr=log
        )
        while not metrics.exists() or metrics.read_text().count("\n") < step:
            if process.poll() is not None:
                log.seek(0)
                raise Failed(f"ended before update {step}: {last_lines(log.read())}")
            time.sleep(0.01)
        process.send_signal(number)
        try:
            status = process.wait(60)
        except subprocess.TimeoutExpired:
            raise Failed(f"no end within a minute of {number.name}") from None
        log.seek(0)
        require(
            status == expected,
            f"status {status} after {number.name}, not {expected}: {last_lines(log.read())}",
        )


def resume(context: Context) -> None:
    """A training killed, then asked by SIGUSR1 to stop, then continued to its end."""
    whole, other, run_dir = _whole_and_other(context)
    context.erniesearch(*whole)
    _interrupt(context, other, run_dir, 7, signal.SIGKILL)
    _interrupt(context, other, run_dir, 14, signal.SIGUSR1)
    saved = sorted(path.name for path in (run_dir / "stages/cascade/checkpoints").glob("step-*"))
    context.erniesearch(*other)
    wanted, own = material.losses(context.folder / "whole"), material.losses(run_dir)
    difference = material.largest_difference(own, wanted)
    context.tell(
        updates=len(own), checkpoint_at_signal=saved[-1], largest_difference=difference,
        tolerance=TOLERANCE[context.size],
    )  # fmt: skip
    require([line["step"] for line in own] == list(range(1, STEPS + 1)), "updates are missing")
    require(
        difference <= TOLERANCE[context.size], f"the interrupted run differs by {difference:.2g}"
    )


def nan_update(context: Context) -> None:
    """A NaN loss in update 3: skipped, described, weights as before, training goes on."""
    _, arguments, run_dir = _whole_and_other(context)
    file = context.folder / "fault.json"
    file.write_text(json.dumps({"kind": "nan_loss", "rank": 0, "steps": [3]}))
    context.python(str(ROOT / "tests" / "support" / "fault_worker.py"), str(file), *arguments[1:])
    told = (run_dir / "stages" / "cascade" / "nonfinite.jsonl").read_text().splitlines()
    trace = material.losses(run_dir)
    odd = [line["step"] for line in trace if not math.isfinite(line["loss"])]
    context.tell(updates=len(trace), skipped_updates=len(told), final_loss=trace[-1]["loss"])
    require(len(told) == 1, f"{len(told)} updates are described as not finite, not 1")
    require(odd == [3], f"losses that are not finite, in updates: {odd}")
    require(trace[-1]["loss"] < trace[0]["loss"], "it did not learn after the NaN")


def fewer_ranks(context: Context) -> None:
    """A checkpoint of two CPU ranks continued on one rank, on the GPU where there is one, against
    the same run left on its two ranks; for ZeRO 1, 2 and 3 (1 and 3
    on a CPU)."""
    base = material.tiny(context.folder)
    hidden = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    jobs: dict[str, list[Any]] = {"whole": [], "first": [], "rest": []}
    stages = (1, 2, 3) if context.gpu else (1, 3)
    for zero in stages:
        for name in ("whole", "moved"):
            config = material.changed(
                base, context.folder / f"{name}{zero}",
                training={"zero_stage": zero, "precision": "fp32", "save_every": 4},
                cascade={"steps": 8, "batch_size": 8, "student_lr": 2e-4, "teacher_lr": 1e-4},
            )  # fmt: skip
            jobs["whole" if name == "whole" else "rest"].append(config)
        jobs["first"].append(jobs["rest"][-1])
    plan = [[config, 2, None] for config in jobs["whole"]]
    plan += [[config, 2, 4] for config in jobs["first"]]
    (context.folder / "two.json").write_text(json.dumps({"plan": plan}))
    context.python(
        str(ROOT / "tests" / "support" / "fork_ranks.py"), str(context.folder / "two.json"),
        environment=hidden,
    )  # fmt: skip
    worker = str(ROOT / "tests" / "support" / "distributed_worker.py")
    file = context.folder / "rest.json"
    file.write_text(json.dumps([["cascade", config] for config in jobs["rest"]]))
    context.python(worker, str(file))
    tolerance = 1e-4 if not context.gpu else 2e-3
    differences = {}
    for zero in stages:
        wanted, own = (material.losses(context.folder / f"{n}{zero}") for n in ("whole", "moved"))
        differences[f"zero{zero}"] = material.largest_difference(own, wanted)
    context.tell(largest_difference=differences, tolerance=tolerance)
    wrong = [name for name, value in differences.items() if not value <= tolerance]
    require(not wrong, f"continued on one rank, the losses differ: {', '.join(wrong)}")


def visible_devices(context: Context) -> None:
    """`erniesearch run` starts its ranks on the GPU that CUDA_VISIBLE_DEVICES names, by its UUID;
    on a CPU, where it names none that exist, the ranks must still be told the same."""
    base = material.tiny(context.folder)
    config = material.changed(
        base, context.folder / "run", training={"num_processes": 1}, student={"dropout": 0.1}
    )
    file = material.write_config(config, context.folder / "run.yaml")
    wanted = _last_gpu() if context.gpu else "97"
    process = subprocess.Popen(
        [sys.executable, "-m", "erniesearch.cli", "run", file, "--only", "cascade"], cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": wanted}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    seen = _watch(process, lambda rank: rank.environ().get("CUDA_VISIBLE_DEVICES"))
    output = process.communicate()[0]
    (context.folder / "log.txt").write_text(output)
    require(process.returncode == 0, f"`erniesearch run` failed: {last_lines(output)}")
    context.tell(asked=wanted, ranks_saw=sorted(map(str, seen)))
    require(seen == {wanted}, f"ranks saw CUDA_VISIBLE_DEVICES={seen or None}, not {wanted}")


def _last_gpu() -> str:
    """UUID of the last GPU that this process sees, as CUDA_VISIBLE_DEVICES takes it."""
    import torch

    return f"GPU-{torch.cuda.get_device_properties(torch.cuda.device_count() - 1).uuid}"


def _watch(process: "subprocess.Popen[str]", ask: Callable[[psutil.Process], Any]) -> set[Any]:
    """What a question about the ranks below a command is answered, until the command ends."""
    seen = set()
    while process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                if "RANK" in child.environ() and "--stage" in child.cmdline():
                    seen.add(ask(child))
            except psutil.Error:
                continue
        time.sleep(0.1)
    return seen
