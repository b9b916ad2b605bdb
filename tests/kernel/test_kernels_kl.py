"""``maxsim_token_kl`` and ``maxsim_attention_kl`` against the float64 reference."""

import erniesearch_kernels as kernels
import pytest
import torch
from erniesearch_kernels.reference import (
    maxsim_attention_kl_reference,
    teacher_attention_map,
)
from support.kernel_cases import (
    PLACES,
    Where,
    assert_close,
    differentiate,
    random_tokens,
)
from support.kernel_checks import FORMS, build_kl, check_kl
from torch import Tensor

# num_queries, query_length, group, passage_length, dim, heads, head_dim
SHAPES = [
    (1, 1, 1, 1, 32, 1, 16),
    (2, 7, 3, 19, 32, 2, 24),
    (2, 33, 2, 70, 48, 3, 16),
    (1, 40, 1, 131, 64, 1, 64),
]
LARGE_SHAPES = [(6, 32, 4, 180, 128, 12, 64), (2, 130, 2, 257, 256, 2, 80)]


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_float32(where: Where, shape: tuple[int, ...], form: str, masks: bool) -> None:
    check_kl(where, shape, torch.float32, form, masks)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(where: Where, form: str, dtype: torch.dtype) -> None:
    check_kl(where, SHAPES[1], dtype, form, True)
    check_kl(where, SHAPES[2], dtype, form, False, tau=4.0)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", LARGE_SHAPES)
def test_large(where: Where, shape: tuple[int, ...], form: str) -> None:
    if where.slow:
        pytest.skip("too many programs for the interpreter")
    check_kl(where, shape, torch.float32, form, True, tau=0.5)


@pytest.mark.parametrize("where", PLACES)
def test_two_runs_are_bitwise_equal(where: Where) -> None:
    shape = SHAPES[1 if where.slow else 2]
    for form in FORMS:
        ours, _, queries, passages, *_ = build_kl(where, shape, torch.float32, form, True, 1.0)
        inputs = queries.to(where.device), passages.to(where.device)
        first, second = (differentiate(ours, inputs, 0) for _ in range(2))
        for x, y in zip(first[0] + first[1], second[0] + second[1], strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("where", PLACES)
def test_tiny_shares_of_attention_still_make_a_distribution(where: Where) -> None:
    """Heads that look elsewhere: exp(logit - lse) underflows, its normalised form does not."""
    shape = SHAPES[1]
    generator = torch.Generator().manual_seed(0)
    num_queries, query_length, group, length, dim, heads, head_dim = shape
    queries = random_tokens(generator, num_queries, query_length, dim, kind="normal")
    passages = random_tokens(generator, num_queries, group, length, dim, kind="normal")
    teacher_queries = torch.randn(num_queries, group, heads, query_length, head_dim)
    teacher_keys = torch.randn(num_queries, group, heads, length, head_dim)
    lse = torch.full((num_queries, group, heads, query_length), 300.0)
    arguments = (queries, passages, teacher_queries, teacher_keys, 0.5)
    expected = maxsim_attention_kl_reference(
        *(x.double() if isinstance(x, Tensor) else x for x in arguments), teacher_lse=lse.double()
    )
    got = kernels.maxsim_attention_kl(
        *(x.to(where.device) if isinstance(x, Tensor) else x for x in arguments),
        teacher_lse=lse.to(where.device), backend=where.backend,
    )  # fmt: skip
    assert_close(list(got), list(expected), 1e-5)


def test_kl_of_a_map_to_itself_is_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = random_tokens(generator, 2, 5, 16, kind="normal", dtype=torch.float64)
    passages = random_tokens(generator, 2, 3, 7, 16, kind="normal", dtype=torch.float64)
    teacher_map = (torch.einsum("iad,igtd->igat", queries, passages) / 0.3).softmax(-1)
    _, kl = kernels.maxsim_token_kl(queries, passages, teacher_map, 0.3, backend="torch")
    assert kl.abs().max() < 1e-12


def test_hand_computed_kl() -> None:
    """One query token, two passage tokens: similarities 1 and 0, teacher (1/2, 1/2), tau 1."""
    queries = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
    passages = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]], dtype=torch.float64)
    teacher_map = torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64)
    scores, kl = kernels.maxsim_token_kl(queries, passages, teacher_map, 1.0)
    assert scores.item() == 1.0
    # log(1/2) - (1/2) (1 + 0) + log(e + 1)
    assert kl.item() == pytest.approx(0.1201145069582775, abs=1e-14)


def test_head_mean_is_cut_then_renormalised() -> None:
    """With ``teacher_lse`` the map equals the full row's head mean, cut and renormalised."""
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(2, 3, 4, 5, 12, generator=generator, dtype=torch.float64)
    keys = torch.eye(12, dtype=torch.float64).expand(2, 3, 4, 12, 12)
    cut = row.softmax(-1).mean(2)[..., 5:11]
    expected = cut / cut.sum(-1, keepdim=True)
    got = teacher_attention_map(row, keys[..., 5:11, :], 1.0, teacher_lse=row.logsumexp(-1))
    torch.testing.assert_close(got, expected)
    without = teacher_attention_map(row, keys[..., 5:11, :], 1.0)
    torch.testing.assert_close(without, row[..., 5:11].softmax(-1).mean(2))


def test_teachers_receive_no_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = random_tokens(generator, 1, 2, 8, kind="normal").requires_grad_()
    passages = random_tokens(generator, 1, 2, 3, 8, kind="normal").requires_grad_()
    for backend in ("torch", "eager"):
        teacher = [
            torch.randn(1, 2, 2, length, 4, generator=generator).requires_grad_()
            for length in (2, 3)
        ]
        scores, kl = kernels.maxsim_attention_kl(queries, passages, *teacher, 1.0, backend=backend)
        (scores.sum() + kl.sum()).backward()
        assert teacher[0].grad is None
        assert teacher[1].grad is None
