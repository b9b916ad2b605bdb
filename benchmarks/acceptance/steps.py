"""Updates of the cascade with all terms on full-length batches: time, operators, host
synchronisations, launches, and peak memory against what ``erniesearch plan`` foretells.

Started with two files, it is the process that trains: ``python -m acceptance.steps JOB RESULT``.
"""

import itertools
import json
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from acceptance import material
from acceptance.check import Context, require
from erniesearch import exiting

STAGE = "cascade"
WARM_UP = 3
PLAN_BOUNDS = (0.8, 1.15)
"""Measured over planned peak, on a GPU; the tiny model of a CPU is smaller than what libraries
take."""


def check(context: Context) -> None:
    """BERT-base student and teacher, 32 queries with groups of 8; tiny on a CPU."""
    from erniesearch.config.keys import RunConfig
    from erniesearch.config.yaml_file import from_dict
    from erniesearch.planning.plan import Machine, Planner

    job: dict[str, Any] = {"config": _config(context), "updates": 20 if context.gpu else 3}
    files = [context.folder / "job.json", context.folder / "result.json"]
    files[0].write_text(json.dumps(job))
    config: RunConfig = from_dict(RunConfig, job["config"])
    queries = config.stages.cascade.queries_per_rank
    # The plan is made on another core meanwhile.
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(context.python, "-m", "acceptance.steps", *map(str, files))
        if not context.gpu:
            training.result()  # there may be no other core
        device = "cuda" if context.gpu else "cpu"
        trace = Planner(config, Machine(), device).estimator(STAGE)(1, queries)
        training.result()
    figures = json.loads(files[1].read_text())
    if not context.gpu:
        from erniesearch.planning.trial import measure
        from erniesearch.stages import Stage

        figures["peak_bytes"] = measure(Stage(config, STAGE), queries).own
    ratio = round(figures["peak_bytes"] / trace.peak, 3)
    context.tell(
        **figures, planned_peak_bytes=trace.peak, peak_over_planned=ratio, flops=trace.flops,
        tflops_per_s=round(trace.flops / figures["median_s"] / 1e12, 3),
    )  # fmt: skip
    low, high = PLAN_BOUNDS
    require(
        not context.gpu or low <= ratio <= high,
        f"peak memory is {ratio} of the planned, not {low} to {high}",
    )


def _config(context: Context) -> dict[str, Any]:
    base = material.tiny(context.folder)
    parts: dict[str, dict[str, Any]] = {
        "student": {"dropout": 0.1}, "teacher": {"dropout": 0.1}, "cascade": {},
    }  # fmt: skip
    if context.gpu:
        path = material.write_model(context.folder / "bert", 30_517, weights=False)
        parts["student"] |= {"path": str(path), "late_interaction_dim": 128}
        parts["data"] = {"max_query_length": 32, "max_passage_length": 128}
        parts["cascade"] = {"queries_per_rank": 32, "num_negatives": 7}
    return material.changed(base, context.folder / "run", **parts)


