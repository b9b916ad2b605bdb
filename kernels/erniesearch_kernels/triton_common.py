"""What the Triton kernels share: device functions, and launch choices that depend on the dtype."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_DIM = 256
# The interpreter computes bfloat16 products wrongly: there, tiles are widened first.
INTERPRET = triton.knobs.runtime.interpret


def padded_dim(dim: int) -> int:
    """The tile width of ``dim``-dimensional tokens: a power of two that a matrix unit takes."""
    if dim > MAX_DIM:
        raise ValueError(f'd={dim}, the Triton kernels take at most {MAX_DIM}; use backend="torch"')
    return max(16, triton.next_power_of_2(dim))


def precision(dtype: torch.dtype) -> str:
    """Of float32 products: full, unless PyTorch is told to use TF32 in CUDA's matmul."""
    settings = torch.backends.cuda.matmul
    if hasattr(settings, "fp32_precision"):  # PyTorch 2.9; the older name must not be mixed in
        tf32 = settings.fp32_precision == "tf32"
    else:
        tf32 = settings.allow_tf32
    return "tf32" if tf32 and dtype == torch.float32 else "ieee"


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
