"""The joint module: work that is not asked for is not done, and what must not matter does not."""

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from conftest import ALL_TERMS, ConfigMaker

from erniesearch.config import LossWeights
from erniesearch.data.collate import Batch
from erniesearch.data.formats import load_beir
from erniesearch.models.joint import JointModel
from erniesearch.objectives.losses import contrastive_loss
from erniesearch.training.stage import build_batches, build_model


def build(make_config: ConfigMaker, **changes: Any) -> tuple[JointModel, Batch]:
    config = make_config(**changes)
    data = load_beir(config.data.path, "train")
    model, tokenizer = build_model(config, "cascade")
    return model, build_batches(config, "cascade", data, tokenizer)[0]


def test_the_loss_is_the_weighted_sum_of_its_terms(make_config: ConfigMaker) -> None:
    weights = LossWeights(*[0.1 * (i + 1) for i in range(8)], mlm=0.0)
    model, batch = build(make_config, weights=weights)
    terms = model(batch)
    expected = sum(w * terms[name] for name, w in asdict(weights).items() if w)
    torch.testing.assert_close(terms["loss"], expected)
    assert set(asdict(ALL_TERMS)) - {"mlm"} <= set(terms)


@pytest.mark.parametrize(
    ("weights", "student", "teacher", "passes"),
    [
        (LossWeights(de=1.0), True, False, 1),
        (LossWeights(de=1.0, dual_reg=1.0), True, False, 2),
        (LossWeights(ce=1.0), False, True, 0),
        (LossWeights(ce_to_de=1.0), True, True, 1),
    ],
)
def test_unused_work_is_not_done(
    make_config: ConfigMaker, weights: LossWeights, student: bool, teacher: bool, passes: int
) -> None:
    model, batch = build(make_config, weights=weights)
    assert (model.student is not None, model.teacher is not None) == (student, teacher)
    calls = {"encoder": 0, "projection": 0}
    if model.student is not None:
        model.student.register_forward_hook(
            lambda *_: calls.__setitem__("encoder", calls["encoder"] + 1)
        )
        model.student.projection.register_forward_hook(
            lambda *_: calls.__setitem__("projection", calls["projection"] + 1)
        )
    model(batch)["loss"].backward()
    assert calls == {"encoder": 2 * passes, "projection": 0}
    # Whatever is trained gets a gradient; a teacher that only gives targets is frozen.
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name


