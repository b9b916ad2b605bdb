"""Every operation of this package in plain PyTorch: the one reference of tests and benchmarks.

Shapes (``True`` in a mask is a real token; a missing mask means that every token is real):

====================  ==========================================================================
queries               ``[num_queries, query_length, dim]``
passages              ``[num_passages, passage_length, dim]`` (every query meets every passage)
                      or ``[num_queries, group_size, passage_length, dim]`` (own group only)
scores                ``[num_queries, num_passages]`` or ``[num_queries, group_size]``
====================  ==========================================================================

Formulas, with the similarity ``s[i,j,a,t] = <queries[i,a], passages[j,t]>``::

    score[i,j] = sum_a max_t s[i,j,a,t]                    a, t over real tokens
    kl[i,j]    = mean_a sum_t p[a,t] * (log p[a,t] - log softmax_t(s[a,:] / tau)[t])

A query without real tokens scores 0 and has KL 0; so does a passage without real tokens. Neither
gives or receives a gradient. ``float64`` stays ``float64``, everything else is computed in
``float32``. These functions hold ``[.., query_length, passage_length]`` similarities and are
differentiated by autograd: small inputs only.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

NORM_EPS = 1e-12  # the same floor as torch.nn.functional.normalize


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which every backend accumulates and returns scores."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit(x: Tensor) -> Tensor:
    """``x / max(|x|, NORM_EPS)`` over the last dimension."""
    return x / x.norm(dim=-1, keepdim=True).clamp_min(NORM_EPS)


def zero_masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Tokens ``[..., length, dim]`` with zeros where ``mask`` ``[..., length]`` is False.

    A selection, not a product, so that a NaN in a padding token stays out of everything.
    """
    return x if mask is None else torch.where(mask.unsqueeze(-1), x, 0.0)


def similarities(
    queries: Tensor,
    passages: Tensor,
    query_mask: Tensor | None = None,
    passage_mask: Tensor | None = None,
    *,
    normalize: bool = False,
) -> Tensor:
    """All token similarities, ``[num_queries, num_passages, query_length, passage_length]``.

    Masked tokens count as zero vectors here; whoever reduces the result applies the masks.
    """
    dtype = compute_dtype(queries.dtype)
    queries = zero_masked(queries.to(dtype), query_mask)
    passages = zero_masked(passages.to(dtype), passage_mask)
    if normalize:
        queries, passages = unit(queries), unit(passages)
    with torch.autocast(queries.device.type, enabled=False):
        if passages.dim() == 4:
            return torch.einsum("iad,igtd->igat", queries, passages)
        return torch.einsum("iad,jtd->ijat", queries, passages)


def _passage_mask_4d(passage_mask: Tensor | None, similarity: Tensor) -> Tensor:
    """The passage mask, broadcastable to ``[num_queries, num_passages, query, passage]``."""
    if passage_mask is None:
        return torch.ones_like(similarity[:1, :1, :1], dtype=torch.bool)
    return passage_mask.unsqueeze(-2) if passage_mask.dim() == 3 else passage_mask[None, :, None]


def _sum_of_maxima(similarity: Tensor, query_mask: Tensor | None, real: Tensor) -> Tensor:
    # max over one dimension (not amax): the whole gradient goes to one winner, the first.
    best = similarity.masked_fill(~real, float("-inf")).max(dim=-1).values
    best = torch.where(real.any(-1), best, 0.0)
    if query_mask is not None:
        best = torch.where(query_mask.unsqueeze(1), best, 0.0)
    return best.sum(-1)


def maxsim_reference(
    queries: Tensor,
    passages: Tensor,
    query_mask: Tensor | None = None,
    passage_mask: Tensor | None = None,
    *,
    normalize: bool = False,
) -> Tensor:
    """``score = sum_a max_t <q_a, p_t>``; shapes as in the module's docstring."""
    similarity = similarities(queries, passages, query_mask, passage_mask, normalize=normalize)
    return _sum_of_maxima(similarity, query_mask, _passage_mask_4d(passage_mask, similarity))


