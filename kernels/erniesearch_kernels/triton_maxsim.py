"""How MaxSim's kernels (:mod:`erniesearch_kernels.maxsim_kernels`) are launched."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from erniesearch_kernels.maxsim_kernels import (
    MINUS_INFINITY_BITS,
    forward_kernel,
    passage_gradient_kernel,
    query_gradient_kernel,
)
from erniesearch_kernels.torch_maxsim import (
    unit_tokens,
    unit_tokens_backward,
    winner_dtype,
    zero_masked,
)
from erniesearch_kernels.triton_common import (
    INTERPRET,
    as_bytes,
    balanced,
    dense,
    precision,
)
from erniesearch_kernels.triton_tiles import (
    capability,
    forward_config,
    padded_dim,
    passage_gradient_config,
    query_gradient_config,
    run_length,
    unit_length,
)


def _passages_per_program(num_row_blocks: int, num_passages: int) -> int:
    # A program's query tile is read once for its passages; leave enough programs for any GPU.
    return max(1, min(16, num_row_blocks * num_passages // 2048))


def maxsim_forward(
    queries: Tensor, passages: Tensor, query_mask: Tensor | None, passage_mask: Tensor | None,
    normalize: bool, save_winners: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As ``torch_maxsim.maxsim_forward``."""
    group = passages.dim() == 4
    num_queries, query_length, _ = queries.shape
    num_passages, passage_length = passages.shape[-3:-1]
    total_passages = num_queries * num_passages if group else num_passages
    config = forward_config(
        queries.dtype, padded_dim(queries.shape[-1]), capability(queries.device), normalize,
        query_length if group else 0,
    )  # fmt: skip
    unit = min(unit_length(query_length), config["BLOCK_M"])
    units_per_query = triton.cdiv(query_length, unit)
    units_per_block = config["BLOCK_M"] // unit
    if group:
        num_row_blocks = num_queries * triton.cdiv(units_per_query, units_per_block)
        sums_width = units_per_query
    else:
        num_row_blocks = triton.cdiv(num_queries * units_per_query, units_per_block)
        sums_width = num_queries * units_per_query
    sums = queries.new_zeros(total_passages, sums_width, dtype=torch.float32)
    shape = (num_queries, num_passages) if group else (num_passages, num_queries)
    winners = queries.new_zeros(
        (*shape, query_length) if save_winners else (0, 0, 0), dtype=winner_dtype(passage_length)
    )
    _launch_forward(
        queries, passages, query_mask, passage_mask, None, None, sums, winners,
        num_queries * units_per_query, query_length, units_per_query, num_passages, passage_length,
        query_length if group else num_queries * query_length, num_row_blocks, unit, config,
        group, normalize, save_winners,
    )  # fmt: skip
    sums = sums.view(*shape, units_per_query).sum(-1)
    return (sums if group else sums.T.contiguous()), winners


def _launch_forward(
    queries: Tensor, passages: Tensor, query_mask: Tensor | None, passage_mask: Tensor | None,
    units: Tensor | None, bounds: Tensor | None, sums: Tensor, winners: Tensor,
    num_units: int, query_length: int, units_per_query: int, num_passages: int,
    passage_length: int, winner_stride: int, num_row_blocks: int, unit: int,
    config: dict[str, int], group: bool, normalize: bool, save_winners: bool,
) -> None:  # fmt: skip
    if num_row_blocks == 0 or num_passages == 0:
        return
    dim = queries.shape[-1]
    columns, packed, varlen = config["BLOCK_N"], queries.dtype != torch.float32, bounds is not None
    even = not varlen and passage_mask is None and passage_length % columns == 0
    code = None
    if packed and not (varlen or even):
        code = _column_codes(passage_mask, passage_length, columns, queries.device)
        passage_mask = None
    per_program = _passages_per_program(num_row_blocks, num_passages)
    grid = (num_row_blocks * triton.cdiv(num_passages, per_program),)
    forward_kernel[grid](
        dense(queries), dense(passages), as_bytes(query_mask), as_bytes(passage_mask), code,
        units, bounds, sums, winners,
        code.shape[1] if code is not None and len(code) > 1 else 0,
        num_units, query_length, units_per_query, num_passages, passage_length, winner_stride,
        per_program, num_row_blocks,
        DIM=dim, BLOCK_D=padded_dim(dim), UNIT=unit,
        HAS_Q_MASK=query_mask is not None, HAS_P_MASK=passage_mask is not None,
        GROUP=group, VARLEN=varlen, EVEN=even, CODED=code is not None,
        NORMALIZE=normalize, SAVE=save_winners, PACK=packed,
        PRECISION=precision(queries.dtype), WIDEN=INTERPRET, **config,
    )  # fmt: skip


