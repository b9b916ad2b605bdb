"""Random cases of every operation against its float64 reference."""

from collections.abc import Callable

import erniesearch_kernels as kernels
import torch
from erniesearch_kernels.reference import (
    maxsim_attention_kl_reference,
    maxsim_reference,
    maxsim_token_kl_reference,
    maxsim_varlen_reference,
)
from support.kernel_cases import (
    TOLERANCE,
    Where,
    assert_close,
    differentiate,
    poison,
    random_mask,
    random_tokens,
)
from torch import Tensor

FORMS = ["map", "heads", "heads with lse"]


def build_kl(
    where: Where, shape: tuple[int, ...], dtype: torch.dtype, form: str, masks: bool, tau: float,
    seed: int = 0,
) -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., tuple[Tensor, Tensor]], Tensor,
           Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """The function under test, the reference, queries and passages with their masks."""
    num_queries, query_length, group, length, dim, heads, head_dim = shape
    generator = torch.Generator().manual_seed(seed)
    queries = random_tokens(generator, num_queries, query_length, dim, kind="grid", dtype=dtype)
    passages = random_tokens(generator, num_queries, group, length, dim, kind="grid", dtype=dtype)
    query_mask = random_mask(generator, num_queries, query_length) if masks else None
    passage_mask = random_mask(generator, num_queries, group, length) if masks else None
    pairs = (num_queries, group)
    teacher: dict[str, Tensor] = {}
    if form == "map":
        logits = torch.randn(*pairs, query_length, length, generator=generator) * 2
        if passage_mask is not None:
            logits = logits.masked_fill(~passage_mask.unsqueeze(-2), -1e4)
        teacher["teacher_map"] = logits.softmax(-1).to(dtype)
    else:
        for name, count in (("teacher_queries", query_length), ("teacher_keys", length)):
            x = torch.randn(*pairs, heads, count, head_dim, generator=generator)
            teacher[name] = x.to(dtype)
        if form == "heads with lse":
            # More mass than the passage holds, different for every head.
            logits = teacher["teacher_queries"].double() @ teacher["teacher_keys"].double().mT
            extra = torch.rand(*pairs, heads, query_length, generator=generator) * 5
            teacher["teacher_lse"] = ((logits * head_dim**-0.5).logsumexp(-1) + extra).float()
    ours = kernels.maxsim_token_kl if form == "map" else kernels.maxsim_attention_kl
    theirs = maxsim_token_kl_reference if form == "map" else maxsim_attention_kl_reference

    def on_device(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(where.device)

    mine = {name: x.to(where.device) for name, x in teacher.items()}
    wide = {name: x.double() for name, x in teacher.items()}
    return (
        lambda q, p: ours(
            q, p, **mine, tau=tau, query_mask=on_device(query_mask),
            passage_mask=on_device(passage_mask), backend=where.backend,
        ),
        lambda q, p: theirs(
            q, p, **wide, tau=tau, query_mask=query_mask, passage_mask=passage_mask
        ),
        queries, passages, query_mask, passage_mask,
    )  # fmt: skip


def check_kl(
    where: Where, shape: tuple[int, ...], dtype: torch.dtype, form: str, masks: bool,
    tau: float = 1.0, seed: int = 0,
) -> None:  # fmt: skip
    ours, theirs, queries, passages, query_mask, passage_mask = build_kl(
        where, shape, dtype, form, masks, tau, seed
    )
    expected = differentiate(theirs, (queries.double(), passages.double()), seed)
    got = differentiate(
        ours,
        (
            poison(queries, query_mask).to(where.device),
            poison(passages, passage_mask).to(where.device),
        ),
        seed,
    )
    # A GPU's exp and log are approximate.
    tolerance = TOLERANCE[dtype] * (4 if where.device == "cuda" else 1)
    assert_close(got[0] + got[1], expected[0] + expected[1], tolerance)


def check_maxsim(
    where: Where, shape: tuple[int, ...], dtype: torch.dtype, *,
    group: bool = False, masks: bool = False, kind: str = "grid", seed: int = 0, **options: bool,
) -> None:  # fmt: skip
    """Scores and both gradients of one random case."""
    num_queries, query_length, num, length, dim = shape
    generator = torch.Generator().manual_seed(seed)
    prefix = (num_queries, num) if group else (num,)
    queries = random_tokens(generator, num_queries, query_length, dim, kind=kind, dtype=dtype)
    passages = random_tokens(generator, *prefix, length, dim, kind=kind, dtype=dtype)
    query_mask = random_mask(generator, num_queries, query_length) if masks else None
    passage_mask = random_mask(generator, *prefix, length) if masks else None
    normalize = options.get("normalize", False)
    expected = differentiate(
        lambda q, p: maxsim_reference(q, p, query_mask, passage_mask, normalize=normalize),
        (queries.double(), passages.double()), seed,
    )  # fmt: skip
    device = where.device
    on_device = [None if mask is None else mask.to(device) for mask in (query_mask, passage_mask)]
    got = differentiate(
        lambda q, p: kernels.maxsim(q, p, *on_device, backend=where.backend, **options),
        (poison(queries, query_mask).to(device), poison(passages, passage_mask).to(device)), seed,
    )  # fmt: skip
    assert got[0][0].dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert [x.dtype for x in got[1]] == [dtype, dtype]
    assert_close(got[0] + got[1], expected[0] + expected[1], TOLERANCE[dtype])


def check_varlen(
    where: Where, query_lengths: list[int], passage_lengths: list[int], dim: int,
    dtype: torch.dtype = torch.float32, kind: str = "grid", index: torch.dtype = torch.int32,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    queries = random_tokens(generator, sum(query_lengths), dim, kind=kind, dtype=dtype)
    passages = random_tokens(generator, sum(passage_lengths), dim, kind=kind, dtype=dtype)
    bounds = [
        torch.tensor([0, *lengths]).cumsum(0).to(index)
        for lengths in (query_lengths, passage_lengths)
    ]
    expected = differentiate(
        lambda q, p: maxsim_varlen_reference(q, p, *bounds),
        (queries.double(), passages.double()), 0,
    )  # fmt: skip
    longest = max(1, *query_lengths), max(1, *passage_lengths)
    device = where.device
    got = differentiate(
        lambda q, p: kernels.maxsim_varlen(
            q, p, *(b.to(device) for b in bounds), *longest, backend=where.backend
        ),
        (queries.to(device), passages.to(device)), 0,
    )  # fmt: skip
    assert_close(got[0] + got[1], expected[0] + expected[1], TOLERANCE[dtype])
