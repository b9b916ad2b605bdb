"""MaxSim in plain PyTorch operations, for CPUs (and GPUs without Triton).

Nothing of the size ``[num_queries, num_passages, query_length, passage_length]`` ever exists: the
forward takes a few passages at a time and keeps one small integer per (passage, query token), the
winner; the backward touches only winners::

    d queries[i,a]  = sum_j grad[i,j] * passages[j, winner[i,j,a]]
    d passages[j,t] = sum_(i,a: winner[i,j,a] = t) grad[i,j] * queries[i,a]

Both sums are ``embedding_bag`` calls: no scatter, no temporary of one row per winner, and the same
order of additions in every run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from erniesearch_kernels.reference import NORM_EPS, compute_dtype, zero_masked

# Similarities in flight, in elements. 2 MB of float32: about a core's share of the caches.
BLOCK_ELEMENTS = 1 << 19
# Winners handled at a time in the backward.
BACKWARD_ELEMENTS = 1 << 16
# Passage tokens whose maximum is taken together before the winner is looked for (see below).
GROUP = 8


def winner_dtype(passage_length: int) -> torch.dtype:
    """The smallest integer that holds a token's position in its passage."""
    if passage_length <= 1 << 8:
        return torch.uint8
    return torch.int16 if passage_length <= 1 << 15 else torch.int32


