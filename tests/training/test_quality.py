"""Retrieval metrics while training, the best checkpoint by them, and early stopping."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.processes import ROOT, SUPPORT, losses_of, run_python, train_cascade
from support.tiny import ALL_TERMS, ConfigMaker

from erniesearch.cli import main
from erniesearch.config.keys import RunConfig, TeacherConfig
from erniesearch.config.stage_keys import LossWeights
from erniesearch.config.yaml_file import to_yaml
from erniesearch.data.collection import load_beir
from erniesearch.data.ranking_metrics import parse_metrics, per_query
from erniesearch.evaluation.measures import draw_subset
from erniesearch.retrieval import ranking
from erniesearch.retrieval.retriever import PairScorer, Retriever
from erniesearch.retrieval.vector_index import VectorIndex
from erniesearch.run_folder import RunFolder
from erniesearch.stages import Stage
from erniesearch.training.checkpoints.checkpointer import find_best, find_checkpoints, step_of
from erniesearch.training.quality_watch import ranks
from erniesearch.training.retrieval_quality import best_metric, trained_models

pytestmark = pytest.mark.distributed
METRICS = ["MRR@10", "nDCG@10", "R@3", "R@30"]
STEPS, EVERY = 6, 2


def make(make_config: ConfigMaker, run_dir: Path, **changes: Any) -> RunConfig:
    settings = {
        "weights": replace(ALL_TERMS, dual_reg=0.0), "steps": STEPS, "save_every": EVERY,
        "dropout": 0.0, "queries_per_rank": 8, "validation_split": "dev", "validation_queries": 23,
        "validation_metrics": METRICS, "validation_distractors": 20, "validation_rerank_depth": 7,
    }  # fmt: skip
    return make_config(run_dir=run_dir, **(settings | changes))


def figures_of(stage: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (stage / "validation.jsonl").read_text().splitlines()]


def without_seconds(stage: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in figures_of(stage)]


def facts_of(stage: Path) -> dict[str, Any]:
    return json.loads((stage / "done.json").read_text())  # type: ignore[no-any-return]


def by_the_evaluation(config: RunConfig, model: Path) -> dict[str, float]:
    """The same figures of a finished model by the code that makes the table."""
    training, lengths = config.training, (config.data.max_query_length,
                                          config.data.max_passage_length)  # fmt: skip
    data = draw_subset(
        load_beir(config.data.path, "dev"), training.validation_queries,
        training.validation_distractors, config.seed,
    )  # fmt: skip
    retriever = Retriever(replace(config.student, path=str(model / "student")), *lengths)
    scorer = PairScorer(TeacherConfig(str(model / "teacher")), *lengths)
    index = VectorIndex.build(retriever.vectors(data.passages, "passage"), data.pids)
    dual = ranking.dense_run(retriever, index, data.queries, 30)
    depth = training.validation_rerank_depth
    runs = {
        "de": dual, "li": ranking.rerank_late_interaction(retriever, data, dual, depth),
        "ce": ranking.rerank_cross_encoder(scorer, data, dual, depth),
    }  # fmt: skip
    metrics = parse_metrics(",".join(METRICS))
    return {
        f"{name}_{key}": float(values.mean())
        for key, run in runs.items()
        for name, values in per_query(run, data.qrels, list(data.qrels), metrics).items()
    }


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (1, {}),
        pytest.param(2, {"zero_stage": 3, "chunk_size": 5}, marks=pytest.mark.slow),
        pytest.param(2, {"candidates": "group"}, marks=pytest.mark.slow),
    ],
    ids=["one", "zero3-chunks", "groups"],
)
def test_figures_are_those_of_the_evaluation(
    make_config: ConfigMaker, tmp_path: Path, ranks: int, changes: dict[str, Any]
) -> None:
    # Little training: a random model that was trained hard gives all passages almost one score.
    own = {"pooling": "mean", "student_lr": 1e-4, "head_lr": 1e-4, "teacher_lr": 1e-4}
    config = make(make_config, tmp_path / "run", queries_per_rank=8 // ranks, **own, **changes)
    stage = train_cascade(config, tmp_path, ranks)
    *_, last = figures_of(stage)
    assert last["step"] == STEPS
    assert last["seconds"] > 0
    for name, value in by_the_evaluation(config, stage / "model").items():
        assert last[name] == pytest.approx(value, abs=1e-6), name
    assert len({last[f"MRR@10_{model}"] for model in ("de", "li", "ce")}) > 1
    facts = facts_of(stage)["validation"]
    assert facts["times"] == STEPS // EVERY
    assert facts["seconds"] == pytest.approx(sum(line["seconds"] for line in figures_of(stage)))


def test_measuring_changes_no_bit_of_the_training(make_config: ConfigMaker, tmp_path: Path) -> None:
    own = {"dropout": 0.1, "weights": ALL_TERMS}
    config = make(make_config, tmp_path / "measured", evaluate_every=1, **own)
    measured = train_cascade(config, tmp_path)
    plain = train_cascade(
        make(make_config, tmp_path / "plain", validation_split=None, validation_metrics=[], **own),
        tmp_path,
    )
    assert losses_of(measured) == losses_of(plain)
    assert [line["step"] for line in figures_of(measured)] == list(range(1, STEPS + 1))
    for part in ("student", "teacher"):
        made, wanted = (load_file(s / "model" / part / "model.safetensors")
                        for s in (measured, plain))  # fmt: skip
        assert all(made[name].equal(tensor) for name, tensor in wanted.items())


def falling_apart(make_config: ConfigMaker, run_dir: Path, **changes: Any) -> RunConfig:
    """A learning rate at which the model gets worse soon."""
    return make(
        make_config, run_dir, steps=30, student_lr=0.05, save_every=20, evaluate_every=2,
        keep_checkpoints=1, best_metric="nDCG@10", early_stopping_patience=2, **changes,
    )  # fmt: skip


def job(config: RunConfig, **more: Any) -> dict[str, Any]:
    return {"stage": "cascade", "config": asdict(config), **more}


def start(root: Path, jobs: list[dict[str, Any]], ranks: int = 1) -> tuple[int, str]:
    file = root / f"jobs-{len(list(root.glob('jobs-*')))}.json"
    file.write_text(json.dumps(jobs))
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--rdzv_backend=c10d",
                "--rdzv_endpoint=localhost:0"] if ranks > 1 else []  # fmt: skip
    return run_python(*launcher, str(SUPPORT / "trainer_worker.py"), str(file))


def check_stopped(stage: Path) -> int:
    """It stopped when patience was over, and its result is its best model; the best update."""
    figures, facts = figures_of(stage), facts_of(stage)
    steps = [line["step"] for line in figures]
    values = [line["nDCG@10_de"] for line in figures]
    best = values.index(max(values))
    assert steps == list(range(2, steps[-1] + 1, 2))
    assert steps[-1] == facts["steps"] == steps[best] + 4 < 30
    assert facts["stopped"] == (
        f"nDCG@10_de was not better in 2 measurements than {max(values):.4f} after update"
        f" {steps[best]}"
    )
    assert facts["result_after"] == facts["validation"]["best_step"] == steps[best]
    assert facts["validation"]["best"] == max(values)
    left = [step_of(path) for path in find_checkpoints(stage / "checkpoints")]
    assert left == [steps[best], steps[-1]]
    assert find_best(stage / "checkpoints") == stage / "checkpoints" / f"step-{steps[best]:06d}"
    return steps[best]


@pytest.mark.parametrize(
    ("ranks", "zero_stages", "precision"),
    [
        (1, (0, 1, 3), "fp32"),
        pytest.param(2, (2, 3), "fp32", marks=pytest.mark.slow),
        pytest.param(1, (0, 1, 3), "bf16", marks=pytest.mark.slow),
    ],
)
def test_patience_ends_a_stage_and_its_best_model_is_the_result(
    make_config: ConfigMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str], ranks: int,
    zero_stages: tuple[int, ...], precision: str,
) -> None:  # fmt: skip
    configs = [
        falling_apart(make_config, tmp_path / f"zero-{zero}", zero_stage=zero, precision=precision,
                      queries_per_rank=8 // ranks)
        for zero in zero_stages
    ]  # fmt: skip
    status, output = start(tmp_path, [job(config) for config in configs], ranks)
    assert status == 0, output[-4000:]
    for config in configs:
        stage = RunFolder(config.run_dir).stage("cascade")
        best = check_stopped(stage)
        file = tmp_path / "run.yaml"
        file.write_text(to_yaml(config))
        out = Path(config.run_dir) / "best"
        arguments = ["export-checkpoint", "--config", str(file), "--stage", "cascade", "--best"]
        assert main([*arguments, "--out", str(out)]) == 0
        assert f"after {best} updates" in capsys.readouterr().out
        for part in ("student", "teacher"):
            made, wanted = (load_file(folder / part / "model.safetensors")
                            for folder in (stage / "model", out))  # fmt: skip
            assert all(made[name].equal(tensor) for name, tensor in wanted.items())
        assert "stopped after update" in output
        if precision == "fp32":
            found = by_the_evaluation(config, stage / "model")
            assert found["nDCG@10_de"] == pytest.approx(facts_of(stage)["validation"]["best"])


@pytest.mark.slow
def test_a_killed_stage_keeps_its_best_and_its_patience(
    make_config: ConfigMaker, tmp_path: Path
) -> None:
    whole = falling_apart(make_config, tmp_path / "whole")
    assert start(tmp_path, [job(whole)])[0] == 0
    stage = RunFolder(whole.run_dir).stage("cascade")
    best = check_stopped(stage)
    killed = replace(whole, run_dir=str(tmp_path / "killed"))
    killed = replace(killed, training=replace(killed.training, save_every=2))
    for step in (best + 1, best + 3):  # after measurements that were not the best
        status, _ = start(tmp_path, [job(killed, kill=step)])
        assert status == 9
    status, output = start(tmp_path, [job(killed)])
    assert status == 0, output[-3000:]
    own = RunFolder(killed.run_dir).stage("cascade")
    assert without_seconds(own) == without_seconds(stage)
    facts, wanted = facts_of(own), facts_of(stage)
    for one in (facts, wanted):
        one["validation"].pop("seconds")
        one.pop("fingerprint")
    assert facts == wanted


def test_the_last_model_where_that_is_wanted(make_config: ConfigMaker, tmp_path: Path) -> None:
    """And a stage that a callback's stop was saved for, but not finished, is finished."""
    config = falling_apart(make_config, tmp_path / "last", load_best_model_at_end=False)
    status, output = start(tmp_path, [job(config)])
    assert status == 0, output[-3000:]
    stage = RunFolder(config.run_dir).stage("cascade")
    assert "result_after" not in facts_of(stage)
    before = load_file(stage / "model" / "student" / "model.safetensors")
    (stage / "done.json").unlink()
    assert start(tmp_path, [job(config)])[0] == 0
    assert check_facts(stage) == facts_of(stage)["steps"]
    after = load_file(stage / "model" / "student" / "model.safetensors")
    assert all(after[name].equal(tensor) for name, tensor in before.items())


