"""Triton without a GPU: the shared tests in the interpreter, and ahead-of-time compilation."""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import erniesearch_kernels as kernels
import numpy
import pytest
import torch
from packaging.version import Version
from support.processes import ROOT

triton = pytest.importorskip("triton")
if TYPE_CHECKING:
    from erniesearch_kernels.ahead_of_time import Configuration

CAPABILITIES = (80, 89, 90, 100, 120)

TESTS = Path(__file__).parent
SHARED = ["test_kernels_maxsim.py", "test_kernels_kl.py", "test_kernels_contract.py"]


@pytest.mark.skipif(
    Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4"),
    reason="Triton 3.6 interprets loops with NumPy before 2.4 only",
)
@pytest.mark.parametrize("module", SHARED)
def test_interpreter(module: str) -> None:
    """Runs in a process of its own: the variable must be set before the kernels are imported."""
    result = subprocess.run(
        [
            sys.executable, "-m", "pytest", str(TESTS / module), "-q", "-x", "-k", "interpreter",
            "-p", "no:cacheprovider",
        ],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


compiler = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler, not the interpreter"
)


def assert_sound(forms: Iterable[Configuration]) -> None:
    """No spills, shared memory to spare, and matrix instructions where there should be some."""
    from erniesearch_kernels.ahead_of_time import MARGIN, compile_one
    from erniesearch_kernels.triton_tiles import SHARED_LIMIT

    wrong = []
    for form in forms:
        compiled = compile_one(form)
        limit = SHARED_LIMIT[form.capability] - MARGIN
        if compiled.spills():
            wrong.append(f"{form.name}: {compiled.spill_bytes} bytes of spills")
        if compiled.registers > 255:
            wrong.append(f"{form.name}: {compiled.registers} registers")
        if compiled.shared_bytes > limit:
            wrong.append(f"{form.name}: {compiled.shared_bytes} bytes of shared memory > {limit}")
        half = form.dtype != torch.float32
        if half and form.name.startswith("maxsim_forward"):
            # Own groups have 32 rows per tile, too few for a warpgroup's product.
            wide = {90: "HGMMA", 100: "UTCHMMA"}.get(form.capability, "HMMA")
            expected = "HMMA" if form.meta["GROUP"] else wide
            if compiled.matrix() != expected:
                wrong.append(f"{form.name}: {compiled.matrix()} instead of {expected}")
    assert not wrong, "\n".join(wrong)


@compiler
@pytest.mark.parametrize("capability", [90, 120])  # the others under ``slow``
def test_usual_forms(capability: int) -> None:
    from erniesearch_kernels.ahead_of_time import configurations

    assert_sound(configurations(capability, (128,), (torch.bfloat16,)))


@compiler
def test_some_rarer_forms() -> None:
    """Of each kind one; all of them are under ``slow``."""
    from erniesearch_kernels.ahead_of_time import rarer_forms

    kinds: dict[str, Configuration] = {}
    for capability, dtype in ((100, torch.bfloat16), (89, torch.float32)):
        for form in rarer_forms(capability, dtype):
            kinds.setdefault(form.name.rsplit("/", 1)[1], form)
    assert {"winners16", "winners32", "bounds64", "unsaved", "unit16", "tf32", "odd_length",
            "teacher_float32", "teacher_bfloat16", "head32", "head256"} <= kinds.keys()  # fmt: skip
    assert_sound(kinds.values())


@compiler
@pytest.mark.parametrize(
    ("capability", "name"),
    [
        (90, "token_kl_query_gradient/bfloat16/d128/winners32"),
        (90, "attention_kl_passage_gradient/float32/d128/tf32"),
        (100, "maxsim_forward/bfloat16/d128/normalized/unmasked"),
        (80, "attention_kl_passage_gradient/bfloat16/d128/head256"),
    ],
)
def test_tightest_forms(capability: int, name: str) -> None:
    """Each spilled with the tile of its neighbours."""
    from erniesearch_kernels.ahead_of_time import rarer_forms

    dtype = torch.float32 if "float32" in name else torch.bfloat16
    forms = [form for form in rarer_forms(capability, dtype) if form.name == name]
    assert len(forms) == 1
    assert_sound(forms)


@pytest.mark.slow
@compiler
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dim", [32, 96, 128, 256])
def test_every_usual_form(capability: int, dim: int) -> None:
    from erniesearch_kernels.ahead_of_time import configurations

    assert_sound(configurations(capability, (dim,)))


@pytest.mark.slow
@compiler
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_rarer_form(capability: int, dtype: torch.dtype) -> None:
    from erniesearch_kernels.ahead_of_time import rarer_forms

    assert_sound(rarer_forms(capability, dtype))


