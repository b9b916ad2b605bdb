"""Time and memory of every implementation on shared inputs; writes JSON.

    python kernels/benchmarks/benchmark.py --device cpu --threads 1 --cases cpu_goal cpu_group
    python kernels/benchmarks/benchmark.py --device cuda --cases gpu_a gpu_b

Before anything is timed, every result is compared with the formula in fp32 on the same inputs, as a
norm: ours must be close, what the others differ by is told (in bf16, plain PyTorch rounds the
similarities, and then finds other maxima). Timing goes in rounds: every round runs each
implementation once, beginning with another one each time, so that drift of the machine hits all
alike; on a GPU the L2 cache is flushed before each run. The JSON has median, minimum and quartiles
over rounds.

Memory is counted beyond inputs, in a run of its own: the allocator's peak (``peak_bytes``, exact),
and on a CPU also the growth of the process's peak resident set in a fresh process
(``peak_rss_bytes``, which sees the math library's buffers too, and the allocator's rounding).
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from candidates import CASES, Candidate, Case, Inputs, candidates, eager, make_inputs
from torch import Tensor

TOLERANCE = {"float32": 1e-4, "float16": 1e-3, "bfloat16": 1e-2}
REFERENCE_SIMILARITIES = 1 << 29
RESULTS = Path(__file__).parent / "results"


def run_once(candidate: Candidate, inputs: Inputs, backward: bool) -> list[Tensor]:
    """Outputs of one forward, and the gradients of their sum weighted by fixed numbers."""
    if not backward:
        with torch.no_grad():
            return list(candidate(inputs))
    outputs = candidate(inputs)
    weights = [torch.linspace(-1, 1, x.numel(), device=x.device).view_as(x) for x in outputs]
    total = sum((x * w).sum() for x, w in zip(outputs, weights, strict=True))
    grads = torch.autograd.grad(total, (inputs["queries"], inputs["passages"]))
    return [x.detach() for x in outputs] + list(grads)


def reference(inputs: Inputs) -> list[Tensor]:
    """What :func:`run_once` must give: the formula in fp32, a few queries at a time."""
    x = {name: value.detach().float() for name, value in inputs.items()}
    queries, passages = x["queries"].requires_grad_(), x["passages"].requires_grad_()
    grouped = passages.dim() == 4
    each = passages.shape[1] if grouped else passages.shape[0]
    weights = torch.linspace(-1, 1, len(queries) * each, device=queries.device).view(-1, each)
    rows = max(1, REFERENCE_SIMILARITIES // (each * queries.shape[1] * passages.shape[-2]))
    parts = []
    for start in range(0, len(queries), rows):
        some = slice(start, start + rows)
        own = {name: value[some] for name, value in x.items()}
        outputs = eager(own if grouped else own | {"passages": passages})
        torch.stack([(output * weights[some]).sum() for output in outputs]).sum().backward()
        parts.append([output.detach() for output in outputs])
    assert queries.grad is not None
    assert passages.grad is not None
    return [*(torch.cat(part) for part in zip(*parts, strict=True)), queries.grad, passages.grad]


def relative_error(got: list[Tensor], expected: list[Tensor]) -> float:
    """Largest norm of an error over the norm of what is expected."""
    return max(
        float((x.double() - y.double()).norm() / y.double().norm())
        for x, y in zip(got, expected, strict=True)
    )


def timer(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    """A function that runs its argument once and returns seconds."""
    if device.type == "cpu":

        def cpu(run: Callable[[], Any]) -> float:
            begin = time.perf_counter()
            run()
            return time.perf_counter() - begin

        return cpu
    flush = torch.empty(256 * 1024 * 1024, dtype=torch.int8, device=device)

    def cuda(run: Callable[[], Any]) -> float:
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return cuda


def allocator_peak(run: Callable[[], Any], device: torch.device) -> int:
    """Most bytes that one run holds at once, from the allocator's own events."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activity = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activity, profile_memory=True) as profile:
        run()
    held = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def peak_resident() -> int:
    """This process's peak resident set. (``getrusage`` would hand down the parent's.)"""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def print_rss(case: Case, name: str) -> None:
    """In a fresh process: how much one forward and backward raise the peak resident set."""
    device = torch.device("cpu")
    inputs = make_inputs(case, device)
    candidate = candidates(case, device)[name]()
    tiny = Case(case.op, 2, 4, 2, 8, group=2 if case.group else 0, heads=2, head_dim=8)
    run_once(candidate, make_inputs(tiny, device), True)  # imports and lazy set-up
    before = peak_resident()
    run_once(candidate, inputs, True)
    sys.stdout.write(str(peak_resident() - before))


