"""``maxsim`` and ``maxsim_varlen`` against the float64 reference, forward and gradients."""

import erniesearch_kernels as kernels
import pytest
import torch
from support.kernel_cases import (
    PLACES,
    TOLERANCE,
    Where,
    assert_close,
    differentiate,
    poison,
    random_tokens,
    relative_error,
)
from support.kernel_checks import check_maxsim, check_varlen

# num_queries, query_length, num_passages (or group), passage_length, dim
SHAPES = [
    (1, 1, 1, 1, 32),
    (3, 7, 4, 19, 32),
    (5, 32, 3, 41, 128),
    (2, 33, 2, 129, 48),
    (4, 5, 3, 64, 96),
    (1, 77, 2, 300, 64),
    (2, 300, 1, 13, 40),
]
LARGE_SHAPES = [(17, 32, 23, 180, 128), (3, 130, 9, 257, 256), (40, 3, 70, 31, 32)]


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_float32(where: Where, shape: tuple[int, ...], group: bool, masks: bool) -> None:
    check_maxsim(where, shape, torch.float32, group=group, masks=masks)
    if not where.slow or shape[3] < 100:
        check_maxsim(where, shape, torch.float32, group=group, masks=masks, kind="normal")


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("shape", SHAPES[1:4:2])
def test_half_precision(
    where: Where, shape: tuple[int, ...], group: bool, dtype: torch.dtype
) -> None:
    check_maxsim(where, shape, dtype, group=group, masks=True)
    if not where.slow:
        check_maxsim(where, shape, dtype, group=group)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("shape", LARGE_SHAPES)
def test_large(where: Where, shape: tuple[int, ...], group: bool) -> None:
    if where.slow:
        pytest.skip("too many programs for the interpreter")
    check_maxsim(where, shape, torch.float32, group=group, masks=True, kind="normal")
    check_maxsim(where, shape, torch.float32, group=group)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [False, True])
