"""A teacher's stored scores in place of the teacher: the same training without the model."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.processes import ROOT, SUPPORT, losses_of, run_python
from support.tiny import ConfigMaker

from erniesearch.config.checks import validate
from erniesearch.config.keys import ObjectiveConfig, RunConfig
from erniesearch.config.stage_keys import LossWeights
from erniesearch.data.collection import RetrievalData, load_beir
from erniesearch.data.negatives import negatives_line, read_scored_negatives
from erniesearch.data.sampler import GroupSampler
from erniesearch.errors import UserError
from erniesearch.retrieval.trained import config_from, make_scorer
from erniesearch.run_folder import RunFolder
from erniesearch.stages import Stage, fingerprint
from erniesearch.training.build import build_batches, build_model, check_inputs
from erniesearch.training.gradient_cache import cached_backward

KL = LossWeights(de=0.2, li=0.2, ce_to_de=1.0, ce_to_li=1.0, li_to_de=1.0)
TAUGHT = replace(KL, margin_mse_de=0.05, margin_mse_li=0.05)
STEPS = 5


@pytest.fixture
def scored(make_config: ConfigMaker, tmp_path: Path, tiny_model: Path) -> Callable[..., RunConfig]:
    """Configs whose data come with hard negatives and a saved cross-encoder's scores of them;
    ``lists`` is how many negatives a query has."""

    def make(lists: int = 4, **changes: Any) -> RunConfig:
        changes = {"weights": KL, "negatives": "given", "dropout": 0.0, "steps": STEPS} | changes
        base = make_config(**changes)
        folder = tmp_path / "teacher"
        if not folder.exists():
            live = replace(base.stages.cascade, teacher_scores="live", weights=KL)
            plain = replace(base, stages=replace(base.stages, cascade=live))
            fresh, _ = build_model(Stage(replace(plain, objective=ObjectiveConfig()), "cascade"))
            assert fresh.teacher is not None
            fresh.teacher.temperature = 0.5
            fresh.teacher.save(folder, dict(fresh.teacher.state_dict()))
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (folder / name).write_bytes((tiny_model / name).read_bytes())
        config = replace(base, teacher=replace(base.teacher, path=str(folder)))
        root = tmp_path / f"data-{lists}"
        if not root.exists():
            shutil.copytree(base.data.path, root)
            _write_scored(root, config, lists)
        return replace(config, data=replace(config.data, path=str(root)))

    return make


def _write_scored(root: Path, config: RunConfig, lists: int) -> None:
    data = load_beir(str(root), "train")
    texts = dict(zip(data.pids, data.passages, strict=True))
    scorer = make_scorer(config, config.teacher)
    lines = []
    for number, (qid, relevant) in enumerate(data.relevant().items()):
        others = [pid for pid in data.pids if pid not in relevant]
        negatives = others[number : number + lists]
        pids = [*relevant, *negatives]
        scores = scorer.scores([data.queries[qid]] * len(pids), [texts[p] for p in pids]).tolist()
        own = scores[: len(relevant)], scores[len(relevant) :]
        lines.append(negatives_line(qid, relevant, negatives, own))
    (root / "negatives.jsonl").write_text("".join(lines))


@pytest.mark.distributed
def test_stored_scores_train_as_the_frozen_teacher_does(
    scored: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Update by update, on two ranks, plain and with gradient caching, KL and MarginMSE; and so
    does the mean of the two."""
    kinds = {
        "live": {}, "stored": {"teacher_scores": "stored"},
        "cached": {"teacher_scores": "stored", "chunk_size": 3},
        "both": {"teacher_scores": "both", "tau_stored": 0.5},
        "both-cached": {"teacher_scores": "both", "chunk_size": 3},
    }  # fmt: skip
    configs = {
        name: scored(run_dir=tmp_path / name, tau_ce="auto", weights=TAUGHT, **changes)
        for name, changes in kinds.items()
    }
    file = tmp_path / "jobs.json"
    file.write_text(json.dumps([("cascade", asdict(config)) for config in configs.values()]))
    status, output = run_python(
        "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d",
        "--rdzv_endpoint=localhost:0", str(SUPPORT / "distributed_worker.py"), str(file),
    )  # fmt: skip
    assert status == 0, output[-3000:]
    folders = {name: RunFolder(config.run_dir) for name, config in configs.items()}
    wanted = losses_of(folders["live"].stage("cascade"))
    weights = load_file(folders["live"].model("cascade", "student") / "model.safetensors")
    assert len(wanted) == STEPS
    assert {"ce_to_de", "margin_mse_de", "margin_mse_li", "accuracy_ce"} <= wanted[0].keys()
    for name in list(kinds)[1:]:
        for own, expected in zip(losses_of(folders[name].stage("cascade")), wanted, strict=True):
            assert own.keys() == expected.keys()
            for key, value in expected.items():
                if not key.startswith("accuracy") and key != "learning_rate":
                    # The tiny student's scores of 30 differ by 1e-4: fp32 has no more of a margin.
                    close = pytest.approx(value, rel=1e-5, abs=1e-5 if "margin" in key else 1e-6)
                    assert own[key] == close, (name, key)
        trained = load_file(folders[name].model("cascade", "student") / "model.safetensors")
        for key, value in weights.items():
            torch.testing.assert_close(trained[key], value, rtol=1e-4, atol=1e-5)
        kept = folders[name].model("cascade", "teacher").exists()
        assert kept == name.startswith("both")


