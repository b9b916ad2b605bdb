"""What the machine is: versions, compilers, headers, the GPU. ``python -m acceptance.machine``
prints what does not change between two runs."""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

import psutil
import torch
from packaging.requirements import Requirement

from acceptance.check import ROOT, Context, require

PACKAGES = (
    "torch", "triton", "transformers", "deepspeed", "tokenizers", "numpy", "faiss-cpu",
    "faiss-gpu", "faiss-gpu-cu12", "faiss-gpu-cu13", "late-interaction-kernels", "flash-maxsim",
    "pylate",
)  # fmt: skip


def describe() -> dict[str, Any]:
    """Processor, memory, GPU and versions."""
    described: dict[str, Any] = {
        "cpu": _processor(), "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "gpu": None,
    }  # fmt: skip
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        described |= {
            "gpu": properties.name, "gpus": torch.cuda.device_count(),
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count, "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),  # type: ignore[no-untyped-call]
        }  # fmt: skip
    return described


def check(context: Context) -> None:
    """Compiler and headers, without which Triton starts no kernel; packages as pyproject wants."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    context.tell(
        platform=platform.platform(),
        c_compiler=_said(os.environ.get("CC") or shutil.which("gcc") or "cc", "--version"),
        python_header=header.is_file(),
        nvcc=_said("nvcc", "--version", line=-1),
        triton_ptxas=_said(_triton_ptxas(), "--version", line=-1),
        compute_sanitizer=_said(sanitizer(), "--version", line=-1),
        requirements=_requirements(),
    )
    if context.gpu:
        context.tell(gpu=_ask_driver(), copy_gb_per_s=_copy_rate(), bf16_tflops=_product_rate())
        require(header.is_file(), f"{header} is missing: Triton cannot build its launchers")
        require(context.figures["c_compiler"] is not None, "no C compiler for Triton: set CC")


def sanitizer() -> str:
    """compute-sanitizer's path, as far as it is known."""
    found = shutil.which("compute-sanitizer")
    return found or "/usr/local/cuda/bin/compute-sanitizer"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.machine()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements() -> dict[str, str]:
    """What of pyproject's dependencies is missing or of another version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wrong = {}
    for requirement in map(Requirement, project["dependencies"]):
        found = _version(requirement.name)
        if found is None:
            wrong[requirement.name] = "missing"
        elif not requirement.specifier.contains(found, prereleases=True):
            wrong[requirement.name] = f"{found}, wanted {requirement.specifier}"
    return wrong


def _said(*command: str, line: int = 0) -> str | None:
    """A line of what a program says of itself; None where there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[line] if lines else None


def _triton_ptxas() -> str:
    try:
        files = importlib.metadata.files("triton") or []
    except importlib.metadata.PackageNotFoundError:
        return ""
    return next((str(file.locate()) for file in files if file.name == "ptxas"), "")


def _ask_driver() -> dict[str, str]:
    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,mig.mode.current"
    line = _said("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
    return dict(zip(fields.split(","), (line or "").split(", "), strict=False))


def _seconds(work: Any, repeats: int = 10) -> float:
    """Of one call on the GPU, the mean of ``repeats`` after one."""
    work()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def _copy_rate() -> float:
    """GB/s of a device-to-device copy, read and written bytes both counted."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    return round(2 * source.nbytes / _seconds(lambda: target.copy_(source)) / 1e9, 1)


def _product_rate() -> float:
    """TFLOP/s of a bf16 matrix product on random numbers."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return round(2 * size**3 / _seconds(lambda: a @ b) / 1e12, 1)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(describe()) + "\n")
