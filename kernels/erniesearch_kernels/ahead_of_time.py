"""Compile every shipped kernel configuration without a GPU, and read what came out.

For tests (no spills, shared memory within the limit, matrix instructions present) and for
``kernels/benchmarks/aot_report.py``. Needs Triton, and a process without ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from erniesearch_kernels import triton_maxsim as maxsim
from erniesearch_kernels import triton_token_kl as token_kl
from erniesearch_kernels.triton_common import padded_dim

# Opt-in maximum of shared memory per block, bytes.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
POINTER = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
TOKENS = {"q_ptr", "p_ptr", "tq_ptr", "tk_ptr", "map_ptr", "out_ptr"}
OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Configuration:
    """One kernel with its compile-time choices, as it is launched for some inputs."""

    name: str
    kernel: Any
    dtype: torch.dtype
    meta: dict[str, Any]
    absent: frozenset[str] = field(default_factory=frozenset)  # pointers that are None
    # Integers that are 1 (compiled in, as the launcher does), and that 16 divides.
    ones: frozenset[str] = field(default_factory=frozenset)
    divisible: frozenset[str] = field(default_factory=frozenset)

    def integers(self) -> frozenset[str]:
        """Names of the run-time integers."""
        names = (name for name in self.kernel.arg_names if name not in self.meta)
        return frozenset(name for name in names if self._type(name) == "i32")

    def source(self) -> ASTSource:
        signature, constants, attributes = {}, dict(self.meta), {}
        for option in OPTIONS:
            constants.pop(option, None)
        for index, name in enumerate(self.kernel.arg_names):
            if name in self.absent:
                constants[name] = None
            if name in self.ones:
                constants[name] = 1
            if name in constants:
                signature[name] = "constexpr"
                continue
            signature[name] = self._type(name)
            if signature[name].startswith("*") or name in self.divisible:
                attributes[(index,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constexprs=constants, attrs=attributes)

    def _type(self, name: str) -> str:
        if name in TOKENS and not (name == "out_ptr" and self.kernel is TEACHER_LSE):
            return POINTER[self.dtype]
        if name in ("q_mask_ptr", "p_mask_ptr", "winner_ptr"):
            return "*u8"
        if name in ("unit_ptr", "query_of_row_ptr"):
            return "*i64"
        if name == "bounds_ptr":
            return "*i32"
        if name.endswith("_ptr"):
            return "*fp32"
        return "fp32" if name in ("inverse_tau", "scale") else "i32"


TEACHER_LSE = token_kl.teacher_lse_kernel


@dataclass(frozen=True)
class Compiled:
    """What the assembler reports for one configuration and architecture."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: dict[str, int]  # of the whole kernel, by mnemonic
    loop: dict[str, int]  # of the shortest loop around most matrix products, by mnemonic
    inner_loop: dict[str, int]  # of a loop inside it that also has matrix products, if any

    def count(self, mnemonic: str) -> int:
        return self.instructions.get(mnemonic, 0)


def _maxsim_variants() -> Iterator[tuple[str, dict[str, bool]]]:
    plain = {"HAS_Q_MASK": False, "HAS_P_MASK": False, "GROUP": False, "VARLEN": False,
             "EVEN": False, "NORMALIZE": False}  # fmt: skip
    yield "even", plain | {"EVEN": True}
    yield "masked", plain | {"HAS_Q_MASK": True, "HAS_P_MASK": True}
    yield "normalized", plain | {"HAS_Q_MASK": True, "HAS_P_MASK": True, "NORMALIZE": True}
    yield "group", plain | {"HAS_Q_MASK": True, "HAS_P_MASK": True, "GROUP": True}
    yield "varlen", plain | {"VARLEN": True}


def _absent(flags: dict[str, bool]) -> frozenset[str]:
    names = set()
    if not flags["HAS_Q_MASK"]:
        names.add("q_mask_ptr")
    if not flags["HAS_P_MASK"]:
        names.add("p_mask_ptr")
    if not flags.get("VARLEN"):
        names |= {"unit_ptr", "bounds_ptr", "query_of_row_ptr"}
    return frozenset(names)


def _for(kernel: Any, name: str, dtype: torch.dtype, meta: dict[str, Any]) -> Configuration:
    accepted = {k: v for k, v in meta.items() if k in kernel.arg_names or k in OPTIONS}
    absent = _absent(meta) & set(kernel.arg_names)
    if "REBUILD" in meta:
        teacher = {"map_ptr"} if meta["REBUILD"] else {"tq_ptr", "tk_ptr", "tlse_ptr"}
        absent |= teacher & set(kernel.arg_names)
    # 32 query tokens are one unit; the lengths of the even form are multiples of 16.
    ones = {"units_per_query"} & set(kernel.arg_names)
    divisible = {"query_length"}
    if meta.get("EVEN"):
        divisible.add("passage_length")
    divisible &= set(kernel.arg_names)
    return Configuration(
        name, kernel, dtype, accepted, absent, frozenset(ones), frozenset(divisible)
    )


