"""The ``torch.library`` operators: one per operation and direction, with fake kernels and autograd.

``backend`` is ``"torch"`` or ``"triton"``; both serve every device that they can (Triton kernels
run on CPU tensors under ``TRITON_INTERPRET=1``). Triton is imported when it is first needed.
A forward returns what its backward needs besides the inputs; those outputs are not differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from erniesearch_kernels import torch_maxsim, torch_token_kl
from erniesearch_kernels.arguments import check_bounds
from erniesearch_kernels.reference import compute_dtype
from erniesearch_kernels.torch_maxsim import winner_dtype

NAMESPACE = "erniesearch_kernels"


def _triton_maxsim() -> ModuleType:
    from erniesearch_kernels import triton_maxsim

    return triton_maxsim


def _triton_token_kl() -> ModuleType:
    from erniesearch_kernels import triton_token_kl

    return triton_token_kl


@contextmanager
def _on_its_own(x: Tensor) -> Iterator[None]:
    """Where ``x`` lies and without autocast, whatever the caller's state.

    Triton launches on the current GPU, which need not be the tensors'. Autocast stays on inside an
    operator and would turn the products into bfloat16 ones.
    """
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        yield


def _grads(like: Sequence[Tensor], grads: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Gradients in the inputs' dtypes; an empty tensor where none was asked for."""
    query, passage = (
        x.new_empty(0) if grad is None else grad.to(x.dtype)
        for x, grad in zip(like, grads, strict=True)
    )
    return query, passage


def _fake_grads(
    queries: Tensor, passages: Tensor, need_queries: bool, need_passages: bool
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(queries, memory_format=torch.contiguous_format)
        if need_queries
        else queries.new_empty(0),
        torch.empty_like(passages, memory_format=torch.contiguous_format)
        if need_passages
        else passages.new_empty(0),
    )


def _raise_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError(
        "erniesearch_kernels operators can be differentiated once only; for second derivatives "
        'use backend="eager"'
    )


# --------------------------------------------------------------------------- maxsim


