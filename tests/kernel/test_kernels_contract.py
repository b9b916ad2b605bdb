"""Public signatures, validation, NaN and infinity, and what importing the package needs."""

import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import erniesearch_kernels as kernels
import pytest
import torch
from support.kernel_cases import PLACES, Where, assert_close, differentiate
from torch import Tensor

ROOT = Path(kernels.__file__).parents[2]

SIGNATURES = {
    "maxsim": "(queries: 'Tensor', passages: 'Tensor', query_mask: 'Tensor | None' = None, "
    "passage_mask: 'Tensor | None' = None, *, normalize: 'bool' = False, "
    "save_winners: 'bool' = True, empty_score: 'float' = 0.0, backend: 'str' = 'auto') "
    "-> 'Tensor'",
    "maxsim_varlen": "(queries: 'Tensor', passages: 'Tensor', query_cu_seqlens: 'Tensor', "
    "passage_cu_seqlens: 'Tensor', max_query_length: 'int', max_passage_length: 'int', *, "
    "empty_score: 'float' = 0.0, backend: 'str' = 'auto') -> 'Tensor'",
    "maxsim_token_kl": "(queries: 'Tensor', passages: 'Tensor', teacher_map: 'Tensor', "
    "tau: 'float', query_mask: 'Tensor | None' = None, passage_mask: 'Tensor | None' = None, *, "
    "empty_score: 'float' = 0.0, backend: 'str' = 'auto') -> 'tuple[Tensor, Tensor]'",
    "maxsim_attention_kl": "(queries: 'Tensor', passages: 'Tensor', teacher_queries: 'Tensor', "
    "teacher_keys: 'Tensor', tau: 'float', query_mask: 'Tensor | None' = None, "
    "passage_mask: 'Tensor | None' = None, *, scale: 'float | None' = None, "
    "teacher_lse: 'Tensor | None' = None, empty_score: 'float' = 0.0, backend: 'str' = 'auto') "
    "-> 'tuple[Tensor, Tensor]'",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_frozen(name: str) -> None:
    assert str(inspect.signature(getattr(kernels, name))) == SIGNATURES[name]


def test_kernels_is_not_a_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert Path(kernels.__file__).parent == ROOT / "kernels" / "erniesearch_kernels"


def test_works_without_triton() -> None:
    """Importing and running on a CPU must not import Triton."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, erniesearch_kernels as k\n"
        "x = torch.ones(2, 3, 4, requires_grad=True)\n"
        "k.maxsim(x, x).sum().backward()\n"
        "k.maxsim_token_kl(x, x[:, None], torch.ones(2, 1, 3, 3) / 3, 1.0)\n"
        "assert x.grad is not None\n"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(ROOT / "kernels")}
    )


TOKENS = torch.zeros(2, 3, 8)
GROUP = torch.zeros(2, 4, 5, 8)
BOUNDS = torch.tensor([0, 2, 5])
HEADS = torch.zeros(2, 4, 2, 3, 6)
KEYS = torch.zeros(2, 4, 2, 5, 6)
MISTAKES = [
    ("queries have d=8, passages have d=6", lambda: kernels.maxsim(TOKENS, TOKENS[..., :6])),
    ("queries are torch.float32", lambda: kernels.maxsim(TOKENS, TOKENS.double())),
    ("queries are torch.int32", lambda: kernels.maxsim(TOKENS.int(), TOKENS.int())),
    (r"queries have shape \[3, 8\]", lambda: kernels.maxsim(TOKENS[0], TOKENS)),
    (r"passages have shape \[3, 8\]", lambda: kernels.maxsim(TOKENS, TOKENS[0])),
    ("groups of 1 queries, there are 2", lambda: kernels.maxsim(TOKENS, GROUP[:1])),
    ("query_length=0", lambda: kernels.maxsim(TOKENS[:, :0], TOKENS)),
    ("passage_length=0", lambda: kernels.maxsim(TOKENS, TOKENS[:, :0])),
    ("d=0", lambda: kernels.maxsim(TOKENS[..., :0], TOKENS[..., :0])),
    ("query_mask is torch.float32", lambda: kernels.maxsim(TOKENS, TOKENS, TOKENS[..., 0])),
    (
        r"passage_mask has shape \[2, 2\], expected \[2, 3\]",
        lambda: kernels.maxsim(TOKENS, TOKENS, None, torch.ones(2, 2, dtype=torch.bool)),
    ),
    ("backend='cuda'", lambda: kernels.maxsim(TOKENS, TOKENS, backend="cuda")),
    ("no float64", lambda: kernels.maxsim(TOKENS.double(), TOKENS.double(), backend="triton")),
    (
        r"passages have shape \[2, 3, 8\]",
        lambda: kernels.maxsim_token_kl(TOKENS, TOKENS, torch.zeros(2, 4, 3, 5), 1.0),
    ),
    (
        r"teacher_map has shape \[2, 4, 3, 4\], expected \[2, 4, 3, 5\]",
        lambda: kernels.maxsim_token_kl(TOKENS, GROUP, torch.zeros(2, 4, 3, 4), 1.0),
    ),
    ("tau=0", lambda: kernels.maxsim_token_kl(TOKENS, GROUP, torch.zeros(2, 4, 3, 5), 0.0)),
    (
        r"teacher_keys has shape \[2, 4, 2, 4, 6\]",
        lambda: kernels.maxsim_attention_kl(TOKENS, GROUP, HEADS, KEYS[:, :, :, :4], 1.0),
    ),
    (
        "teacher_queries has shape",
        lambda: kernels.maxsim_attention_kl(TOKENS, GROUP, HEADS[:, :, 0], KEYS, 1.0),
    ),
    (
        "teacher_lse has shape",
        lambda: kernels.maxsim_attention_kl(
            TOKENS, GROUP, HEADS, KEYS, 1.0, teacher_lse=torch.zeros(2, 4, 2, 5)
        ),
    ),
    (
        r"queries have shape \[2, 3, 8\], expected \[total_tokens, dim\]",
        lambda: kernels.maxsim_varlen(TOKENS, TOKENS[0], BOUNDS, BOUNDS, 3, 3),
    ),
    (
        "query_cu_seqlens is torch.float32",
        lambda: kernels.maxsim_varlen(TOKENS[0], TOKENS[0], BOUNDS.float(), BOUNDS, 3, 3),
    ),
    (
        "query_cu_seqlens goes from 0 to 5, expected from 0 to 3",
        lambda: kernels.maxsim_varlen(TOKENS[0], GROUP[0, 0], BOUNDS, BOUNDS, 3, 3),
    ),
    (
        "passage_cu_seqlens has a sequence of 3 tokens, the stated maximum is 2",
        lambda: kernels.maxsim_varlen(GROUP[0, 0], GROUP[0, 0], BOUNDS, BOUNDS, 3, 2),
    ),
    (
        "query_cu_seqlens decreases",
        lambda: kernels.maxsim_varlen(
            GROUP[0, 0], GROUP[0, 0], torch.tensor([0, 6, 5]), BOUNDS, 6, 3
        ),
    ),
]


@pytest.mark.parametrize(("message", "call"), MISTAKES, ids=[m for m, _ in MISTAKES])
def test_mistakes_are_named(message: str, call) -> None:
    if "float64" in message and importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_in_its_pairs(where: Where, dtype: torch.dtype) -> None:
    """A NaN in a real token makes all scores of its query or passage NaN, and no other."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(3, 5, 32, generator=generator).to(where.device, dtype)
    passages = torch.randn(4, 9, 32, generator=generator).to(where.device, dtype)
    clean = kernels.maxsim(queries, passages, backend=where.backend)
    queries[1, 2, 3] = float("nan")
    passages[2, 8, 0] = float("nan")
    scores = kernels.maxsim(queries, passages, backend=where.backend)
    poisoned = torch.zeros(3, 4, dtype=torch.bool)
    poisoned[1], poisoned[:, 2] = True, True
    assert torch.equal(scores.isnan().cpu(), poisoned)
    assert torch.equal(scores.cpu()[~poisoned], clean.cpu()[~poisoned])


@pytest.mark.parametrize("where", PLACES)
def test_infinity_stays_in_its_pairs(where: Where) -> None:
    """A winning infinity makes the score non-finite; other pairs do not see it."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.rand(3, 5, 32, generator=generator).to(where.device)
    passages = torch.rand(4, 9, 32, generator=generator).to(where.device)
    passages[2, 4, 0] = float("inf")
    for dtype in (torch.float32, torch.bfloat16):
        scores = kernels.maxsim(queries.to(dtype), passages.to(dtype), backend=where.backend)
        assert not scores[:, 2].isfinite().any()
        assert scores[:, [0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [False, True])
def test_a_losing_minus_infinity_loses(where: Where, dtype: torch.dtype, group: bool) -> None:
    """As if the token were not there; where it is alone, it wins."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.rand(2, 5, 32, generator=generator).to(where.device, dtype)
    passages = torch.rand(2, 70, 32, generator=generator).to(where.device, dtype)
    mask = torch.ones(2, 70, dtype=torch.bool, device=where.device)
    passages[0, [3, 66], 0] = float("-inf")
    mask[0, [3, 66]] = False
    if group:
        passages, mask = (x.unsqueeze(0).expand(2, *x.shape).clone() for x in (passages, mask))
    given, without = (
        differentiate(
            lambda q, p, m=m: kernels.maxsim(q, p, None, m, backend=where.backend),
            (queries, passages), 0,
        )
        for m in (torch.ones_like(mask), mask)
    )  # fmt: skip
    assert_close(given[0] + given[1], without[0] + without[1], 1e-6)
    for m in (None, ~mask):
        alone = passages[..., 3:4, :] if m is None else passages
        scores = kernels.maxsim(queries, alone, None, m, backend=where.backend)
        assert scores[:, 0].eq(float("-inf")).all()
        assert (scores[:, 1].isfinite()).all()


def test_signed_infinities_follow_the_maximum_in_float32() -> None:
    passages = torch.tensor([[[float("-inf")], [2.0]]])
    queries = torch.ones(1, 1, 1)
    assert kernels.maxsim(queries, passages, backend="torch").item() == 2.0
    mask = torch.tensor([[True, False]])
    scores = kernels.maxsim(queries, passages, None, mask, backend="torch")
    assert scores.item() == float("-inf")


@pytest.mark.parametrize("where", [*PLACES, pytest.param(Where("eager", "cpu"), id="eager")])
def test_score_of_empty_passages(where: Where) -> None:
    """0 by default, or what the caller wants; without a gradient either way."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 3, 32, generator=generator).to(where.device)
    passages = torch.randn(2, 2, 5, 32, generator=generator).to(where.device)
    mask = torch.ones(2, 2, 5, dtype=torch.bool, device=where.device)
    mask[0, 1] = False
    packed, bounds = passages[0, 0], torch.tensor([0, 2, 2, 5], device=where.device)
    teacher = torch.full((2, 2, 3, 5), 0.2, device=where.device)
    heads = [torch.zeros(2, 2, 1, n, 16, device=where.device) for n in (3, 5)]

    def scores(name: str, q: Tensor, p: Tensor, **given: float) -> Tensor:
        options = given | {"backend": where.backend}
        if name == "pairs":
            return kernels.maxsim(q, p[0], None, mask[0], **options)
        if name == "group":
            return kernels.maxsim(q, p, None, mask, **options)
        if name == "varlen":
            return kernels.maxsim_varlen(
                q[0], packed, torch.tensor([0, 3], device=where.device), bounds, 3, 3, **options
            )
        if name == "map":
            return kernels.maxsim_token_kl(q, p, teacher, 1.0, None, mask, **options)[0]
        return kernels.maxsim_attention_kl(q, p, *heads, 1.0, None, mask, **options)[0]

    for name in ("pairs", "group", "varlen", "map", "heads"):
        leaves = queries.clone().requires_grad_(), passages.clone().requires_grad_()
        usual, given = scores(name, *leaves), scores(name, *leaves, empty_score=-1e4)
        empty = usual == 0
        assert empty.sum() == {"pairs": 2, "group": 1, "varlen": 1, "map": 1, "heads": 1}[name]
        assert given[empty].eq(-1e4).all()
        assert torch.equal(given[~empty], usual[~empty])
        grads = [torch.autograd.grad(x.sum(), leaves, allow_unused=True) for x in (usual, given)]
        for x, y in zip(*grads, strict=True):
            assert x is y is None or torch.equal(x, y)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_nan_read_their_own_passage_only(where: Where, dtype: torch.dtype) -> None:
    """Behind every tensor lie numbers that would show."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> Tensor:
        buffer = torch.full((3 * count, 32), 1e30, dtype=dtype, device=where.device)
        buffer[:count] = torch.randn(count, 32, generator=generator).to(buffer)
        return buffer[:count].detach()

    queries, passages = tokens(10), tokens(23)
    queries[1, 3] = float("nan")
    bounds = [torch.tensor(x, device=where.device) for x in ([0, 5, 10], [0, 20, 23])]
    functions = [
        lambda q, p: kernels.maxsim_varlen(q, p, *bounds, 5, 20, backend=where.backend),
        lambda q, p: kernels.maxsim(q.view(2, 5, 32), p.view(1, 23, 32), backend=where.backend),
        lambda q, p: kernels.maxsim(
            q.view(2, 5, 32), p[:22].view(2, 1, 11, 32), backend=where.backend
        ),
    ]
    for function in functions:
        leaves = queries.detach().requires_grad_(), passages.detach().requires_grad_()
        scores = function(*leaves)
        assert scores[0].isnan().all()
        assert scores[1].isfinite().all()
        grads = torch.autograd.grad(scores, leaves, torch.ones_like(scores))
        for grad in grads:
            assert grad.nan_to_num(0.0).abs().max() < 1e3
        assert grads[0][5:].isfinite().all()
