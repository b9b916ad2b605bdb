"""The joint module: work that is not asked for is not done, and what must not matter does not."""

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from support.tiny import EVERY_TERM, ConfigMaker
from torch import Tensor

from erniesearch.config.stage_keys import LossWeights, StageConfig
from erniesearch.config.terms import TERMS
from erniesearch.data.batches import Batch
from erniesearch.data.collection import load_beir
from erniesearch.models.joint import JointModel
from erniesearch.objectives import losses, scores
from erniesearch.objectives.losses import contrastive_loss, kl_divergence, margin_mse
from erniesearch.objectives.scores import candidate_mask, own_group
from erniesearch.stages import Stage
from erniesearch.training.build import build_batches, build_model
from erniesearch.training.gradient_cache import cached_backward


def build(make_config: ConfigMaker, **changes: Any) -> tuple[JointModel, Batch]:
    config = make_config(**changes)
    data = load_beir(config.data.path, "train")
    model, tokenizer = build_model(Stage(config, "cascade"))
    return model, build_batches(Stage(config, "cascade"), data, tokenizer)[0]


def test_the_loss_is_the_weighted_sum_of_its_terms(make_config: ConfigMaker) -> None:
    weights = LossWeights(**{n: 0.1 * (i + 1) for i, n in enumerate(TERMS) if n != "mlm"})
    model, batch = build(make_config, weights=weights)
    terms = model(batch)
    expected = sum(w * terms[name] for name, w in asdict(weights).items() if w)
    torch.testing.assert_close(terms["loss"], expected)
    assert set(asdict(weights)) - {"mlm"} <= set(terms)


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
    model, batch = build(make_config, dropout=0.0, weights=EVERY_TERM)

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
    model, batch = build(make_config, dropout=0.0, num_negatives=3, weights=EVERY_TERM)
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
    model, batch = build(make_config, dropout=0.0, kernels="auto", weights=EVERY_TERM)
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
    model, batch = build(make_config, competence_gate=True, weights=EVERY_TERM)
    model.train()
    model.objective.running_accuracy = {
        "group_ce": 0.5,
        "group_li": 2.0,
        "group_de": -1.0,
        "li": 1.0,
        "de": 2.0,
    }
    terms = model(batch)
    assert terms["li_to_de"] == 0
    assert terms["ce_to_li"] == 0
    assert terms["attention"] == 0
    assert terms["ce_to_de"] > 0
    assert terms["virt"] > 0
    assert terms["ce"] > 0


@pytest.mark.parametrize("size", [None, 5])
def test_a_closed_gate_computes_nothing(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch, size: int | None
) -> None:
    """And leaves every other term's gradient as it is without these terms."""
    weights = replace(EVERY_TERM, dual_reg=0.0)
    model, batch = build(make_config, dropout=0.0, competence_gate=True, weights=weights)
    model.train()
    teachers, students = ("li", "group_ce"), ("de", "group_li", "group_de")
    closed = dict.fromkeys(teachers, 0.1) | dict.fromkeys(students, 0.9) | {"li": 0.1}
    for function in ("attention_kl", "attention_map_kl"):
        monkeypatch.setattr(scores, function, None)
    monkeypatch.setattr(losses, "kl_divergence", None)

    def gradients(model: JointModel) -> dict[str, Any]:
        model.zero_grad()
        if size:
            cached_backward(model, model, Tensor.backward, batch, size)
        else:
            model(batch)["loss"].backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    model.objective.running_accuracy = dict(closed)
    ours = gradients(model)
    cut = {name: 0.0 for name, term in TERMS.items() if term.teacher}
    plain, _ = build(make_config, dropout=0.0, weights=replace(weights, **cut))
    wanted = gradients(plain.train())
    assert ours.keys() >= wanted.keys()
    for name, gradient in ours.items():
        expected = wanted.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6, msg=name)


