"""Is the teacher a teacher: the figures by hand, the warnings, the step, the report."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from support.processes import ROOT
from support.tiny import ConfigMaker
from torch import Tensor

from erniesearch import stages
from erniesearch.cli import main
from erniesearch.config.keys import RunConfig
from erniesearch.config.stage_keys import LossWeights, StageConfig
from erniesearch.config.yaml_file import to_yaml
from erniesearch.data.collection import RetrievalData
from erniesearch.evaluation.measures import Estimate
from erniesearch.evaluation.table import Report
from erniesearch.evaluation.teacher_check import Teacher, TeacherCheck, check_teachers
from erniesearch.models.backbone import load_tokenizer
from erniesearch.models.cross_encoder import CrossEncoder
from erniesearch.models.encoder import StudentEncoder
from erniesearch.pipeline import steps
from erniesearch.pipeline.run import planned
from erniesearch.retrieval.retriever import PassageReader
from erniesearch.run_folder import RunFolder, is_done

RELEVANT = {"q0": "p1", "q1": "p5", "q2": "p0", "q3": "p2"}
SCORES = np.array([6.0, 5.0, 4.0, 3.0, 2.0, 1.0], dtype=np.float32)


class Student(PassageReader):
    """Finds p0, p1, p2, … for every query; its late interaction ranks the other way round."""

    def vectors(self, texts: list[str], kind: Literal["query", "passage"]) -> np.ndarray:
        if kind == "query":
            return np.tile(SCORES, (len(texts), 1))
        return np.eye(6, dtype=np.float32)[[int(text) for text in texts]]

    def tokens(self, texts: list[str], kind: Literal["query", "passage"]) -> list[Tensor]:
        sign = -1.0 if kind == "query" else 1.0
        return [torch.from_numpy(sign * row)[None] for row in self.vectors(texts, kind)]


class Oracle(PassageReader):
    """Knows the relevant passage."""

    def scores(self, queries: list[str], passages: list[str]) -> Tensor:
        return torch.tensor(
            [float(RELEVANT[q] == f"p{p}") for q, p in zip(queries, passages, strict=True)]
        )


DATA = RetrievalData(
    [f"p{i}" for i in range(6)], [str(i) for i in range(6)], {q: q for q in RELEVANT},
    {q: {p: 1} for q, p in RELEVANT.items()},
)  # fmt: skip


def facts(**changes: Any) -> TeacherCheck:
    found = check_teachers(DATA, Student(), Oracle(), True, 3, 42)  # type: ignore[arg-type]
    return TeacherCheck(**({"split": "dev", "trained_on": False} | found | changes))


def test_figures_by_hand() -> None:
    """The student ranks the relevant passages 2nd, not among its three, 1st and 3rd."""
    check = facts()
    assert (check.queries, check.passages, check.depth) == (4, 6, 3)
    assert check.student.mean == pytest.approx((1 / 2 + 0 + 1 + 1 / 3) / 4)
    assert check.ceiling.mean == pytest.approx(3 / 4)
    assert check.cross_encoder is not None
    assert check.late_interaction is not None
    # The best that reranking can reach, and the student's order reversed.
    assert check.cross_encoder.mrr.mean == pytest.approx(check.ceiling.mean)
    assert check.cross_encoder.gain.mean == pytest.approx((1 / 2 + 2 / 3) / 4)
    assert check.late_interaction.mrr.mean == pytest.approx((1 / 2 + 0 + 1 / 3 + 1) / 4)
    assert check.late_interaction.gain.mean == pytest.approx(0.0)
    # The interval is that of the paired difference.
    assert check.late_interaction.gain.low == pytest.approx(-check.late_interaction.gain.high)
    for value in (check.cross_encoder.gain, check.student):
        assert value.low < value.mean < value.high
    alone = check_teachers(DATA, Student(), None, False, 3, 42)  # type: ignore[arg-type]
    assert alone["late_interaction"] is None
    assert alone["cross_encoder"] is None


def test_warnings_say_which_teacher_and_what_to_do() -> None:
    gains = {"better": (0.1, 0.05, 0.15), "unsure": (0.01, -0.01, 0.03), "worse": (-0.02, -0.05, 0)}
    teachers = {name: Teacher(Estimate(0.5, 0.4, 0.6), Estimate(*g)) for name, g in gains.items()}
    assert facts(cross_encoder=teachers["better"], late_interaction=None).warnings() == []
    told = facts(cross_encoder=teachers["worse"], late_interaction=teachers["unsure"]).warnings()
    assert "late-interaction model does not certainly rank better" in told[0]
    assert "stage interaction longer" in told[0]
    assert told[1].startswith(
        "the cross-encoder model does not rank better than the student it is to teach (gain in"
        " MRR@10 -0.020, -0.050 to +0.000): train the stage teacher longer"
    )


def test_report_has_it_and_reads_older_ones(tmp_path: Path) -> None:
    old = Report.load(ROOT / "tests" / "golden" / "squad")
    assert old.teacher_check is None
    assert "Before the cascade" not in old.markdown()
    report = replace(old, teacher_check=facts())
    report.save(tmp_path)
    assert Report.load(tmp_path) == report
    assert asdict(report)["teacher_check"]["cross_encoder"]["gain"]["mean"] > 0
    summary = (tmp_path / "summary.md").read_text()
    assert "- cross-encoder 0.750" in summary
    assert "- ceiling 0.750" in summary
    assert "Warning: the late-interaction model does not rank better" in summary


@pytest.fixture
def config(make_config: ConfigMaker) -> RunConfig:
    """Interaction, teacher and a cascade with every target, on two-layer models."""
    config = make_config(weights=LossWeights(de=1.0, ce_to_de=1.0, li_to_de=1.0))
    one = StageConfig(steps=1, negatives="random")
    return replace(
        config,
        stages=replace(
            config.stages,
            interaction=replace(one, weights=LossWeights(li=1.0)),
            teacher=replace(one, weights=LossWeights(ce=1.0)),
            teacher_check=replace(config.stages.teacher_check, queries=12, depth=5,
                                  num_distractors=1000),
        ),
    )  # fmt: skip


def with_cascade(config: RunConfig, **changes: Any) -> RunConfig:
    cascade = replace(config.stages.cascade, **changes)
    return replace(config, stages=replace(config.stages, cascade=cascade))


def with_check(config: RunConfig, **changes: Any) -> RunConfig:
    check = replace(config.stages.teacher_check, **changes)
    return replace(config, stages=replace(config.stages, teacher_check=check))


def test_the_run_has_it_where_something_is_distilled(config: RunConfig) -> None:
    assert planned(config) == [
        "interaction", "teacher", "teacher_check", "cascade", "export", "evaluate"
    ]  # fmt: skip
    for other in (
        with_cascade(config, weights=LossWeights(ce=1.0, de=1.0, li=1.0)),
        with_cascade(config, steps=0),
        with_check(config, enabled=False),
    ):
        assert "teacher_check" not in planned(other)
    attention = with_cascade(config, weights=LossWeights(attention=1.0))
    assert "teacher_check" in planned(attention)


def test_what_it_depends_on_and_what_depends_on_it(config: RunConfig) -> None:
    def redone(other: RunConfig) -> set[str]:
        names = ("interaction", "teacher", "teacher_check", "cascade", "evaluate")
        return {n for n in names if stages.fingerprint(config, n) != stages.fingerprint(other, n)}

    assert redone(with_check(config, depth=6)) == {"teacher_check", "evaluate"}
    assert redone(with_check(config, split="test")) == {"teacher_check", "evaluate"}
    assert redone(with_check(config, split="dev")) == set()  # as it is without a name
    assert redone(with_cascade(config, steps=2)) == {"cascade", "evaluate"}
    teacher = replace(config.stages, teacher=replace(config.stages.teacher, steps=2))
    assert "teacher_check" in redone(replace(config, stages=teacher))
    # Without a cross-encoder's term its training does not count.
    own = with_cascade(config, weights=LossWeights(li_to_de=1.0))
    longer = replace(own, stages=replace(teacher, cascade=own.stages.cascade))
    assert stages.fingerprint(own, "teacher_check") == stages.fingerprint(longer, "teacher_check")
    assert stages.upstream(own, "teacher_check") == ["interaction"]


def test_the_split(config: RunConfig, tmp_path: Path) -> None:
    assert stages.check_split(config) == "dev"
    validated = replace(config, training=replace(config.training, validation_split="test"))
    assert stages.check_split(validated) == "test"
    assert stages.check_split(with_check(validated, split="own")) == "own"
    (tmp_path / "qrels").mkdir()
    bare = replace(config, data=replace(config.data, path=str(tmp_path)))
    assert stages.check_split(bare) == "train"
    assert "trained on these queries" in facts(split="train", trained_on=True).caption
    assert "trained on these queries" not in facts().caption


def test_a_split_that_is_not_there_is_told_first(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(with_check(config, split="nowhere")))
    assert main(["run", str(file)]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert not (Path(config.run_dir) / "stages").exists()


def test_the_step(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(config.run_dir)
    torch.manual_seed(3)
    tokenizer = load_tokenizer(config.student)
    for stage, part, model in (
        ("interaction", "student", StudentEncoder(config.student)),
        ("teacher", "teacher", CrossEncoder(replace(config.teacher, path=config.student.path))),
    ):
        model.save(folder.model(stage, part), model.state_dict())
        tokenizer.save_pretrained(folder.model(stage, part))
    steps.run_step(config, "teacher_check", 1)
    marker = json.loads((folder.stage("teacher_check") / "done.json").read_text())
    check = TeacherCheck.from_facts(marker)
    assert (check.queries, check.split, check.depth, check.passages) == (12, "dev", 5, 60)
    assert check.student.mean <= check.ceiling.mean
    assert check.cross_encoder is not None
    assert check.late_interaction is not None
    # A cross-encoder with a random head has nothing to teach.
    told = " ".join(capsys.readouterr().err.split())
    assert "warning: the cross-encoder model does not" in told
    assert is_done(folder.stage("teacher_check"), stages.fingerprint(config, "teacher_check", 1))
