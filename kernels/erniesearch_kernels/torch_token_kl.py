"""MaxSim with a KL term over the same similarities, in plain PyTorch, a few queries at a time.

Per pair and real query token ``a``, with ``x = s / tau`` and the teacher's row ``p``::

    kl[a]     = sum_t p log p - sum_t p x + (sum_t p) * logsumexp_t(x)
    d s[a, t] = g_kl / (num_query_tokens * tau) * ((sum_t p) * softmax_t(x) - p)
                + g_score * [t is the winner of a]

Only winners and ``logsumexp`` are kept for the backward, which computes the similarities again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from erniesearch_kernels.reference import compute_dtype, teacher_attention_map, zero_masked
from erniesearch_kernels.torch_backend import BLOCK_ELEMENTS, winner_dtype

TeacherMap = Callable[[slice], Tensor]  # some queries -> their maps [num, group, query, passage]


def given_map(teacher_map: Tensor, dtype: torch.dtype) -> TeacherMap:
    """The teacher's map was handed in."""
    return lambda own: teacher_map[own].to(dtype)


def rebuilt_map(
    teacher_queries: Tensor, teacher_keys: Tensor, teacher_lse: Tensor | None, scale: float,
    query_mask: Tensor | None, passage_mask: Tensor | None,
) -> TeacherMap:  # fmt: skip
    """The teacher's map is rebuilt from its last layer's projections."""

    def build(own: slice) -> Tensor:
        return teacher_attention_map(
            teacher_queries[own], teacher_keys[own], scale,
            None if query_mask is None else query_mask[own],
            None if passage_mask is None else passage_mask[own],
            None if teacher_lse is None else teacher_lse[own],
        )  # fmt: skip

    return build


def _blocks(queries: Tensor, passages: Tensor, heads: int) -> list[slice]:
    per_query = passages.shape[1] * passages.shape[2] * queries.shape[1] * heads
    step = max(1, BLOCK_ELEMENTS // per_query)
    return [slice(i, min(i + step, len(queries))) for i in range(0, len(queries), step)]


def _tokens(
    queries: Tensor, passages: Tensor, query_mask: Tensor | None, passage_mask: Tensor | None,
    own: slice,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Own queries and passages without what is masked, and the real pairs of tokens."""
    dtype = compute_dtype(queries.dtype)
    query, passage = queries[own].to(dtype), passages[own].to(dtype)
    pairs = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=query.device)
    if query_mask is not None:
        query = zero_masked(query, query_mask[own])
        pairs = pairs & query_mask[own, None, :, None]
    if passage_mask is not None:
        passage = zero_masked(passage, passage_mask[own])
        pairs = pairs & passage_mask[own, :, None, :]
    return query, passage, pairs


def _num_query_tokens(queries: Tensor, query_mask: Tensor | None) -> Tensor:
    """Real tokens per query, at least one, ``[num_queries, 1]``."""
    if query_mask is None:
        return torch.full((len(queries), 1), queries.shape[1], device=queries.device)
    return query_mask.sum(-1, keepdim=True).clamp_min(1)


def token_kl_forward(
    queries: Tensor, passages: Tensor, teacher: TeacherMap, heads: int, tau: float,
    query_mask: Tensor | None, passage_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Scores and KL ``[num_queries, group]``, winners and row LSE ``[num_queries, group, query]``."""
    dtype, device = compute_dtype(queries.dtype), queries.device
    num_queries, query_length = queries.shape[:2]
    group, length = passages.shape[1:3]
    scores = torch.zeros(num_queries, group, dtype=dtype, device=device)
    kl = torch.zeros_like(scores)
    lse = torch.zeros(num_queries, group, query_length, dtype=dtype, device=device)
    winners = torch.zeros(lse.shape, dtype=winner_dtype(length), device=device)
    for own in _blocks(queries, passages, heads):
        query, passage, pairs = _tokens(queries, passages, query_mask, passage_mask, own)
        similarity = (query.unsqueeze(1) @ passage.transpose(-1, -2)).masked_fill_(
            ~pairs, float("-inf")
        )
        rows = pairs.any(-1)
        best, index = similarity.max(-1)
        scores[own] = torch.where(rows, best, 0.0).sum(-1)
        winners[own] = index
        row_lse = torch.where(rows, (similarity / tau).logsumexp(-1), 0.0)
        lse[own] = row_lse
        p = torch.where(pairs, teacher(own), 0.0)
        log_student = torch.where(pairs, similarity / tau - row_lse.unsqueeze(-1), 0.0)
        kl[own] = (torch.xlogy(p, p) - p * log_student).sum((-1, -2))
    return scores, kl / _num_query_tokens(queries, query_mask), winners, lse


def token_kl_backward(
    grad_scores: Tensor, grad_kl: Tensor, queries: Tensor, passages: Tensor,
    teacher: TeacherMap, heads: int, tau: float,
    query_mask: Tensor | None, passage_mask: Tensor | None, winners: Tensor, lse: Tensor,
    need_queries: bool, need_passages: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of ``queries`` and ``passages``, in the compute dtype."""
    dtype = compute_dtype(queries.dtype)
    grad_scores = grad_scores.to(dtype)
    grad_kl = grad_kl.to(dtype) / _num_query_tokens(queries, query_mask) / tau
    grad_queries = torch.empty_like(queries, dtype=dtype) if need_queries else None
    grad_passages = torch.empty_like(passages, dtype=dtype) if need_passages else None
    for own in _blocks(queries, passages, heads):
        query, passage, pairs = _tokens(queries, passages, query_mask, passage_mask, own)
        similarity = query.unsqueeze(1) @ passage.transpose(-1, -2)
        p = torch.where(pairs, teacher(own), 0.0)
        student = torch.where(pairs, similarity / tau - lse[own].unsqueeze(-1), float("-inf")).exp()
        grad = (p.sum(-1, keepdim=True) * student - p) * grad_kl[own, :, None, None]
        grad.scatter_add_(
            -1, winners[own].long().unsqueeze(-1),
            grad_scores[own, :, None, None].expand(*grad.shape[:-1], 1),
        )  # fmt: skip
        grad = torch.where(pairs, grad, 0.0)
        if grad_queries is not None:
            grad_queries[own] = (grad @ passage).sum(1)
        if grad_passages is not None:
            grad_passages[own] = grad.transpose(-1, -2) @ query.unsqueeze(1)
    return grad_queries, grad_passages