def test_no_cross_encoder_is_loaded(scored: Callable[..., RunConfig]) -> None:
    config = scored(teacher_scores="stored", tau_ce="auto")
    check_inputs(config, load_beir(config.data.path, "train"))
    model, _ = build_model(Stage(config, "cascade"))
    assert model.teacher is None
    assert model.objective.settings.tau_ce == 0.5  # the one that lies with it


def test_a_passage_without_a_score_has_no_part_in_the_kl(
    scored: Callable[..., RunConfig],
) -> None:
    """Lists of 1 in groups of 1 + 3: the two random passages change the contrastive terms only."""
    weights = LossWeights(ce_to_de=1.0, ce_to_li=1.0)
    config = scored(lists=1, teacher_scores="stored", num_negatives=3)
    cascade = replace(config.stages.cascade, weights=weights)
    config = replace(config, stages=replace(config.stages, cascade=cascade))
    data = load_beir(config.data.path, "train")
    model, tokenizer = build_model(Stage(config, "cascade"))
    model = model.double()
    batch = build_batches(Stage(config, "cascade"), data, tokenizer)[0]
    assert batch.teacher_scores is not None
    scores = batch.teacher_scores.view(-1, 4)
    assert scores.isfinite().tolist() == [[True, True, False, False]] * len(scores)
    whole = model(batch)
    # The same groups cut to the two scored passages, by hand.
    kept = (torch.arange(len(batch.passage_ids)) % 4) < 2
    small = replace(
        batch, passage_ids=batch.passage_ids[kept], passage_mask=batch.passage_mask[kept],
        passage_index=batch.passage_index[kept], teacher_scores=batch.teacher_scores[kept],
    )  # fmt: skip
    cut = model(small)
    for name in ("ce_to_de", "ce_to_li", "loss"):
        torch.testing.assert_close(whole[name], cut[name])
        assert whole[name].item() > 0
    vectors = model.outputs(small)
    dual = vectors.queries.vectors @ vectors.passages.vectors.T  # type: ignore[union-attr]
    own = dual.view(len(scores), -1, 2)[range(len(scores)), range(len(scores))]
    target = scores[:, :2].double().softmax(1)
    by_hand = (target * (target.log() - own.log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(whole["ce_to_de"].double(), by_hand)
    model.zero_grad()
    cached = cached_backward(model, model, torch.Tensor.backward, batch, 3)
    torch.testing.assert_close(cached["loss"], whole["loss"].detach())


def test_groups_carry_the_scores_of_their_passages() -> None:
    pids = [f"p{i}" for i in range(9)]
    data = RetrievalData(pids, ["text"] * 9, {"q": "x", "r": "y"}, {"q": {"p0": 1, "p8": 1},
                                                                    "r": {"p1": 1}})  # fmt: skip
    negatives = {"q": ["p3", "p2", "p5"], "r": ["p4"]}
    scores = {
        "q": {"p0": 0.0, "p8": 8.0, "p2": 2.0, "p3": 3.0, "p5": 5.0},
        "r": {"p1": 1.0, "p4": 4.0},
    }
    sampler = GroupSampler(data, negatives, 2, 2, seed=0, teacher_scores=scores)
    seen = set()
    for step in range(30):
        for position, query in enumerate(sampler.queries(step)):
            group = sampler.group(step, position, int(query))
            assert group.teacher_scores is not None
            for row, score in zip(group.passages, group.teacher_scores, strict=True):
                known = scores[sampler.qids[query]].get(pids[row])
                assert np.isnan(score) if known is None else score == known == row
                seen.add(known is None)
    assert seen == {True, False}
    plain = GroupSampler(data, negatives, 2, 2, seed=0)
    assert plain.group(0, 0, 0).teacher_scores is None
    del scores["q"]["p8"]
    with pytest.raises(UserError, match=r"no teacher's score .* 'p8', .* relevant to query 'q'"):
        GroupSampler(data, negatives, 2, 2, seed=0, teacher_scores=scores)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"positive_scores": None}, ":1: no positive_scores"),
        ({"negative_scores": ["high"]}, ":1: no negative_scores"),
        ({"negative_scores": [float("nan")]}, ":1: no negative_scores"),
        ({"negative_scores": [True]}, ":1: no negative_scores"),
        ({"negative_scores": [1.0, 2.0]}, ":1: 2 negative_scores for 1 negative_document_ids"),
        ({"positive_document_ids": None}, ":1: 1 positive_scores for no positive_document_ids"),
    ],
)
def test_odd_scores_are_named(change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    line = {"query_id": "q", "positive_document_ids": ["a"], "negative_document_ids": ["b"],
            "positive_scores": [1], "negative_scores": [-2.5]}  # fmt: skip
    path = tmp_path / "negatives.jsonl"
    path.write_text(json.dumps(line) + "\n")
    assert read_scored_negatives(path)[1] == {"q": {"a": 1.0, "b": -2.5}}
    path.write_text(json.dumps(line | change) + "\n")
    with pytest.raises(UserError, match=problem):
        read_scored_negatives(path)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"weights": replace(KL, ce=1.0)}, "weights.ce' is 1.0: must be 0 while"),
        ({"teacher_scores": "both", "negatives": "bm25"}, "live unless negatives are mined or giv"),
        ({"teacher_scores": "both", "easy_steps": 3}, "easy_steps' is 3: must be 0 while"),
        ({"teacher_scores": "live", "tau_stored": 2.0}, "tau_stored' is 2.0: must be null while"),
        ({"tau_stored": 0.0}, "tau_stored' is 0.0: must be above 0"),
        ({"tau_de_margin": -1.0}, "tau_de_margin' is -1.0: must be above 0"),
        ({"weights": replace(KL, attention=1.0)}, "weights.attention' is 1.0: must be 0 while"),
        ({"weights": replace(KL, virt=1.0)}, "weights.virt' is 1.0: must be 0 while"),
        ({"weights": LossWeights(de=1.0)}, "nothing reads the scores"),
        ({"negatives": "bm25"}, "live unless negatives are mined or given"),
        ({"easy_steps": 3}, "easy_steps' is 3: must be 0 while"),
        ({"detach_targets": False}, "detach_targets' is False: must be true while"),
        ({"negatives": "mined"}, "live unless mining asks a teacher"),
    ],
)
def test_what_stored_scores_cannot_do(
    changes: dict[str, Any], problem: str, make_config: ConfigMaker
) -> None:
    settings = {"weights": KL, "negatives": "given", "teacher_scores": "stored"}
    validate(make_config(**settings))
    with pytest.raises(UserError, match=problem):
        validate(make_config(**(settings | changes)))


