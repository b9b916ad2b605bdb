"""Inputs, masks and comparisons that the kernel tests share.

The same tests run on the CPU backend, on Triton's interpreter (when TRITON_INTERPRET=1, which
``test_kernels_triton.py`` sets for a process of its own) and on a GPU (marker ``cuda``).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Where:
    """A backend and the device it runs on."""

    backend: str
    device: str

    @property
    def slow(self) -> bool:
        """The interpreter takes about 10 ms per program."""
        return self.backend == "triton" and self.device == "cpu"


PLACES = [
    pytest.param(Where("torch", "cpu"), id="torch"),
    pytest.param(
        Where("triton", "cpu"),
        id="interpreter",
        marks=pytest.mark.skipif(not INTERPRETED, reason="runs in test_kernels_triton.py"),
    ),
    pytest.param(Where("triton", "cuda"), id="cuda", marks=pytest.mark.cuda),
    pytest.param(Where("torch", "cuda"), id="torch-cuda", marks=pytest.mark.cuda),
]


def random_tokens(
    generator: torch.Generator, *shape: int, kind: str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Token vectors, rounded to ``dtype``.

    ``normal``: Gaussian, scaled to length about 1. ``grid``: multiples of 1/4 from 0 to 1, whose
    products and sums are exact in every dtype and order, and tie often.
    """
    if kind == "grid":
        return (torch.randint(0, 5, shape, generator=generator) / 4).to(dtype)
    return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(dtype)


def random_mask(generator: torch.Generator, *shape: int) -> Tensor:
    """About 70 % real tokens anywhere; with two rows or more, one of them has none."""
    mask = torch.rand(*shape, generator=generator) < 0.7
    rows = mask.view(-1, shape[-1])
    if len(rows) > 1:
        rows[len(rows) // 2] = False
    return mask


def poison(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """NaN in every masked token: nothing may read them."""
    return tokens if mask is None else tokens.masked_fill(~mask.unsqueeze(-1), float("nan"))


def differentiate(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: tuple[Tensor, Tensor], seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and gradients for random output gradients that depend on ``seed`` only."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
    return [x.detach() for x in outputs], list(torch.autograd.grad(outputs, leaves, grads))


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest error over the largest expected magnitude; infinite where NaN is wrong."""
    got, expected = got.double().cpu(), expected.double().cpu()
    assert got.shape == expected.shape
    if got.numel() == 0:
        return 0.0
    error = (got - expected).abs().nan_to_num(float("inf")).max()
    return float(error / expected.abs().max().clamp_min(1e-3))


def assert_close(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for index, (x, y) in enumerate(zip(got, expected, strict=True)):
        error = relative_error(x, y)
        assert error < tolerance, f"output {index}: relative error {error:.2e} >= {tolerance:.0e}"
