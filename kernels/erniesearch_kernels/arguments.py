"""Argument checks of the public operations. Errors carry the values that are wrong."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("auto", "torch", "triton", "eager")


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)


def _require_shape(name: str, x: Tensor, expected: list[int], why: str) -> None:
    if _shape(x) != expected:
        raise ValueError(f"{name} has shape {_shape(x)}, expected {expected} ({why})")


def check_tokens(queries: Tensor, passages: Tensor) -> None:
    """One dtype, one device, one dim, and nothing empty but the batch."""
    if queries.dtype != passages.dtype:
        raise ValueError(f"queries are {queries.dtype}, passages are {passages.dtype}")
    if queries.dtype not in DTYPES:
        raise ValueError(f"queries are {queries.dtype}, expected one of {list(DTYPES)}")
    if queries.device != passages.device:
        raise ValueError(f"queries are on {queries.device}, passages on {passages.device}")
    if queries.shape[-1] != passages.shape[-1]:
        raise ValueError(
            f"queries have d={queries.shape[-1]}, passages have d={passages.shape[-1]}"
        )
    if queries.shape[-1] == 0:
        raise ValueError("queries and passages have d=0")


def check_padded(
    queries: Tensor, passages: Tensor, query_mask: Tensor | None, passage_mask: Tensor | None,
    *, group_only: bool = False,
) -> None:  # fmt: skip
    """``queries [n, a, d]``, ``passages [m, t, d]`` or ``[n, group, t, d]``, and their masks."""
    if queries.dim() != 3:
        raise ValueError(
            f"queries have shape {_shape(queries)}, expected [num_queries, query_length, dim]"
        )
    if passages.dim() not in ((4,) if group_only else (3, 4)):
        all_pairs = "" if group_only else "[num_passages, passage_length, dim] or "
        raise ValueError(
            f"passages have shape {_shape(passages)}, expected {all_pairs}"
            "[num_queries, group_size, passage_length, dim]"
        )
    check_tokens(queries, passages)
    if passages.dim() == 4 and passages.shape[0] != queries.shape[0]:
        raise ValueError(
            f"passages hold groups of {passages.shape[0]} queries, there are {queries.shape[0]}"
        )
    if queries.shape[1] == 0 or passages.shape[-2] == 0:
        raise ValueError(
            f"query_length={queries.shape[1]}, passage_length={passages.shape[-2]}: "
            "both must be at least 1"
        )
    for name, mask, x in (
        ("query_mask", query_mask, queries),
        ("passage_mask", passage_mask, passages),
    ):
        if mask is None:
            continue
        if mask.dtype != torch.bool:
            raise ValueError(f"{name} is {mask.dtype}, expected torch.bool (True = real token)")
        _require_shape(name, mask, _shape(x)[:-1], "the tokens' shape without dim")
        if mask.device != x.device:
            raise ValueError(f"{name} is on {mask.device}, its tokens on {x.device}")


def check_varlen(
    queries: Tensor, passages: Tensor, query_cu_seqlens: Tensor, passage_cu_seqlens: Tensor,
    max_query_length: int, max_passage_length: int,
) -> None:  # fmt: skip
    """Packed tokens and their bounds (the bounds' values are checked in ``check_bounds``)."""
    for name, x in (("queries", queries), ("passages", passages)):
        if x.dim() != 2:
            raise ValueError(f"{name} have shape {_shape(x)}, expected [total_tokens, dim]")
    check_tokens(queries, passages)
    for name, bounds in (
        ("query_cu_seqlens", query_cu_seqlens),
        ("passage_cu_seqlens", passage_cu_seqlens),
    ):
        if bounds.dim() != 1 or bounds.shape[0] < 1:
            raise ValueError(f"{name} has shape {_shape(bounds)}, expected [num_sequences + 1]")
        if bounds.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} is {bounds.dtype}, expected torch.int32 or torch.int64")
        if bounds.device != queries.device:
            raise ValueError(f"{name} is on {bounds.device}, its tokens on {queries.device}")
    for name, length in (
        ("max_query_length", max_query_length),
        ("max_passage_length", max_passage_length),
    ):
        if length < 1:
            raise ValueError(f"{name}={length}, expected at least 1")


