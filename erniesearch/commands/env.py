"""``env``: what this runs on, for a report of a bug."""

import os
import platform
import sys

from erniesearch.commands.parsing import command_parser, name_accelerator
from erniesearch.installation import versions

PACKAGES = (
    "torch", "deepspeed", "transformers", "tokenizers", "accelerate", "datasets", "numpy",
    "pyarrow", "bm25s", "faiss-cpu", "faiss-gpu", "triton", "sentence-transformers", "pylate",
    "onnxruntime", "fastapi", "rjieba",
)  # fmt: skip
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "DS_ACCELERATOR",
             "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "NCCL_DEBUG")  # fmt: skip
"""Variables that change what happens, and those that begin as PREFIXES do; others may be secret."""
PREFIXES = ("ERNIESEARCH_", "SLURM_NNODES", "SLURM_NTASKS")


def env_command(argv: list[str]) -> int:
    """``erniesearch env``."""
    command_parser(
        "env", "Versions, processor, memory and GPUs, and the variables that change what happens;"
        " neither user nor host nor folders. It belongs in a report of a bug.",
    ).parse_args(argv)  # fmt: skip
    given = {name for name in os.environ if name in VARIABLES or name.startswith(PREFIXES)}
    name_accelerator()
    import psutil
    import torch

    from erniesearch.evaluation.table import describe_machine

    used = versions(*PACKAGES)
    facts: dict[str, object] = {name: value or "not installed" for name, value in used.items()}
    facts["commit"] = used["commit"] or "of an installed wheel"
    facts |= {"system": platform.platform(), "C library": " ".join(platform.libc_ver())}
    facts |= {"CUDA of torch": torch.version.cuda or "none"}
    machine = describe_machine()
    facts |= {name: machine[name] for name in ("CPU", "cores", "GPU") if name in machine}
    facts["cores for this process"] = len(os.sched_getaffinity(0))
    facts["memory"] = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        facts[f"GPU {number}"] = (
            f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability"
            f" {gpu.major}.{gpu.minor}"
        )
    facts |= {name: _told(name) for name in sorted(given)}
    for name, value in facts.items():
        sys.stdout.write(f"{name:<24} {value}\n")
    return 0


def _told(name: str) -> str:
    """A variable's value; a path says no more than that there is one."""
    return "a path" if os.sep in os.environ[name] else os.environ[name]
