"""Late-interaction scores (MaxSim), and KL terms over the same token similarities, fused.

Four operations, differentiable once with respect to ``queries`` and ``passages``:

- ``maxsim``: ``score = sum_a max_t <q_a, p_t>``, all pairs or every query's own group
- ``maxsim_varlen``: the same on packed tokens
- ``maxsim_token_kl``: own group's scores and ``KL(teacher map || softmax_t(<q_a, p_t> / tau))``
- ``maxsim_attention_kl``: the same, the teacher's map rebuilt from its query and key projections

Masks are bool, True marks a real token; a missing mask means that every token is real. Masked
tokens may hold anything, NaN included. ``queries`` and ``passages`` share one dtype (float64,
float32, float16, bfloat16); results are float32, or float64 for float64 inputs.

``backend``: ``"triton"`` (CUDA tensors; CPU tensors under ``TRITON_INTERPRET=1``), ``"torch"``
(memory-bounded PyTorch), ``"eager"`` (``erniesearch_kernels.reference``: holds every similarity),
or ``"auto"``: Triton on CUDA tensors where Triton >= 3.6 is installed, else torch.
"""

from __future__ import annotations

import functools
import importlib.util
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from erniesearch_kernels import arguments, ops, reference

__all__ = ["maxsim", "maxsim_attention_kl", "maxsim_token_kl", "maxsim_varlen", "triton_available"]

MIN_TRITON = (3, 6)


@functools.cache
def triton_available() -> bool:
    """Whether a Triton that these kernels support is installed (it is not imported)."""
    if importlib.util.find_spec("triton") is None:
        return False
    for distribution in ("triton", "pytorch-triton", "pytorch-triton-rocm"):
        try:
            installed = version(distribution)
        except PackageNotFoundError:
            continue
        return tuple(int(part) for part in installed.split(".")[:2]) >= MIN_TRITON
    return False


# Asked here, out of torch.compile's sight, which could not follow the question.
# (torch.compiler.assume_constant_result would say so too, and import the compiler for it.)
_TRITON_INSTALLED = triton_available()


def _resolve(backend: str, queries: Tensor) -> str:
    if backend not in arguments.BACKENDS:
        raise ValueError(f"backend={backend!r}, expected one of {list(arguments.BACKENDS)}")
    if backend == "auto":
        return "triton" if queries.is_cuda and _TRITON_INSTALLED else "torch"
    if backend == "triton" and not _TRITON_INSTALLED:
        raise ValueError('backend="triton" needs Triton >= 3.6, which is not installed')
    if backend == "triton" and queries.dtype == torch.float64:
        raise ValueError('backend="triton" has no float64; use backend="torch"')
    return backend


def _with_empty(scores: Tensor, passage_mask: Tensor | None, empty_score: float) -> Tensor:
    """``empty_score`` where a passage has no real token (the operators give 0)."""
    if passage_mask is None or empty_score == 0.0:
        return scores
    return torch.where(passage_mask.any(-1), scores, empty_score)