def _first_maximum(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x.max(dim=1, keepdim=True)`` in vectorised steps; the index as a float. Overwrites ``x``.

    Where all are NaN the index is the last.
    """
    num = x.shape[1]
    best = x.amax(1, keepdim=True)
    countdown = torch.arange(num, 0, -1, dtype=x.dtype, device=x.device).view(1, num, 1)
    index = x.eq_(best).mul_(countdown).amax(1, keepdim=True).neg_().add_(num)
    return best, index.clamp_(max=num - 1)


def max_with_index(x: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum and first maximal index over dimension 1 of ``[blocks, length, columns]``.

    ``length`` is a multiple of ``GROUP``. The same result as ``x.max(dim=1)``, which is scalar code
    on a CPU: here one vectorised pass takes the maxima of groups of ``GROUP``, and only the winning
    group is looked at again. The index is a float.
    """
    groups = x.unflatten(1, (-1, GROUP))
    best, group = _first_maximum(groups.amax(2))
    chosen = group.long().unsqueeze(2).expand(-1, -1, GROUP, -1)
    _, offset = _first_maximum(groups.gather(1, chosen).squeeze(1))
    return best.squeeze(1), group.mul_(GROUP).add_(offset).squeeze(1)


def _whole_groups(length: int) -> int:
    return -(-length // GROUP) * GROUP


@dataclass(frozen=True)
class PackedTokens:
    """Token sequences of several lengths in one matrix ``rows`` ``[total, dim]``.

    Sequence ``i`` consists of ``lengths[i]`` real tokens. Its ``k``-th one is row ``starts[i] + k``
    of ``token_rows`` (a list of rows), or that row itself if ``token_rows`` is None. Positions are
    counted from row ``origins[i]``.
    """

    rows: Tensor
    origins: Tensor
    starts: Tensor
    lengths: Tensor
    token_rows: Tensor | None

    @staticmethod
    def from_padded(x: Tensor, mask: Tensor | None) -> PackedTokens:
        """From ``[num, length, dim]`` and ``[num, length]``."""
        num, length = x.shape[:2]
        origins = torch.arange(num, device=x.device) * length
        rows = x.reshape(num * length, x.shape[-1])
        if mask is None:
            return PackedTokens(rows, origins, origins, torch.full_like(origins, length), None)
        lengths = mask.sum(-1)
        token_rows = mask.flatten().nonzero().squeeze(-1)
        return PackedTokens(rows, origins, lengths.cumsum(0) - lengths, lengths, token_rows)

    @staticmethod
    def from_cu_seqlens(x: Tensor, cu_seqlens: Tensor) -> PackedTokens:
        """From packed tokens ``[total, dim]`` and their bounds ``[num + 1]``."""
        bounds = cu_seqlens.long()
        return PackedTokens(x, bounds[:-1], bounds[:-1], bounds[1:] - bounds[:-1], None)


def _passage_block(
    passages: PackedTokens, first: int, last: int, length: int, dtype: torch.dtype,
    consecutive: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Tokens of passages ``first..last``, ``[num * length, dim]``; their rows ``[num, length]``.

    Shorter passages repeat their last real token, which changes no maximum and wins no tie. The
    rows are None where they are ``consecutive``.
    """
    starts, num = passages.starts[first:last, None], last - first
    if consecutive:
        begin = int(starts[0])
        return passages.rows[begin : begin + num * length].to(dtype), None
    offsets = torch.arange(length, device=starts.device)[None]
    index = starts + torch.minimum(offsets, passages.lengths[first:last, None] - 1)
    if passages.token_rows is not None:
        index = passages.token_rows[index.clamp_(0, len(passages.token_rows) - 1)]
    else:
        index.clamp_(0, len(passages.rows) - 1)
    return passages.rows[index.flatten()].to(dtype), index


def packed_forward(
    queries: Tensor, slots: Tensor | None, num_queries: int, query_length: int,
    passages: PackedTokens, max_passage_length: int, save_winners: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scores ``[num_queries, num_passages]`` and winners ``[num_passages, num_rows]``.

    ``queries [num_rows, dim]`` are real query tokens in the compute dtype; row ``r`` is token
    ``slots[r] % query_length`` of query ``slots[r] // query_length`` (None: ``slots[r] = r``).
    Winners are positions within their passage, 0 in a passage without real tokens.
    """
    num_rows, num_passages = len(queries), len(passages.origins)
    dtype, device = queries.dtype, queries.device
    scores = torch.zeros(num_passages, num_queries, dtype=dtype, device=device)
    winners = torch.zeros(
        (num_passages, num_rows) if save_winners else (0, 0),
        dtype=winner_dtype(max_passage_length), device=device,
    )  # fmt: skip
    lengths = passages.lengths.tolist()
    longest = _whole_groups(max(lengths, default=0))
    if num_rows == 0 or longest == 0:
        return scores.T.contiguous(), winners
    # Whole rows of queries if they fit; several passages at a time if there is room to spare.
    row_step = min(num_rows, max(GROUP, BLOCK_ELEMENTS // longest))
    passage_step = max(1, min(num_passages, BLOCK_ELEMENTS // (longest * row_step)))
    buffer = torch.empty(passage_step * longest * row_step, dtype=dtype, device=device)
    best = torch.zeros(passage_step, num_queries * query_length, dtype=dtype, device=device)
    queries = queries.T
    for first in range(0, num_passages, passage_step):
        last = min(first + passage_step, num_passages)
        num, length = last - first, _whole_groups(max(lengths[first:last]))
        if length == 0:
            continue
        consecutive = passages.token_rows is None and min(lengths[first:last]) == length
        block, rows = _passage_block(passages, first, last, length, dtype, consecutive)
        for r0 in range(0, num_rows, row_step):
            r1 = min(r0 + row_step, num_rows)
            similarity = buffer[: num * length * (r1 - r0)].view(num * length, r1 - r0)
            torch.mm(block, queries[:, r0:r1], out=similarity)
            values, index = max_with_index(similarity.view(num, length, r1 - r0))
            if slots is None:
                best[:num, r0:r1] = values
            else:
                best[:num].index_copy_(1, slots[r0:r1], values)
            if save_winners:
                if rows is not None:
                    index = rows.gather(1, index.long()) - passages.origins[first:last, None]
                    index[passages.lengths[first:last] == 0] = 0
                winners[first:last, r0:r1] = index
        torch.sum(best[:num].view(num, num_queries, query_length), -1, out=scores[first:last])
    scores = torch.where(passages.lengths[:, None] > 0, scores, 0.0)
    return scores.T.contiguous(), winners


def packed_backward(
    grad: Tensor, queries: Tensor, query_of_row: Tensor,
    passages: PackedTokens, winners: Tensor, need_queries: bool, need_passages: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of ``queries [num_rows, dim]`` and ``passages.rows [total, dim]``.

    ``grad [num_queries, num_passages]``; ``passages.rows`` in the compute dtype, with no NaN in
    empty passages; ``winners [num_passages, num_rows]``.
    """
    num_rows, num_passages = len(queries), len(passages.origins)
    if grad.numel() == 0 or num_rows == 0 or len(passages.rows) == 0:
        return torch.zeros_like(queries), torch.zeros_like(passages.rows)
    grad = torch.where(passages.lengths[None, :] > 0, grad.to(queries.dtype), 0.0)
    grad_queries = grad_passages = None
    if need_queries:
        grad_queries = torch.empty_like(queries)
        step = max(1, BACKWARD_ELEMENTS // max(1, num_passages))
        for r0 in range(0, num_rows, step):
            r1 = min(r0 + step, num_rows)
            index = (winners[:, r0:r1].T + passages.origins[None, :]).contiguous()
            # An empty last passage of a packed batch begins past the end.
            index.clamp_(max=len(passages.rows) - 1)
            grad_queries[r0:r1] = F.embedding_bag(
                index, passages.rows, mode="sum", per_sample_weights=grad[query_of_row[r0:r1]]
            )
    if need_passages:
        grad_passages = torch.zeros_like(passages.rows)
        grad_of_passage = grad.T.contiguous()
        step = max(1, BACKWARD_ELEMENTS // max(1, num_rows))
        for first in range(0, num_passages if num_rows else 0, step):
            last = min(first + step, num_passages)
            begin = int(passages.origins[first])
            end = int(passages.origins[last]) if last < num_passages else len(passages.rows)
            if begin == end:
                continue
            keys = winners[first:last] + (passages.origins[first:last, None] - begin)
            weights = grad_of_passage[first:last].index_select(1, query_of_row)
            order, offsets = _by_key(keys, end - begin)
            grad_passages[begin:end] = F.embedding_bag(
                order % num_rows, queries, offsets, mode="sum",
                per_sample_weights=weights.flatten()[order],
            )  # fmt: skip
    return grad_queries, grad_passages


def _by_key(keys: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """Entries in order of their key (and within a key in their own), and where each key begins.

    Entries with a key of ``num_keys`` or more (an empty passage at the end) are left out.
    """
    keys = keys.flatten().to(torch.int16 if num_keys < 1 << 15 else torch.int32)
    order = keys.sort(stable=True).indices
    counts = torch.bincount(keys, minlength=num_keys)
    order = order[: len(order) - int(counts[num_keys:].sum())]
    counts = counts[:num_keys]
    return order, counts.cumsum(0) - counts


def unit_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    norm = x.norm(dim=-1, keepdim=True)
    return x / norm.clamp_min(NORM_EPS), norm


def unit_tokens_backward(grad: Tensor, x_unit: Tensor, norm: Tensor) -> Tensor:
    """Gradient of ``x`` from that of ``x / max(|x|, eps)``: ``(g - u <u, g>) / max(|x|, eps)``."""
    inner = (grad * x_unit).sum(-1, keepdim=True)
    inner = torch.where(norm > NORM_EPS, inner, 0.0)
    return (grad - x_unit * inner) / norm.clamp_min(NORM_EPS)


def maxsim_forward(
    queries: Tensor, passages: Tensor, query_mask: Tensor | None, passage_mask: Tensor | None,
    normalize: bool, save_winners: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scores, and winners ``[num_passages, num_queries, query_length]`` (group: ``[num_queries,
    group, query_length]``)."""
    dtype = compute_dtype(queries.dtype)
    if passages.dim() == 4:
        return _group_forward(queries, passages, query_mask, passage_mask, normalize, save_winners)
    num_queries, query_length = queries.shape[:2]
    passage_length = passages.shape[1]
    if normalize:
        passages = unit_tokens(passages.to(dtype))[0]
    rows, slots = _query_rows(queries, query_mask, dtype)
    if normalize:
        rows = unit_tokens(rows)[0]
    packed = PackedTokens.from_padded(passages, passage_mask)
    scores, winners = packed_forward(
        rows, slots, num_queries, query_length, packed, passage_length, save_winners
    )
    if not save_winners or slots is None:
        shape = (len(winners), num_queries, query_length) if save_winners else (0, 0, 0)
        return scores, winners.view(shape)
    full = winners.new_zeros(len(winners), num_queries * query_length)
    full[:, slots] = winners
    return scores, full.view(len(winners), num_queries, query_length)


def _query_rows(
    queries: Tensor, query_mask: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    rows = queries.reshape(-1, queries.shape[-1])
    if query_mask is None:
        return rows.to(dtype), None
    slots = query_mask.flatten().nonzero().squeeze(-1)
    return rows[slots].to(dtype), slots


def maxsim_backward(
    grad: Tensor, queries: Tensor, passages: Tensor,
    query_mask: Tensor | None, passage_mask: Tensor | None, winners: Tensor,
    normalize: bool, need_queries: bool, need_passages: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of ``maxsim_forward``'s scores, in the compute dtype."""
    dtype = compute_dtype(queries.dtype)
    backward = _group_backward if passages.dim() == 4 else _pairs_backward
    # Winners are real, except in a passage without any: keep its NaNs out of 0 * NaN.
    passages = _clean(passages.to(dtype), passage_mask)
    query_norm = passage_norm = None
    queries = queries.to(dtype)
    if normalize:
        queries, query_norm = unit_tokens(zero_masked(queries, query_mask))
        passages, passage_norm = unit_tokens(zero_masked(passages, passage_mask))
    grad_queries, grad_passages = backward(
        grad, queries, passages, query_mask, passage_mask, winners, need_queries, need_passages
    )
    if query_norm is not None and grad_queries is not None:
        grad_queries = unit_tokens_backward(grad_queries, queries, query_norm)
    if passage_norm is not None and grad_passages is not None:
        grad_passages = unit_tokens_backward(grad_passages, passages, passage_norm)
    return grad_queries, grad_passages


def _clean(passages: Tensor, passage_mask: Tensor | None) -> Tensor:
    if passage_mask is None or bool(passage_mask.any(-1).all()):
        return passages
    return zero_masked(passages, passage_mask)


def _pairs_backward(
    grad: Tensor, queries: Tensor, passages: Tensor,
    query_mask: Tensor | None, passage_mask: Tensor | None, winners: Tensor,
    need_queries: bool, need_passages: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    num_queries, query_length, dim = queries.shape
    rows, slots = _query_rows(queries, query_mask, queries.dtype)
    winners = winners.reshape(len(winners), num_queries * query_length)
    if slots is None:
        query_of_row = torch.arange(num_queries, device=rows.device)
        query_of_row = query_of_row.repeat_interleave(query_length)
    else:
        query_of_row, winners = slots // query_length, winners[:, slots]
    packed = PackedTokens.from_padded(passages, passage_mask)
    grad_rows, grad_passages = packed_backward(
        grad, rows, query_of_row, packed, winners, need_queries, need_passages
    )
    if grad_passages is not None:
        grad_passages = grad_passages.view(passages.shape)
    if grad_rows is None or slots is None:
        return None if grad_rows is None else grad_rows.view(queries.shape), grad_passages
    grad_queries = queries.new_zeros(num_queries * query_length, dim)
    grad_queries[slots] = grad_rows
    return grad_queries.view(queries.shape), grad_passages


def _group_forward(
    queries: Tensor, passages: Tensor, query_mask: Tensor | None, passage_mask: Tensor | None,
    normalize: bool, save_winners: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    num_queries, query_length, dim = queries.shape
    group, length = passages.shape[1:3]
    dtype = compute_dtype(queries.dtype)
    scores = torch.zeros(num_queries, group, dtype=dtype, device=queries.device)
    winners = torch.zeros(
        (num_queries, group, query_length) if save_winners else (0, 0, 0),
        dtype=winner_dtype(length), device=queries.device,
    )  # fmt: skip
    if scores.numel() == 0:
        return scores, winners
    tokens = torch.arange(_whole_groups(length), device=queries.device).clamp_(max=length - 1)
    step = max(1, BLOCK_ELEMENTS // (group * len(tokens) * query_length))
    for i0 in range(0, num_queries, step):
        own = slice(i0, min(i0 + step, num_queries))
        query, passage = queries[own].to(dtype), passages[own].to(dtype)
        if normalize:
            query, passage = unit_tokens(query)[0], unit_tokens(passage)[0]
        # Whole groups of passage tokens: the last token is repeated, which changes no winner.
        passage = passage[:, :, tokens] if len(tokens) > length else passage
        # [queries, group * length, query_length]: the maximum runs over rows, column by column.
        similarity = passage.reshape(len(query), -1, dim) @ query.transpose(1, 2)
        similarity = similarity.view(-1, len(tokens), query_length)
        if passage_mask is not None:
            similarity[~passage_mask[own][:, :, tokens].flatten(0, 1)] = float("-inf")
        best, index = max_with_index(similarity)
        best = best.view(-1, group, query_length)
        if query_mask is not None:
            best = torch.where(query_mask[own, None], best, 0.0)
        scores[own] = best.sum(-1)
        if save_winners:
            winners[own] = index.clamp_(max=length - 1).view(best.shape)  # NaN: past the end
    if passage_mask is not None:
        scores = torch.where(passage_mask.any(-1), scores, 0.0)
    return scores, winners


def _group_backward(
    grad: Tensor, queries: Tensor, passages: Tensor,
    query_mask: Tensor | None, passage_mask: Tensor | None, winners: Tensor,
    need_queries: bool, need_passages: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    num_queries, query_length, dim = queries.shape
    group, length = passages.shape[1:3]
    grad = grad.to(queries.dtype)
    if passage_mask is not None:
        grad = torch.where(passage_mask.any(-1), grad, 0.0)
    weights = grad.unsqueeze(-1).expand(winners.shape)
    if query_mask is not None:
        queries = zero_masked(queries, query_mask)
        weights = torch.where(query_mask.unsqueeze(1), weights, 0.0)
    if grad.numel() == 0:
        return torch.zeros_like(queries), torch.zeros_like(passages)
    grad_queries = torch.empty_like(queries) if need_queries else None
    grad_passages = torch.empty_like(passages) if need_passages else None
    step = max(1, BLOCK_ELEMENTS // (group * max(length, query_length) * dim))
    for i0 in range(0, num_queries, step):
        own = slice(i0, min(i0 + step, num_queries))
        weight = weights[own]
        num = len(weight)
        origins = torch.arange(num * group, device=grad.device).view(num, group, 1) * length
        keys = winners[own] + origins
        if grad_queries is not None:
            grad_queries[own] = F.embedding_bag(
                keys.transpose(1, 2).reshape(-1, group), passages[own].reshape(-1, dim),
                mode="sum", per_sample_weights=weight.transpose(1, 2).reshape(-1, group),
            ).view(num, query_length, dim)  # fmt: skip
        if grad_passages is not None:
            order, offsets = _by_key(keys, num * group * length)
            rows = order // (group * query_length) * query_length + order % query_length
            grad_passages[own] = F.embedding_bag(
                rows, queries[own].reshape(-1, dim), offsets, mode="sum",
                per_sample_weights=weight.flatten()[order],
            ).view(num, group, length, dim)  # fmt: skip
    if query_mask is not None and grad_queries is not None:
        # A NaN in a masked token has won with the passage's last one, which may be masked as well.
        grad_queries.masked_fill_(~query_mask.unsqueeze(-1), 0.0)
    return grad_queries, grad_passages


def varlen_forward(
    queries: Tensor, passages: Tensor, query_cu_seqlens: Tensor, passage_cu_seqlens: Tensor,
    max_query_length: int, max_passage_length: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scores and winners ``[num_passages, total_query_tokens]`` of packed tokens."""
    num_queries = len(query_cu_seqlens) - 1
    query_of_row = _sequence_of_row(query_cu_seqlens)
    offset = torch.arange(len(queries), device=queries.device) - query_cu_seqlens[query_of_row]
    slots = query_of_row * max_query_length + offset
    packed = PackedTokens.from_cu_seqlens(passages, passage_cu_seqlens)
    return packed_forward(
        queries.to(compute_dtype(queries.dtype)), slots, num_queries, max_query_length,
        packed, max_passage_length, True,
    )  # fmt: skip


def varlen_backward(
    grad: Tensor, queries: Tensor, passages: Tensor, query_cu_seqlens: Tensor,
    passage_cu_seqlens: Tensor, winners: Tensor, need_queries: bool, need_passages: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of ``varlen_forward``'s scores, in the compute dtype."""
    dtype = compute_dtype(queries.dtype)
    packed = PackedTokens.from_cu_seqlens(passages.to(dtype), passage_cu_seqlens)
    return packed_backward(
        grad, queries.to(dtype), _sequence_of_row(query_cu_seqlens), packed, winners,
        need_queries, need_passages,
    )  # fmt: skip


def _sequence_of_row(cu_seqlens: Tensor) -> Tensor:
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