def test_scores_that_are_missing_are_told_before_anything_is_trained(
    scored: Callable[..., RunConfig],
) -> None:
    config = scored(teacher_scores="stored")
    path = Path(config.data.path) / "negatives.jsonl"
    lines = path.read_text().splitlines()
    first = json.loads(lines[0])
    del first["positive_scores"]
    path.write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
    with pytest.raises(UserError, match=r"negatives\.jsonl:1: no positive_scores"):
        check_inputs(config, load_beir(config.data.path, "train"))


def test_both_may_train_the_teacher_and_read_its_attention(make_config: ConfigMaker) -> None:
    weights = replace(KL, ce=1.0, attention=1.0)
    validate(make_config(weights=weights, negatives="given", teacher_scores="both",
                         detach_targets=False, tau_stored="auto"))  # fmt: skip
    alone = LossWeights(margin_mse_li=1.0)
    validate(make_config(weights=alone, negatives="given", teacher_scores="stored"))


def test_the_scale_of_stored_scores_is_found(scored: Callable[..., RunConfig]) -> None:
    """By likelihood, whatever unit they are in; a number, and tau_ce alone, are taken as they
    are."""
    found = {}
    for factor in (1.0, 100.0):
        config = scored(teacher_scores="stored", tau_stored="auto")
        path = Path(config.data.path) / "negatives.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for number, line in enumerate(lines):  # every fourth list is wrong
            lead = -1.0 if number % 4 == 0 else 1.0
            line["positive_scores"] = [factor * lead] * len(line["positive_scores"])
            line["negative_scores"] = [0.0] * len(line["negative_scores"])
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        model, _ = build_model(Stage(config, "cascade"))
        found[factor] = model.objective.settings.tau_stored
        assert model.objective.settings.tau_ce == 1.0
    # With r = e^(1/T), the positive's odds against one of four negatives, the log-likelihood is
    # 3/4 · log(r / (r + 4)) + 1/4 · log(1 / (1 + 4 r)); the root of its derivative by bisection:
    low, high = 0.05, 20.0
    for _ in range(60):
        tau = (low + high) / 2
        right, wrong = (np.exp(lead / tau) / (np.exp(lead / tau) + 4) for lead in (1, -1))
        # d/d(1/T): the lead times how much probability the positive still lacks
        low, high = (low, tau) if 0.75 * (1 - right) > 0.25 * (1 - wrong) else (tau, high)
    assert found[1.0] == pytest.approx(tau, rel=1e-3)
    assert found[100.0] / found[1.0] == pytest.approx(100.0, rel=1e-3)


