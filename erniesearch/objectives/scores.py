"""Scores of the three models, and which of them count.

s_de(q,p) = <u_q, u_p> / tau_de
s_li(q,p) = sum over query tokens i of max over passage tokens j of <E_qi, E_pj> / tau_li
"""

import math
from typing import Literal

import torch
from erniesearch_kernels import maxsim, maxsim_attention_kl
from torch import Tensor
from torch.nn import functional as F

from erniesearch import distributed
from erniesearch.objectives.exchange import TokenGather
from erniesearch.objectives.outputs import TeacherAttention
from erniesearch.objectives.ring import ring_scores

Kernels = Literal["auto", "triton", "torch", "eager"]
Exchange = Literal["all_gather", "ring"]


def dual_encoder_scores(query_vectors: Tensor, passage_vectors: Tensor, tau: float) -> Tensor:
    """``[B, hidden]`` against ``[P, hidden]`` to ``[B, P]``, or against every query's own group
    ``[B, G, hidden]`` to ``[B, G]``."""
    if passage_vectors.dim() == 3:
        return (passage_vectors @ query_vectors.unsqueeze(-1)).squeeze(-1) / tau
    return query_vectors @ passage_vectors.T / tau


def prefix(vectors: Tensor, dim: int, normalize: bool) -> Tensor:
    """The first ``dim`` dimensions of ``[…, hidden]``, of length 1 again where the whole have it
    (Matryoshka representations, Kusupati et al. 2022, arXiv 2205.13147)."""
    cut = vectors[..., :dim]
    return F.normalize(cut, dim=-1) if normalize else cut


def late_interaction_scores(
    query_tokens: Tensor,
    query_mask: Tensor,
    passage_tokens: Tensor,
    passage_mask: Tensor,
    tau: float,
    kernels: Kernels = "auto",
) -> Tensor:
    """``[B, Lq, dim]`` against ``[P, Lp, dim]`` to ``[B, P]``, or against every query's own group
    ``[B, G, Lp, dim]`` to ``[B, G]``; masks are True on real tokens."""
    scores = maxsim(query_tokens, passage_tokens, query_mask, passage_mask, backend=kernels)
    return scores / tau


def cross_batch_late_interaction_scores(
    query_tokens: Tensor,
    query_mask: Tensor,
    passage_tokens: Tensor,
    passage_mask: Tensor,
    gather: TokenGather,
    tau: float,
    kernels: Kernels = "auto",
    exchange: Exchange = "all_gather",
) -> Tensor:
    """This rank's queries against every rank's passages, ``[B, P]``, in rank order, with gradient.

    ``gather`` is that of ``passage_mask``. Every rank has as many passages.
    ``all_gather`` holds all P passages' tokens at once; ``ring`` holds two ranks' at a time, for
    more time and more bytes on the wire (:func:`erniesearch.objectives.ring.ring_scores`).
    """
    if exchange == "all_gather" or distributed.world_size() == 1:
        passage_tokens, passage_mask = gather.take(passage_tokens, passage_mask)
        return late_interaction_scores(
            query_tokens, query_mask, passage_tokens, passage_mask, tau, kernels
        )

    def score(queries: Tensor, passages: Tensor, mask: Tensor) -> Tensor:
        return late_interaction_scores(queries, query_mask, passages, mask, tau, kernels)

    return ring_scores(score, query_tokens, passage_tokens, gather)