def maxsim(
    queries: Tensor,
    passages: Tensor,
    query_mask: Tensor | None = None,
    passage_mask: Tensor | None = None,
    *,
    normalize: bool = False,
    save_winners: bool = True,
    empty_score: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Sum over query tokens of the maximal similarity to a passage token.

    ``score[i,j] = sum_a max_t <queries[i,a], passages[j,t]>`` over real tokens; of equal
    similarities the first token wins and takes the whole gradient.

    Args:
        queries: ``[num_queries, query_length, dim]``.
        passages: ``[num_passages, passage_length, dim]`` for all pairs, or
            ``[num_queries, group_size, passage_length, dim]`` for every query's own group.
        query_mask: ``[num_queries, query_length]``.
        passage_mask: the shape of ``passages`` without ``dim``.
        normalize: divide every token vector by its length (at least 1e-12) first.
        save_winners: keep the winners (1, 2 or 4 bytes each) for the backward; otherwise it finds
            them again, which costs a second forward.
        empty_score: of passages without real tokens. 0 lies above every negative score: give a
            large negative number where such passages are ranked among others.
        backend: see the module.

    Returns:
        ``[num_queries, num_passages]`` or ``[num_queries, group_size]``. A query without real
        tokens scores 0, a passage without any ``empty_score``; neither gives nor receives a
        gradient.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, and unknown backends.

    >>> queries, passages = torch.eye(2)[None], torch.ones(3, 4, 2)
    >>> maxsim(queries, passages)
    tensor([[2., 2., 2.]])
    """
    arguments.check_padded(queries, passages, query_mask, passage_mask)
    backend = _resolve(backend, queries)
    if backend == "eager":
        scores = reference.maxsim_reference(
            queries, passages, query_mask, passage_mask, normalize=normalize
        )
    else:
        scores, _ = ops.maxsim_op(
            queries, passages, query_mask, passage_mask, normalize, save_winners, backend
        )
    return _with_empty(scores, passage_mask, empty_score)


def maxsim_varlen(
    queries: Tensor,
    passages: Tensor,
    query_cu_seqlens: Tensor,
    passage_cu_seqlens: Tensor,
    max_query_length: int,
    max_passage_length: int,
    *,
    empty_score: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """``maxsim`` of all pairs, on tokens packed without padding.

    Args:
        queries: ``[total_query_tokens, dim]``.
        passages: ``[total_passage_tokens, dim]``.
        query_cu_seqlens: ``[num_queries + 1]``, int32 or int64: query ``i`` owns rows
            ``query_cu_seqlens[i]`` up to ``query_cu_seqlens[i + 1]``.
        passage_cu_seqlens: ``[num_passages + 1]``, likewise.
        max_query_length: at least the longest query's number of tokens.
        max_passage_length: at least the longest passage's.
        empty_score: of empty passages, as in ``maxsim``.
        backend: see the module.

    Returns:
        ``[num_queries, num_passages]``; empty queries score 0.

    Raises:
        ValueError: as ``maxsim``; bounds that do not fit their tokens (on CPU tensors).
    """
    arguments.check_varlen(
        queries, passages, query_cu_seqlens, passage_cu_seqlens,
        max_query_length, max_passage_length,
    )  # fmt: skip
    backend = _resolve(backend, queries)
    if backend == "eager":
        scores = reference.maxsim_varlen_reference(
            queries, passages, query_cu_seqlens, passage_cu_seqlens
        )
    else:
        scores, _ = ops.maxsim_varlen_op(
            queries, passages, query_cu_seqlens, passage_cu_seqlens,
            max_query_length, max_passage_length, backend,
        )  # fmt: skip
    real = None if empty_score == 0.0 else passage_cu_seqlens.diff().unsqueeze(-1) > 0
    return _with_empty(scores, real, empty_score)


def maxsim_token_kl(
    queries: Tensor,
    passages: Tensor,
    teacher_map: Tensor,
    tau: float,
    query_mask: Tensor | None = None,
    passage_mask: Tensor | None = None,
    *,
    empty_score: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Own-group scores and the KL of token similarities to a given teacher map, in one pass.

    ``kl[i,j] = mean_a sum_t p log p - p log softmax_t(<queries[i,a], passages[i,j,t]> / tau)``
    with ``p = teacher_map[i,j,a,t]``, over real tokens.

    Args:
        queries: ``[num_queries, query_length, dim]``.
        passages: ``[num_queries, group_size, passage_length, dim]``.
        teacher_map: ``[num_queries, group_size, query_length, passage_length]``, used as it is
            (rows are expected to sum to 1 over real tokens); receives no gradient.
        tau: the student's temperature.
        query_mask: ``[num_queries, query_length]``.
        passage_mask: ``[num_queries, group_size, passage_length]``.
        empty_score: of passages without real tokens, as in ``maxsim``; their KL is 0.
        backend: see the module.

    Returns:
        ``(scores, kl)``, both ``[num_queries, group_size]``, and 0 for queries without real tokens.

    Raises:
        ValueError: as ``maxsim``; a ``tau`` that is not positive.
    """
    arguments.check_padded(queries, passages, query_mask, passage_mask, group_only=True)
    arguments.check_teacher_map(queries, passages, teacher_map)
    arguments.check_tau(tau)
    backend = _resolve(backend, queries)
    if backend == "eager":
        scores, kl = reference.maxsim_token_kl_reference(
            queries, passages, teacher_map, tau, query_mask, passage_mask
        )
    else:
        scores, kl, *_ = ops.maxsim_kl_op(
            queries, passages, query_mask, passage_mask, teacher_map.detach(), None, None, None,
            tau, 1.0, backend,
        )  # fmt: skip
    return _with_empty(scores, passage_mask, empty_score), kl


def maxsim_attention_kl(
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
    empty_score: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``maxsim_token_kl`` with the teacher's attention map rebuilt tile by tile.

    With ``a[h,s,t] = scale * <teacher_queries[h,s], teacher_keys[h,t]>``, ``t`` over the passage's
    real tokens, the teacher's row is::

        with teacher_lse     p[s,t] ~ sum_h exp(a[h,s,t] - teacher_lse[h,s])
        without              p[s,t] ~ sum_h softmax_t(a[h,s,:])[t]

    The first is the head mean of the attention maps, cut to the passage and renormalised; the
    second gives every head the same weight, however little of its attention goes to the passage.
    Arguments that are not listed are those of ``maxsim_token_kl``.

    Args:
        teacher_queries: ``[num_queries, group_size, heads, query_length, head_dim]``.
        teacher_keys: ``[num_queries, group_size, heads, passage_length, head_dim]``.
        scale: of the teacher's attention logits; ``head_dim ** -0.5`` if None.
        teacher_lse: ``[num_queries, group_size, heads, query_length]``, log-sum-exp of each head's
            whole attention row, every real token of the cross-encoder's input included.

    Returns:
        ``(scores, kl)``, both ``[num_queries, group_size]``. Teacher inputs receive no gradient.

    Raises:
        ValueError: as ``maxsim_token_kl``.
    """
    arguments.check_padded(queries, passages, query_mask, passage_mask, group_only=True)
    arguments.check_teacher_projections(
        queries, passages, teacher_queries, teacher_keys, teacher_lse
    )
    arguments.check_tau(tau)
    backend = _resolve(backend, queries)
    scale = teacher_queries.shape[-1] ** -0.5 if scale is None else scale
    if backend == "eager":
        scores, kl = reference.maxsim_attention_kl_reference(
            queries, passages, teacher_queries, teacher_keys, tau, query_mask, passage_mask,
            scale=scale, teacher_lse=teacher_lse,
        )  # fmt: skip
    else:
        scores, kl, *_ = ops.maxsim_kl_op(
            queries, passages, query_mask, passage_mask,
            None, teacher_queries.detach(), teacher_keys.detach(),
            None if teacher_lse is None else teacher_lse.detach(), tau, scale, backend,
        )  # fmt: skip
    return _with_empty(scores, passage_mask, empty_score), kl
