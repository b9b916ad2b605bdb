"""Compiled layers compute what they do uncompiled, without a graph for every width."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.tiny import ALL_TERMS, ConfigMaker
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import BertConfig, DebertaV2Config

from erniesearch.config.keys import StudentConfig, TeacherConfig, TrainingConfig
from erniesearch.data.collection import load_beir
from erniesearch.errors import UserError
from erniesearch.models.compiled import check_compiles, compile_layers
from erniesearch.models.joint import JointModel
from erniesearch.stages import Stage
from erniesearch.training.build import build_batches, build_model, check_inputs
from erniesearch.training.gradient_cache import cached_backward

BATCHES = 10


def losses_and_gradients(
    model: JointModel, batches: Any, chunk_size: int | None
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    found = []
    for number in range(BATCHES):
        model.zero_grad()
        if chunk_size:
            terms = cached_backward(model, model, Tensor.backward, batches[number], chunk_size)
        else:
            terms = model(batches[number])
            terms["loss"].backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((terms["loss"].detach(), gradients))
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_compiled_layers_compute_the_same(make_config: ConfigMaker) -> None:
    """With dropout: both runs of a chunk, in graphs of their own, draw what they do uncompiled."""
    config = make_config(
        steps=BATCHES, weights=ALL_TERMS, dropout=0.1, queries_per_rank=2, num_negatives=1
    )
    stage = Stage(config, "cascade")
    model, tokenizer = build_model(stage)
    batches = build_batches(stage, load_beir(config.data.path, "train"), tokenizer)
    widths = {batches[number].passage_ids.shape[1] for number in range(BATCHES)}
    assert len(widths) >= 4, widths
    model.train()
    names = list(model.state_dict())
    wanted = {size: losses_and_gradients(model, batches, size) for size in (None, 2)}
    torch._dynamo.reset()
    counters.clear()
    layers = compile_layers(model, config, 1)
    # Both of the student; of the teacher the first: attention reads the last one's projections.
    assert len(layers) == 3
    for size, rows in wanted.items():
        made = losses_and_gradients(model, batches, size)
        for number, ((loss, gradients), (expected, whole)) in enumerate(
            zip(made, rows, strict=True)
        ):
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
            for name, gradient in whole.items():
                wrong = gradients[name] - gradient
                assert wrong.norm() <= 1e-5 * gradient.norm() + 1e-6, (size, number, name)
        # With gradient; the cached form's first run goes without. Ten widths are one graph.
        assert counters["stats"]["unique_graphs"] <= (2 if size is None else 4)
    assert not counters["graph_break"], counters["graph_break"]
    assert list(model.state_dict()) == names


def refusal(training: TrainingConfig, zero_stage: int, settings: Any, model: Any) -> str:
    with pytest.raises(UserError) as told:
        check_compiles(training, zero_stage, settings, model)
    return str(told.value)


def test_what_cannot_be_compiled_is_told(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, bert, student = TrainingConfig(compile=True), BertConfig(), StudentConfig(path="x")
    assert "ZeRO-3" in refusal(compiled, 3, student, bert)
    recomputed = replace(compiled, activation_checkpointing=True)
    assert "activation_checkpointing is true" in refusal(recomputed, 1, student, bert)
    packed = TeacherConfig(path="x", attn_implementation="unpadded")
    assert "teacher.attn_implementation is unpadded" in refusal(compiled, 1, packed, bert)
    assert "'x' (deberta-v2) are not known" in refusal(compiled, 1, student, DebertaV2Config())
    check_compiles(compiled, 2, student, bert)
    config = make_config(zero_stage=3, compile=True)
    with pytest.raises(UserError, match=r"training\.compile is true, but ZeRO-3"):
        check_inputs(config, load_beir(config.data.path, "train"))
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    assert "finds no C++ compiler" in refusal(compiled, 1, student, bert)
