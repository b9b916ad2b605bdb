"""Compile every form of every kernel without a GPU, and read what came out.

For tests (no spills, shared memory within the limit, matrix instructions present) and for
``kernels/benchmarks/aot_report.py``. Needs Triton, and a process without ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from erniesearch_kernels import triton_maxsim as maxsim
from erniesearch_kernels import triton_tiles as tiles
from erniesearch_kernels import triton_token_kl as token_kl
from erniesearch_kernels.triton_common import SIZES, UNALIGNED
from erniesearch_kernels.triton_tiles import padded_dim

CAPABILITIES = (80, 89, 90, 100, 120)
# Left free of a block's shared memory: room for what the next compiler adds.
MARGIN = 4 * 1024
REGISTERS = 64 * 1024  # of a multiprocessor
POINTER = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
TEACHER_LSE = token_kl.teacher_lse_kernel
STUDENT = {"q_ptr", "p_ptr", "out_ptr"}
TEACHER = {"tq_ptr", "tk_ptr", "map_ptr"}
OPTIONS = ("num_warps", "num_stages", "maxnreg")
# The matrix instructions of tensor cores: Hopper's and datacenter Blackwell's take whole
# warpgroups, the others' one warp.
MATRIX = ("HGMMA", "UTCHMMA", "HMMA")


@dataclass(frozen=True)
class Configuration:
    """One kernel with its compile-time choices, as it is launched for some inputs on some GPU."""

    name: str
    kernel: Any
    capability: int
    dtype: torch.dtype
    meta: dict[str, Any]
    absent: frozenset[str] = field(default_factory=frozenset)  # pointers that are None
    teacher: torch.dtype | None = None  # None: as ``dtype``
    winners: str = "*u8"
    bounds: str = "*i32"

    def source(self) -> ASTSource:
        signature, constants, attributes = {}, dict(self.meta), {}
        for option in OPTIONS:
            constants.pop(option, None)
        for index, name in enumerate(self.kernel.arg_names):
            if name in self.absent:
                constants[name] = None
            if name in constants:
                signature[name] = "constexpr"
                continue
            signature[name] = self._type(name)
            # What the launcher tells the compiler of pointers, and of no integer.
            if signature[name].startswith("*") and name not in UNALIGNED:
                attributes[(index,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constexprs=constants, attrs=attributes)

    def _type(self, name: str) -> str:
        if name == "out_ptr" and self.kernel is TEACHER_LSE:
            return "*fp32"
        if name in STUDENT:
            return POINTER[self.dtype]
        if name in TEACHER:
            return POINTER[self.teacher or self.dtype]
        if name in UNALIGNED:
            return "*u8"
        if name == "code_ptr":
            return "*i32"
        if name in ("winner_ptr", "bounds_ptr"):
            return self.winners if name == "winner_ptr" else self.bounds
        if name in ("unit_ptr", "query_of_row_ptr"):
            return "*i64"
        if name in SIZES:
            return "i32"
        return "*fp32" if name.endswith("_ptr") else "fp32"


@dataclass(frozen=True)
class Compiled:
    """What the assembler reports for one configuration and architecture."""

    warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: dict[str, int]  # of the whole kernel, by mnemonic
    loop: dict[str, int]  # of the shortest loop around most matrix products, by mnemonic
    inner_loop: dict[str, int]  # of a loop inside it that also has matrix products, if any

    def spills(self) -> bool:
        """Whether registers ran out. (ptxas also gives up a few of them where that lets one block
        more run on a multiprocessor: up to 16 bytes do not count at such a number.)"""
        threads = 32 * self.warps
        blocks = REGISTERS // (self.registers * threads)
        most = REGISTERS // (blocks * threads) // 8 * 8  # registers are given out in eights
        return self.spill_bytes > (16 if self.registers == most else 0)

    def blocks(self, capability: int) -> int:
        """How many thread blocks a multiprocessor holds at once."""
        registers = -(-self.registers // 8) * 8  # given out in eights
        return min(
            REGISTERS // (registers * 32 * self.warps),
            # A multiprocessor has 1 KB more than one block may ask for, and each takes 1 KB more.
            (tiles.SHARED_LIMIT[capability] + 1024) // (self.shared_bytes + 1024),
            (48 if capability in (86, 89, 120) else 64) // self.warps,
        )

    def matrix(self) -> str:
        """The widest matrix instruction in use, empty if none is."""
        return next((name for name in MATRIX if self.instructions.get(name)), "")


def _maxsim_variants() -> Iterator[tuple[str, dict[str, bool]]]:
    plain = {"HAS_Q_MASK": False, "HAS_P_MASK": False, "GROUP": False, "VARLEN": False,
             "EVEN": False, "NORMALIZE": False}  # fmt: skip
    masks = {"HAS_Q_MASK": True, "HAS_P_MASK": True}
    yield "even", plain | {"EVEN": True}
    yield "masked", plain | masks
    yield "normalized", plain | masks | {"NORMALIZE": True}
    yield "group", plain | masks | {"GROUP": True}
    yield "varlen", plain | {"VARLEN": True}


def _absent(flags: dict[str, bool]) -> frozenset[str]:
    names = set()
    if not flags["HAS_Q_MASK"]:
        names.add("q_mask_ptr")
    if not flags.get("HAS_P_MASK"):
        names.add("p_mask_ptr")
    names.add("p_mask_ptr" if flags.get("CODED") else "code_ptr")
    if not flags.get("VARLEN"):
        names |= {"unit_ptr", "bounds_ptr", "query_of_row_ptr"}
    if "REBUILD" in flags:
        names |= {"map_ptr"} if flags["REBUILD"] else {"tq_ptr", "tk_ptr", "tlse_ptr"}
    return frozenset(names)


def _for(
    kernel: Any, name: str, capability: int, dtype: torch.dtype, meta: dict[str, Any]
) -> Configuration:
    accepted = {k: v for k, v in meta.items() if k in kernel.arg_names or k in OPTIONS}
    absent = _absent(accepted) & set(kernel.arg_names)
    return Configuration(name, kernel, capability, dtype, accepted, absent)


def configurations(
    capability: int,
    dims: tuple[int, ...] = (128,),
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32),
) -> Iterator[Configuration]:
    """Every kernel in its usual forms at query length 32, for token dims ``dims``."""
    for dtype in dtypes:
        label = str(dtype).removeprefix("torch.")
        for dim in dims:
            block_d = padded_dim(dim)
            shared = {"DIM": dim, "BLOCK_D": block_d, "PRECISION": "ieee", "WIDEN": False}
            for variant, flags in _maxsim_variants():
                name = f"{label}/d{dim}/{variant}"
                normalize = flags["NORMALIZE"]
                packed = dtype != torch.float32
                meta = shared | flags | {"SAVE": True, "PACK": packed, "UNIT": 32}
                meta["CODED"] = packed and not (flags["EVEN"] or flags["VARLEN"])
                steps = [("query_gradient", tiles.query_gradient_config(dtype, block_d)),
                         ("passage_gradient", tiles.passage_gradient_config(
                             dtype, block_d, capability, normalize))]  # fmt: skip
                if variant == "even":
                    steps = []  # the backward does not know the difference
                rows = 32 if flags["GROUP"] else 0
                forward = tiles.forward_config(dtype, block_d, capability, normalize, rows)
                for step, config in [("forward", forward), *steps]:
                    kernel = getattr(maxsim, f"{step}_kernel")
                    yield _for(kernel, f"maxsim_{step}/{name}", capability, dtype, meta | config)
            yield from _kl_configurations(capability, dtype, f"{label}/d{dim}", shared)


def _kl_configurations(
    capability: int, dtype: torch.dtype, label: str, shared: dict[str, Any], head_dim: int = 64
) -> Iterator[Configuration]:
    head: dict[str, Any] = {
        "HEAD_DIM": head_dim, "BLOCK_H": padded_dim(head_dim), "HAS_Q_MASK": True,
        "HAS_P_MASK": True, "TEACHER_PRECISION": "ieee",
    }  # fmt: skip
    lse_config = tiles.teacher_lse_config(dtype, head["BLOCK_H"])
    yield _for(TEACHER_LSE, f"teacher_lse/{label}", capability, dtype, shared | head | lse_config)
    for rebuild in (False, True):
        name = f"{'attention' if rebuild else 'token'}_kl"
        for step in ("forward", "query_gradient", "passage_gradient"):
            meta = shared | head | {"REBUILD": rebuild, "ALIGNED": not rebuild}
            meta |= _kl_tile(step, dtype, meta)
            kernel = getattr(token_kl, f"{step}_kernel")
            yield _for(kernel, f"{name}_{step}/{label}", capability, dtype, meta)


def _kl_tile(step: str, dtype: torch.dtype, meta: dict[str, Any]) -> dict[str, int]:
    tile = dtype, meta["BLOCK_D"], meta["BLOCK_H"] if meta["REBUILD"] else 0
    if step == "forward":
        return tiles.kl_config(*tile)
    return tiles.kl_gradient_config(*tile, of_passages=step == "passage_gradient")


def rarer_forms(capability: int, dtype: torch.dtype, dim: int = 128) -> Iterator[Configuration]:
    """What other inputs make of the usual forms, one change at a time."""
    for usual in configurations(capability, (dim,), (dtype,)):
        for suffix, form in _changes(usual):
            yield replace(form, name=f"{usual.name}/{suffix}")
    if dtype == torch.float32:
        return
    label = f"{str(dtype).removeprefix('torch.')}/d{dim}"
    shared = {"DIM": dim, "BLOCK_D": padded_dim(dim), "PRECISION": "ieee", "WIDEN": False}
    for head_dim in (32, 128, 256):  # others are padded to these and 64
        for usual in _kl_configurations(capability, dtype, label, shared, head_dim):
            if not usual.name.startswith("token_kl"):
                yield replace(usual, name=f"{usual.name}/head{head_dim}")


def _changes(usual: Configuration) -> Iterator[tuple[str, Configuration]]:
    meta = usual.meta

    def changed(**choices: Any) -> Configuration:
        return replace(usual, meta=meta | choices)

    if meta.get("ALIGNED"):
        yield "odd_length", changed(ALIGNED=False)
    if usual.dtype == torch.float32 and "PRECISION" in meta:
        choices = {"PRECISION": "tf32"}
        if "TEACHER_PRECISION" in meta:
            choices["TEACHER_PRECISION"] = "tf32"
        yield "tf32", changed(**choices)
    if TEACHER & set(usual.kernel.arg_names) and usual.kernel is not TEACHER_LSE:
        other = torch.bfloat16 if usual.dtype == torch.float32 else torch.float32
        if meta["REBUILD"]:
            step = usual.kernel.__name__.removesuffix("_kernel")
            meta = meta | _kl_tile(step, torch.float32, meta)
        suffix = f"teacher_{str(other).removeprefix('torch.')}"
        yield suffix, replace(usual, teacher=other, meta=meta)
        meta = usual.meta
    if usual.dtype == torch.float32:
        return  # the rest changes what does not depend on the dtype
    if "winner_ptr" in usual.kernel.arg_names:  # passages over 256 and over 32,768 tokens
        yield "winners16", replace(usual, winners="*i16")
        if usual.name.startswith("token_kl") or usual.name.endswith("/masked"):
            yield "winners32", replace(usual, winners="*i32")
    if meta.get("VARLEN"):
        yield "bounds64", replace(usual, bounds="*i64")
    if "SAVE" in meta:
        yield "unsaved", changed(SAVE=False)
        yield "unit16", changed(UNIT=16)
    if "TAIL" in meta:  # passages of 129 to 192 tokens
        block_d, normalize = meta["BLOCK_D"], meta["NORMALIZE"]
        config = tiles.passage_gradient_config(
            usual.dtype, block_d, usual.capability, normalize, 180
        )
        if config["TAIL"]:
            own = {key: value for key, value in meta.items() if key != "maxnreg"}
            yield "tail", replace(usual, meta=own | config)
    if meta.get("HAS_P_MASK"):
        absent = usual.absent | {"q_mask_ptr", "p_mask_ptr"} & set(usual.kernel.arg_names)
        free = {name: False for name in ("HAS_Q_MASK", "HAS_P_MASK") if name in meta}
        yield "unmasked", replace(usual, absent=absent, meta=meta | free)


def compile_one(configuration: Configuration) -> Compiled:
    """Compile for ``sm_<capability>`` and read the machine code."""
    options = {k: v for k, v in configuration.meta.items() if k in OPTIONS}
    target = GPUTarget("cuda", configuration.capability, 32)
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
        warps=configuration.meta["num_warps"],
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
            products = sum(n in MATRIX for n in inside)
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