def test_lists_without_a_pair_have_no_scale(scored: Callable[..., RunConfig]) -> None:
    config = scored(lists=0, teacher_scores="stored", tau_stored="auto")
    with pytest.raises(UserError, match=r"negatives\.jsonl: objective\.tau_stored is auto, but no"):
        build_model(Stage(config, "cascade"))


def test_runs_of_before_are_still_good(make_config: ConfigMaker) -> None:
    """Keys that did not exist then are in no fingerprint while they are at their defaults."""
    base = make_config(weights=KL, negatives="given", teacher_scores="stored")
    for stage in ("cascade", "export"):
        before = fingerprint(base, stage)
        for key in ("tau_stored", "tau_de_margin", "tau_li_margin"):
            changed = replace(base, objective=replace(base.objective, **{key: 2.0}))
            if stage == "cascade" and key != "tau_stored":
                assert fingerprint(changed, stage) == before  # no MarginMSE reads it
            else:
                assert fingerprint(changed, stage) != before
    live = make_config(weights=KL, negatives="given")
    changed = replace(live, objective=replace(live.objective, tau_stored=2.0))
    assert fingerprint(changed, "cascade") == fingerprint(live, "cascade")


def test_a_result_depends_on_where_the_scores_came_from(make_config: ConfigMaker) -> None:
    settings = {"weights": KL, "negatives": "given"}
    live, stored = (
        fingerprint(make_config(teacher_scores=kind, **settings), "cascade")
        for kind in ("live", "stored")
    )
    assert live != stored


@pytest.mark.parametrize("language", ["", ".zh-CN"])
def test_the_documented_settings_are_settings(language: str) -> None:
    text = (ROOT / "docs" / f"stored-scores{language}.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    base = {"run_dir": "run", "data": {"path": "data"}, "student": {"path": "model"}}
    config = config_from(base | yaml.safe_load(block), "the docs")
    assert Stage(config, "cascade").settings.teacher_scores == "stored"
    (line,) = re.findall(r"```json\n(.*?)\n```", text, re.DOTALL)
    record = json.loads(line)
    ids = {kind: record[f"{kind}_document_ids"] for kind in ("positive", "negative")}
    scores = record["positive_scores"], record["negative_scores"]
    assert negatives_line(record["query_id"], *ids.values(), scores) == line + "\n"