def _column_codes(mask: Tensor | None, length: int, columns: int, device: torch.device) -> Tensor:
    """What the forward puts into the low bits of a column's similarities, ``[P, tiles · columns]``
    int32 (``[1, …]`` without a mask): its number from the tile's end, so that the first of equals
    wins; the bits of -inf, which are negative, where no real token stands."""
    width = triton.cdiv(length, columns) * columns
    numbers = torch.arange(width, dtype=torch.int32, device=device)
    if mask is None:
        real = (numbers < length)[None]
    else:
        real = torch.nn.functional.pad(mask.reshape(-1, length), (0, width - length))
    return torch.where(real, columns - 1 - numbers % columns, MINUS_INFINITY_BITS.value)


def maxsim_backward(
    grad: Tensor, queries: Tensor, passages: Tensor,
    query_mask: Tensor | None, passage_mask: Tensor | None, winners: Tensor,
    normalize: bool, need_queries: bool, need_passages: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """As ``torch_maxsim.maxsim_backward``, in the inputs' dtype."""
    if passage_mask is not None:
        grad = torch.where(passage_mask.any(-1), grad, 0.0)
    return _launch_backward(
        grad, dense(queries), dense(passages), query_mask, passage_mask,
        None, None, winners, queries.shape[-2], passages.shape[-2],
        normalize, need_queries, need_passages,
    )  # fmt: skip


def _launch_backward(
    grad: Tensor, queries: Tensor, passages: Tensor,
    query_mask: Tensor | None, passage_mask: Tensor | None,
    query_of_row: Tensor | None, bounds: Tensor | None, winners: Tensor,
    query_length: int, passage_length: int,
    normalize: bool, need_queries: bool, need_passages: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    dim, group, varlen = queries.shape[-1], passages.dim() == 4, bounds is not None
    num_rows = queries.numel() // dim
    num_passages = grad.shape[1]
    total_passages = grad.numel() if group else num_passages
    winner_stride = query_length if group else num_rows
    block_d = padded_dim(dim)
    grad_queries = torch.zeros_like(queries) if need_queries else None
    grad_passages = torch.zeros_like(passages) if need_passages else None
    if grad.numel() == 0 or num_rows == 0:
        return grad_queries, grad_passages
    scale, (grad,) = balanced(grad.float().contiguous())
    shared = {
        "DIM": dim, "BLOCK_D": block_d, "HAS_Q_MASK": query_mask is not None, "GROUP": group,
        "VARLEN": varlen, "NORMALIZE": normalize,
    }  # fmt: skip
    if grad_queries is not None:
        config = query_gradient_config(queries.dtype, block_d)
        row_blocks = triton.cdiv(num_rows, config["BLOCK_M"])
        run = run_length(row_blocks, num_passages)
        runs = triton.cdiv(num_passages, run)
        out = grad_queries
        if runs > 1:
            out = queries.new_empty((runs, *queries.shape), dtype=torch.float32)
        query_gradient_kernel[row_blocks, runs](
            grad, scale, queries, passages, as_bytes(query_mask), query_of_row, bounds, winners,
            out, num_rows, query_length, num_passages, passage_length, winner_stride, run,
            PARTIAL=runs > 1, **shared, **config,
        )  # fmt: skip
        if runs > 1:  # added up in one order
            total = out.sum(0)
            if normalize:
                tokens = zero_masked(queries, query_mask).float()
                total = unit_tokens_backward(total, *unit_tokens(tokens))
            grad_queries.copy_(total)
    if grad_passages is not None:
        config = passage_gradient_config(
            queries.dtype, block_d, capability(queries.device), normalize, passage_length
        )
        tiles = triton.cdiv(passage_length, config["BLOCK_N"] + config["TAIL"])
        passage_gradient_kernel[(total_passages * tiles,)](
            grad, scale, queries, passages, as_bytes(query_mask), as_bytes(passage_mask),
            query_of_row, bounds, winners, grad_passages,
            query_length if group else num_rows, query_length, num_passages, passage_length,
            winner_stride, num_passages if group else 1,
            HAS_P_MASK=passage_mask is not None,
            PRECISION=precision(queries.dtype), WIDEN=INTERPRET, **shared, **config,
        )  # fmt: skip
    return grad_queries, grad_passages


def varlen_forward(
    queries: Tensor, passages: Tensor, query_cu_seqlens: Tensor, passage_cu_seqlens: Tensor,
    max_query_length: int, max_passage_length: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As ``torch_maxsim.varlen_forward``."""
    num_queries, num_passages = len(query_cu_seqlens) - 1, len(passage_cu_seqlens) - 1
    if num_queries == 0:
        winners = queries.new_zeros(num_passages, 0, dtype=winner_dtype(max_passage_length))
        return queries.new_zeros(0, num_passages, dtype=torch.float32), winners
    config = forward_config(
        queries.dtype, padded_dim(queries.shape[-1]), capability(queries.device)
    )
    unit = min(unit_length(max_query_length), config["BLOCK_M"])
    # As many units as there can be, known without reading the bounds; unused ones hold no token.
    num_units = len(queries) // unit + num_queries
    bounds = query_cu_seqlens.long()
    per_query = (bounds[1:] - bounds[:-1] + unit - 1) // unit
    ends = per_query.cumsum(0)
    index = torch.arange(num_units, device=queries.device)
    query = torch.searchsorted(ends, index, right=True).clamp_(max=num_queries - 1)
    position = index - (ends - per_query)[query]
    begin = bounds[query] + position * unit
    count = torch.where(position < per_query[query], bounds[query + 1] - begin, 0)
    units = torch.stack((begin, count.clamp(0, unit)), 1).contiguous()
    sums = queries.new_zeros(num_passages, num_units, dtype=torch.float32)
    winners = queries.new_zeros(num_passages, len(queries), dtype=winner_dtype(max_passage_length))
    units_per_block = config["BLOCK_M"] // unit
    _launch_forward(
        queries, passages, None, None, units, passage_cu_seqlens.contiguous(), sums, winners,
        num_units, max_query_length, 1, num_passages, max_passage_length, len(queries),
        triton.cdiv(num_units, units_per_block), unit, config, False, False, True,
    )  # fmt: skip
    # Sum a query's units in order: spread them out, unused ones to a place that is cut off.
    width = triton.cdiv(max_query_length, unit)
    slots = torch.where(position < per_query[query], query * width + position, num_queries * width)
    spread = sums.new_zeros(num_passages, num_queries * width + 1)
    spread.index_copy_(1, slots, sums)
    scores = spread[:, :-1].view(num_passages, num_queries, width).sum(-1)
    return scores.T.contiguous(), winners


def varlen_backward(
    grad: Tensor, queries: Tensor, passages: Tensor,
    query_cu_seqlens: Tensor, passage_cu_seqlens: Tensor, winners: Tensor,
    max_query_length: int, max_passage_length: int, need_queries: bool, need_passages: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """As ``torch_maxsim.varlen_backward``, in the inputs' dtype."""
    lengths = passage_cu_seqlens[1:] - passage_cu_seqlens[:-1]
    grad = torch.where(lengths > 0, grad, 0.0)
    query_of_row = torch.bucketize(
        torch.arange(len(queries), device=queries.device), query_cu_seqlens[1:].long(), right=True
    )
    return _launch_backward(
        grad, dense(queries), dense(passages), None, None,
        query_of_row.contiguous(), passage_cu_seqlens.contiguous(), winners,
        max_query_length, max_passage_length, False, need_queries, need_passages,
    )  # fmt: skip