def check_facts(stage: Path) -> int:
    return int(figures_of(stage)[-1]["step"])


def test_fixed_lists_where_no_dual_encoder_is_trained(
    make_config: ConfigMaker, tmp_path: Path
) -> None:
    """The cross-encoder alone: positives, then BM25's best; also after post-training without
    judged pairs, and of late interaction alone."""
    common: dict[str, Any] = {
        "validation_split": "dev", "validation_metrics": ["MRR@10", "R@3"], "dropout": 0.0,
        "validation_queries": 20, "validation_rerank_depth": 7, "steps": 2, "save_every": 1,
    }  # fmt: skip
    jobs = []
    for stage, weights in (
        ("teacher", LossWeights(ce=1.0)), ("interaction", LossWeights(li=1.0)),
        ("post_train", LossWeights(mlm=1.0, de=1.0)),
    ):  # fmt: skip
        config = make_config(stage=stage, run_dir=tmp_path / stage, weights=weights, **common)
        jobs.append({"stage": stage, "config": asdict(config)})
    status, output = start(tmp_path, jobs)
    assert status == 0, output[-3000:]
    for (stage, model), each in zip(
        (("teacher", "ce"), ("interaction", "li"), ("post_train", "de")), jobs, strict=True
    ):
        lines = figures_of(RunFolder(each["config"]["run_dir"]).stage(stage))
        assert [line["step"] for line in lines] == [1, 2]
        assert 0 < lines[-1][f"MRR@10_{model}"] <= 1
        assert {name for name in lines[-1] if "@" in name} == {f"MRR@10_{model}", f"R@3_{model}"}