def check_bounds(name: str, bounds: Tensor, total: int, longest: int) -> None:
    """Values of a ``cu_seqlens``: from 0 up to ``total`` in steps of 0 to ``longest``.

    Reads the tensor, so it is called only where that costs no synchronisation.
    """
    values = bounds.tolist()
    if values[0] != 0 or values[-1] != total:
        raise ValueError(
            f"{name} goes from {values[0]} to {values[-1]}, expected from 0 to {total}"
        )
    lengths = [after - before for before, after in pairwise(values)]
    if lengths and min(lengths) < 0:
        raise ValueError(f"{name} decreases: {values}")
    if lengths and max(lengths) > longest:
        raise ValueError(f"{name} has a sequence of {max(lengths)} tokens, the stated maximum is "
                         f"{longest}")  # fmt: skip


def check_teacher_map(queries: Tensor, passages: Tensor, teacher_map: Tensor) -> None:
    """``teacher_map [num_queries, group, query_length, passage_length]``, a floating dtype."""
    expected = [*passages.shape[:2], queries.shape[1], passages.shape[2]]
    _require_shape(
        "teacher_map", teacher_map, expected,
        "[num_queries, group_size, query_length, passage_length]",
    )  # fmt: skip
    _check_teacher("teacher_map", teacher_map, queries)


def _check_teacher(name: str, x: Tensor, queries: Tensor) -> None:
    if not x.dtype.is_floating_point:
        raise ValueError(f"{name} is {x.dtype}, expected a floating dtype")
    if x.device != queries.device:
        raise ValueError(f"{name} is on {x.device}, queries on {queries.device}")


def check_teacher_projections(
    queries: Tensor, passages: Tensor, teacher_queries: Tensor, teacher_keys: Tensor,
    teacher_lse: Tensor | None,
) -> None:  # fmt: skip
    """``[num_queries, group, heads, tokens, head_dim]`` twice, ``teacher_lse`` without head_dim."""
    for name, x in (("teacher_queries", teacher_queries), ("teacher_keys", teacher_keys)):
        if x.dim() != 5:
            raise ValueError(
                f"{name} has shape {_shape(x)}, expected "
                "[num_queries, group_size, heads, length, head_dim]"
            )
    heads, head_dim = teacher_queries.shape[2], teacher_queries.shape[4]
    if teacher_keys.dtype != teacher_queries.dtype:
        raise ValueError(
            f"teacher_queries are {teacher_queries.dtype}, teacher_keys are {teacher_keys.dtype}"
        )
    if heads == 0 or head_dim == 0:
        raise ValueError(f"the teacher has {heads} heads of dim {head_dim}")
    prefix, query_length, length = passages.shape[:2], queries.shape[1], passages.shape[2]
    why = "queries, group, heads, tokens and head_dim agree with the other inputs"
    expected = [*prefix, heads, query_length, head_dim]
    _require_shape("teacher_queries", teacher_queries, expected, why)
    _require_shape("teacher_keys", teacher_keys, [*prefix, heads, length, head_dim], why)
    _check_teacher("teacher_queries", teacher_queries, queries)
    _check_teacher("teacher_keys", teacher_keys, queries)
    if teacher_lse is not None:
        why = "one number per head and query token"
        _require_shape("teacher_lse", teacher_lse, [*prefix, heads, query_length], why)
        _check_teacher("teacher_lse", teacher_lse, queries)


def check_tau(tau: float) -> None:
    """A positive finite temperature."""
    if not 0.0 < tau < float("inf"):
        raise ValueError(f"tau={tau}, expected a positive finite number")
