"""What the Triton kernels share: how they are declared, and functions on tiles and arguments."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# The interpreter computes bfloat16 products wrongly: there, tiles are widened first.
INTERPRET = triton.knobs.runtime.interpret
# Integers that change with the batch. The launcher would compile a kernel of its own for each that
# is 1 or a multiple of 16; no load of tokens is wider for knowing it.
SIZES = (
    "num_units", "query_length", "units_per_query", "num_passages", "passage_length",
    "winner_stride", "code_stride", "passages_per_program", "num_row_blocks", "num_rows",
    "group_size", "heads",
)  # fmt: skip
# Loaded byte by byte, and slices of larger masks begin anywhere.
UNALIGNED = ("q_mask_ptr", "p_mask_ptr")


def kernel(function: Any) -> Any:
    """``triton.jit`` of a kernel that is compiled once for all batch sizes and lengths."""
    return triton.jit(function, do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)


def precision(dtype: torch.dtype) -> str:
    """Of float32 products: full, unless PyTorch is told to use TF32 in CUDA's matmul."""
    settings = torch.backends.cuda.matmul
    if hasattr(settings, "fp32_precision"):  # PyTorch 2.9; the older name must not be mixed in
        tf32 = settings.fp32_precision == "tf32"
    else:
        tf32 = settings.allow_tf32
    return "tf32" if tf32 and dtype == torch.float32 else "ieee"


def dense(x: Tensor) -> Tensor:
    """``x`` contiguous, from a multiple of 16 bytes on: narrower loads spill registers."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """A bool mask as the bytes that kernels load."""
    return None if mask is None else mask.contiguous().view(torch.uint8)


def balanced(*grads: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Gradients divided by their largest magnitude, and that magnitude ``[1]``.

    The kernels round weighted tokens to the inputs' dtype for the matrix units: small gradients
    would underflow in float16.
    """
    largest = torch.stack([grad.abs().amax() for grad in grads]).amax().reshape(1)
    scale = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    return scale, [grad / scale for grad in grads]


@triton.jit
def dot(a, b, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def narrow(x, like, WIDEN: tl.constexpr):
    """``x`` in the dtype of ``like`` for the matrix unit (float32 in the interpreter)."""
    if WIDEN:
        return x
    return x.to(like.dtype)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def row_max(x):
    """Maximum of each row; NaN if the row has one."""
    return tl.reduce(x, 1, _larger)


@triton.jit
def inverse_norm(x, AXIS: tl.constexpr):
    """``1 / max(|x|, 1e-12)`` of the tokens in a tile."""
    x = x.to(tl.float32)
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, AXIS)), 1e-12)


@triton.jit
def norm_jacobian(grad, x):
    """Gradient of tokens ``x [rows, dim]`` from that of ``x / max(|x|, 1e-12)``."""
    x = x.to(tl.float32)
    norm = tl.sqrt(tl.sum(x * x, 1))
    inverse = 1.0 / tl.maximum(norm, 1e-12)
    unit = x * inverse[:, None]
    inner = tl.where(norm > 1e-12, tl.sum(grad * unit, 1), 0.0)
    return (grad - unit * inner[:, None]) * inverse[:, None]
