"""What only a GPU shows: every operation, dtype, dim and form through the real compiler.

The same checks run on the CPU backend, so that a mistake in them shows here.
"""

from __future__ import annotations

from collections.abc import Callable

import erniesearch_kernels as kernels
import pytest
import torch
from support.kernel_cases import (
    TOLERANCE,
    Where,
    assert_close,
    differentiate,
    poison,
    random_mask,
    random_tokens,
)
from support.kernel_checks import FORMS, build_kl, check_kl, check_maxsim, check_varlen
from torch import Tensor

PLACES = [
    pytest.param(Where("torch", "cpu"), id="torch"),
    pytest.param(Where("triton", "cuda"), id="cuda", marks=pytest.mark.cuda),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DIMS = [32, 64, 96, 128, 256]


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_maxsim(where: Where, dim: int, dtype: torch.dtype) -> None:
    """Pairs, own groups and packed tokens; with masks and without; winners of 1 and 2 bytes."""
    for group in (False, True):
        check_maxsim(where, (5, 32, 3, 180, dim), dtype, group=group, masks=True)
        check_maxsim(where, (3, 20, 2, 128, dim), dtype, group=group)
        check_maxsim(
            where, (2, 35, 2, 300, dim), dtype, group=group, masks=True, save_winners=False
        )
    check_varlen(where, [32] * 4 + [0, 5], [130, 0, 1, 64, 0], dim, dtype)
    check_varlen(where, [3, 40], [257, 300], dim, dtype, index=torch.int64)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_kl(where: Where, dim: int, dtype: torch.dtype) -> None:
    """Given and rebuilt maps; heads of every dim; winners of 1 and 2 bytes."""
    for form in FORMS:
        check_kl(where, (2, 32, 3, 70, dim, 3, dim), dtype, form, True)
        check_kl(where, (2, 17, 2, 64, dim, 2, 80), dtype, form, False, tau=2.0)
    check_kl(where, (1, 20, 1, 300, dim, 2, 64), dtype, "heads with lse", True)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("student", DTYPES)
@pytest.mark.parametrize("teacher", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_teacher_of_another_dtype(
    where: Where, form: str, teacher: torch.dtype, student: torch.dtype
) -> None:
    ours, theirs, queries, passages, query_mask, passage_mask = build_kl(
        where, (2, 32, 3, 48, 128, 2, 64), teacher, form, True, 1.0
    )
    # Grid data is exact in every dtype.
    inputs = poison(queries, query_mask), poison(passages, passage_mask)
    got = differentiate(ours, tuple(x.to(where.device, student) for x in inputs), 0)
    expected = differentiate(theirs, (queries.double(), passages.double()), 0)
    tolerance = 4 * max(TOLERANCE[student], TOLERANCE[teacher])
    assert_close(got[0] + got[1], expected[0] + expected[1], tolerance)


def operations(where: Where, generator: torch.Generator) -> dict[str, Callable[..., object]]:
    """Functions of queries ``[4, 32, 128]`` and passages ``[12, 300, 128]``, with masks."""
    query_mask = random_mask(generator, 4, 32).to(where.device)
    passage_mask = random_mask(generator, 12, 300).to(where.device)
    bounds = [torch.arange(n + 1, device=where.device) * m for n, m in ((4, 32), (12, 300))]
    heads = [torch.randn(4, 3, 2, n, 64, generator=generator).to(where.device) for n in (32, 300)]
    teacher = torch.randn(4, 3, 32, 300, generator=generator).softmax(-1).to(where.device)
    own = query_mask, passage_mask.view(4, 3, 300)
    backend = where.backend
    return {
        "pairs": lambda q, p: kernels.maxsim(q, p, query_mask, passage_mask, backend=backend),
        "normalized": lambda q, p: kernels.maxsim(
            q, p, query_mask, passage_mask, normalize=True, backend=backend
        ),
        "group": lambda q, p: kernels.maxsim(q, p.view(4, 3, 300, 128), *own, backend=backend),
        "varlen": lambda q, p: kernels.maxsim_varlen(
            q.flatten(0, 1), p.flatten(0, 1), *bounds, 32, 300, backend=backend
        ),
        "map": lambda q, p: kernels.maxsim_token_kl(
            q, p.view(4, 3, 300, 128), teacher, 0.5, *own, backend=backend
        ),
        "heads": lambda q, p: kernels.maxsim_attention_kl(
            q, p.view(4, 3, 300, 128), *heads, 0.5, *own, backend=backend
        ),
    }


OPERATIONS = list(operations(Where("torch", "cpu"), torch.Generator()))


def tokens(dtype: torch.dtype, kind: str = "normal") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        random_tokens(generator, 4, 32, 128, kind=kind, dtype=dtype),
        random_tokens(generator, 12, 300, 128, kind=kind, dtype=dtype),
    )


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_two_runs_are_bitwise_equal(where: Where, name: str, dtype: torch.dtype) -> None:
    function = operations(where, torch.Generator().manual_seed(1))[name]
    inputs = tuple(x.to(where.device) for x in tokens(dtype))
    first, second = (differentiate(function, inputs, 0) for _ in range(2))
    for x, y in zip(first[0] + first[1], second[0] + second[1], strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_strides_and_alignment_do_not_matter(where: Where, name: str, dtype: torch.dtype) -> None:
    """Every second of a transposed tensor; a slice that begins at an odd element."""
    function = operations(where, torch.Generator().manual_seed(1))[name]
    plain = tuple(x.to(where.device) for x in tokens(dtype, "grid"))

    def strided(x: Tensor) -> Tensor:
        wide = x.new_empty(*x.shape[1:], 2 * len(x))
        wide[..., ::2] = x.movedim(0, -1)
        return wide[..., ::2].movedim(-1, 0)

    def shifted(x: Tensor) -> Tensor:
        buffer = x.new_empty(x.numel() + 1)
        buffer[1:] = x.flatten()
        return buffer[1:].view(x.shape)

    def outcome(change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves = [change(x).detach().requires_grad_() for x in plain]
        outputs = function(*leaves)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        weights = [torch.linspace(-1, 1, x.numel()).to(x).view_as(x) for x in outputs]
        return [x.detach() for x in outputs] + list(torch.autograd.grad(outputs, leaves, weights))

    expected = outcome(lambda x: x)
    for change in (strided, shifted):
        if name in ("group", "varlen", "map", "heads") and change is strided:
            continue  # these take views of the tensors, which need contiguous ones
        assert_close(outcome(change), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_nan_and_infinity_stay_in_their_pairs(where: Where, name: str, dtype: torch.dtype) -> None:
    """Forward and backward: the scores and gradients of other pairs stay the same."""
    function = operations(where, torch.Generator().manual_seed(1))[name]
    queries, passages = (x.to(where.device) for x in tokens(dtype, "grid"))
    clean = differentiate(function, (queries, passages), 0)
    mask_free = slice(0, 1)  # a token that may be masked: poison all of passage 0 and query 0
    for value in (float("nan"), float("inf")):
        p = passages.clone()
        p[mask_free] = value
        scores, (_, grad_passages) = differentiate(function, (queries, p), 0)
        assert not scores[0][:1, 0].isfinite().any()
        others = (slice(None), slice(1, None)) if scores[0].shape[1] == 12 else (slice(1, None),)
        assert_close([scores[0][others]], [clean[0][0][others]], TOLERANCE[dtype])
        assert_close([grad_passages[1:]], [clean[1][1][1:]], TOLERANCE[dtype])
    q = queries.clone()
    q[0] = float("nan")
    scores, (grad_queries, _) = differentiate(function, (q, passages), 0)
    assert scores[0][0].isnan().sum() >= scores[0].shape[1] - 1  # a passage without tokens: 0
    assert_close([scores[0][1:]], [clean[0][0][1:]], TOLERANCE[dtype])
    assert_close([grad_queries[1:]], [clean[1][0][1:]], TOLERANCE[dtype])


@pytest.mark.parametrize("where", PLACES)
def test_winners_of_four_bytes(where: Where) -> None:
    check_maxsim(where, (2, 17, 1, 33_000, 32), torch.bfloat16, masks=True)
    check_maxsim(where, (1, 17, 1, 33_000, 32), torch.float32, group=True)


@pytest.mark.parametrize("where", PLACES)
def test_tf32(where: Where, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grid data is exact in TF32 too; the random weights of the gradients are not."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        generator = torch.Generator().manual_seed(1)
        function = operations(where, generator)["pairs"]
        inputs = tuple(x.to(where.device) for x in tokens(torch.float32, "grid"))
        got = differentiate(function, inputs, 0)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    expected = differentiate(function, inputs, 0)
    assert_close(got[0], expected[0], 1e-6)
    assert_close(got[1], expected[1], 5e-3)