def maxsim_varlen_reference(
    queries: Tensor, passages: Tensor, query_cu_seqlens: Tensor, passage_cu_seqlens: Tensor
) -> Tensor:
    """MaxSim on packed tokens ``[total_tokens, dim]``; returns ``[num_queries, num_passages]``.

    Query ``i`` owns rows ``query_cu_seqlens[i]`` to ``query_cu_seqlens[i + 1]``.
    """
    dtype = compute_dtype(queries.dtype)
    query_bounds, passage_bounds = query_cu_seqlens.tolist(), passage_cu_seqlens.tolist()
    rows = []
    for q0, q1 in pairwise(query_bounds):
        row = []
        for p0, p1 in pairwise(passage_bounds):
            query, passage = queries[q0:q1].to(dtype), passages[p0:p1].to(dtype)
            if q1 > q0 and p1 > p0:
                row.append((query @ passage.T).max(dim=-1).values.sum())
            else:
                row.append((query.sum() + passage.sum()) * 0.0)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def _token_kl(
    similarity: Tensor, teacher: Tensor, tau: float, query_mask: Tensor | None, real: Tensor
) -> Tensor:
    """KL of every pair ``[num_queries, group_size]`` from both maps ``[.., query, passage]``."""
    logits = (similarity / tau).masked_fill(~real, float("-inf"))
    alive = real.any(-1, keepdim=True)
    log_student = torch.where(alive, logits, 0.0).log_softmax(-1)
    pairs = real if query_mask is None else real & query_mask[:, None, :, None]
    teacher = torch.where(pairs, teacher, 0.0)
    row = (torch.xlogy(teacher, teacher) - teacher * torch.where(pairs, log_student, 0.0)).sum(-1)
    if query_mask is None:
        return row.mean(-1)
    return row.sum(-1) / query_mask.sum(-1, keepdim=True).clamp_min(1)


def maxsim_token_kl_reference(
    queries: Tensor,
    passages: Tensor,
    teacher_map: Tensor,
    tau: float,
    query_mask: Tensor | None = None,
    passage_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(scores, kl)`` for the own group; ``teacher_map`` ``[num_queries, group, query, passage]``.

    The map is used as it is (no renormalisation) and receives no gradient.
    """
    similarity = similarities(queries, passages, query_mask, passage_mask)
    real = _passage_mask_4d(passage_mask, similarity)
    teacher = teacher_map.detach().to(similarity.dtype)
    kl = _token_kl(similarity, teacher, tau, query_mask, real)
    return _sum_of_maxima(similarity, query_mask, real), kl


def teacher_attention_map(
    teacher_queries: Tensor,
    teacher_keys: Tensor,
    scale: float,
    query_mask: Tensor | None = None,
    passage_mask: Tensor | None = None,
    teacher_lse: Tensor | None = None,
) -> Tensor:
    """Head mean of the teacher's attention from query to passage tokens, renormalised per row.

    ``a[h,s,t] = scale * <teacher_queries[h,s], teacher_keys[h,t]>``::

        with teacher_lse     p[s,t] ~ sum_h exp(a[h,s,t] - teacher_lse[h,s])
        without              p[s,t] ~ sum_h softmax_t(a[h,s,:])[t]      (t over real tokens)

    ``teacher_lse`` is the log-sum-exp of a head's *whole* attention row. The two differ: with it,
    a head that looks mostly at other tokens ([CLS], the query itself) weighs less in the mean.
    Shapes: ``[num_queries, group, heads, query, head_dim]``, keys with passage tokens,
    ``teacher_lse [num_queries, group, heads, query]``, result ``[num_queries, group, query,
    passage]``. Rows without a real passage token are zero.
    """
    dtype = compute_dtype(teacher_queries.dtype)
    query_mask5 = None if query_mask is None else query_mask[:, None, None]
    keys_mask = None if passage_mask is None else passage_mask.unsqueeze(2)
    teacher_queries = zero_masked(teacher_queries.detach().to(dtype), query_mask5)
    teacher_keys = zero_masked(teacher_keys.detach().to(dtype), keys_mask)
    with torch.autocast(teacher_queries.device.type, enabled=False):
        logits = teacher_queries @ teacher_keys.transpose(-1, -2) * scale
    if keys_mask is not None:
        logits = logits.masked_fill(~keys_mask.unsqueeze(-2), float("-inf"))
    if teacher_lse is None:
        lse = logits.logsumexp(-1)
    else:
        lse = teacher_lse.detach().to(dtype)
        if query_mask5 is not None:
            lse = torch.where(query_mask5, lse, 0.0)
    # A passage without real tokens has only -inf: keep it from becoming -inf - (-inf).
    log_share = logits - torch.where(lse.isneginf(), 0.0, lse).unsqueeze(-1)
    log_mean = log_share.logsumexp(2)
    # softmax, not a quotient of exponentials: the shares may all be tiny.
    alive = ~log_mean.isneginf().all(-1, keepdim=True)
    return torch.where(alive, torch.where(alive, log_mean, 0.0).softmax(-1), 0.0)


def maxsim_attention_kl_reference(
    queries: Tensor,
    passages: Tensor,
    teacher_queries: Tensor,
    teacher_keys: Tensor,
    tau: float,
    query_mask: Tensor | None = None,
    passage_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    teacher_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``maxsim_token_kl_reference`` with the map of ``teacher_attention_map``."""
    scale = teacher_queries.shape[-1] ** -0.5 if scale is None else scale
    teacher_map = teacher_attention_map(
        teacher_queries, teacher_keys, scale, query_mask, passage_mask, teacher_lse
    )
    return maxsim_token_kl_reference(queries, passages, teacher_map, tau, query_mask, passage_mask)
