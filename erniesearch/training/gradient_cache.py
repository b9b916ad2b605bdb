"""Gradient caching: one loss over a batch whose activations do not fit.

    1. outputs o_1 … o_K of the batch's chunks, without gradient
    2. L = objective(o_1, …, o_K) over the whole batch, every rank's passages included, and ∂L/∂o_k
    3. each chunk once more, with gradient:  ∂L/∂θ = sum over k of (∂o_k/∂θ)ᵀ ∂L/∂o_k

This is the chain rule and no approximation (Gao et al. 2021, arXiv 2101.06983). Dropout is seeded
per chunk, so that both runs of a chunk draw the same masks. Activations of one chunk live at a
time; what grows with the batch are outputs (vectors, token vectors, scores) and their gradients.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from erniesearch.data.batches import Batch
from erniesearch.models.joint import Chunk, JointModel, Work
from erniesearch.objectives.exchange import Exchange
from erniesearch.objectives.outputs import Encoded, Outputs
from erniesearch.training.faults.guards import spoil_nonfinite

Leaves = dict[tuple[Work, int], list[Tensor]]
"""Outputs over the whole batch by kind of work and dropout pass; empty where not asked for."""


def cached_backward(
    model: JointModel,
    forward: Callable[[Batch, Chunk], tuple[Tensor, ...]],
    backward: Callable[[Tensor], Any],
    batch: Batch,
    chunk_size: int,
    scale: float = 1.0,
    progress: Callable[[str], Any] = lambda _: None,
) -> dict[str, Tensor]:
    """The terms of a micro-step, their gradient added to the parameters.

    Args:
        model: for its objective; its parameters are used through ``forward`` only.
        forward: runs ``model(batch, chunk)``; an engine does it with its own hooks.
        backward: of a scalar, once per chunk; wherever it leaves gradients, they must add up.
        batch: this rank's.
        chunk_size: texts or pairs per call of ``forward``.
        scale: factor of the gradient.
        progress: is told what is being done.

    Returns:
        As :meth:`Objective.terms`, without graph.
    """
    chunks = list(model.chunks(batch, chunk_size))
    leaves, pair_terms, exchange = _run(model, forward, batch, chunks, progress)
    for (kind, _), parts in leaves.items():
        for part in parts:
            part.requires_grad_(kind != "pair" or model.objective.trains_teacher)
    progress("loss over all chunks")
    terms: dict[str, Tensor] = {}
    if leaves:
        outputs = _outputs(leaves, pair_terms.terms(leaves), exchange)
        terms = model.objective.terms(batch, outputs, model.training)
        (scale * spoil_nonfinite(terms["loss"])).backward()
        terms = {name: value.detach() for name, value in terms.items()}
    num_masked = model.masked_words(batch) if model.weights.mlm else 0.0
    masked_lm = torch.zeros((), device=batch.query_ids.device)
    for number, chunk in enumerate(chunks):
        progress(f"chunk {number + 1} of {len(chunks)}, backward pass")
        if chunk.kind == "masked":
            own = forward(batch, chunk)[0] / num_masked
            masked_lm += own.detach()
            backward(scale * model.weights.mlm * spoil_nonfinite(own))
            continue
        gradients = [part.grad for part in leaves[chunk.kind, chunk.number]]
        if any(gradient is not None for gradient in gradients):
            backward(_inner_product(forward(batch, chunk), gradients, chunk.rows))
    if model.weights.mlm:
        terms = {"mlm": masked_lm} | terms
        terms["loss"] = terms.get("loss", 0) + model.weights.mlm * masked_lm
    return terms


def chunked_outputs(
    model: JointModel,
    forward: Callable[[Batch, Chunk], tuple[Tensor, ...]],
    batch: Batch,
    chunk_size: int,
) -> Outputs:
    """What the models make of a batch, without gradient and without masked words."""
    chunks = list(model.chunks(batch, chunk_size))
    leaves, pair_terms, exchange = _run(model, forward, batch, chunks, lambda _: None)
    return _outputs(leaves, pair_terms.terms(leaves), exchange)


def _run(
    model: JointModel,
    forward: Callable[[Batch, Chunk], tuple[Tensor, ...]],
    batch: Batch,
    chunks: list[Chunk],
    progress: Callable[[str], Any],
) -> tuple[Leaves, "_PairTerms", Exchange | None]:
    leaves: Leaves = {}
    pair_terms = _PairTerms(model, batch)
    exchange = model.objective.exchange(batch) if model.needs_student else None
    with torch.no_grad():
        for number, chunk in enumerate(chunks):
            progress(f"chunk {number + 1} of {len(chunks)}, forward pass")
            if chunk.kind != "masked":
                _store(leaves, batch, chunk, forward(batch, chunk))
            if chunk.kind == "pair":
                pair_terms.add(chunk.rows, leaves)
            last = chunk.kind == "passage" and chunk.rows.stop == len(batch.passage_ids)
            if exchange is not None and last:
                passages = Encoded(*leaves["passage", chunk.number])
                exchange.start(chunk.number, passages.vectors, passages.tokens)
    return leaves, pair_terms, exchange


def _store(leaves: Leaves, batch: Batch, chunk: Chunk, made: tuple[Tensor, ...]) -> None:
    total = len(batch.query_ids if chunk.kind == "query" else batch.passage_ids)
    key = (chunk.kind, chunk.number)
    if key not in leaves:
        leaves[key] = [p.new_empty((total, *p.shape[1:]) if p.numel() else (0,)) for p in made]
    for whole, part in zip(leaves[key], made, strict=True):
        if part.numel():
            whole[chunk.rows] = part


def _outputs(leaves: Leaves, pair_terms: dict[str, Tensor], exchange: Exchange | None) -> Outputs:
    outputs = Outputs(
        attention=pair_terms.get("attention"), virt=pair_terms.get("virt"), exchange=exchange
    )
    if ("query", 1) in leaves:
        queries, passages = Encoded(*leaves["query", 1]), Encoded(*leaves["passage", 1])
        outputs = outputs._replace(queries=queries, passages=passages)
    if ("query", 2) in leaves:
        second = leaves["query", 2][0], leaves["passage", 2][0]
        outputs = outputs._replace(second_queries=second[0], second_passages=second[1])
    if ("pair", 3) in leaves:
        outputs = outputs._replace(teacher_scores=leaves["pair", 3][0])
    return outputs


def _inner_product(
    outputs: tuple[Tensor, ...], gradients: list[Tensor | None], rows: slice
) -> Tensor:
    """A scalar whose gradient with respect to ``outputs`` is ``gradients[rows]``."""
    products = [
        (output.float() * gradient[rows].float()).sum()
        for output, gradient in zip(outputs, gradients, strict=True)
        if gradient is not None
    ]
    return torch.stack(products).sum()


class _PairTerms:
    """The terms over attention, computed while the teacher's projections of a chunk of pairs are
    there: they are too large to keep. Their gradients with respect to the student's outputs are
    kept instead."""

    def __init__(self, model: JointModel, batch: Batch) -> None:
        self._model, self._batch = model, batch
        parts = {"attention": "tokens", "virt": "projections"}
        # The part of the student's outputs that a term reads.
        named = model.open_pair_terms()
        self._reads = {name: Encoded._fields.index(parts[name]) for name in named}
        self._values: dict[str, Tensor] = {}
        self._gradients: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, rows: slice, leaves: Leaves) -> None:
        """The pairs ``rows``, which the teacher has just read."""
        if not self._reads:
            return
        batch, group_size = self._batch, self._batch.group_size
        first, last = rows.start // group_size, (rows.stop - 1) // group_size + 1
        query = torch.arange(rows.start, rows.stop, device=batch.query_ids.device) // group_size
        share = (rows.stop - rows.start) / len(batch.passage_ids)
        queries = [part[first:last].detach() for part in leaves["query", 1]]
        passages = [part[rows].detach() for part in leaves["passage", 1]]
        for index in self._reads.values():
            queries[index].requires_grad_()
            passages[index].requires_grad_()
        with torch.enable_grad():
            by_pair = [part[query - first] if part.numel() else part for part in queries]
            made = self._model.pair_terms(
                batch, rows, self._model.pairs(batch, rows), Encoded(*by_pair), Encoded(*passages)
            )
            made = {name: share * value for name, value in made.items()}
        for name, index in self._reads.items():
            value = made[name]
            parts = torch.autograd.grad(value, (queries[index], passages[index]))
            self._values[name] = self._values.get(name, 0) + value.detach()
            if name not in self._gradients:
                wholes = leaves["query", 1][index], leaves["passage", 1][index]
                self._gradients[name] = torch.zeros_like(wholes[0]), torch.zeros_like(wholes[1])
            places = slice(first, last), rows
            for whole, where, part in zip(self._gradients[name], places, parts, strict=True):
                whole[where] += part

    def terms(self, leaves: Leaves) -> dict[str, Tensor]:
        """The whole batch's, with gradient to the student's outputs."""
        return {
            name: _WithGradient.apply(
                leaves["query", 1][index], leaves["passage", 1][index], self._values[name],
                *self._gradients[name],
            )
            for name, index in self._reads.items()
        }  # fmt: skip


class _WithGradient(torch.autograd.Function):
    """A number that is known already, with its known gradient."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, queries: Tensor, passages: Tensor, value: Tensor, *gradients: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        queries, passages = ctx.saved_tensors
        return grad * queries, grad * passages, None, None, None