def test_which_models_and_which_metric(make_config: ConfigMaker) -> None:
    def stage(name: str = "cascade", **changes: Any) -> Stage:
        given = {"validation_split": "dev", "best_metric": "ndcg@10"} | changes
        return Stage(make_config(stage=name, **given), name)

    assert trained_models(stage()) == ("de", "li", "ce")
    assert best_metric(stage()) == ("nDCG@10_de", True)
    assert best_metric(stage(best_metric="MRR@10_li")) == ("MRR@10_li", True)
    assert best_metric(stage(best_metric="loss")) == ("loss", False)
    assert best_metric(stage(best_metric="accuracy_li")) == ("accuracy_li", True)
    teacher = stage("teacher", weights=LossWeights(ce=1.0), best_metric="MRR@10_li")
    assert best_metric(teacher) == ("MRR@10_ce", True)
    distilled = stage(weights=LossWeights(ce_to_li=1.0))
    assert trained_models(distilled) == ("li",)
    words = stage("post_train", weights=LossWeights(mlm=1.0))
    assert best_metric(words) is None
    assert not ranks(words)


def test_settings_of_measuring_count_only_where_they_decide(make_config: ConfigMaker) -> None:
    def print_of(**changes: Any) -> str:
        return Stage(make_config(validation_split="dev", **changes), "cascade").fingerprint

    plain = Stage(make_config(), "cascade").fingerprint
    assert plain == print_of() == print_of(validation_metrics=["MRR@10"], evaluate_every=3)
    assert plain == print_of(best_metric="MRR@10")
    patient = print_of(early_stopping_patience=3)
    assert len({plain, patient, print_of(early_stopping_patience=4),
                print_of(early_stopping_patience=3, best_metric="MRR@10"),
                print_of(load_best_model_at_end=True)}) == 5  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_metrics": ["NDGC@10"]}, "training.validation_metrics NDGC@10: unknown"),
        ({"validation_metrics": ["MRR@10", "mrr@10"]}, "MRR@10 stands twice"),
        ({"validation_metrics": ["R"]}, "R: give a cutoff"),
        ({"validation_metrics": ["A@10"]}, "answer strings are for `evaluate`"),
        ({"best_metric": "accuracy"}, "training.best_metric accuracy: unknown"),
        ({"best_metric": "nDCG@10_ce", "weights": LossWeights(de=1.0)}, "no stage of this run"),
        ({"validation_split": None, "validation_metrics": ["MRR@10"]},
         "'training.validation_metrics' is ['MRR@10']: must be left out while"),
        ({"validation_split": None, "early_stopping_patience": 3}, "training.validation_split"),
        ({"validation_split": None, "best_metric": "MRR@10"}, "training.validation_split is null"),
        ({"validation_split": None, "evaluate_every": 5}, "training.validation_split is null"),
        ({"early_stopping_patience": 3, "save_every": 0}, "nothing is measured before the end"),
        ({"early_stopping_patience": 0}, "1 or more"),
        ({"validation_split": "nowhere"}, "nowhere.tsv"),
    ],
)  # fmt: skip
def test_bad_settings_are_one_line(
    make_config: ConfigMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any], message: str,
) -> None:  # fmt: skip
    config = make_config(**({"validation_split": "dev", "save_every": 5} | changes))
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config))
    assert main(["run", str(file)]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert len(told.strip().splitlines()) == 1
    assert not (Path(config.run_dir) / "stages").exists()


PAGES = ("watching-quality.md", "watching-quality.zh-CN.md")
# What `from erniesearch import …` gives.
NAMES = """
import erniesearch
from erniesearch.config.checks import validate
from erniesearch.config.keys import RunConfig
from erniesearch.config.yaml_file import from_dict, read_yaml
from erniesearch.training.callbacks import Callback
from erniesearch.training.trainer import Trainer
erniesearch.Callback, erniesearch.Trainer = Callback, Trainer
erniesearch.load_config = lambda path: validate(from_dict(RunConfig, read_yaml(path)))
"""


def test_the_pages_callback_stops_a_training(make_config: ConfigMaker, tmp_path: Path) -> None:
    blocks = [re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
              for page in PAGES]  # fmt: skip
    assert blocks[0] == blocks[1]
    (code,) = blocks[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    config = make(make_config, tmp_path / "run", steps=20, evaluate_every=1, student_lr=0.0,
                  head_lr=0.0, teacher_lr=0.0, save_every=0)  # fmt: skip
    file, script = tmp_path / "run.yaml", tmp_path / "script.py"
    file.write_text(to_yaml(config))
    script.write_text(NAMES + code)
    status, output = run_python(str(script), str(file), "cascade")
    assert status == 0, output[-3000:]
    stage = RunFolder(config.run_dir).stage("cascade")
    assert f"the model lies in {stage / 'model'}" in output
    assert facts_of(stage)["steps"] == 4  # the first is the best; three more are not better
    assert facts_of(stage)["stopped"] == "EarlyStopping"
