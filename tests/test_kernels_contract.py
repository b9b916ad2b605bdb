"""Public signatures, validation, NaN and infinity, and what importing the package needs."""

import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import erniesearch_kernels as kernels
import pytest
import torch
from kernel_cases import PLACES, Where

ROOT = Path(kernels.__file__).parents[2]

SIGNATURES = {
    "maxsim": "(queries: 'Tensor', passages: 'Tensor', query_mask: 'Tensor | None' = None, "
    "passage_mask: 'Tensor | None' = None, *, normalize: 'bool' = False, "
    "save_winners: 'bool' = True, backend: 'str' = 'auto') -> 'Tensor'",
    "maxsim_varlen": "(queries: 'Tensor', passages: 'Tensor', query_cu_seqlens: 'Tensor', "
    "passage_cu_seqlens: 'Tensor', max_query_length: 'int', max_passage_length: 'int', *, "
    "backend: 'str' = 'auto') -> 'Tensor'",
    "maxsim_token_kl": "(queries: 'Tensor', passages: 'Tensor', teacher_map: 'Tensor', "
    "tau: 'float', query_mask: 'Tensor | None' = None, passage_mask: 'Tensor | None' = None, *, "
    "backend: 'str' = 'auto') -> 'tuple[Tensor, Tensor]'",
    "maxsim_attention_kl": "(queries: 'Tensor', passages: 'Tensor', teacher_queries: 'Tensor', "
    "teacher_keys: 'Tensor', tau: 'float', query_mask: 'Tensor | None' = None, "
    "passage_mask: 'Tensor | None' = None, *, scale: 'float | None' = None, "
    "teacher_lse: 'Tensor | None' = None, backend: 'str' = 'auto') -> 'tuple[Tensor, Tensor]'",
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


def test_signed_infinities_follow_the_maximum_in_float32() -> None:
    passages = torch.tensor([[[float("-inf")], [2.0]]])
    queries = torch.ones(1, 1, 1)
    assert kernels.maxsim(queries, passages, backend="torch").item() == 2.0
    mask = torch.tensor([[True, False]])
    scores = kernels.maxsim(queries, passages, None, mask, backend="torch")
    assert scores.item() == float("-inf")
