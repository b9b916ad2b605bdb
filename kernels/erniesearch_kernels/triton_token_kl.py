"""MaxSim with a KL term over the same tile of similarities, in Triton, for own groups.

With ``x = s / tau`` and a teacher row ``p = w / sum_t w``, one pass over a row's tiles keeps

    max_t s, its t, and the running log-sum-exp of x
    W = sum_t w,  L = sum_t w log w,  X = sum_t w x

and gives ``kl = L/W - log W - X/W + lse(x)``. Given maps are not renormalised: there ``w = p`` and
``kl = L - X + W * lse(x)``. Rebuilt maps have ``w[t] = sum_h exp(a[h,t] - lse[h] - M)``, with
``M`` the row's largest exponent so far; when it grows, the sums shrink with it. The backward needs
``lse(x)``, the winner, and ``log W + M`` (rebuilt) or ``W`` (given)::

    d s[t] = g_kl / tau * ((sum p) * exp(x[t] - lse(x)) - p[t]) + g_score * [t = winner]

One kernel owns query rows (``d q = d s @ p``), another passage tokens (``d p = d s^T @ q``); both
compute ``d s`` again, tile by tile, and add in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from erniesearch_kernels.torch_maxsim import winner_dtype
from erniesearch_kernels.triton_common import (
    INTERPRET,
    as_bytes,
    balanced,
    dense,
    dot,
    kernel,
    narrow,
    precision,
    row_max,
)
from erniesearch_kernels.triton_tiles import (
    kl_config,
    kl_gradient_config,
    padded_dim,
    teacher_lse_config,
)


@triton.jit
def _unmasked(mask_ptr, index, inside):
    return inside & (tl.load(mask_ptr + index, mask=inside, other=0) != 0)


@triton.jit
def _load_rows(ptr, row, real, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Tokens ``[rows, dim]``, zero where not real."""
    dims = tl.arange(0, BLOCK_D)
    return tl.load(
        ptr + row[:, None] * DIM + dims[None, :],
        mask=real[:, None] & (dims < DIM)[None, :], other=0.0,
    )  # fmt: skip


@triton.jit
def _load_map(map_ptr, row, t, pairs, passage_length, ALIGNED: tl.constexpr):
    """Rows of the teacher's map, ``[queries, passage tokens]``, zero where no pair is real."""
    stride = passage_length
    if ALIGNED:  # says that 16 divides it: wider loads
        stride = passage_length // 16 * 16
    pointers = map_ptr + row[:, None] * stride + t[None, :]
    return tl.load(pointers, mask=pairs, other=0.0).to(tl.float32)