def attention_kl(
    query_tokens: Tensor,
    query_mask: Tensor,
    passage_tokens: Tensor,
    passage_mask: Tensor,
    teacher: TeacherAttention,
    tau: float,
    kernels: Kernels = "auto",
) -> Tensor:
    """Mean over the group's pairs and query tokens i of

        KL(A_i ‖ softmax over j of <E_qi, E_pj>/tau)

    where A_i is the head mean of the teacher's last-layer attention from query token i, cut to the
    passage's tokens and renormalised. ``passage_tokens`` ``[B·G, Lp, dim]`` and the teacher's
    tensors ``[B·G, heads, …]`` hold each query's own group; masks exclude [CLS] and [SEP]. Pairs
    without a query or passage token left count as 0.
    """
    num_queries = query_tokens.shape[0]

    def grouped(tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (num_queries, -1))

    _, divergence = maxsim_attention_kl(
        query_tokens, grouped(passage_tokens), grouped(teacher.queries), grouped(teacher.keys),
        tau, query_mask, grouped(passage_mask), teacher_lse=grouped(teacher.lse), backend=kernels,
    )  # fmt: skip
    return divergence.mean()


def attention_map_kl(
    queries: Tensor,
    keys: Tensor,
    query_mask: Tensor,
    key_mask: Tensor,
    teacher_queries: Tensor,
    teacher_keys: Tensor,
    kernels: Kernels = "auto",
) -> Tensor:
    """One direction of the virtual interaction (after VIRT, Li et al. 2022): the mean over pairs
    (x, y), heads h and tokens i of x of

        KL(A_hi ‖ softmax over j of <Q_hi, K_hj>/sqrt(d))
        A_hi = softmax over j of <Q'_hi, K'_hj>/sqrt(d')

    with j over the tokens of y. Q' and K' are the teacher's projections of a pair that it read as
    one; Q and K the student's, of x and of y, which it encoded apart. To the operator every head of
    a pair is a pair with one head, so that no map is held. Cut to y and renormalised, one head's
    attention is the softmax over y alone.

    Args:
        queries, keys: ``[n, heads, Lx, d]`` and ``[n·k, heads, Ly, d]``, k texts y for each x.
        query_mask, key_mask: ``[n, Lx]`` and ``[n·k, Ly]``, False on what takes no part. A pair
            without a token on either side counts as 0.
        teacher_queries, teacher_keys: ``[n·k, heads, L, d']``; they receive no gradient.
    """
    num_queries, heads = queries.shape[:2]

    def grouped(tensor: Tensor) -> Tensor:  # [n·k, heads, …] to [n·heads, k, …]
        return tensor.unflatten(0, (num_queries, -1)).transpose(1, 2).flatten(0, 1)

    _, divergence = maxsim_attention_kl(
        queries.flatten(0, 1), grouped(keys),
        grouped(teacher_queries).unsqueeze(2), grouped(teacher_keys).unsqueeze(2),
        math.sqrt(queries.shape[-1]), query_mask.repeat_interleave(heads, 0),
        grouped(key_mask.unsqueeze(1).expand(-1, heads, -1)), backend=kernels,
    )  # fmt: skip
    return divergence.mean()


@torch.no_grad()
def candidate_mask(relevant_index: Tensor, passage_index: Tensor, labels: Tensor) -> Tensor:
    """Which passages count as candidates of each query: ``[B, P]``, False for false negatives;
    ``[B, G]`` where each query has passages of its own.

    A passage that the qrels call relevant to the query is no negative of it, whichever query's
    group it came with; nor is another copy of its positive. The positive itself stays.

    Args:
        relevant_index: ``[B, R]`` corpus positions relevant to each query, -1 filled up.
        passage_index: ``[P]`` corpus position of each passage, or ``[B, G]`` of each query's.
        labels: ``[B]`` column of each query's positive.
    """
    if passage_index.dim() == 2:
        passage_index = passage_index.unsqueeze(1)
    relevant = (relevant_index[:, :, None] == passage_index).any(1)
    return (~relevant).scatter(1, labels[:, None], True)


def own_group(scores: Tensor, labels: Tensor, group_size: int) -> Tensor:
    """Columns of each query's own group, ``[B, P]`` to ``[B, G]``; the positive stands first."""
    columns = labels[:, None] + torch.arange(group_size, device=scores.device)
    return scores.gather(1, columns)
