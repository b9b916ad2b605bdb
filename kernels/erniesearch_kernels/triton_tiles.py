"""Tile shapes of the Triton kernels, by dtype, token dim and GPU. Choices, never timed."""

from __future__ import annotations

import functools

import torch
import triton

MAX_DIM = 256
# Shared memory that one block may ask for, in bytes, by compute capability (CUDA C++ Programming
# Guide, technical specifications).
SHARED_LIMIT = {
    80: 163 * 1024, 86: 99 * 1024, 87: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024,
    100: 227 * 1024, 103: 227 * 1024, 120: 99 * 1024, 121: 99 * 1024,
}  # fmt: skip

# Two for each multiprocessor of the largest GPUs; and what is worth a program of its own.
WANTED_PROGRAMS, SHORTEST_RUN = 264, 64
ONE_PASS = (90, 100, 103)


def padded_dim(dim: int) -> int:
    """The tile width of ``dim``-dimensional tokens: a power of two that a matrix unit takes."""
    if dim > MAX_DIM:
        raise ValueError(f'd={dim}, the Triton kernels take at most {MAX_DIM}; use backend="torch"')
    return max(16, triton.next_power_of_2(dim))


@functools.cache
def capability(device: torch.device) -> int:
    """Of a GPU, as ``90`` for 9.0; in the interpreter, where tile shapes do not matter, also 90."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def roomy(capability: int) -> bool:
    """Whether a block may hold well over 99 KB of shared memory (unknown ones: assume not)."""
    return SHARED_LIMIT.get(capability, 0) > 128 * 1024


def forward_config(
    dtype: torch.dtype, block_d: int, capability: int, normalize: bool = False, group_rows: int = 0
) -> dict[str, int]:
    """Tile shape of the forward; ``group_rows`` > 0: tokens per query in the own-group form."""
    wide = block_d > 128
    tight = normalize and capability >= 100 and roomy(capability)  # registers spill there
    if group_rows:
        rows = min(32 if wide else 64, max(16, triton.next_power_of_2(group_rows)))
        columns = 32 if wide or dtype == torch.float32 else 64
        return {"BLOCK_M": rows, "BLOCK_N": columns, "num_warps": 4, "num_stages": 2}
    if dtype == torch.float32:
        return {"BLOCK_M": 32 if wide else 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
    if wide:
        rows, columns = (64, 32) if tight or not roomy(capability) else (128, 64)
        return {"BLOCK_M": rows, "BLOCK_N": columns, "num_warps": 8, "num_stages": 2}
    # Many rows halve what comes from L2; 64 columns waste less of a last tile. 256 rows take 98 KB
    # of shared memory, and spill registers where norms are computed.
    rows = 256 if roomy(capability) and not normalize else 128
    config = {"BLOCK_M": rows, "BLOCK_N": 32 if tight else 64, "num_warps": 8, "num_stages": 3}
    # Two blocks to a multiprocessor: while one waits for its products, the other looks for maxima.
    # (Blackwell's would spill.)
    return config | ({"maxnreg": 128} if capability == 90 else {})


def query_gradient_config(dtype: torch.dtype, block_d: int) -> dict[str, int]:
    """Rows per program of the query gradient."""
    rows = min(32, 8192 // (block_d * dtype.itemsize))
    return {"BLOCK_M": rows, "num_warps": 8, "num_stages": 2}  # 4 warps spill at some dims


def run_length(row_blocks: int, num_passages: int) -> int:
    """Passages that one program of the query gradient walks along. Few query tokens against many
    passages leave multiprocessors idle unless several programs share the passages."""
    if row_blocks >= WANTED_PROGRAMS:
        return max(1, num_passages)
    runs = min(-(-WANTED_PROGRAMS // row_blocks), num_passages // SHORTEST_RUN)
    return -(-num_passages // max(1, runs))


def passage_gradient_config(
    dtype: torch.dtype, block_d: int, capability: int, normalize: bool = False, tokens: int = 0
) -> dict[str, int]:
    """Passage tokens per program and query tokens per step of the passage gradient, for passages of
    so many ``tokens``."""
    wide = block_d > 128
    config = {"BLOCK_N": 64, "BLOCK_K": 32, "TAIL": 0, "num_warps": 8, "num_stages": 2}
    if dtype == torch.float32:  # without tensor cores, loads that run ahead spill registers
        columns = 32 if wide else 64
        return config | {"BLOCK_N": columns, "BLOCK_K": 16, "num_stages": 1}
    if wide or (normalize and not roomy(capability)):
        return config
    # The usual 180 tokens in one pass over the queries, not in two of 128; others' registers spill.
    one_pass = 128 < tokens <= 192 and capability in ONE_PASS and not normalize
    config |= {"BLOCK_N": 128, "num_stages": 3}
    if capability == 90 and not normalize and not one_pass:
        # Two blocks to a multiprocessor, as for the forward; wider steps would spill.
        return config | {"maxnreg": 128}
    return config | {"BLOCK_K": 64, "TAIL": 64 if one_pass else 0}


def unit_length(query_length: int) -> int:
    """Query tokens per unit: 32 unless 16 wastes less of the last one."""
    return 32 if -(-query_length // 32) * 2 == -(-query_length // 16) else 16


def kl_config(dtype: torch.dtype, block_d: int, block_h: int = 0) -> dict[str, int]:
    """Tile shape of the KL kernels' forward, query tokens by passage tokens; ``block_h``: padded
    head dim of the teacher, 0 where its map is given."""
    if dtype == torch.float32:
        # Without tensor cores, loads that run ahead cost registers that spill.
        rows = 32 if block_d <= 128 else 16
        return {"BLOCK_M": rows, "BLOCK_N": rows, "num_warps": 8, "num_stages": 1}
    columns = 64 if block_d <= 128 else 32
    return {
        "BLOCK_M": 32, "BLOCK_N": columns, "num_warps": _kl_warps(block_d, block_h),
        "num_stages": 2,
    }  # fmt: skip


def teacher_lse_config(dtype: torch.dtype, block_h: int) -> dict[str, int]:
    """As the KL forward's; one product alone needs two warps."""
    config = kl_config(dtype, block_h)
    return config if dtype == torch.float32 or block_h > 128 else config | {"num_warps": 2}


def kl_gradient_config(
    dtype: torch.dtype, block_d: int, block_h: int, of_passages: bool
) -> dict[str, int]:
    """Tile shape of a gradient; ``block_h`` as in :func:`kl_config`."""
    widest = max(block_d, block_h)
    if dtype == torch.float32:
        rows, warps = (32, 8) if widest <= 64 else (16, 4)
        return {"BLOCK_M": rows, "BLOCK_N": 16, "num_warps": warps, "num_stages": 1}
    # With 4 warps the passages' gradient would spill before Hopper.
    return kl_config(dtype, widest) | {
        "num_warps": 8 if of_passages else _kl_warps(block_d, block_h)
    }


def _kl_warps(block_d: int, block_h: int) -> int:
    """4 take fewer instructions in all than 8, and two or more blocks fit on a multiprocessor, as
    long as registers last."""
    return 8 if block_d > 128 or block_h > 64 else 4
