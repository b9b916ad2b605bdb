"""MaxSim in Triton: all pairs, own groups, and packed tokens, by the same three kernels.

Forward: one program multiplies ``BLOCK_M`` query tokens (those of several queries) with a run of
passages, ``BLOCK_N`` tokens at a time, and keeps a running maximum per query token. Queries are cut
into units of ``UNIT`` tokens; a program writes the sum of each unit, so that no query length needs
its own tile shape and no two programs write to one place.

Backward, with ``w[a]`` the winner of query token ``a`` in passage ``j``::

    d q[a]   = sum_j g[i,j] * p[j, w[a]]                  rows gathered passage by passage
    d p[j,t] = sum_(i,a) [w[a] = t] * g[i,j] * q[i,a]     a one-hot tile times query tokens

Each output row belongs to one program that adds in a fixed order: no atomics, repeatable bits.

For 16-bit inputs the winner's column replaces the lowest ``log2(BLOCK_N)`` mantissa bits of the
similarity, and one maximum finds both: scores lose less than ``2**-16`` relative, near-ties tie.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from erniesearch_kernels.triton_common import (
    dot,
    inverse_norm,
    kernel,
    narrow,
    norm_jacobian,
    row_max,
)

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
MINUS_INFINITY_BITS = tl.constexpr(-0x00800000)


@triton.jit
def _query_rows(
    units, lane, unit_ptr, num_units, query_length, units_per_query,
    UNIT: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Row in the query matrix and token in its query, and whether there is such a token."""
    real = units < num_units
    if VARLEN:
        begin = tl.load(unit_ptr + 2 * units, mask=real, other=0)
        count = tl.load(unit_ptr + 2 * units + 1, mask=real, other=0)
        return begin + lane, lane, real & (lane < count)
    token = (units % units_per_query) * UNIT + lane
    row = (units // units_per_query).to(tl.int64) * query_length + token
    return row, token, real & (token < query_length)


@triton.jit
def _passage(j, bounds_ptr, passage_length, VARLEN: tl.constexpr):
    """First row of passage ``j`` in the passage matrix, and its tokens."""
    if VARLEN:
        begin = tl.load(bounds_ptr + j).to(tl.int64)
        length = (tl.load(bounds_ptr + j + 1) - begin).to(tl.int32)
    else:
        begin = j * passage_length
        length = passage_length
    return begin, length


@kernel
def forward_kernel(
    q_ptr, p_ptr, q_mask_ptr, p_mask_ptr, code_ptr, unit_ptr, bounds_ptr, sums_ptr, winner_ptr,
    code_stride, num_units, query_length, units_per_query, num_passages, passage_length,
    winner_stride, passages_per_program, num_row_blocks,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_Q_MASK: tl.constexpr, HAS_P_MASK: tl.constexpr, GROUP: tl.constexpr, VARLEN: tl.constexpr,
    EVEN: tl.constexpr, CODED: tl.constexpr, NORMALIZE: tl.constexpr, SAVE: tl.constexpr,
    PACK: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Sums per passage and query unit, and winners per passage and query token.

    ``GROUP``: programs belong to one query and ``num_passages`` is its number of passages.
    ``EVEN``: every passage fills its tiles with real tokens.
    ``CODED``: what :func:`_column_codes` made stands in for the passages' mask.
    """
    UNITS: tl.constexpr = BLOCK_M // UNIT
    pid = tl.program_id(0)
    block = pid % num_row_blocks
    first = (pid // num_row_blocks) * passages_per_program
    lanes = tl.arange(0, BLOCK_M)
    if GROUP:
        # Row blocks of one query, then the next query's: a block never holds two queries.
        blocks_per_query = tl.cdiv(units_per_query, UNITS)
        query = (block // blocks_per_query).to(tl.int64)
        unit0 = (block % blocks_per_query) * UNITS
        token = unit0 * UNIT + lanes
        row = query * query_length + token
        valid = token < query_length
        winner_row = token.to(tl.int64)
        origin = query * num_passages
    else:
        unit0 = block * UNITS
        row, token, valid = _query_rows(
            unit0 + lanes // UNIT, lanes % UNIT, unit_ptr, num_units, query_length,
            units_per_query, UNIT, VARLEN,
        )  # fmt: skip
        winner_row = row
        origin = tl.cast(0, tl.int64)
    stored = valid
    if HAS_Q_MASK:
        valid = valid & (tl.load(q_mask_ptr + row, mask=valid, other=0) != 0)
    dims = tl.arange(0, BLOCK_D)
    q = tl.load(
        q_ptr + row[:, None] * DIM + dims[None, :],
        mask=valid[:, None] & (dims < DIM)[None, :], other=0.0,
    )  # fmt: skip

    columns = tl.arange(0, BLOCK_N)
    tiles = tl.cdiv(passage_length, BLOCK_N)
    last = tl.minimum(first + passages_per_program, num_passages)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    winner = tl.zeros([BLOCK_M], tl.int32)
    alive = 0
    # One loop over the tiles of all passages, so that loads run ahead from one to the next.
    for step in range(0, (last - first) * tiles):
        j = origin + first + step // tiles
        tile = step % tiles
        t = tile * BLOCK_N + columns
        begin, length = _passage(j, bounds_ptr, passage_length, VARLEN)
        real = t < length
        if HAS_P_MASK and not CODED:
            real = real & (tl.load(p_mask_ptr + begin + t, mask=real, other=0) != 0)
        if CODED:
            code = tl.load(code_ptr + j * code_stride + t)
        elif EVEN:
            code = BLOCK_N - 1 - columns
        else:
            code = tl.where(real, BLOCK_N - 1 - columns, MINUS_INFINITY_BITS)
        if PACK and not VARLEN:
            # A column that does not count may hold anything, its code takes all of its bits; of the
            # last tile's end the passage's last token is read again.
            place = t if EVEN else tl.minimum(t, length - 1)
            p = tl.load(
                p_ptr + (begin + place)[None, :] * DIM + dims[:, None],
                mask=(dims < DIM)[:, None], other=0.0,
            )  # fmt: skip
        else:
            p = tl.load(
                p_ptr + (begin + t)[None, :] * DIM + dims[:, None],
                mask=real[None, :] & (dims < DIM)[:, None], other=0.0,
            )  # fmt: skip
        s = dot(q, p, PRECISION, WIDEN)
        if NORMALIZE:
            s = s * inverse_norm(p, 0)[None, :]
        if PACK:
            # A column's bits would turn -inf into NaN: the lowest finite number stands in for it.
            s = tl.maximum(s, LOWEST, propagate_nan=tl.PropagateNan.ALL)
            keep = -BLOCK_N if EVEN else (~(code >> 31) & -BLOCK_N)[None, :]
            bits = (s.to(tl.int32, bitcast=True) & keep) | code[None, :]
            s = bits.to(tl.float32, bitcast=True)
        elif not EVEN:
            s = tl.where(real[None, :], s, float("-inf"))
        tile_best = row_max(s)
        if PACK:
            bits = tile_best.to(tl.int32, bitcast=True)
            tile_winner = tile * BLOCK_N + (BLOCK_N - 1) - (bits & (BLOCK_N - 1))
            tile_best = (bits & (-BLOCK_N)).to(tl.float32, bitcast=True)
        else:
            hits = tl.where(s == tile_best[:, None], t[None, :], passage_length - 1)
            tile_winner = tl.min(hits, 1)
        better = (tile == 0) | (tile_best > best) | (tile_best != tile_best)
        # A NaN stays: nothing is larger than it.
        winner = tl.where(better, tile_winner, winner)
        best = tl.where(better, tile_best, best)
        if not PACK:
            any_real = tl.max(real.to(tl.int32), 0)
            alive = tl.where(tile == 0, any_real, tl.maximum(alive, any_real))
        if tile == tiles - 1:
            value = best
            if PACK:  # all real similarities were -inf
                value = tl.where(value < 0.9999 * LOWEST, float("-inf"), value)
            if NORMALIZE:
                value = value * inverse_norm(q, 1)
            # Packed, what is real is above -inf (or NaN).
            counts = valid & (best != float("-inf")) if PACK else valid & (alive > 0)
            value = tl.where(counts, value, 0.0)
            sums = tl.sum(tl.reshape(value, (UNITS, UNIT)), 1)
            units = unit0 + tl.arange(0, UNITS)
            limit = units_per_query if GROUP else num_units
            tl.store(sums_ptr + j * limit + units, sums, mask=units < limit)
            if SAVE:
                # Where all are NaN, the position found may lie behind the passage.
                index = tl.where(counts, tl.minimum(winner, length - 1), 0)
                tl.store(
                    winner_ptr + j * winner_stride + winner_row,
                    index.to(winner_ptr.dtype.element_ty), mask=stored,
                )  # fmt: skip


@kernel
def query_gradient_kernel(
    g_ptr, scale_ptr, q_ptr, p_ptr, q_mask_ptr, query_of_row_ptr, bounds_ptr, winner_ptr, out_ptr,
    num_rows, query_length, num_passages, passage_length, winner_stride, passages_per_program,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    HAS_Q_MASK: tl.constexpr, GROUP: tl.constexpr, VARLEN: tl.constexpr, NORMALIZE: tl.constexpr,
    PARTIAL: tl.constexpr,
):  # fmt: skip
    """``d q[a] = sum_j g[i,j] * p[j, w[a]]`` for ``BLOCK_M`` rows; ``PARTIAL``: the sum over a run
    of passages, of unit tokens where they are normalised, in fp32."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < num_rows
    stored = valid
    if HAS_Q_MASK:
        valid = valid & (tl.load(q_mask_ptr + row, mask=valid, other=0) != 0)
    if VARLEN:
        query = tl.load(query_of_row_ptr + row, mask=valid, other=0).to(tl.int64)
    else:
        query = row // query_length
    first = query * 0
    winner_row = row
    if GROUP:
        first = query * num_passages
        winner_row = row % query_length
    dims = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin_run = tl.program_id(1) * passages_per_program
    for step in range(begin_run, tl.minimum(begin_run + passages_per_program, num_passages)):
        j = first + step
        g = tl.load(g_ptr + query * num_passages + step, mask=valid, other=0.0)
        # Without weight nothing is read: neither padding nor passages without real tokens.
        used = valid & (g != 0.0)
        token = tl.load(winner_ptr + j * winner_stride + winner_row, mask=used, other=0)
        if VARLEN:
            begin = tl.load(bounds_ptr + j, mask=used, other=0).to(tl.int64)
        else:
            begin = j * passage_length
        p = tl.load(
            p_ptr + (begin + token.to(tl.int64))[:, None] * DIM + dims[None, :],
            mask=used[:, None] & (dims < DIM)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        if NORMALIZE:
            g = g * inverse_norm(p, 1)
        total += g[:, None] * p
    total = total * tl.load(scale_ptr)
    inside = stored[:, None] & (dims < DIM)[None, :]
    offsets = row[:, None] * DIM + dims[None, :]
    if PARTIAL:
        offsets += tl.program_id(1).to(tl.int64) * num_rows * DIM
    elif NORMALIZE:
        q = tl.load(q_ptr + offsets, mask=valid[:, None] & (dims < DIM)[None, :], other=0.0)
        total = tl.where(valid[:, None], norm_jacobian(total, q), 0.0)
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=inside)


@kernel
def passage_gradient_kernel(
    g_ptr, scale_ptr, q_ptr, p_ptr, q_mask_ptr, p_mask_ptr, query_of_row_ptr, bounds_ptr,
    winner_ptr, out_ptr,
    num_rows, query_length, num_passages, passage_length, winner_stride, group_size,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
    HAS_Q_MASK: tl.constexpr, HAS_P_MASK: tl.constexpr, GROUP: tl.constexpr, VARLEN: tl.constexpr,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """``d p[j,t] = sum_a [w[a] = t] * g[i,j] * q[a]`` for ``BLOCK_N`` tokens of one passage, and
    with ``TAIL`` for that many behind them, from the same query tokens."""
    tiles = tl.cdiv(passage_length, BLOCK_N + TAIL)
    j = (tl.program_id(0) // tiles).to(tl.int64)
    t = (tl.program_id(0) % tiles) * (BLOCK_N + TAIL) + tl.arange(0, BLOCK_N)
    begin, length = _passage(j, bounds_ptr, passage_length, VARLEN)
    first_row = j * 0
    if GROUP:
        first_row = (j // group_size) * query_length
    dims = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if TAIL:
        behind = (tl.program_id(0) % tiles) * (BLOCK_N + TAIL) + BLOCK_N + tl.arange(0, TAIL)
        tail = tl.zeros([TAIL, BLOCK_D], tl.float32)
    for start in range(0, num_rows, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        row = first_row + k
        valid = k < num_rows
        if HAS_Q_MASK:
            valid = valid & (tl.load(q_mask_ptr + row, mask=valid, other=0) != 0)
        if GROUP:
            g_offset = row * 0 + j
            winner_row = k.to(tl.int64)
        else:
            if VARLEN:
                query = tl.load(query_of_row_ptr + row, mask=valid, other=0).to(tl.int64)
            else:  # row is k here, and 32 bits divide in fewer instructions
                query = (k // query_length).to(tl.int64)
            g_offset = query * num_passages + j
            winner_row = row
        g = tl.load(g_ptr + g_offset, mask=valid, other=0.0)
        used = valid & (g != 0.0)
        token = tl.load(winner_ptr + j * winner_stride + winner_row, mask=used, other=0)
        q = tl.load(
            q_ptr + row[:, None] * DIM + dims[None, :],
            mask=used[:, None] & (dims < DIM)[None, :], other=0.0,
        )  # fmt: skip
        if NORMALIZE:
            g = g * inverse_norm(q, 1)
        one_hot = tl.where(token.to(tl.int32)[None, :] == t[:, None], g[None, :], 0.0)
        total += dot(narrow(one_hot, q, WIDEN), q, PRECISION, WIDEN)
        if TAIL:
            one_hot = tl.where(token.to(tl.int32)[None, :] == behind[:, None], g[None, :], 0.0)
            tail += dot(narrow(one_hot, q, WIDEN), q, PRECISION, WIDEN)
    scale = tl.load(scale_ptr)
    _store_passage_gradient(
        out_ptr, total * scale, p_ptr, p_mask_ptr, begin, t, length, dims,
        DIM, HAS_P_MASK, NORMALIZE,
    )  # fmt: skip
    if TAIL:
        _store_passage_gradient(
            out_ptr, tail * scale, p_ptr, p_mask_ptr, begin, behind, length, dims,
            DIM, HAS_P_MASK, NORMALIZE,
        )  # fmt: skip


@triton.jit
def _store_passage_gradient(
    out_ptr, total, p_ptr, p_mask_ptr, begin, t, length, dims,
    DIM: tl.constexpr, HAS_P_MASK: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Of tokens ``t`` of the passage at ``begin``."""
    inside = t < length
    offsets = (begin + t)[:, None] * DIM + dims[None, :]
    if NORMALIZE:
        real = inside
        if HAS_P_MASK:
            real = real & (tl.load(p_mask_ptr + begin + t, mask=inside, other=0) != 0)
        p = tl.load(p_ptr + offsets, mask=real[:, None] & (dims < DIM)[None, :], other=0.0)
        total = tl.where(real[:, None], norm_jacobian(total, p), 0.0)
    tl.store(
        out_ptr + offsets, total.to(out_ptr.dtype.element_ty),
        mask=inside[:, None] & (dims < DIM)[None, :],
    )  # fmt: skip
