"""MaxSim with a KL term over the same similarities, in plain PyTorch, a few queries at a time.

Per pair and real query token ``a``, with ``x = s / tau`` and the teacher's row ``p``::

    kl[a]     = sum_t p log p - sum_t p x + (sum_t p) * logsumexp_t(x)
    d s[a, t] = g_kl / (num_query_tokens * tau) * ((sum_t p) * softmax_t(x) - p)
                + g_score * [t is the winner of a]

Kept for the backward are winners and ``logsumexp``; and, where queries have at most ``dim`` tokens,
the residual ``(sum_t p) * softmax_t(x) - p``: one number for each pair of tokens, no more than the
passages have. Longer queries' similarities and teacher maps are computed again instead.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from erniesearch_kernels.reference import compute_dtype, zero_masked
from erniesearch_kernels.torch_maxsim import winner_dtype

# Similarities (times the teacher's heads) in flight, in elements: a fraction of a core's cache.
BLOCK_ELEMENTS = 1 << 17

MASKED = -1e30
"""Logit of a pair of tokens that is none: its probability is 0, and 0 times it is 0, without the
NaN that -inf would make of rows without any."""

TeacherMap = Callable[[slice], Tensor]  # some queries -> their maps [num, group, query, passage]


def given_map(teacher_map: Tensor, dtype: torch.dtype) -> TeacherMap:
    """The teacher's map was handed in."""
    return lambda own: teacher_map[own].to(dtype)


def rebuilt_map(
    teacher_queries: Tensor, teacher_keys: Tensor, teacher_lse: Tensor | None, scale: float,
    passage_mask: Tensor | None,
) -> TeacherMap:  # fmt: skip
    """The teacher's map is rebuilt from its last layer's projections.

    Rows of masked query tokens, and of passages without real tokens, hold anything.
    """
    dtype = compute_dtype(teacher_queries.dtype)

    def build(own: slice) -> Tensor:
        keys = teacher_keys[own].to(dtype)
        logits = (teacher_queries[own].to(dtype) * scale) @ keys.transpose(-1, -2)
        if passage_mask is not None:
            logits.masked_fill_(~passage_mask[own, :, None, None, :], float("-inf"))
        if teacher_lse is None:
            return logits.softmax(-1).mean(2)
        logits.sub_(teacher_lse[own].to(dtype).unsqueeze(-1))
        # The shares of all heads may be tiny: scale by the row's largest before normalising.
        weights = logits.sub_(logits.amax((2, -1), keepdim=True)).exp_().sum(2)
        return weights.div_(weights.sum(-1, keepdim=True))

    return build