def main(job_file: str, result_file: str) -> None:
    """Train, and write the figures."""
    import torch

    from erniesearch import distributed
    from erniesearch.config.keys import RunConfig
    from erniesearch.config.yaml_file import from_dict
    from erniesearch.models.backbone import without_weights
    from erniesearch.models.precision import use_bf16
    from erniesearch.planning.trial import full_batches
    from erniesearch.stages import Stage
    from erniesearch.training.build import assemble_model, base_teacher
    from erniesearch.training.engine import build_engine
    from erniesearch.training.update import update

    job = json.loads(Path(job_file).read_text())
    config: RunConfig = from_dict(RunConfig, job["config"])
    stage = config.stages.cascade
    device = distributed.initialize()
    gpu, bf16 = device.type == "cuda", use_bf16(config.training.precision, device)
    with without_weights():
        model, tokenizer = assemble_model(
            Stage(config, STAGE), config.student, base_teacher(config)
        )
    engine, _ = build_engine(model, config.training, stage, stage.queries_per_rank, bf16)
    engine.train()
    batches = full_batches(Stage(config, STAGE), stage.queries_per_rank, tokenizer)
    told: list[Any] = []

    def step() -> None:
        told.append(update(engine, batches, stage, device, lambda what: None))

    for _ in range(WARM_UP):
        step()
    seconds = _timed(step, job["updates"], gpu)
    figures: dict[str, Any] = {
        "queries": stage.queries_per_rank, "group": 1 + stage.num_negatives,
        "precision": "bf16" if engine.bfloat16_enabled() else "fp32", "updates": job["updates"],
        "median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds),
        "tokens_per_s": round(told[-1].num_tokens / statistics.median(seconds)),
        "losses": [float(made.terms["loss"]) for made in (told[0], told[-1])],
    }  # fmt: skip
    if gpu:
        figures["peak_bytes"] = torch.cuda.max_memory_allocated()
        figures["reserved_bytes"] = torch.cuda.max_memory_reserved()
    with (_cuda_synchronisations if gpu else _cpu_synchronisations)() as places:
        step()
    figures |= {"synchronisations": places.total(), "synchronisations_by_place": dict(places)}
    figures |= _profile(step, gpu)
    assert all(value == value for value in figures["losses"]), "a loss is NaN"
    Path(result_file).write_text(json.dumps(figures))
    torch.distributed.destroy_process_group()


def _timed(step: Callable[[], None], updates: int, gpu: bool) -> list[float]:
    """Seconds of each update. On a GPU by its own clock, so that nothing waits for the host."""
    import torch

    if not gpu:
        seconds = []
        for _ in range(updates):
            began = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - began)
        return seconds
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(updates + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]


def _place() -> str:
    """The innermost line of the running code that is not PyTorch's or this file's."""
    import torch

    others = (str(Path(torch.__file__).parent), warnings.__file__, __file__)
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(others):
            return f"{'/'.join(Path(file).parts[-3:])}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "autograd"


@contextmanager
def _cuda_synchronisations() -> Iterator[Counter[str]]:
    """Where CUDA makes the host wait, as PyTorch warns of it."""
    import torch

    places: Counter[str] = Counter()

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            places[_place()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")


@contextmanager
def _cpu_synchronisations() -> Iterator[Counter[str]]:
    """Where a GPU would make the host wait: a number is read, or a mask decides a shape. Copies
    from device to host cannot be seen on a CPU."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    aten, places = torch.ops.aten, Counter[str]()
    reading = {
        aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default,
        aten.repeat_interleave.Tensor,
    }  # fmt: skip
    indexing = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            by_mask = function in indexing and any(
                index is not None and index.dtype == torch.bool for index in args[1]
            )
            if function in reading or by_mask:
                places[_place()] += 1
            return function(*args, **(kwargs or {}))

    with Mode():
        yield places


def _profile(step: Callable[[], None], gpu: bool, updates: int = 2) -> dict[str, Any]:
    """What takes the time, and on a GPU how often kernels are launched."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
    with profile(activities=activities) as profiler:
        began = time.perf_counter()
        for _ in range(updates):
            step()
        if gpu:
            torch.cuda.synchronize()
        wall = time.perf_counter() - began
    events = profiler.key_averages()

    def share(event: Any) -> float:
        time_us = event.self_device_time_total if gpu else event.self_cpu_time_total
        return float(time_us) / 1e6

    kernels = torch.autograd.DeviceType.CUDA
    timed = [e for e in events if not gpu or e.device_type == kernels]
    total = sum(map(share, timed))
    figures: dict[str, Any] = {
        "top": [
            {"name": event.key[:120], "ms": round(1e3 * share(event) / updates, 3),
             "calls": event.count / updates}
            for event in sorted(timed, key=share, reverse=True)[:20]
        ]
    }  # fmt: skip
    if gpu:
        launches = [e for e in events if "LaunchKernel" in e.key]
        waits = [e for e in events if "Synchronize" in e.key]
        figures["launches"] = sum(e.count for e in launches) / updates
        figures["synchronize_calls"] = sum(e.count for e in waits) / updates
        figures["gpu_busy"] = round(total / wall, 3)
    return figures


if __name__ == "__main__":
    exiting.run(lambda: main(*sys.argv[1:]))
