"""Blocks of similar length: the same outputs and gradients, with less padding."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.tiny import EVERY_TERM, ConfigMaker
from torch import Tensor

from erniesearch.config.stage_keys import LossWeights
from erniesearch.data.collection import load_beir
from erniesearch.models import cross_encoder, encoder, lengths
from erniesearch.models.precision import tune_for_device
from erniesearch.stages import Stage
from erniesearch.training.build import build_batches, build_model

CPU = torch.device("cpu")


def ragged(number: int, longest: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    own = torch.randint(1, longest + 1, (number, 1), generator=generator)
    return torch.arange(longest) < own


@pytest.mark.parametrize("number", [1, 15, 31, 32, 33, 100])
def test_blocks_hold_every_row_and_little_padding(number: int) -> None:
    mask = ragged(number, 40)
    blocks = lengths.blocks_by_length(mask.sum(1), CPU, 32)
    assert sorted(torch.cat([own for own, _ in blocks]).tolist()) == list(range(number))
    assert len(blocks) == max(1, number // 16)
    rows = torch.arange(number * 3).view(number, 3)
    assert lengths.put_back([rows[own] for own, _ in blocks], blocks).equal(rows)
    assert all(width == mask[own].sum(1).max() for own, width in blocks)
    computed = sum(len(own) * width for own, width in blocks)
    if number == 100:
        assert computed < 1.15 * mask.sum() < 0.65 * mask.numel()


def test_the_number_of_blocks_does_not_depend_on_the_texts() -> None:
    """ZeRO-3's ranks gather parameters at every call: they must all make the same ones."""
    for number in range(1, 120):
        masks = ragged(number, 9), torch.ones(number, 9, dtype=torch.bool)
        found = [lengths.blocks_by_length(mask.sum(1), CPU, 32) for mask in masks]
        assert len(found[0]) == len(found[1])


@pytest.mark.parametrize(
    "weights", [EVERY_TERM, LossWeights(ce=1.0, de=1.0, li=1.0, ce_to_li=1.0, ce_to_de=1.0)]
)
def test_same_terms_and_gradients_as_in_one_pass(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch, weights: LossWeights
) -> None:
    config = make_config(dropout=0.0, queries_per_rank=16, num_negatives=3, weights=weights,
                         pooling="mean")  # fmt: skip
    data = load_beir(config.data.path, "train")
    model, tokenizer = build_model(Stage(config, "cascade"))
    model = model.double()
    batch = build_batches(Stage(config, "cascade"), data, tokenizer)[0]
    assert len(lengths.blocks_by_length(batch.passage_mask.sum(1), CPU, 32)) == 4

    def measured() -> tuple[dict[str, Tensor], dict[str, Any]]:
        model.zero_grad()
        terms = model(batch)
        terms["loss"].backward()
        return terms, {name: p.grad for name, p in model.named_parameters()}

    ours, own = measured()
    for module in (encoder, cross_encoder):
        monkeypatch.setattr(module, "blocks_by_length", lambda *given: [])
    wanted, whole = measured()
    assert ours.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(ours[name], value)
    for name, gradient in whole.items():
        assert (own[name] is None) == (gradient is None), name
        if gradient is not None:
            assert (own[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize(
    ("precision", "tokens", "wanted"),
    [("bf16", 16, "eager"), ("bf16", 500, "sdpa"), ("fp32", 16, "sdpa")],
)
def test_attention_on_a_cpu(
    make_config: ConfigMaker, precision: str, tokens: int, wanted: str
) -> None:
    """Plain attention where the fused one is slow: the same terms."""
    config = make_config(precision=precision, dropout=0.0)
    model, tokenizer = build_model(Stage(config, "cascade"))
    data = load_beir(config.data.path, "train")
    batch = build_batches(Stage(config, "cascade"), data, tokenizer)[0]
    before = model(batch)
    long = replace(config, data=replace(config.data, max_passage_length=tokens))
    tune_for_device(model, long, torch.device("cpu"), precision == "bf16")
    assert {tower.config._attn_implementation for tower in model.towers()} == {wanted}
    for name, value in model(batch).items():
        torch.testing.assert_close(value, before[name], msg=lambda m, n=name: f"{n}: {m}")
