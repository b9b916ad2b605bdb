"""The virtual interaction (``virt``): by hand, against eager attention maps, what it reaches."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import EVERY_TERM, ConfigMaker, write_model
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig

from erniesearch.config.keys import TeacherConfig
from erniesearch.config.stage_keys import LossWeights
from erniesearch.data.batches import Batch
from erniesearch.data.collection import load_beir
from erniesearch.errors import UserError
from erniesearch.models.encoder import content_mask
from erniesearch.models.joint import JointModel
from erniesearch.models.projections import matched_layers
from erniesearch.objectives.scores import attention_map_kl
from erniesearch.stages import Stage
from erniesearch.training.build import build_batches, build_model, check_inputs

ALONE = LossWeights(virt=1.0)


def build(make_config: ConfigMaker, teacher: Path | None = None, **changes: Any) -> Any:
    config = make_config(**{"dropout": 0.0, "weights": ALONE, **changes})
    if teacher is not None:
        config = replace(config, teacher=TeacherConfig(str(teacher), dropout=0.0))
    model, tokenizer = build_model(Stage(config, "cascade"))
    data = load_beir(config.data.path, "train")
    return model, build_batches(Stage(config, "cascade"), data, tokenizer)[0]


def column(*values: float) -> Tensor:
    """One head's projections of some tokens, ``[1, 1, L, 4]``: the logit is a product over √4."""
    return torch.tensor([[value, 0.0, 0.0, 0.0] for value in values])[None, None]


@pytest.mark.parametrize("kernels", ["torch", "eager"])
def test_one_token_against_two_by_hand(kernels: Any) -> None:
    one, two = torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool)
    # Target (3, 1)/4 and student (1, 1)/2, then target (1, 1)/2 and student (1, 4)/5.
    first = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    made = attention_map_kl(
        column(2), column(5, 5), one, two, column(2), column(math.log(3), 0), kernels
    )
    assert made.item() == pytest.approx(first, abs=1e-6)
    second = 0.5 * math.log(2.5) + 0.5 * math.log(0.625)
    student, teacher = column(0, math.log(4)), column(7, 7)
    made = attention_map_kl(column(2), student, one, two, column(1), teacher, kernels)
    assert made.item() == pytest.approx(second, abs=1e-6)
    # Both as heads of one pair: heads are compared each with its own, and averaged.
    queries, teacher_queries = torch.cat([column(2)] * 2, 1), torch.cat([column(2), column(1)], 1)
    keys = torch.cat([column(5, 5), student], 1)
    teacher_keys = torch.cat([column(math.log(3), 0), teacher], 1)
    made = attention_map_kl(queries, keys, one, two, teacher_queries, teacher_keys, kernels)
    assert made.item() == pytest.approx((first + second) / 2, abs=1e-6)
    # What is masked takes no part on either side; a pair with nothing left counts as 0.
    wide, mask = column(float("nan"), 5, 5), torch.tensor([[False, True, True]])
    of_teacher = column(9, math.log(3), 0)
    made = attention_map_kl(column(2), wide, one, mask, column(2), of_teacher, kernels)
    assert made.item() == pytest.approx(first, abs=1e-6)
    pairs = [torch.cat([part, part]) for part in (column(5, 5), two, column(math.log(3), 0))]
    pairs[1][1] = False
    made = attention_map_kl(
        column(2), pairs[0], one, pairs[1], torch.cat([column(2)] * 2), pairs[2], kernels
    )
    assert made.item() == pytest.approx(first / 2, abs=1e-6)


def eager_maps(model: JointModel, batch: Batch, teacher: Path) -> list[Tensor]:
    """The teacher's attention maps ``[N, heads, L, L]``, layer by layer, from transformers."""
    assert model.teacher is not None
    eager = AutoModelForSequenceClassification.from_pretrained(
        teacher, num_labels=1, attn_implementation="eager", hidden_dropout_prob=0.0
    ).eval()
    eager.load_state_dict(model.teacher.model.state_dict())
    pairs = model.pairs(batch, slice(0, len(batch.passage_ids)))
    with torch.no_grad():
        output = eager(
            input_ids=pairs.input_ids, attention_mask=pairs.mask.long(),
            token_type_ids=pairs.token_type_ids, output_attentions=True,
        )  # fmt: skip
    return list(output.attentions)