@triton.jit
def _head_logits(
    tq_ptr, tk_ptr, head_row, a, real_a, t, real_t, query_length, passage_length, scale,
    HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The teacher's attention logits of one head, ``[queries, passage tokens]``."""
    tq = _load_rows(tq_ptr, head_row * query_length + a, real_a, HEAD_DIM, BLOCK_H)
    tk = _load_rows(tk_ptr, head_row * passage_length + t, real_t, HEAD_DIM, BLOCK_H)
    logits = dot(tq, tl.trans(tk), PRECISION, WIDEN) * scale
    return tl.where(real_t[None, :], logits, float("-inf"))


@kernel
def teacher_lse_kernel(
    tq_ptr, tk_ptr, q_mask_ptr, p_mask_ptr, out_ptr,
    query_length, passage_length, group_size, heads, scale,
    HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_Q_MASK: tl.constexpr, HAS_P_MASK: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp over the passage's tokens of each head's attention logits."""
    row_blocks = tl.cdiv(query_length, BLOCK_M)
    head_row = (tl.program_id(0) // row_blocks).to(tl.int64)
    pair = head_row // heads
    a = (tl.program_id(0) % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    real_a = a < query_length
    stored = real_a
    if HAS_Q_MASK:
        row = (pair // group_size) * query_length + a
        real_a = _unmasked(q_mask_ptr, row, real_a)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for tile in range(0, tl.cdiv(passage_length, BLOCK_N)):
        t = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        real_t = t < passage_length
        if HAS_P_MASK:
            real_t = _unmasked(p_mask_ptr, pair * passage_length + t, real_t)
        logits = _head_logits(
            tq_ptr, tk_ptr, head_row, a, real_a, t, real_t, query_length, passage_length, scale,
            HEAD_DIM, BLOCK_H, PRECISION, WIDEN,
        )  # fmt: skip
        grown = tl.maximum(largest, tl.max(logits, 1))
        # Nothing real so far: exp(-inf - 0) = 0.
        shift = tl.where(grown == float("-inf"), 0.0, grown)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(logits - shift[:, None]), 1)
        largest = grown
    lse = tl.where(total > 0.0, largest + tl.log(total), 0.0)
    tl.store(out_ptr + head_row * query_length + a, lse, mask=stored)


@kernel
def forward_kernel(
    q_ptr, p_ptr, q_mask_ptr, p_mask_ptr, map_ptr, tq_ptr, tk_ptr, tlse_ptr,
    best_ptr, kl_ptr, winner_ptr, lse_ptr, norm_ptr,
    query_length, passage_length, group_size, heads, inverse_tau, scale,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_Q_MASK: tl.constexpr, HAS_P_MASK: tl.constexpr, REBUILD: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr, TEACHER_PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Per pair and query token: maximum, winner, KL, ``lse(x)`` and the teacher's norm."""
    row_blocks = tl.cdiv(query_length, BLOCK_M)
    pair = (tl.program_id(0) // row_blocks).to(tl.int64)
    query = pair // group_size
    a = (tl.program_id(0) % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    real_a = a < query_length
    stored = real_a
    if HAS_Q_MASK:
        real_a = _unmasked(q_mask_ptr, query * query_length + a, real_a)
    q = _load_rows(q_ptr, query * query_length + a, real_a, DIM, BLOCK_D)

    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    winner = tl.zeros([BLOCK_M], tl.int32)
    total = tl.zeros([BLOCK_M], tl.float32)  # sum of exp(x - best / tau)
    w_shift = tl.full([BLOCK_M], float("-inf"), tl.float32)
    w_sum = tl.zeros([BLOCK_M], tl.float32)
    w_log = tl.zeros([BLOCK_M], tl.float32)
    w_x = tl.zeros([BLOCK_M], tl.float32)
    alive = 0
    for tile in range(0, tl.cdiv(passage_length, BLOCK_N)):
        t = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        real_t = t < passage_length
        if HAS_P_MASK:
            real_t = _unmasked(p_mask_ptr, pair * passage_length + t, real_t)
        p = _load_rows(p_ptr, pair * passage_length + t, real_t, DIM, BLOCK_D)
        s = dot(q, tl.trans(p), PRECISION, WIDEN)
        s = tl.where(real_t[None, :], s, float("-inf"))
        tile_best = row_max(s)
        hits = tl.where(s == tile_best[:, None], t[None, :], passage_length - 1)
        better = (tile == 0) | (tile_best > best) | (tile_best != tile_best)
        winner = tl.where(better, tl.min(hits, 1), winner)
        grown = tl.where(better, tile_best, best)
        shift = tl.where(grown == float("-inf"), 0.0, grown)
        total *= tl.exp((best - shift) * inverse_tau)
        total += tl.sum(tl.exp((s - shift[:, None]) * inverse_tau), 1)
        best = grown
        alive = tl.maximum(alive, tl.max(real_t.to(tl.int32), 0))

        pairs = real_a[:, None] & real_t[None, :]
        if REBUILD:
            w = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            tile_shift = w_shift
            for head in range(0, heads):
                head_row = pair * heads + head
                logits = _head_logits(
                    tq_ptr, tk_ptr, head_row, a, real_a, t, real_t,
                    query_length, passage_length, scale,
                    HEAD_DIM, BLOCK_H, TEACHER_PRECISION, WIDEN,
                )  # fmt: skip
                tlse = tl.load(tlse_ptr + head_row * query_length + a, mask=real_a, other=0.0)
                logits -= tlse.to(tl.float32)[:, None]
                larger = tl.maximum(tile_shift, tl.max(logits, 1))
                to = tl.where(larger == float("-inf"), 0.0, larger)
                w = w * tl.exp(tile_shift - to)[:, None] + tl.exp(logits - to[:, None])
                tile_shift = larger
            to = tl.where(tile_shift == float("-inf"), 0.0, tile_shift)
            delta = tl.where(w_shift == float("-inf"), 0.0, w_shift - to)
            shrink = tl.where(w_shift == float("-inf"), 0.0, tl.exp(delta))
            w_log = shrink * (w_log + delta * w_sum)
            w_sum *= shrink
            w_x *= shrink
            w_shift = tile_shift
        else:
            w = _load_map(map_ptr, pair * query_length + a, t, pairs, passage_length, ALIGNED)
        w = tl.where(pairs, w, 0.0)
        w_sum += tl.sum(w, 1)
        # 1.18e-38, the smallest normal number, stands in for 0 in the logarithm: 0 log 0 = 0.
        w_log += tl.sum(w * tl.log(tl.where(w == 0.0, 1.18e-38, w)), 1)
        w_x += tl.sum(w * tl.where(pairs, s, 0.0), 1) * inverse_tau

    rows = real_a & (alive > 0)
    lse = best * inverse_tau + tl.log(total)
    if REBUILD:
        log_sum = tl.log(w_sum)
        kl = w_log / w_sum - log_sum - w_x / w_sum + lse
        norm = w_shift + log_sum
    else:
        kl = w_log - w_x + w_sum * lse
        norm = w_sum
    out = pair * query_length + a
    tl.store(best_ptr + out, tl.where(rows, best, 0.0), mask=stored)
    tl.store(kl_ptr + out, tl.where(rows, kl, 0.0), mask=stored)
    tl.store(lse_ptr + out, tl.where(rows, lse, 0.0), mask=stored)
    tl.store(norm_ptr + out, tl.where(rows, norm, 0.0), mask=stored)
    winner = tl.where(rows, winner, 0)
    tl.store(winner_ptr + out, winner.to(winner_ptr.dtype.element_ty), mask=stored)


@triton.jit
def _similarity_gradient(
    q, p, map_ptr, tq_ptr, tk_ptr, tlse_ptr, winner_ptr, lse_ptr, norm_ptr,
    g_score, g_kl, pair, a, real_a, t, real_t,
    query_length, passage_length, heads, inverse_tau, scale,
    HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    REBUILD: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    TEACHER_PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """``d s`` for ``BLOCK_M`` query tokens and ``BLOCK_N`` passage tokens of one pair."""
    pairs = real_a[:, None] & real_t[None, :]
    out = pair * query_length + a
    lse = tl.load(lse_ptr + out, mask=real_a, other=0.0)
    norm = tl.load(norm_ptr + out, mask=real_a, other=0.0)
    winner = tl.load(winner_ptr + out, mask=real_a, other=0).to(tl.int32)
    if REBUILD:
        teacher = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for head in range(0, heads):
            head_row = pair * heads + head
            logits = _head_logits(
                tq_ptr, tk_ptr, head_row, a, real_a, t, real_t,
                query_length, passage_length, scale,
                HEAD_DIM, BLOCK_H, TEACHER_PRECISION, WIDEN,
            )  # fmt: skip
            tlse = tl.load(tlse_ptr + head_row * query_length + a, mask=real_a, other=0.0)
            teacher += tl.exp(logits - (tlse.to(tl.float32) + norm)[:, None])
        mass = tl.full([BLOCK_M], 1.0, tl.float32)
    else:
        teacher = _load_map(map_ptr, out, t, pairs, passage_length, ALIGNED)
        mass = norm
    s = dot(q, tl.trans(p), PRECISION, WIDEN)
    student = tl.exp(s * inverse_tau - lse[:, None])
    grad = (mass[:, None] * student - teacher) * (g_kl * inverse_tau)
    grad += tl.where(winner[:, None] == t[None, :], g_score, 0.0)
    return tl.where(pairs, grad, 0.0)


@kernel
def query_gradient_kernel(
    g_score_ptr, g_kl_ptr, grad_scale_ptr,
    q_ptr, p_ptr, q_mask_ptr, p_mask_ptr, map_ptr, tq_ptr, tk_ptr, tlse_ptr,
    winner_ptr, lse_ptr, norm_ptr, out_ptr,
    query_length, passage_length, group_size, heads, inverse_tau, scale,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_Q_MASK: tl.constexpr, HAS_P_MASK: tl.constexpr, REBUILD: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr, TEACHER_PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """``d q = sum over the group and its tokens of d s @ p``."""
    row_blocks = tl.cdiv(query_length, BLOCK_M)
    query = (tl.program_id(0) // row_blocks).to(tl.int64)
    a = (tl.program_id(0) % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    real_a = a < query_length
    stored = real_a
    if HAS_Q_MASK:
        real_a = _unmasked(q_mask_ptr, query * query_length + a, real_a)
    q = _load_rows(q_ptr, query * query_length + a, real_a, DIM, BLOCK_D)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    tiles = tl.cdiv(passage_length, BLOCK_N)
    for step in range(0, group_size * tiles):
        pair = query * group_size + step // tiles
        t = (step % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        real_t = t < passage_length
        if HAS_P_MASK:
            real_t = _unmasked(p_mask_ptr, pair * passage_length + t, real_t)
        p = _load_rows(p_ptr, pair * passage_length + t, real_t, DIM, BLOCK_D)
        grad = _similarity_gradient(
            q, p, map_ptr, tq_ptr, tk_ptr, tlse_ptr, winner_ptr, lse_ptr, norm_ptr,
            tl.load(g_score_ptr + pair), tl.load(g_kl_ptr + pair), pair, a, real_a, t, real_t,
            query_length, passage_length, heads, inverse_tau, scale,
            HEAD_DIM, BLOCK_H, BLOCK_M, BLOCK_N, REBUILD, ALIGNED, PRECISION, TEACHER_PRECISION,
            WIDEN,
        )  # fmt: skip
        total += dot(narrow(grad, p, WIDEN), p, PRECISION, WIDEN)
    total *= tl.load(grad_scale_ptr)
    dims = tl.arange(0, BLOCK_D)
    tl.store(
        out_ptr + (query * query_length + a)[:, None] * DIM + dims[None, :],
        total.to(out_ptr.dtype.element_ty), mask=stored[:, None] & (dims < DIM)[None, :],
    )  # fmt: skip


@kernel
def passage_gradient_kernel(
    g_score_ptr, g_kl_ptr, grad_scale_ptr,
    q_ptr, p_ptr, q_mask_ptr, p_mask_ptr, map_ptr, tq_ptr, tk_ptr, tlse_ptr,
    winner_ptr, lse_ptr, norm_ptr, out_ptr,
    query_length, passage_length, group_size, heads, inverse_tau, scale,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_Q_MASK: tl.constexpr, HAS_P_MASK: tl.constexpr, REBUILD: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr, TEACHER_PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """``d p = sum over query tokens of d s^T @ q`` for ``BLOCK_N`` tokens of one passage."""
    tiles = tl.cdiv(passage_length, BLOCK_N)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    query = pair // group_size
    t = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    real_t = t < passage_length
    stored = real_t
    if HAS_P_MASK:
        real_t = _unmasked(p_mask_ptr, pair * passage_length + t, real_t)
    p = _load_rows(p_ptr, pair * passage_length + t, real_t, DIM, BLOCK_D)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for block in range(0, tl.cdiv(query_length, BLOCK_M)):
        a = block * BLOCK_M + tl.arange(0, BLOCK_M)
        real_a = a < query_length
        if HAS_Q_MASK:
            real_a = _unmasked(q_mask_ptr, query * query_length + a, real_a)
        q = _load_rows(q_ptr, query * query_length + a, real_a, DIM, BLOCK_D)
        grad = _similarity_gradient(
            q, p, map_ptr, tq_ptr, tk_ptr, tlse_ptr, winner_ptr, lse_ptr, norm_ptr,
            tl.load(g_score_ptr + pair), tl.load(g_kl_ptr + pair), pair, a, real_a, t, real_t,
            query_length, passage_length, heads, inverse_tau, scale,
            HEAD_DIM, BLOCK_H, BLOCK_M, BLOCK_N, REBUILD, ALIGNED, PRECISION, TEACHER_PRECISION,
            WIDEN,
        )  # fmt: skip
        total += dot(narrow(tl.trans(grad), q, WIDEN), q, PRECISION, WIDEN)
    total *= tl.load(grad_scale_ptr)
    dims = tl.arange(0, BLOCK_D)
    tl.store(
        out_ptr + (pair * passage_length + t)[:, None] * DIM + dims[None, :],
        total.to(out_ptr.dtype.element_ty), mask=stored[:, None] & (dims < DIM)[None, :],
    )  # fmt: skip


# --------------------------------------------------------------------------- launching


class _Problem:
    """One call's tensors, sizes and compile-time choices, in the order that the kernels take."""

    def __init__(
        self, queries: Tensor, passages: Tensor, query_mask: Tensor | None,
        passage_mask: Tensor | None, teacher_map: Tensor | None, teacher_queries: Tensor | None,
        teacher_keys: Tensor | None, tau: float, scale: float,
    ) -> None:  # fmt: skip
        self.num_queries, self.query_length, dim = queries.shape
        self.group, self.passage_length = passages.shape[1:3]
        self.pairs = self.num_queries * self.group
        self.queries, self.passages = dense(queries), dense(passages)
        self.masks = as_bytes(query_mask), as_bytes(passage_mask)
        self.teacher = tuple(
            None if x is None else dense(x) for x in (teacher_map, teacher_queries, teacher_keys)
        )
        rebuild = teacher_queries is not None
        self.heads, head_dim = (
            (teacher_queries.shape[2], teacher_queries.shape[4])
            if teacher_queries is not None
            else (1, 16)
        )
        teacher_dtype = queries.dtype if teacher_queries is None else teacher_queries.dtype
        if teacher_dtype == torch.float64:
            raise ValueError('backend="triton" has no float64; the teacher\'s projections are')
        # Rebuilding from float32 takes float32 products, and their tiles, whatever the student's.
        tile_dtype = torch.promote_types(queries.dtype, teacher_dtype)
        if query_mask is not None:
            self.num_tokens = query_mask.sum(-1, keepdim=True).clamp_min(1)
        else:
            self.num_tokens = torch.full(
                (self.num_queries, 1), self.query_length, device=queries.device
            )
        self.sizes = (
            self.query_length, self.passage_length, self.group, self.heads, 1.0 / tau, scale
        )  # fmt: skip
        self.meta: dict[str, Any] = {
            "DIM": dim, "BLOCK_D": padded_dim(dim),
            "HEAD_DIM": head_dim, "BLOCK_H": padded_dim(head_dim),
            "HAS_Q_MASK": query_mask is not None, "HAS_P_MASK": passage_mask is not None,
            "REBUILD": rebuild, "ALIGNED": not rebuild and self.passage_length % 16 == 0,
            "PRECISION": precision(queries.dtype),
            "TEACHER_PRECISION": precision(teacher_dtype), "WIDEN": INTERPRET,
        }  # fmt: skip
        self.tile = tile_dtype, self.meta["BLOCK_D"], self.meta["BLOCK_H"] if rebuild else 0

    def teacher_lse(self, given: Tensor | None) -> Tensor | None:
        """Each head's log-sum-exp: the given one, or over the passage's tokens."""
        if not self.meta["REBUILD"]:
            return None
        if given is not None:
            return given.float().contiguous()
        _, teacher_queries, teacher_keys = self.teacher
        assert teacher_queries is not None
        lse = self.queries.new_zeros(self.pairs, self.heads, self.query_length, dtype=torch.float32)
        query_length, passage_length, group, heads, _, scale = self.sizes
        config = teacher_lse_config(teacher_queries.dtype, self.meta["BLOCK_H"])
        grid = (self.pairs * heads * triton.cdiv(query_length, config["BLOCK_M"]),)
        if grid[0]:
            teacher_lse_kernel[grid](
                teacher_queries, teacher_keys, *self.masks, lse,
                query_length, passage_length, group, heads, scale,
                HEAD_DIM=self.meta["HEAD_DIM"], BLOCK_H=self.meta["BLOCK_H"],
                HAS_Q_MASK=self.meta["HAS_Q_MASK"], HAS_P_MASK=self.meta["HAS_P_MASK"],
                PRECISION=self.meta["TEACHER_PRECISION"], WIDEN=INTERPRET, **config,
            )  # fmt: skip
        return lse

    def forward(self, given_lse: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Scores, KL, winners, ``lse(x)`` and the teacher's norm."""
        shape = (self.num_queries, self.group, self.query_length)
        best, kl, lse, norm = (self.queries.new_zeros(shape, dtype=torch.float32) for _ in range(4))
        winners = self.queries.new_zeros(shape, dtype=winner_dtype(self.passage_length))
        config = kl_config(*self.tile)
        grid = (self.pairs * triton.cdiv(self.query_length, config["BLOCK_M"]),)
        if grid[0]:
            forward_kernel[grid](
                self.queries, self.passages, *self.masks, *self.teacher,
                self.teacher_lse(given_lse), best, kl, winners, lse, norm,
                *self.sizes, **self.meta, **config,
            )  # fmt: skip
        return best.sum(-1), kl.sum(-1) / self.num_tokens, winners, lse, norm

    def backward(
        self, grad_scores: Tensor, grad_kl: Tensor, given_lse: Tensor | None,
        winners: Tensor, lse: Tensor, norm: Tensor, need_queries: bool, need_passages: bool,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """Gradients of queries and passages, in their dtype."""
        grad_queries = torch.zeros_like(self.queries) if need_queries else None
        grad_passages = torch.zeros_like(self.passages) if need_passages else None
        if self.pairs == 0:
            return grad_queries, grad_passages
        grad_kl = grad_kl.float() / self.num_tokens
        scale, grads = balanced(grad_scores.float().contiguous(), grad_kl.contiguous())
        inputs = (
            *grads, scale, self.queries, self.passages, *self.masks, *self.teacher,
            self.teacher_lse(given_lse), winners, lse, norm,
        )  # fmt: skip
        if grad_queries is not None:
            config = kl_gradient_config(*self.tile, of_passages=False)
            grid = (self.num_queries * triton.cdiv(self.query_length, config["BLOCK_M"]),)
            query_gradient_kernel[grid](*inputs, grad_queries, *self.sizes, **self.meta, **config)
        if grad_passages is not None:
            config = kl_gradient_config(*self.tile, of_passages=True)
            grid = (self.pairs * triton.cdiv(self.passage_length, config["BLOCK_N"]),)
            passage_gradient_kernel[grid](
                *inputs, grad_passages, *self.sizes, **self.meta, **config
            )
        return grad_queries, grad_passages


def kl_forward(
    queries: Tensor, passages: Tensor, query_mask: Tensor | None, passage_mask: Tensor | None,
    teacher_map: Tensor | None, teacher_queries: Tensor | None, teacher_keys: Tensor | None,
    teacher_lse: Tensor | None, tau: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Scores, KL, winners, ``lse(x)`` and the teacher's norm, for a given or a rebuilt map."""
    problem = _Problem(
        queries, passages, query_mask, passage_mask, teacher_map, teacher_queries, teacher_keys,
        tau, scale,
    )  # fmt: skip
    return problem.forward(teacher_lse)


def kl_backward(
    grad_scores: Tensor, grad_kl: Tensor, queries: Tensor, passages: Tensor,
    query_mask: Tensor | None, passage_mask: Tensor | None,
    teacher_map: Tensor | None, teacher_queries: Tensor | None, teacher_keys: Tensor | None,
    teacher_lse: Tensor | None, winners: Tensor, lse: Tensor, norm: Tensor,
    tau: float, scale: float, need_queries: bool, need_passages: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of queries and passages, in their dtype."""
    problem = _Problem(
        queries, passages, query_mask, passage_mask, teacher_map, teacher_queries, teacher_keys,
        tau, scale,
    )  # fmt: skip
    return problem.backward(
        grad_scores, grad_kl, teacher_lse, winners, lse, norm, need_queries, need_passages
    )