def test_normalize(where: Where, group: bool, dtype: torch.dtype) -> None:
    # A token of length 0 stays 0: grid data of dim 32 has none, one is put in by the mask.
    options = {"normalize": True, "kind": "normal"}
    check_maxsim(where, (3, 9, 4, 21, 32), dtype, group=group, masks=True, **options)
    check_maxsim(where, (2, 4, 2, 5, 48), dtype, group=group, seed=1, **options)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_programs_share_a_querys_passages(
    where: Where, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where few queries meet thousands of passages: partial sums of the queries' gradient."""
    if where.backend == "triton":
        monkeypatch.setattr("erniesearch_kernels.triton_tiles.SHORTEST_RUN", 2)
    for normalize in (False, True):
        check_maxsim(where, (3, 5, 9, 7, 32), dtype, masks=True, normalize=normalize)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("length", [129, 150, 192])
def test_passages_of_one_pass(where: Where, length: int) -> None:
    """129 to 192 tokens in 16 bits: both parts of a passage's gradient in one program."""
    for group in (False, True):
        check_maxsim(where, (2, 9, 3, length, 32), torch.bfloat16, group=group, masks=True)
        check_maxsim(where, (2, 9, 2, length, 32), torch.bfloat16, group=group)


@pytest.mark.parametrize("where", PLACES)
def test_recomputed_winners_give_the_same_bits(where: Where) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = (
        random_tokens(generator, 4, 7, 32, kind="normal").to(where.device),
        random_tokens(generator, 5, 18, 32, kind="normal").to(where.device),
    )
    saved, recomputed = (
        differentiate(
            lambda q, p, s=save: kernels.maxsim(q, p, save_winners=s, backend=where.backend),
            inputs, 0,
        )
        for save in (True, False)
    )  # fmt: skip
    for x, y in zip(saved[0] + saved[1], recomputed[0] + recomputed[1], strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("where", PLACES)
def test_two_runs_are_bitwise_equal(where: Where) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = random_tokens(generator, 5, 33, 64, kind="normal").to(where.device)
    passages = random_tokens(generator, 6, 50, 64, kind="normal").to(where.device)
    # Duplicated passages tie with each other's tokens nowhere, but load equal gradients.
    passages[3] = passages[0]
    runs = [
        differentiate(
            lambda q, p: kernels.maxsim(q, p, backend=where.backend), (queries, passages), 1
        )
        for _ in range(2)
    ]
    for x, y in zip(runs[0][0] + runs[0][1], runs[1][0] + runs[1][1], strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("where", PLACES)
def test_the_first_of_equal_tokens_wins(where: Where) -> None:
    token = torch.tensor([[1.0, 2.0, -1.0, 0.5]]).repeat(1, 8)
    for sign in (1.0, -1.0):
        queries = (sign * token).view(1, 1, 32).to(where.device)
        passages = token.repeat(70, 1).view(1, 70, 32).to(where.device)
        mask = torch.ones(1, 70, dtype=torch.bool, device=where.device)
        mask[0, :5] = False
        _, (_, grad) = differentiate(
            lambda q, p, m=mask: kernels.maxsim(q, p, None, m, backend=where.backend),
            (queries, passages), 0,
        )  # fmt: skip
        assert grad[0].abs().sum(-1).nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_ties_below_zero(where: Where, dtype: torch.dtype) -> None:
    queries = -torch.ones(1, 1, 32, dtype=dtype, device=where.device)
    passages = torch.ones(1, 9, 32, dtype=dtype, device=where.device)
    (scores,), (grad_queries, grad_passages) = differentiate(
        lambda q, p: kernels.maxsim(q, p, backend=where.backend), (queries, passages), 0
    )
    assert relative_error(scores, torch.full((1, 1), -32.0)) < 1e-4
    # Which of the equal tokens wins is not promised, but exactly one does.
    assert len(grad_passages[0].abs().sum(-1).nonzero()) == 1
    assert_close([grad_passages.sum(1)], [-grad_queries[:, 0]], TOLERANCE[dtype])


@pytest.mark.parametrize("where", PLACES)
def test_a_masked_token_never_wins_over_negative_similarities(where: Where) -> None:
    queries = torch.ones(1, 1, 32, device=where.device)
    passages = -torch.ones(1, 3, 32, device=where.device)
    passages[0, 2] = 0.0
    mask = torch.tensor([[True, True, False]], device=where.device)
    scores = kernels.maxsim(queries, passages, None, mask, backend=where.backend)
    assert scores.item() == -32.0


@pytest.mark.parametrize("where", PLACES)
def test_empty_queries_and_passages(where: Where) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = random_tokens(generator, 3, 5, 32, kind="normal").to(where.device)
    passages = random_tokens(generator, 3, 6, 32, kind="normal").to(where.device)
    query_mask = torch.ones(3, 5, dtype=torch.bool, device=where.device)
    passage_mask = torch.ones(3, 6, dtype=torch.bool, device=where.device)
    query_mask[1], passage_mask[2] = False, False
    (scores,), (grad_queries, grad_passages) = differentiate(
        lambda q, p: kernels.maxsim(q, p, query_mask, passage_mask, backend=where.backend),
        (poison(queries, query_mask), poison(passages, passage_mask)), 0,
    )  # fmt: skip
    assert scores[1].eq(0).all()
    assert scores[:, 2].eq(0).all()
    assert grad_queries[1].eq(0).all()
    assert grad_passages[2].eq(0).all()
    assert scores[0, :2].ne(0).all()


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("group", [False, True])
def test_no_queries_or_no_passages(where: Where, group: bool) -> None:
    for num_queries, num in ((0, 3), (3, 0)):
        queries = torch.zeros(num_queries, 4, 32, device=where.device)
        prefix = (num_queries, num) if group else (num,)
        passages = torch.zeros(*prefix, 5, 32, device=where.device)
        outputs, grads = differentiate(
            lambda q, p: kernels.maxsim(q, p, backend=where.backend), (queries, passages), 0
        )
        assert outputs[0].shape == (num_queries, num)
        assert [x.shape for x in grads] == [queries.shape, passages.shape]


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_varlen(where: Where, dtype: torch.dtype) -> None:
    check_varlen(where, [3, 0, 17, 1], [5, 20, 0, 66, 1, 0], 32, dtype)
    check_varlen(where, [2], [1], 48, dtype, index=torch.int64)
    if not where.slow:
        check_varlen(where, [32] * 9 + [300, 1], [180] * 7 + [3, 0, 129], 128, dtype)


@pytest.mark.parametrize("where", PLACES)
def test_varlen_equals_padded(where: Where) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [4, 1, 9], [11, 3, 18, 7]
    (query_mask, passage_mask) = (
        torch.arange(max(x)) < torch.tensor(x).unsqueeze(1) for x in lengths
    )
    queries = random_tokens(generator, 3, 9, 32, kind="normal")
    passages = random_tokens(generator, 4, 18, 32, kind="normal")
    bounds = [torch.tensor([0, *x]).cumsum(0) for x in lengths]
    device = where.device
    padded = kernels.maxsim(
        queries.to(device), passages.to(device), query_mask.to(device), passage_mask.to(device),
        backend=where.backend,
    )  # fmt: skip
    packed = kernels.maxsim_varlen(
        queries[query_mask].to(device), passages[passage_mask].to(device),
        *(b.to(device) for b in bounds), 9, 18, backend=where.backend,
    )  # fmt: skip
    assert relative_error(packed, padded) < 1e-6


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny blocks force every loop of the CPU backend to run more than once."""
    from erniesearch_kernels import torch_maxsim

    monkeypatch.setattr(torch_maxsim, "BLOCK_ELEMENTS", 100)
    monkeypatch.setattr(torch_maxsim, "BACKWARD_ELEMENTS", 30)
    for group in (False, True):
        for masks in (False, True):
            check_maxsim(
                Where("torch", "cpu"), (5, 19, 7, 33, 16), torch.float64, group=group, masks=masks
            )
    check_varlen(
        Where("torch", "cpu"), [3, 0, 17, 1], [5, 20, 0, 33, 1, 0], 16, torch.float64, "normal"
    )