def _blocks(queries: Tensor, passages: Tensor, heads: int) -> list[slice]:
    per_query = passages.shape[1] * passages.shape[2] * queries.shape[1] * heads
    step = max(1, BLOCK_ELEMENTS // max(1, per_query))
    return [slice(i, min(i + step, len(queries))) for i in range(0, len(queries), step)]


def _tokens(
    queries: Tensor, passages: Tensor, query_mask: Tensor | None, passage_mask: Tensor | None,
    own: slice,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Own queries ``[num, query, dim]`` and passages ``[num, group · passage, dim]``, which meet in
    one product, without what is masked; which pairs of tokens ``[num, query, group, passage]`` are
    real, and which query tokens ``[num, query, group]`` have any (None: all)."""
    dtype = compute_dtype(queries.dtype)
    query, passage = queries[own].to(dtype), passages[own].to(dtype)
    pairs = rows = None
    if query_mask is not None:
        query = zero_masked(query, query_mask[own])
        pairs, rows = query_mask[own, :, None, None], query_mask[own, :, None]
    if passage_mask is not None:
        passage = zero_masked(passage, passage_mask[own])
        real, some = passage_mask[own, None], passage_mask[own].any(-1)[:, None]
        pairs = real if pairs is None else pairs & real
        rows = some if rows is None else rows & some
    return query, passage.flatten(1, 2), pairs, rows


def _only(pairs: Tensor | None, x: Tensor, other: float) -> Tensor:
    return x if pairs is None else torch.where(pairs, x, other)


def residuals_shape(queries: Tensor, passages: Tensor) -> tuple[int, ...]:
    """Of the residuals that the backward gets; ``(0,)`` where it computes them again."""
    num_queries, length, dim = queries.shape
    return (num_queries, length, *passages.shape[1:3]) if length <= dim else (0,)


def _num_query_tokens(queries: Tensor, query_mask: Tensor | None) -> Tensor:
    """Real tokens per query, at least one, ``[num_queries, 1]``."""
    if query_mask is None:
        return torch.full((len(queries), 1), queries.shape[1], device=queries.device)
    return query_mask.sum(-1, keepdim=True).clamp_min(1)


def token_kl_forward(
    queries: Tensor, passages: Tensor, teacher: TeacherMap, heads: int, tau: float,
    query_mask: Tensor | None, passage_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Scores, KL ``[num_queries, group]``; winners, row LSE ``[num_queries, group, query]``;
    residuals ``[num_queries, query, group, passage]``, empty where they are not kept."""
    dtype, device = compute_dtype(queries.dtype), queries.device
    num_queries, query_length = queries.shape[:2]
    group, length = passages.shape[1:3]
    scores = torch.zeros(num_queries, group, dtype=dtype, device=device)
    kl = torch.zeros_like(scores)
    lse = torch.zeros(num_queries, group, query_length, dtype=dtype, device=device)
    winners = torch.zeros(lse.shape, dtype=winner_dtype(length), device=device)
    shape = residuals_shape(queries, passages)
    residuals = torch.empty(shape, dtype=dtype, device=device)
    for own in _blocks(queries, passages, heads):
        query, passage, pairs, rows = _tokens(queries, passages, query_mask, passage_mask, own)
        logits = (query @ passage.mT).mul_(1 / tau).unflatten(-1, (group, length))
        logits = _only(pairs, logits, MASKED)
        best, first = logits.max(-1)  # the first of equal ones, as in torch_maxsim
        winners[own] = _only(rows, first, 0).mT
        scores[own] = _only(rows, best * tau, 0.0).sum(1)
        student = logits.softmax(-1)
        row_lse = _only(rows, best - student.amax(-1).log_(), 0.0)  # its largest is 1 / sum
        lse[own] = row_lse.mT
        p = _only(pairs, teacher(own).transpose(1, 2), 0.0)
        mass = p.sum(-1)
        if residuals.numel():
            torch.sub(student.mul_(mass.unsqueeze(-1)), p, out=residuals[own])
        # x log x with 0 at 0; the smallest normal number stands in for 0 in the logarithm.
        terms = p.clamp_min(torch.finfo(dtype).tiny).log_().sub_(logits).mul_(p)
        kl[own] = (terms.sum(-1) + mass * row_lse).sum(1)
    return scores, kl / _num_query_tokens(queries, query_mask), winners, lse, residuals


def token_kl_backward(
    grad_scores: Tensor, grad_kl: Tensor, queries: Tensor, passages: Tensor,
    teacher: TeacherMap, heads: int, tau: float,
    query_mask: Tensor | None, passage_mask: Tensor | None, winners: Tensor, lse: Tensor,
    residuals: Tensor, need_queries: bool, need_passages: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of ``queries`` and ``passages``, in the compute dtype."""
    dtype = compute_dtype(queries.dtype)
    grad_scores = grad_scores.to(dtype)
    grad_kl = grad_kl.to(dtype) / _num_query_tokens(queries, query_mask) / tau
    grad_queries, grad_passages = (
        torch.empty(x.shape, dtype=dtype, device=x.device) if needed else None
        for x, needed in ((queries, need_queries), (passages, need_passages))
    )
    kept = residuals.numel() > 0
    for own in _blocks(queries, passages, 1 if kept else heads):
        query, passage, pairs, rows = _tokens(queries, passages, query_mask, passage_mask, own)
        of_kl = grad_kl[own, None, :, None]
        if kept:
            grad = residuals[own] * of_kl
        else:
            student = (query @ passage.mT).unflatten(-1, passages.shape[1:3])
            student.mul_(1 / tau).sub_(lse[own].mT.unsqueeze(-1)).exp_()
            p = _only(pairs, teacher(own).transpose(1, 2), 0.0)
            grad = student.mul_(p.sum(-1, keepdim=True)).sub_(p).mul_(of_kl)
            grad = _only(pairs, grad, 0.0)
        of_winners = _only(rows, grad_scores[own, None].expand(grad.shape[:-1]), 0.0)
        grad.scatter_add_(-1, winners[own].mT.long().unsqueeze(-1), of_winners.unsqueeze(-1))
        grad = grad.flatten(2)
        if grad_queries is not None:
            torch.bmm(grad, passage, out=grad_queries[own])
        if grad_passages is not None:
            torch.bmm(grad.mT, query, out=grad_passages[own].flatten(1, 2))
    return grad_queries, grad_passages
