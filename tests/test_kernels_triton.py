"""Triton without a GPU: the shared tests in the interpreter, and ahead-of-time compilation."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

TESTS = Path(__file__).parent
SHARED = ["test_kernels_maxsim.py", "test_kernels_kl.py", "test_kernels_contract.py"]


@pytest.mark.parametrize("module", SHARED)
def test_interpreter(module: str) -> None:
    """Runs in a process of its own: the variable must be set before the kernels are imported."""
    result = subprocess.run(
        [
            sys.executable, "-m", "pytest", str(TESTS / module), "-q", "-x", "-k", "interpreter",
            "-p", "no:cacheprovider",
        ],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, cwd=TESTS.parent,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


def compile_all(capability: int, dims: tuple[int, ...], *dtypes: torch.dtype) -> None:
    """Assert what holds for every configuration; prints nothing unless something is wrong."""
    from erniesearch_kernels.ahead_of_time import SHARED_LIMIT, compile_for, configurations

    wrong = []
    for configuration in configurations(dims, dtypes):
        compiled = compile_for(configuration, capability)
        if compiled.spill_bytes:
            wrong.append(f"{configuration.name}: {compiled.spill_bytes} bytes of spills")
        if compiled.registers > 255:
            wrong.append(f"{configuration.name}: {compiled.registers} registers")
        if compiled.shared_bytes > SHARED_LIMIT[capability]:
            wrong.append(f"{configuration.name}: {compiled.shared_bytes} bytes of shared memory")
        half = configuration.dtype != torch.float32
        if half and configuration.name.startswith("maxsim_forward"):
            # Own groups have 32 rows per tile, too few for a warpgroup's product.
            wide = capability >= 90 and "group" not in configuration.name
            mnemonic = "HGMMA" if wide else "HMMA"
            if not compiled.count(mnemonic):
                wrong.append(f"{configuration.name}: no {mnemonic}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler")
@pytest.mark.parametrize("capability", [80, 90])
def test_every_configuration_compiles(capability: int) -> None:
    compile_all(capability, (128,), torch.bfloat16, torch.float32)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler")
def test_lengths_and_counts_of_one_compile() -> None:
    """The launcher compiles integers of value 1 in, which changes their type in the kernel."""
    from dataclasses import replace

    from erniesearch_kernels.ahead_of_time import compile_for, configurations

    for configuration in configurations((128,), (torch.bfloat16,)):
        ones = configuration.integers()
        compile_for(replace(configuration, ones=ones, divisible=frozenset()), 90)


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler")
@pytest.mark.parametrize("capability", [80, 90])
def test_every_configuration_compiles_for_other_dims(capability: int) -> None:
    compile_all(capability, (32, 96, 256), torch.bfloat16, torch.float32)


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler")
@pytest.mark.parametrize("capability", [80, 90])
def test_every_configuration_compiles_for_float16(capability: int) -> None:
    compile_all(capability, (32, 96, 128, 256), torch.float16)