def configurations(
    dims: tuple[int, ...] = (128,),
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32),
) -> Iterator[Configuration]:
    """Every shipped configuration at query length 32, for token dims ``dims``."""
    for dtype in dtypes:
        label = str(dtype).removeprefix("torch.")
        for dim in dims:
            block_d = padded_dim(dim)
            shared = {"DIM": dim, "BLOCK_D": block_d, "PRECISION": "ieee", "WIDEN": False}
            for variant, flags in _maxsim_variants():
                name = f"{label}/d{dim}/{variant}"
                meta = shared | flags | {"SAVE": True, "PACK": dtype != torch.float32, "UNIT": 32}
                forward = maxsim.forward_config(dtype, block_d, 32 if flags["GROUP"] else 0)
                yield _for(maxsim.forward_kernel, f"maxsim_forward/{name}", dtype, meta | forward)
                if variant == "even":
                    continue  # the backward does not know the difference
                yield _for(
                    maxsim.query_gradient_kernel, f"maxsim_query_gradient/{name}", dtype,
                    meta | maxsim.query_gradient_config(dtype, block_d),
                )  # fmt: skip
                yield _for(
                    maxsim.passage_gradient_kernel, f"maxsim_passage_gradient/{name}", dtype,
                    meta | maxsim.passage_gradient_config(dtype, block_d),
                )  # fmt: skip
            yield from _kl_configurations(dtype, f"{label}/d{dim}", shared)


def _kl_configurations(
    dtype: torch.dtype, label: str, shared: dict[str, Any]
) -> Iterator[Configuration]:
    head: dict[str, Any] = {"HEAD_DIM": 64, "BLOCK_H": 64, "HAS_Q_MASK": True, "HAS_P_MASK": True,
            "TEACHER_PRECISION": "ieee"}  # fmt: skip
    lse_config = token_kl.kl_config(dtype, head["BLOCK_H"])
    yield _for(TEACHER_LSE, f"teacher_lse/{label}", dtype, shared | head | lse_config)
    for rebuild in (False, True):
        name = f"{'attention' if rebuild else 'token'}_kl"
        for step, kernel in (
            ("forward", token_kl.forward_kernel),
            ("query_gradient", token_kl.query_gradient_kernel),
            ("passage_gradient", token_kl.passage_gradient_kernel),
        ):
            backward = step != "forward"
            config = token_kl.kl_config(dtype, shared["BLOCK_D"], backward=backward)
            meta = shared | head | {"REBUILD": rebuild} | config
            yield _for(kernel, f"{name}_{step}/{label}", dtype, meta)


def compile_for(configuration: Configuration, capability: int) -> Compiled:
    """Compile for ``sm_<capability>`` and read the machine code."""
    options = {k: v for k, v in configuration.meta.items() if k in OPTIONS}
    target = GPUTarget("cuda", capability, 32)
    kernel = triton.compile(configuration.source(), target=target, options=options)
    tools = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage, code = (
            subprocess.run(
                [str(tools / tool), option, cubin.name], check=True, capture_output=True, text=True
            ).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    resources = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    lines = _instructions(code)
    loop, inner_loop = _matrix_loops(lines, _labels(code))
    return Compiled(
        registers=resources["REG"],
        spill_bytes=resources["LOCAL"] + resources["STACK"],
        shared_bytes=kernel.metadata.shared,
        instructions=dict(Counter(name for _, name, _ in lines)),
        loop=dict(Counter(loop)),
        inner_loop=dict(Counter(inner_loop)),
    )


_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([^;]*);")


def _instructions(code: str) -> list[tuple[int, str, str]]:
    """Address, mnemonic without its modifiers, and the rest of every instruction."""
    return [(int(m[1], 16), m[2], m[3]) for m in _INSTRUCTION.finditer(code)]


def _labels(code: str) -> dict[str, int]:
    """Address that follows each label."""
    found, waiting = {}, []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x?_?\w+):", line):
            waiting.append(label[1])
        elif instruction := _INSTRUCTION.search(line):
            found.update(dict.fromkeys(waiting, int(instruction[1], 16)))
            waiting = []
    return found


def _matrix_loops(
    lines: list[tuple[int, str, str]], labels: dict[str, int]
) -> tuple[list[str], list[str]]:
    """Mnemonics of the shortest loop that holds most matrix products (or FFMAs), and of the
    largest loop inside it that holds some (the loop over heads; empty if there is none)."""
    loops = []
    for address, name, rest in lines:
        target = re.search(r"\((\.L_\w+)\)", rest)
        begin = labels.get(target[1], address) if name == "BRA" and target else address
        if begin < address:
            inside = [n for a, n, _ in lines if begin <= a <= address]
            products = sum(n in ("HGMMA", "HMMA") for n in inside)
            weight = products * 1000 + sum(n == "FFMA" for n in inside)
            loops.append((weight, -len(inside), begin, address, inside))
    if not loops:
        return [], []
    _, _, first, last, body = max(loops)
    nested = [
        inside
        for weight, _, begin, end, inside in loops
        if weight >= 1000 and first <= begin and end <= last and (begin, end) != (first, last)
    ]
    return body, max(nested, key=len, default=[])