def naive_virt(
    model: JointModel, batch: Batch, maps: list[Tensor], layers: dict[int, int], heads: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The term pair by pair, head by head, from whole maps, and its gradient; ``layers`` of teacher
    and student."""
    assert model.student is not None
    student = AutoModel.from_pretrained(model.student.settings.path, attn_implementation="eager")
    student.load_state_dict(model.student.query_tower.state_dict(), strict=False)
    pairs = model.pairs(batch, slice(0, len(batch.passage_ids)))

    def states(ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return student.eval()(
            input_ids=ids, attention_mask=mask.long(), output_hidden_states=True
        ).hidden_states

    sides = [(batch.query_ids, batch.query_mask), (batch.passage_ids, batch.passage_mask)]
    hidden = [states(*side) for side in sides]
    content = [content_mask(*side, model.special_ids) for side in sides]
    total = []
    for layer, own in layers.items():
        attention = student.encoder.layer[own].attention.self
        for n in range(len(batch.passage_ids)):
            rows = n // batch.group_size, n
            texts = [hidden[i][own][rows[i]][content[i][rows[i]]] for i in (0, 1)]
            columns = [
                where[n][content[i][rows[i]]]
                for i, where in enumerate((pairs.query_columns, pairs.passage_columns))
            ]
            for x, y in ((0, 1), (1, 0)):
                queries = attention.query(texts[x]).unflatten(-1, (heads, -1)).transpose(0, 1)
                keys = attention.key(texts[y]).unflatten(-1, (heads, -1)).transpose(0, 1)
                virtual = (queries @ keys.mT / math.sqrt(queries.shape[-1])).softmax(-1)
                target = maps[layer][n][:, columns[x]][:, :, columns[y]]
                target = target / target.sum(-1, keepdim=True)
                total.append((target * (target.log() - virtual.log())).sum(-1).mean())
    term = torch.stack(total).sum() / len(layers) / len(batch.passage_ids)
    term.backward()
    return term, {n: p.grad for n, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("sizes", "wanted", "layers"),
    [
        ({}, [-1], {1: 1}),
        ({}, [0, 1], {0: 0, 1: 1}),
        # A larger teacher: the student's 32 dimensions are split into its 4 heads.
        ({"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 5}, [-1, 1],
         {4: 1, 1: 0}),
    ],
)  # fmt: skip
def test_parity_with_eager_maps(
    make_config: ConfigMaker, tmp_path: Path, sizes: dict[str, int], wanted: list[int],
    layers: dict[int, int],
) -> None:  # fmt: skip
    teacher = write_model(tmp_path / "teacher", seed=5, **sizes)
    model, batch = build(make_config, teacher, virt_layers=wanted, num_negatives=3)
    with torch.no_grad():  # peaks, where a fresh model's attention is flat
        for name, parameter in model.named_parameters():
            if name.endswith(("query.weight", "key.weight")):
                parameter *= 20
    term = model.eval()(batch)["virt"]
    heads = model.teacher.num_heads
    maps = eager_maps(model, batch, teacher)
    expected, gradients = naive_virt(model, batch, maps, layers, heads)
    assert expected > 0.1
    torch.testing.assert_close(term, expected, rtol=1e-4, atol=1e-5)
    term.backward()
    made = {
        n: p.grad for n, p in model.student.query_tower.named_parameters() if p.grad is not None
    }
    top = f"encoder.layer.{max(layers.values())}.attention.self"
    assert {f"{top}.query.weight", f"{top}.key.weight"} <= gradients.keys()
    assert made.keys() >= gradients.keys()
    for name, gradient in gradients.items():
        wrong = made[name] - gradient
        assert wrong.norm() <= 1e-4 * gradient.norm() + 1e-5, name


def test_no_map_is_kept_for_the_backward_pass() -> None:
    """What grows with both lengths is never saved: 64 heads of pairs, 32 x 512 tokens, 8 numbers
    each."""
    shape = 16, 4, 32, 512
    parts = {name: torch.randn(16, 4, length, 8) for name, length in (("x", 32), ("y", 512))}
    own = [part.clone().requires_grad_() for part in parts.values()]
    masks = [torch.ones(16, length, dtype=torch.bool) for length in shape[2:]]
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        term = attention_map_kl(own[0], own[1], *masks, parts["x"], parts["y"], "torch")
    term.backward()
    assert saved
    assert max(saved) == max(part.numel() for part in own) == math.prod(shape) // 4


def test_virt_reaches_the_students_projections_and_not_the_teacher(
    make_config: ConfigMaker,
) -> None:
    for tied in (True, False):
        model, batch = build(
            make_config, tied=tied, detach_targets=False, virt_layers=[0],
            weights=LossWeights(virt=1.0),
        )  # fmt: skip
        model(batch)["loss"].backward()
        reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert not any(name.startswith("teacher.") for name in reached)
        for tower in ("passage_tower", *(() if tied else ("query_tower",))):
            layer = f"student.{tower}.encoder.layer.0.attention.self"
            assert {f"{layer}.query.weight", f"{layer}.key.weight"} <= reached
        assert not any("layer.1." in name for name in reached)


def test_without_weight_nothing_is_tapped(make_config: ConfigMaker) -> None:
    model, batch = build(make_config, weights=LossWeights(de=1.0, ce_to_de=1.0))
    assert model.student.taps == {}
    assert model.teacher.tap is None
    assert model.outputs(batch).queries.projections.numel() == 0
    model, batch = build(make_config, weights=replace(EVERY_TERM, dual_reg=0.0))
    assert model.outputs(batch).queries.projections.shape[2:] == (1, 2, 32)
    hooks = [m for m in model.modules() if m._forward_hooks]
    assert hooks == []  # they are there while a model runs


def test_recomputed_activations_give_the_same_gradient(make_config: ConfigMaker) -> None:
    gradients = []
    for recompute in (False, True):
        model, batch = build(make_config, weights=replace(EVERY_TERM, dual_reg=0.0))
        if recompute:
            model.enable_activation_checkpointing()
        model.train()(batch)["loss"].backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert not model.teacher.tap._kept
        assert not any(tap._kept for tap in model.student.taps.values())
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda m, n=name: n + m)


def test_layers_are_matched_evenly_from_the_top() -> None:
    def matched(layers: list[int], teacher: int, student: int, **sizes: int) -> Any:
        configs = [BertConfig(num_hidden_layers=n, **sizes) for n in (teacher, student)]
        return matched_layers(layers, *configs, "some/teacher")

    assert matched([-1, 0, -12], 13, 13) == [(0, 0), (1, 1), (12, 12)]
    assert matched([-1, -3, -5, -7, -9, -11], 12, 6) == [(2 * i + 1, i) for i in range(6)]
    assert matched([3, 7, 11], 12, 3) == [(3, 0), (7, 1), (11, 2)]
    assert matched([0, 1], 2, 6) == [(0, 2), (1, 5)]
    assert matched([-1], 24, 6) == [(23, 5)]
    with pytest.raises(
        UserError, match=r"layers 10 and 11 of the teacher 'some/teacher'.*layer, 5"
    ):
        matched([-1, -2], 12, 6)
    with pytest.raises(UserError, match=r"virt_layers.*layers 1 and 1 of"):
        matched([-1, 1], 2, 2)
    for wrong in (12, -13):
        with pytest.raises(UserError, match=rf"virt_layers names layer {wrong}.*has 12 layers: 0"):
            matched([-1, wrong], 12, 6)
    with pytest.raises(UserError, match=r"768 dimensions cannot be split into the 10"):
        matched([-1], 12, 6, num_attention_heads=10)


def test_layers_that_do_not_fit_are_told_before_anything_is_trained(
    make_config: ConfigMaker,
) -> None:
    for changes, message in (
        ({"virt_layers": [2]}, r"virt_layers names layer 2, but the teacher.*has 2 layers"),
        ({"layers": 1, "virt_layers": [0, 1]}, r"fall on one layer, 0, of the student \(1 layers"),
    ):
        config = make_config(weights=ALONE, **changes)
        with pytest.raises(UserError, match=message):
            check_inputs(config, load_beir(config.data.path, "train"))
        unused = make_config(weights=LossWeights(de=1.0), **changes)
        check_inputs(unused, load_beir(config.data.path, "train"))