def rss_peak(case_name: str, name: str, threads: int) -> int:
    command = [sys.executable, __file__, "--rss", case_name, name, "--threads", str(threads)]
    # With the default threshold malloc keeps freed blocks, and the peak would hide behind them.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(output.stdout)


def summary(seconds: list[float]) -> dict[str, float]:
    quartiles = statistics.quantiles(seconds, n=4)
    return {
        "median_s": statistics.median(seconds), "min_s": min(seconds),
        "q1_s": quartiles[0], "q3_s": quartiles[2], "rounds": len(seconds),
    }  # fmt: skip


def measure(case_name: str, device: torch.device, rounds: int, skip: set[str]) -> dict[str, Any]:
    case = CASES[case_name]
    inputs = make_inputs(case, device)
    ready: dict[str, Candidate] = {}
    results: dict[str, dict[str, Any]] = {}
    expected = reference(inputs)
    order = candidates(case, device)
    for name in order:
        if name in skip:
            continue
        try:
            candidate = order[name]()
            got = run_once(candidate, inputs, True)
        except Exception as error:  # a peer may fail in any way; that is a result
            results[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
            continue
        error = relative_error(got, expected)
        if name.startswith("erniesearch") and not error <= TOLERANCE[case.dtype]:
            raise AssertionError(f"{name} differs from the formula in fp32 by {error:.2e}")
        results[name] = {"relative_error": error}
        ready[name] = candidate
        del got
    del expected
    clock = timer(device)
    for backward, key in ((False, "forward"), (True, "forward_backward")):
        seconds: dict[str, list[float]] = {name: [] for name in ready}
        names = list(ready)
        for round_index in range(rounds):
            shift = round_index % len(names)
            for name in names[shift:] + names[:shift]:
                candidate = ready[name]
                elapsed = clock(lambda c=candidate, b=backward: run_once(c, inputs, b))
                seconds[name].append(elapsed)
        for name, values in seconds.items():
            results[name][key] = summary(values)
            flops = case.flops() * (3 if backward else 1)
            results[name][key]["tflops"] = flops / results[name][key]["median_s"] / 1e12
    for name, candidate in ready.items():
        run = lambda c=candidate: run_once(c, inputs, True)  # noqa: E731
        results[name]["peak_bytes"] = allocator_peak(run, device)
        if device.type == "cpu":
            results[name]["peak_rss_bytes"] = rss_peak(case_name, name, torch.get_num_threads())
    return {"case": case.describe(), "results": results}


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    return f"{models[0] if models else platform.machine()}" + (
        " (AVX-512)" if "avx512f" in flags else ""
    )


def machine(device: torch.device) -> dict[str, Any]:
    versions = {}
    for name in ("torch", "triton", "late-interaction-kernels", "flash-maxsim", "pylate"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    described = {
        "cpu": cpu_model(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "python": platform.python_version(), "versions": versions,
    }  # fmt: skip
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described |= {
            "gpu": properties.name, "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }  # fmt: skip
    return described


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cases", nargs="+", default=["cpu_goal"], choices=sorted(CASES))
    parser.add_argument("--skip", nargs="*", default=[], help="candidates to leave out")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rss", nargs=2, metavar=("CASE", "CANDIDATE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.rss:
        print_rss(CASES[arguments.rss[0]], arguments.rss[1])
        return
    device = torch.device(arguments.device)
    report = {
        "machine": machine(device),
        "cases": {
            name: measure(name, device, arguments.rounds, set(arguments.skip))
            for name in arguments.cases
        },
    }
    output = arguments.output or RESULTS / f"{arguments.device}_{arguments.threads}t.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")
    sys.stdout.write(f"{output}\n")


if __name__ == "__main__":
    main()