def test_terms_over_the_group_score_the_group_alone(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same terms as over all candidates, and no passage of another query is looked at."""
    weights = LossWeights(ce=1.0, ce_to_li=1.0, ce_to_de=1.0)
    model, batch = build(make_config, dropout=0.0, num_negatives=3, weights=weights)
    ours = model(batch)
    assert model.objective.candidates == "group"
    with monkeypatch.context() as patch:
        patch.setattr(type(model.objective), "candidates", "cross_batch")
        wanted = model(batch)
    for name in ("ce_to_li", "ce_to_de", "ce", "loss", "accuracy_group_li", "accuracy_group_de"):
        torch.testing.assert_close(ours[name], wanted[name])
    for name in ("li", "de"):  # all candidates are the group here, and many passages there
        assert ours[f"accuracy_group_{name}"] == ours[f"accuracy_{name}"]
        assert wanted[f"accuracy_{name}"] <= wanted[f"accuracy_group_{name}"]
    shapes = []
    real = scores.dual_encoder_scores
    monkeypatch.setattr(
        scores, "dual_encoder_scores",
        lambda q, p, tau: shapes.append(p.shape) or real(q, p, tau),
    )  # fmt: skip
    for name in ("RowGather", "TokenGather"):
        monkeypatch.setattr(f"erniesearch.objectives.exchange.{name}", None)
    model(batch)
    assert shapes == [(4, 4, 32)]


def test_targets_are_detached_unless_configured(make_config: ConfigMaker) -> None:
    for detach in (True, False):
        model, batch = build(make_config, weights=LossWeights(li_to_de=1.0), detach_targets=detach)
        model(batch)["loss"].backward()
        has_gradient = model.student.projection.weight.grad is not None
        assert has_gradient != detach


def test_untied_towers_train_apart(make_config: ConfigMaker) -> None:
    model, batch = build(make_config, tied=False, weights=LossWeights(de=1.0))
    model(batch)["loss"].backward()
    groups = list(model.parameter_groups(StageConfig(), 0.1))
    assert len({id(p) for g in groups for p in g["params"]}) == sum(
        len(g["params"]) for g in groups
    )
    assert {g["name"] for g in groups} == {"student", "student_no_decay"}
    towers = model.student.query_tower, model.student.passage_tower
    assert towers[0] is not towers[1]
    assert all(next(tower.parameters()).grad is not None for tower in towers)


def test_parameter_groups_have_the_parts_rates(make_config: ConfigMaker) -> None:
    model, _ = build(make_config)
    stage = StageConfig(student_lr=1.0, head_lr=2.0, teacher_lr=3.0)
    groups = {g["name"]: g for g in model.parameter_groups(stage, 0.1)}
    assert {name: g["lr"] for name, g in groups.items()} == {
        "student": 1.0, "student_no_decay": 1.0, "head": 2.0, "teacher": 3.0,
        "teacher_no_decay": 3.0,
    }  # fmt: skip
    assert groups["teacher_no_decay"]["weight_decay"] == 0
    assert groups["head"]["params"] == [model.student.projection.weight]
    assert sum(len(g["params"]) for g in groups.values()) == len(list(model.parameters()))


def test_the_cross_encoders_head_may_have_a_rate_of_its_own(make_config: ConfigMaker) -> None:
    """The classifier, and the pooling layer where the checkpoint has none."""
    model, _ = build(make_config)
    stage = StageConfig(teacher_lr=3.0, teacher_head_lr=4.0)
    groups = {g["name"]: g for g in model.parameter_groups(stage, 0.1)}
    classifier = model.teacher.model.classifier
    assert groups["teacher_head"]["lr"] == 4.0
    # The test's model has a pooling layer.
    assert groups["teacher_head"]["params"] == [classifier.weight, classifier.bias]
    assert groups["teacher"]["lr"] == 3.0
    assert sum(len(g["params"]) for g in groups.values()) == len(list(model.parameters()))


def test_temperatures_of_the_kl_terms(make_config: ConfigMaker) -> None:
    weights = LossWeights(ce_to_li=1.0, ce_to_de=1.0, li_to_de=1.0, de=1.0)
    settings = {"tau_de": 0.5, "tau_li": 2.0, "tau_ce": 3.0, "tau_de_kl": 0.7, "tau_li_kl": 1.5,
                "tau_li_target": 4.0}  # fmt: skip
    model, batch = build(make_config, dropout=0.0, weights=weights, **settings)
    terms, outputs = model(batch), model.outputs(batch)
    rows = torch.arange(len(batch.query_ids))
    de = outputs.queries.vectors @ outputs.passages.vectors.T
    li = torch.einsum("qid,pjd->qpij", outputs.queries.tokens, outputs.passages.tokens)
    li = li.masked_fill(~batch.passage_mask[:, None], -9.0).amax(-1)
    li = (li * batch.query_mask[:, None]).sum(-1)
    ce = outputs.teacher_scores.view(len(rows), -1)
    labels = rows * batch.group_size
    own = labels[:, None] + torch.arange(batch.group_size)
    mask = candidate_mask(batch.relevant_index, batch.passage_index, labels)
    group_mask = mask.gather(1, own)
    expected = {
        "de": contrastive_loss(de / 0.5, labels, mask),
        "ce_to_de": kl_divergence(ce / 3.0, de.gather(1, own) / 0.7, group_mask),
        "ce_to_li": kl_divergence(ce / 3.0, li.gather(1, own) / 1.5, group_mask),
        "li_to_de": kl_divergence(li / 4.0, de / 0.7, mask),
    }
    target = (ce / 3.0).masked_fill(~group_mask, -torch.inf).softmax(-1)
    expected["ce_to_de_target_top1"] = target.amax(-1).mean()
    student = (de / 0.7).masked_fill(~mask, -torch.inf).softmax(-1)
    expected["li_to_de_student_entropy"] = torch.special.entr(student).sum(-1).mean()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=1e-6, msg=name)
    logged = {f"{t}_{side}_{what}" for t in ("ce_to_de", "ce_to_li", "li_to_de")
              for side in ("target", "student") for what in ("top1", "entropy")}  # fmt: skip
    assert logged == {name for name in terms if name.endswith(("top1", "entropy"))}
    assert not any(terms[name].requires_grad for name in logged)


@pytest.mark.parametrize(
    ("kind", "tau_stored"), [("live", None), ("stored", None), ("stored", 0.5), ("both", 0.5)]
)
def test_margins_and_the_mean_of_two_teachers(
    make_config: ConfigMaker, kind: str, tau_stored: float | None
) -> None:
    """Live scores over tau_ce, stored ones over tau_stored (tau_ce where there is none), and the
    mean of both: the target of the KL and of MarginMSE alike."""
    weights = LossWeights(ce_to_li=1.0, ce_to_de=1.0, margin_mse_li=1.0, margin_mse_de=1.0)
    settings = {"tau_de": 0.5, "tau_li": 2.0, "tau_ce": 3.0, "tau_stored": tau_stored,
                "tau_de_margin": 0.7, "tau_li_margin": 1.5, "num_negatives": 3}  # fmt: skip
    model, batch = build(make_config, dropout=0.0, weights=weights, **settings)
    size = batch.group_size
    stored = torch.randn(len(batch.passage_ids), generator=torch.Generator().manual_seed(3))
    stored[size - 1] = torch.nan  # a passage that fills the first group up
    if kind != "live":
        batch = replace(batch, teacher_scores=stored)
    if kind == "stored":
        model.teacher = None
    terms, outputs = model(batch), model.outputs(batch)
    rows = torch.arange(len(batch.query_ids))
    own = rows[:, None] * size + torch.arange(size)
    mask = candidate_mask(batch.relevant_index, batch.passage_index, rows * size).gather(1, own)
    targets = []
    if kind != "stored":
        targets.append(outputs.teacher_scores.view(-1, size) / 3.0)
    if kind != "live":
        targets.append(stored.nan_to_num().view(-1, size) / (tau_stored or 3.0))
        mask = mask & stored.isfinite().view(-1, size)
    target = sum(targets) / len(targets)
    de = (outputs.queries.vectors @ outputs.passages.vectors.T).gather(1, own)
    li = torch.einsum("qid,pjd->qpij", outputs.queries.tokens, outputs.passages.tokens)
    li = li.masked_fill(~batch.passage_mask[:, None], -9.0).amax(-1)
    li = (li * batch.query_mask[:, None]).sum(-1).gather(1, own)
    expected = {
        "ce_to_de": kl_divergence(target, de / 0.5, mask),
        "ce_to_li": kl_divergence(target, li / 2.0, mask),
        "margin_mse_de": margin_mse(target, de / 0.7, mask),
        "margin_mse_li": margin_mse(target, li / 1.5, mask),
    }
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=1e-6, msg=name)
    torch.testing.assert_close(terms["loss"], sum(expected.values()), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("candidates", ["in_batch", "group"])
def test_candidates_of_the_own_rank_alone(
    make_config: ConfigMaker, candidates: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is gathered; on one rank in_batch is cross_batch, and group is the group's columns of
    it."""
    model, batch = build(make_config, dropout=0.0)
    whole = model.objective.score(batch, model.outputs(batch))
    expected = model(batch)
    settings = replace(model.objective.settings, candidates=candidates)
    model.objective.settings = settings
    for name in ("RowGather", "TokenGather"):
        monkeypatch.setattr(f"erniesearch.objectives.exchange.{name}", None)
    terms = model(batch)
    if candidates == "in_batch":
        for name, value in expected.items():
            assert torch.equal(terms[name], value), name
        return
    part = model.objective.score(batch, model.outputs(batch))
    assert part.labels.tolist() == [0] * len(batch.query_ids)
    for own, every in ((part.dual, whole.dual), (part.late, whole.late), (part.mask, whole.mask)):
        columns = own_group(every, whole.labels, batch.group_size)
        torch.testing.assert_close(own, columns, rtol=1e-5, atol=1e-5)
    for name in ("ce", "ce_to_li", "ce_to_de", "attention"):  # over the group in any case
        torch.testing.assert_close(terms[name], expected[name], rtol=1e-5, atol=1e-6, msg=name)
    own = own_group(whole.dual, whole.labels, batch.group_size)
    torch.testing.assert_close(terms["de"], contrastive_loss(own, part.labels, part.mask))


def test_frozen_word_embeddings_get_no_gradient(make_config: ConfigMaker) -> None:
    for tied in (True, False):
        model, batch = build(make_config, freeze_embeddings=True, tied=tied)
        model(batch)["loss"].backward()
        frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
        towers = {"passage_tower"} if tied else {"query_tower", "passage_tower"}
        assert frozen == {f"student.{t}.embeddings.word_embeddings.weight" for t in towers}
        trained = [p for g in model.parameter_groups(StageConfig(), 0.1) for p in g["params"]]
        assert all(p.requires_grad and p.grad is not None for p in trained)
        assert len(trained) + len(frozen) == len(list(model.parameters()))