@contextmanager
def one_reduction(engine: DeepSpeedEngine) -> Iterator[Callable[[Tensor], Any]]:
    """A context for many backward passes of one update (micro-steps, chunks), and the backward to
    use in it; gradients stay on their rank until its end and are averaged over ranks once.

    Where parameters are bf16 the sum over passes is kept in fp32: added up in bf16, a chunk's
    gradient would vanish beside that of the hundred before it.
    """
    plain = engine.zero_optimization_stage() == 0
    sums: dict[Tensor, Tensor] = {}
    low_precision = [p for p in engine.module.parameters() if p.dtype == torch.bfloat16]

    def backward(loss: Tensor) -> None:
        engine.backward(loss, scale_wrt_gas=False)
        own = [parameter for parameter in low_precision if parameter.grad is not None]
        if not own:
            return
        for parameter in own:
            if parameter not in sums:
                sums[parameter] = torch.zeros_like(parameter, dtype=torch.float32)
        gradients = [parameter.grad for parameter in own]
        wide = gradients
        if own[0].device.type != "cpu":  # one dtype, so that hundreds go in a few launches
            wide = [torch.empty_like(gradient, dtype=torch.float32) for gradient in gradients]
            torch._foreach_copy_(wide, gradients)
        torch._foreach_add_([sums[parameter] for parameter in own], wide)
        torch._foreach_zero_(gradients)

    with engine.no_sync() if plain else engine.coalesce_grad_reduction():
        yield backward
        for parameter, total in sums.items():
            assert parameter.grad is not None
            parameter.grad.copy_(total)
    if plain:
        engine.allreduce_gradients()
