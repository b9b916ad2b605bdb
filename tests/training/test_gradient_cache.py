"""Gradient caching gives the plain path's gradient, whatever the chunks."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from support.tiny import ALL_TERMS, EVERY_TERM, ConfigMaker
from torch import Tensor

from erniesearch.config.keys import RunConfig
from erniesearch.config.stage_keys import LossWeights
from erniesearch.data.batches import Batch
from erniesearch.data.collection import load_beir
from erniesearch.models.joint import Chunk, JointModel
from erniesearch.stages import Stage
from erniesearch.training.build import build_batches, build_model
from erniesearch.training.gradient_cache import cached_backward, one_reduction


def build(config: RunConfig, stage: str = "cascade") -> tuple[JointModel, Batch]:
    data = load_beir(config.data.path, "train")
    model, tokenizer = build_model(Stage(config, stage))
    return model.double().train(), build_batches(Stage(config, stage), data, tokenizer)[1]


def plain(model: JointModel, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    model.zero_grad()
    terms = model(batch)
    terms["loss"].backward()
    return terms, {name: p.grad for name, p in model.named_parameters()}


def cached(
    model: JointModel, batch: Batch, size: int, scale: float = 1.0
) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    model.zero_grad()
    terms = cached_backward(model, model, Tensor.backward, batch, size, scale)
    return terms, {name: p.grad for name, p in model.named_parameters()}


def assert_same(ours: Any, wanted: Any, factor: float = 1.0) -> None:
    terms, gradients = ours
    expected, whole = wanted
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value.detach(), msg=lambda m, n=name: f"{n}: {m}")
    for name, gradient in whole.items():
        assert (gradients[name] is None) == (gradient is None), name
        if gradient is not None:
            wrong = gradients[name] - factor * gradient
            # Token vectors and the teacher's scores are fp32 in any model.
            assert wrong.norm() <= 1e-5 * factor * gradient.norm() + 1e-6, name


@pytest.mark.parametrize("size", [1, 2, 3, 5, 12, 1000])
def test_all_terms_have_the_plain_gradient(make_config: ConfigMaker, size: int) -> None:
    # Groups of 3 and 5 queries: chunks cut through groups and do not divide the batch.
    model, batch = build(
        make_config(
            dropout=0.0, queries_per_rank=5, normalize=True, tau_de=0.05, weights=EVERY_TERM
        )
    )
    assert_same(cached(model, batch, size), plain(model, batch))


TERMS = [name for name in asdict(ALL_TERMS) if name != "mlm"]


@pytest.mark.parametrize("term", TERMS)
def test_each_term_alone(make_config: ConfigMaker, term: str) -> None:
    weights = LossWeights(**{term: 0.5})  # type: ignore[arg-type]
    model, batch = build(make_config(dropout=0.0, weights=weights))
    assert_same(cached(model, batch, 4), plain(model, batch))


@pytest.mark.parametrize(
    "changes",
    [
        {"tied": False}, {"detach_targets": False}, {"pooling": "mean"}, {"kernels": "eager"},
        {"weights": LossWeights(ce_to_de=1.0, attention=1.0)},
        {"weights": EVERY_TERM, "virt_layers": [0, -1], "tied": False},
        {"candidates": "group", "tau_ce": 2.0, "tau_de_kl": 3.0, "tau_li_kl": 0.5},
        {"candidates": "in_batch", "tau_li_target": 0.25, "detach_targets": False},
        {"matryoshka_dims": [20, 3], "normalize": True, "tau_de": 0.1},
        {"layers": 1, "freeze_embeddings": True},
        {"num_negatives": 9, "queries_per_rank": 2},
    ],
    ids=str,
)  # fmt: skip
def test_under_other_settings(make_config: ConfigMaker, changes: dict[str, Any]) -> None:
    model, batch = build(make_config(dropout=0.0, **changes))
    assert_same(cached(model, batch, 4), plain(model, batch))


def test_post_training(make_config: ConfigMaker) -> None:
    config = make_config(
        stage="post_train", dropout=0.0, queries_per_rank=7,
        weights=LossWeights(mlm=0.7, de=1.0, li=0.5),
    )  # fmt: skip
    model, batch = build(config, "post_train")
    assert_same(cached(model, batch, 3), plain(model, batch))
    alone = replace(config.stages.post_train, weights=LossWeights(mlm=1.0))
    config = replace(config, stages=replace(config.stages, post_train=alone))
    model, batch = build(config, "post_train")
    assert_same(cached(model, batch, 3), plain(model, batch))


def test_scale_is_the_gradients_and_not_the_terms(make_config: ConfigMaker) -> None:
    model, batch = build(make_config(dropout=0.0))
    assert_same(cached(model, batch, 4, scale=0.25), plain(model, batch), factor=0.25)


def test_the_gate_is_open_or_closed_for_whole_batches(make_config: ConfigMaker) -> None:
    model, batch = build(make_config(dropout=0.0, competence_gate=True))
    before = {"group_ce": 0.9, "group_li": 0.1, "group_de": 0.95, "li": 0.5, "de": 0.1}
    model.objective.running_accuracy = dict(before)
    wanted = plain(model, batch)
    after = model.objective.running_accuracy
    assert wanted[0]["ce_to_de"] == 0 != wanted[0]["attention"]
    model.objective.running_accuracy = dict(before)
    assert_same(cached(model, batch, 4), wanted)
    assert model.objective.running_accuracy == after


def test_both_runs_of_a_chunk_draw_the_same_dropout(make_config: ConfigMaker) -> None:
    model, batch = build(make_config(dropout=0.3))
    made: dict[Any, list[list[Tensor]]] = {}

    def forward(own: Batch, chunk: Chunk) -> tuple[Tensor, ...]:
        outputs = model(own, chunk)
        assert isinstance(outputs, tuple)
        made.setdefault(_key(chunk), []).append([part.detach() for part in outputs])
        return outputs

    cached_backward(model, forward, Tensor.backward, batch, 4)
    for chunk, (first, second) in made.items():
        for one, other in zip(first, second, strict=True):
            assert torch.equal(one, other), chunk
    vectors = {key[:2]: runs[0][0] for key, runs in made.items() if key[2] == 0}
    assert not torch.equal(vectors["query", 1], vectors["query", 2])
    assert not torch.equal(vectors["passage", 1], vectors["passage", 2])


def _key(chunk: Chunk) -> Any:
    return chunk.kind, chunk.number, chunk.rows.start


def test_a_chunk_is_all_that_runs_at_a_time(make_config: ConfigMaker) -> None:
    model, batch = build(make_config(dropout=0.0, queries_per_rank=5))
    seen: list[tuple[str, int, bool]] = []

    def forward(own: Batch, chunk: Chunk) -> tuple[Tensor, ...]:
        made = model(own, chunk)
        assert isinstance(made, tuple)
        rows = chunk.rows.stop - chunk.rows.start
        assert {len(part) for part in made if part.numel()} == {rows}
        seen.append((chunk.kind, rows, torch.is_grad_enabled()))
        return made

    cached_backward(model, forward, Tensor.backward, batch, 4)
    assert max(rows for _, rows, _ in seen) == 4
    # 5 queries and 15 passages, twice for dual_reg, and 15 pairs; each without and with gradient.
    wanted = [("query", 4), ("query", 1), *[("passage", 4)] * 3, ("passage", 3)] * 2
    wanted += [*[("pair", 4)] * 3, ("pair", 3)]
    assert seen == [(*row, grad) for grad in (False, True) for row in wanted]


def test_a_frozen_teacher_runs_once(make_config: ConfigMaker) -> None:
    model, batch = build(make_config(dropout=0.0, weights=LossWeights(ce_to_de=1.0)))
    assert model.teacher is not None
    calls = []
    model.teacher.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    cached(model, batch, 6)
    assert calls == [False, False]


class _Engine:
    """What :func:`one_reduction` needs of DeepSpeed's engine; one process reduces nothing."""

    def __init__(self, module: torch.nn.Module, zero_stage: int) -> None:
        self.module, self._zero_stage, self.reductions = module, zero_stage, 0

    def zero_optimization_stage(self) -> int:
        return self._zero_stage

    def backward(self, loss: Tensor, scale_wrt_gas: bool) -> None:
        loss.backward()

    @contextmanager
    def coalesce_grad_reduction(self) -> Iterator[None]:
        yield
        self.reductions += 1

    def no_sync(self) -> AbstractContextManager[None]:
        return nullcontext()

    def allreduce_gradients(self) -> None:
        self.reductions += 1


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_many_chunks_add_up_in_fp32(zero_stage: int) -> None:
    """In bf16, 1/256 added to 1 is 1: chunks after the first would count for nothing."""
    layer = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    engine = _Engine(layer, zero_stage)
    with one_reduction(engine) as backward:  # type: ignore[arg-type]
        for size in (1.0, *[1 / 256] * 64):
            backward((layer.weight * size).sum())
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.bfloat16
    assert float(layer.weight.grad) == 1.25
    assert engine.reductions == 1


def test_a_loss_that_is_not_finite_reaches_the_gradient(make_config: ConfigMaker) -> None:
    model, batch = build(make_config(dropout=0.0))
    assert model.student is not None
    with torch.no_grad():
        model.student.projection.weight[0, 0] = float("inf")
    terms, gradients = cached(model, batch, 4)
    assert not terms["loss"].isfinite()
    total = torch.stack([g.sum() for g in gradients.values() if g is not None]).sum()
    assert not total.isfinite()