@torch.library.custom_op(f"{NAMESPACE}::maxsim", mutates_args=())
def maxsim_op(
    queries: Tensor, passages: Tensor, query_mask: Tensor | None, passage_mask: Tensor | None,
    normalize: bool, save_winners: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scores and winners (an empty tensor unless ``save_winners``)."""
    forward = (
        _triton_maxsim().maxsim_forward if backend == "triton" else torch_maxsim.maxsim_forward
    )
    with _on_its_own(queries):
        return forward(queries, passages, query_mask, passage_mask, normalize, save_winners)


@maxsim_op.register_fake
def _(
    queries: Tensor, passages: Tensor, query_mask: Tensor | None, passage_mask: Tensor | None,
    normalize: bool, save_winners: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    num_queries, query_length = queries.shape[:2]
    num, length = passages.shape[-3:-1]
    scores = queries.new_empty(num_queries, num, dtype=compute_dtype(queries.dtype))
    shape = (num_queries, num) if passages.dim() == 4 else (num, num_queries)
    winners = queries.new_empty(
        (*shape, query_length) if save_winners else (0, 0, 0), dtype=winner_dtype(length)
    )
    return scores, winners


@torch.library.custom_op(f"{NAMESPACE}::maxsim_backward", mutates_args=())
def maxsim_backward_op(
    grad: Tensor, queries: Tensor, passages: Tensor,
    query_mask: Tensor | None, passage_mask: Tensor | None, winners: Tensor | None,
    normalize: bool, need_queries: bool, need_passages: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of queries and passages; ``winners`` None: found again."""
    module = _triton_maxsim() if backend == "triton" else torch_maxsim
    with _on_its_own(queries):
        if winners is None:
            _, winners = module.maxsim_forward(
                queries, passages, query_mask, passage_mask, normalize, True
            )
        grads = module.maxsim_backward(
            grad, queries, passages, query_mask, passage_mask, winners,
            normalize, need_queries, need_passages,
        )  # fmt: skip
    return _grads((queries, passages), grads)


@maxsim_backward_op.register_fake
def _(
    grad: Tensor, queries: Tensor, passages: Tensor,
    query_mask: Tensor | None, passage_mask: Tensor | None, winners: Tensor | None,
    normalize: bool, need_queries: bool, need_passages: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _fake_grads(queries, passages, need_queries, need_passages)


def _maxsim_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    queries, passages, query_mask, passage_mask, normalize, save_winners, backend = inputs
    _scores, winners = output
    ctx.mark_non_differentiable(winners)
    ctx.save_for_backward(
        queries, passages, query_mask, passage_mask, winners if save_winners else None
    )
    ctx.options = normalize, backend


def _maxsim_vjp(ctx: Any, grad: Tensor, _winners: None) -> tuple[Tensor | None, ...]:
    queries, passages, query_mask, passage_mask, winners = ctx.saved_tensors
    normalize, backend = ctx.options
    need = ctx.needs_input_grad
    grad_queries, grad_passages = maxsim_backward_op(
        grad, queries, passages, query_mask, passage_mask, winners,
        normalize, need[0], need[1], backend,
    )  # fmt: skip
    none = (None,) * 5
    return grad_queries if need[0] else None, grad_passages if need[1] else None, *none


# --------------------------------------------------------------------------- maxsim_varlen


@torch.library.custom_op(f"{NAMESPACE}::maxsim_varlen", mutates_args=())
def maxsim_varlen_op(
    queries: Tensor, passages: Tensor, query_cu_seqlens: Tensor, passage_cu_seqlens: Tensor,
    max_query_length: int, max_passage_length: int, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scores and winners ``[num_passages, total_query_tokens]``."""
    if queries.device.type == "cpu":  # on a GPU, reading the bounds would wait for it
        check_bounds("query_cu_seqlens", query_cu_seqlens, len(queries), max_query_length)
        check_bounds("passage_cu_seqlens", passage_cu_seqlens, len(passages), max_passage_length)
    forward = (
        _triton_maxsim().varlen_forward if backend == "triton" else torch_maxsim.varlen_forward
    )
    with _on_its_own(queries):
        return forward(
            queries, passages, query_cu_seqlens, passage_cu_seqlens,
            max_query_length, max_passage_length,
        )  # fmt: skip


@maxsim_varlen_op.register_fake
def _(
    queries: Tensor, passages: Tensor, query_cu_seqlens: Tensor, passage_cu_seqlens: Tensor,
    max_query_length: int, max_passage_length: int, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    num_queries, num_passages = query_cu_seqlens.shape[0] - 1, passage_cu_seqlens.shape[0] - 1
    scores = queries.new_empty(num_queries, num_passages, dtype=compute_dtype(queries.dtype))
    winners = queries.new_empty(
        num_passages, queries.shape[0], dtype=winner_dtype(max_passage_length)
    )
    return scores, winners


@torch.library.custom_op(f"{NAMESPACE}::maxsim_varlen_backward", mutates_args=())
def maxsim_varlen_backward_op(
    grad: Tensor, queries: Tensor, passages: Tensor,
    query_cu_seqlens: Tensor, passage_cu_seqlens: Tensor, winners: Tensor,
    max_query_length: int, max_passage_length: int,
    need_queries: bool, need_passages: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of packed queries and passages."""
    with _on_its_own(queries):
        if backend == "triton":
            grads = _triton_maxsim().varlen_backward(
                grad, queries, passages, query_cu_seqlens, passage_cu_seqlens, winners,
                max_query_length, max_passage_length, need_queries, need_passages,
            )  # fmt: skip
        else:
            grads = torch_maxsim.varlen_backward(
                grad, queries, passages, query_cu_seqlens, passage_cu_seqlens, winners,
                need_queries, need_passages,
            )  # fmt: skip
    return _grads((queries, passages), grads)


@maxsim_varlen_backward_op.register_fake
def _(
    grad: Tensor, queries: Tensor, passages: Tensor,
    query_cu_seqlens: Tensor, passage_cu_seqlens: Tensor, winners: Tensor,
    max_query_length: int, max_passage_length: int,
    need_queries: bool, need_passages: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _fake_grads(queries, passages, need_queries, need_passages)


def _varlen_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _scores, winners = output
    ctx.mark_non_differentiable(winners)
    ctx.save_for_backward(*inputs[:4], winners)
    ctx.options = inputs[4:]


def _varlen_vjp(ctx: Any, grad: Tensor, _winners: None) -> tuple[Tensor | None, ...]:
    max_query_length, max_passage_length, backend = ctx.options
    need = ctx.needs_input_grad
    grad_queries, grad_passages = maxsim_varlen_backward_op(
        grad, *ctx.saved_tensors, max_query_length, max_passage_length, need[0], need[1], backend
    )
    none = (None,) * 5
    return grad_queries if need[0] else None, grad_passages if need[1] else None, *none


# --------------------------------------------------------------------------- KL over the maps
#
# One operator serves both forms: either ``teacher_map`` or ``teacher_queries`` and
# ``teacher_keys`` are given.


def _teacher(
    queries: Tensor, passage_mask: Tensor | None, teacher_map: Tensor | None,
    teacher_queries: Tensor | None, teacher_keys: Tensor | None, teacher_lse: Tensor | None,
    scale: float,
) -> tuple[torch_token_kl.TeacherMap, int]:  # fmt: skip
    """How the torch backend gets the teacher's map, and how many heads that takes."""
    if teacher_map is not None:
        return torch_token_kl.given_map(teacher_map, compute_dtype(queries.dtype)), 1
    if teacher_queries is None or teacher_keys is None:
        raise ValueError("neither teacher_map nor teacher_queries and teacher_keys are given")
    build = torch_token_kl.rebuilt_map(
        teacher_queries, teacher_keys, teacher_lse, scale, passage_mask
    )
    return build, teacher_queries.shape[2]


@torch.library.custom_op(f"{NAMESPACE}::maxsim_kl", mutates_args=())
def maxsim_kl_op(
    queries: Tensor, passages: Tensor, query_mask: Tensor | None, passage_mask: Tensor | None,
    teacher_map: Tensor | None, teacher_queries: Tensor | None, teacher_keys: Tensor | None,
    teacher_lse: Tensor | None, tau: float, scale: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Scores, KL, winners, log-sum-exp of student rows, norm of teacher rows (torch: residuals)."""
    with _on_its_own(queries):
        if backend == "triton":
            return _triton_token_kl().kl_forward(
                queries, passages, query_mask, passage_mask,
                teacher_map, teacher_queries, teacher_keys, teacher_lse, tau, scale,
            )  # fmt: skip
        teacher, heads = _teacher(
            queries, passage_mask, teacher_map, teacher_queries, teacher_keys, teacher_lse, scale
        )
        return torch_token_kl.token_kl_forward(
            queries, passages, teacher, heads, tau, query_mask, passage_mask
        )


@maxsim_kl_op.register_fake
def _(
    queries: Tensor, passages: Tensor, query_mask: Tensor | None, passage_mask: Tensor | None,
    teacher_map: Tensor | None, teacher_queries: Tensor | None, teacher_keys: Tensor | None,
    teacher_lse: Tensor | None, tau: float, scale: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    num_queries, query_length = queries.shape[:2]
    group, length = passages.shape[1:3]
    dtype = compute_dtype(queries.dtype)
    scores = queries.new_empty(num_queries, group, dtype=dtype)
    lse = queries.new_empty(num_queries, group, query_length, dtype=dtype)
    winners = queries.new_empty(lse.shape, dtype=winner_dtype(length))
    if backend == "triton":
        norm = torch.empty_like(lse)
    else:
        norm = lse.new_empty(torch_token_kl.residuals_shape(queries, passages))
    return scores, torch.empty_like(scores), winners, lse, norm


@torch.library.custom_op(f"{NAMESPACE}::maxsim_kl_backward", mutates_args=())
def maxsim_kl_backward_op(
    grad_scores: Tensor, grad_kl: Tensor, queries: Tensor, passages: Tensor,
    query_mask: Tensor | None, passage_mask: Tensor | None,
    teacher_map: Tensor | None, teacher_queries: Tensor | None, teacher_keys: Tensor | None,
    teacher_lse: Tensor | None, winners: Tensor, lse: Tensor, norm: Tensor,
    tau: float, scale: float, need_queries: bool, need_passages: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of queries and passages."""
    with _on_its_own(queries):
        if backend == "triton":
            grads = _triton_token_kl().kl_backward(
                grad_scores, grad_kl, queries, passages, query_mask, passage_mask,
                teacher_map, teacher_queries, teacher_keys, teacher_lse, winners, lse, norm,
                tau, scale, need_queries, need_passages,
            )  # fmt: skip
        else:
            teacher, heads = _teacher(
                queries, passage_mask, teacher_map, teacher_queries, teacher_keys, teacher_lse,
                scale,
            )  # fmt: skip
            grads = torch_token_kl.token_kl_backward(
                grad_scores, grad_kl, queries, passages, teacher, heads, tau,
                query_mask, passage_mask, winners, lse, norm, need_queries, need_passages,
            )  # fmt: skip
    return _grads((queries, passages), grads)


@maxsim_kl_backward_op.register_fake
def _(
    grad_scores: Tensor, grad_kl: Tensor, queries: Tensor, passages: Tensor,
    query_mask: Tensor | None, passage_mask: Tensor | None,
    teacher_map: Tensor | None, teacher_queries: Tensor | None, teacher_keys: Tensor | None,
    teacher_lse: Tensor | None, winners: Tensor, lse: Tensor, norm: Tensor,
    tau: float, scale: float, need_queries: bool, need_passages: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _fake_grads(queries, passages, need_queries, need_passages)


def _kl_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, tau, scale, backend = inputs
    _scores, _kl, winners, lse, norm = output
    ctx.mark_non_differentiable(winners, lse, norm)
    ctx.save_for_backward(*tensors, winners, lse, norm)
    ctx.options = tau, scale, backend


def _kl_vjp(
    ctx: Any, grad_scores: Tensor, grad_kl: Tensor, *_others: None
) -> tuple[Tensor | None, ...]:
    tau, scale, backend = ctx.options
    need = ctx.needs_input_grad
    grad_queries, grad_passages = maxsim_kl_backward_op(
        grad_scores, grad_kl, *ctx.saved_tensors, tau, scale, need[0], need[1], backend
    )
    none = (None,) * 9
    return grad_queries if need[0] else None, grad_passages if need[1] else None, *none


def _register_autograd() -> None:
    forward: list[tuple[Any, Callable[..., Any], Callable[..., Any]]] = [
        (maxsim_op, _maxsim_vjp, _maxsim_setup),
        (maxsim_varlen_op, _varlen_vjp, _varlen_setup),
        (maxsim_kl_op, _kl_vjp, _kl_setup),
    ]
    for op, vjp, setup in forward:
        op.register_autograd(vjp, setup_context=setup)
    for op in (maxsim_backward_op, maxsim_varlen_backward_op, maxsim_kl_backward_op):
        op.register_autograd(_raise_second_derivative)


_register_autograd()