def test_all_terms_reach_every_parameter(make_config: ConfigMaker) -> None:
    model, batch = build(make_config)
    model(batch)["loss"].backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_padding_changes_nothing(make_config: ConfigMaker) -> None:
    model, batch = build(make_config, dropout=0.0)

    def pad(tensor: torch.Tensor, width: int) -> torch.Tensor:
        return torch.nn.functional.pad(tensor, (0, width))

    wide = replace(
        batch, query_ids=pad(batch.query_ids, 3), query_mask=pad(batch.query_mask, 3),
        passage_ids=pad(batch.passage_ids, 7), passage_mask=pad(batch.passage_mask, 7),
    )  # fmt: skip
    grads = []
    for each in (batch, wide):
        model.zero_grad()
        terms = model(each)
        terms["loss"].backward()
        grads.append((terms, {n: p.grad.clone() for n, p in model.named_parameters()}))
    for name, value in grads[0][0].items():
        torch.testing.assert_close(grads[1][0][name], value, rtol=1e-5, atol=1e-6, msg=name)
    for name, value in grads[0][1].items():
        torch.testing.assert_close(grads[1][1][name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_order_of_hard_negatives_changes_nothing(make_config: ConfigMaker) -> None:
    model, batch = build(make_config, dropout=0.0, num_negatives=3)
    size = batch.group_size
    order = torch.arange(len(batch.passage_ids)).view(-1, size)[:, [0, 3, 1, 2]].flatten()
    shuffled = replace(
        batch, passage_ids=batch.passage_ids[order], passage_mask=batch.passage_mask[order],
        passage_index=batch.passage_index[order],
    )  # fmt: skip
    before, after = model(batch), model(shuffled)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_another_copy_of_the_positive_is_no_negative(make_config: ConfigMaker) -> None:
    """Query 1's hard negative is query 0's positive passage: query 0 must not see it."""
    model, batch = build(make_config, dropout=0.0, weights=LossWeights(de=1.0))
    size = batch.group_size
    ids, mask = batch.passage_ids.clone(), batch.passage_mask.clone()
    index = batch.passage_index.clone()
    ids[size + 1], mask[size + 1], index[size + 1] = ids[0], mask[0], index[0]
    copied = replace(batch, passage_ids=ids, passage_mask=mask, passage_index=index)
    vectors = model.student(batch.query_ids, batch.query_mask, "query").vectors
    logits = (vectors @ model.student(ids, mask, "passage").vectors.T)[0]
    keep = [i for i in range(len(ids)) if i == 0 or int(index[i]) != int(index[0])]
    assert size + 1 not in keep
    student = model.objective.score(copied, model.outputs(copied))
    assert student.mask[0].nonzero().flatten().tolist() == keep
    loss = contrastive_loss(student.dual[:1], torch.tensor([0]), student.mask[:1])
    expected = torch.logsumexp(logits[keep], 0) - logits[0]
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernels", ["torch", "eager"])
def test_kernel_backends_give_the_same_losses(make_config: ConfigMaker, kernels: str) -> None:
    model, batch = build(make_config, dropout=0.0, kernels="auto")
    expected = model(batch)
    model.objective.settings = replace(model.objective.settings, kernels=kernels)
    for name, value in model(batch).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_dropout_depends_on_step_and_pass_only(make_config: ConfigMaker) -> None:
    model, batch = build(make_config)
    model.train()
    first = model(batch)["loss"]
    torch.rand(7)  # whatever else consumes random numbers
    assert torch.equal(model(batch)["loss"], first)
    assert not torch.equal(model(replace(batch, step=1))["loss"], first)
    assert model(batch)["dual_reg"] > 0  # its two passes differ


def test_competence_gate_silences_a_teacher_below_its_student(make_config: ConfigMaker) -> None:
    model, batch = build(make_config, competence_gate=True)
    model.train()
    model.objective.running_accuracy = {
        "group_ce": 0.5,
        "group_li": 2.0,
        "group_de": -1.0,
        "de": 2.0,
    }
    terms = model(batch)
    assert terms["li_to_de"] == 0
    assert terms["ce_to_li"] == 0
    assert terms["attention"] == 0
    assert terms["ce_to_de"] > 0
    assert terms["ce"] > 0


def test_targets_are_detached_unless_configured(make_config: ConfigMaker) -> None:
    for detach in (True, False):
        model, batch = build(make_config, weights=LossWeights(li_to_de=1.0), detach_targets=detach)
        model(batch)["loss"].backward()
        has_gradient = model.student.projection.weight.grad is not None
        assert has_gradient != detach


def test_untied_towers_train_apart(make_config: ConfigMaker) -> None:
    model, batch = build(make_config, tied=False, weights=LossWeights(de=1.0))
    model(batch)["loss"].backward()
    groups = list(model.parameter_groups(1.0, 2.0, 3.0, 0.1))
    assert len({id(p) for g in groups for p in g["params"]}) == sum(
        len(g["params"]) for g in groups
    )
    assert {g["name"] for g in groups} == {"student", "student_no_decay"}
    towers = model.student.query_tower, model.student.passage_tower
    assert towers[0] is not towers[1]
    assert all(next(tower.parameters()).grad is not None for tower in towers)


def test_parameter_groups_have_the_parts_rates(make_config: ConfigMaker) -> None:
    model, _ = build(make_config)
    groups = {g["name"]: g for g in model.parameter_groups(1.0, 2.0, 3.0, 0.1)}
    assert {name: g["lr"] for name, g in groups.items()} == {
        "student": 1.0, "student_no_decay": 1.0, "head": 2.0, "teacher": 3.0,
        "teacher_no_decay": 3.0,
    }  # fmt: skip
    assert groups["teacher_no_decay"]["weight_decay"] == 0
    assert groups["head"]["params"] == [model.student.projection.weight]
    assert sum(len(g["params"]) for g in groups.values()) == len(list(model.parameters()))