@compiler
def test_registers_given_up_for_another_block_are_no_spills() -> None:
    from erniesearch_kernels.ahead_of_time import Compiled

    def spills(warps: int, registers: int, spill_bytes: int) -> bool:
        return Compiled(warps, registers, spill_bytes, 0, {}, {}, {}).spills()

    # 2 and 4 blocks of 8 warps, 3 of 4 warps; then 24 bytes, and numbers that no block gains by.
    assert not any(spills(*x, 16) for x in [(8, 128), (8, 64), (4, 168), (4, 128)])
    assert all(spills(*x) for x in [(8, 128, 24), (8, 168, 8), (8, 255, 8), (4, 255, 16)])


@compiler
def test_capabilities_are_those_that_are_compiled_for() -> None:
    from erniesearch_kernels import ahead_of_time

    assert ahead_of_time.CAPABILITIES == CAPABILITIES


def test_tiles_follow_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from erniesearch_kernels import triton_tiles as tiles

    rows = []
    for index, version in enumerate([(9, 0), (8, 9), (12, 0), (99, 0)]):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, v=version: v)
        capability = tiles.capability.__wrapped__(torch.device("cuda", index))
        assert capability == 10 * version[0] + version[1]
        rows.append(tiles.forward_config(torch.bfloat16, 128, capability)["BLOCK_M"])
    assert rows == [256, 128, 128, 128]  # a GPU that is not known gets the small ones


@contextmanager
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, set[str]]]:
    """What the launcher would compile anew for, by kernel; nothing is launched."""
    from erniesearch_kernels import triton_maxsim, triton_token_kl
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    backend = CUDABackend(GPUTarget("cuda", 90, 32))
    keys: dict[str, set[str]] = {}

    def run(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        _, specialization, options = bind(*arguments, **named)
        name = f"{kernel.__module__}.{kernel.__name__}"
        keys.setdefault(name, set()).add(f"{specialization} {options}")

    with monkeypatch.context() as patch:
        for module in (triton_maxsim, triton_token_kl):
            for kernel in vars(module).values():
                if isinstance(kernel, JITFunction):
                    patch.setattr(kernel, "run", functools.partial(run, kernel))
        yield keys


@compiler
def test_batches_of_other_sizes_compile_nothing_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers, lengths and addresses that are 1, odd, and multiples of 16."""
    sizes = [(1, 1, 17, 24), (2, 3, 32, 31), (16, 48, 32, 112), (17, 16, 20, 96), (33, 5, 29, 160)]
    with launches(monkeypatch) as keys:
        for num_queries, num, query_length, length in sizes:
            launch_everything(num_queries, num, query_length, length)
    assert len(keys) == 7
    found = {name: len(values) for name, values in keys.items()}
    # Pairs, own groups and packed tokens; or a rebuilt map and a given one, whose loads are wider
    # where 16 divides the passages' length.
    assert all(count <= (1 if "teacher" in name else 3) for name, count in found.items()), found


def launch_everything(num_queries: int, num: int, query_length: int, length: int) -> None:
    """All operations with masks, forward and backward: pairs, own groups, packed, KL."""

    def tokens(*shape: int) -> torch.Tensor:
        odd = num_queries % 2  # some begin at an address that only 4 divides
        return torch.zeros(math.prod(shape) + odd)[odd:].view(shape).requires_grad_()

    queries = tokens(num_queries, query_length, 64)
    passages = tokens(num, length, 64)
    group = tokens(num_queries, num, length, 64)
    query_mask, passage_mask, group_mask = (
        torch.ones(x.shape[:-1], dtype=torch.bool) for x in (queries, passages, group)
    )
    heads = [torch.zeros(num_queries, num, 3, n, 32) for n in (query_length, length)]
    teacher = torch.zeros(num_queries, num, query_length, length)
    bounds = [torch.arange(n + 1) * m for n, m in ((num_queries, query_length), (num, length))]
    masks = query_mask, group_mask
    outputs = [
        kernels.maxsim(queries, passages, query_mask, passage_mask, backend="triton"),
        kernels.maxsim(queries, group, *masks, backend="triton"),
        kernels.maxsim_varlen(
            queries.flatten(0, 1), passages.flatten(0, 1), *bounds, 32, 160, backend="triton"
        ),
        *kernels.maxsim_token_kl(queries, group, teacher, 0.7, *masks, backend="triton"),
        *kernels.maxsim_attention_kl(queries, group, *heads, 0.7, *masks, backend="triton"),
    ]
    sum(x.sum() for x in outputs).backward()
