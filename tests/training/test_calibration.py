"""The teacher's temperature: fitted by likelihood, stored with the model, used by the KL terms."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import run_python
from support.tiny import ConfigMaker

from erniesearch.config.keys import ObjectiveConfig, RunConfig
from erniesearch.config.stage_keys import LossWeights, StageConfig
from erniesearch.config.yaml_file import to_yaml
from erniesearch.data.collection import load_beir
from erniesearch.errors import UserError
from erniesearch.run_folder import RunFolder
from erniesearch.stages import Stage
from erniesearch.training.build import build_model, check_inputs
from erniesearch.training.calibration import HIGHEST, LOWEST, Calibration, fit_temperature

KL = LossWeights(de=1.0, ce_to_de=1.0)


def test_temperature_by_hand() -> None:
    """Lists of two with a margin of 2, three of four in the right order: the softmax is right in
    three of four cases where 1 / (1 + exp(-2/T)) = 3/4, so T = 2 / log 3."""
    scores = torch.tensor([[1.0, -1.0, 50.0]] * 3 + [[-3.0, -1.0, 50.0]])
    mask = torch.tensor([[True, True, False]] * 4)  # the third is a false negative
    assert fit_temperature(scores, mask) == pytest.approx(2 / math.log(3), rel=1e-4)
    assert fit_temperature(10 * scores, mask) == pytest.approx(20 / math.log(3), rel=1e-4)


def test_temperature_is_the_best_on_a_grid() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = 4 * torch.randn(64, 8, generator=generator)
    scores[:, 0] += 5
    mask = torch.ones_like(scores, dtype=torch.bool)
    best = fit_temperature(scores, mask)

    def loss(temperature: float) -> float:
        return float((scores / temperature).logsumexp(1).sub(scores[:, 0] / temperature).mean())

    assert LOWEST < best < HIGHEST
    assert min(map(loss, torch.linspace(0.5, 2.0, 100).mul(best).tolist())) >= loss(best) - 1e-6


def test_a_temperature_at_its_bound_is_told() -> None:
    right = fit_temperature(torch.tensor([[2.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool))
    assert right == pytest.approx(LOWEST, rel=0.2)  # flat down there
    assert "at its bound" in Calibration(right, 1, True, 0.1, 0.0).told()
    fine = Calibration(1.3, 256, True, 0.5, 0.4).told()
    assert fine == (
        "teacher's temperature 1.3 by likelihood on 256 held-out lists: loss 0.5 at 1, 0.4 there"
    )
    assert "trained on their queries" in Calibration(1.3, 256, False, 0.5, 0.4).told()


@pytest.fixture
def config(make_config: ConfigMaker) -> RunConfig:
    """A teacher stage of two updates and a cascade with tau_ce auto."""
    config = make_config(steps=2, tau_ce="auto", weights=KL)
    teacher = StageConfig(steps=2, queries_per_rank=2, num_negatives=3, negatives="random",
                          weights=LossWeights(ce=1.0))  # fmt: skip
    return replace(config, stages=replace(config.stages, teacher=teacher))


def train(config: RunConfig, stage: str, root: Path) -> tuple[int, str]:
    (root / "config.yaml").write_text(to_yaml(config))
    return run_python(
        "launch/train.py", "--config", str(root / "config.yaml"), "--stage", stage
    )  # fmt: skip


@pytest.mark.distributed
def test_the_teacher_stage_finds_it_and_the_cascade_uses_it(
    config: RunConfig, tmp_path: Path
) -> None:
    status, output = train(config, "teacher", tmp_path)
    assert status == 0, output[-3000:]
    folder = RunFolder(config.run_dir)
    facts = json.loads((folder.stage("teacher") / "done.json").read_text())["calibration"]
    stored = json.loads((folder.model("teacher", "teacher") / "temperature.json").read_text())
    assert stored == {"temperature": facts["temperature"]}
    # 40 queries, 4 of them trained on: the other 36 are not enough for 40 lists.
    assert facts["num_lists"] == 40
    assert facts["held_out"] is False
    assert facts["loss_after"] <= facts["loss_before"]
    assert " ".join(Calibration(**facts).told().split()) in " ".join(output.split())
    model, _ = build_model(Stage(config, "cascade"))
    assert model.objective.settings.tau_ce == facts["temperature"]
    assert model.teacher is not None
    assert model.teacher.temperature == facts["temperature"]


def test_auto_without_a_stored_temperature_is_refused(config: RunConfig) -> None:
    off = replace(config.stages, teacher=replace(config.stages.teacher, steps=0))
    config = replace(config, stages=off)
    data = load_beir(config.data.path, "train")
    for call in (lambda: check_inputs(config, data), lambda: build_model(Stage(config, "cascade"))):
        with pytest.raises(UserError, match=r"objective.tau_ce is auto, but no temperature lies"):
            call()
    fixed = replace(config, objective=ObjectiveConfig(tau_ce=2.0))
    check_inputs(fixed, data)
    assert build_model(Stage(fixed, "cascade"))[0].objective.settings.tau_ce == 2.0


def test_auto_takes_what_lies_with_the_pretrained_teacher(
    config: RunConfig, tiny_model: Path, tmp_path: Path
) -> None:
    off: dict[str, Any] = {"teacher": replace(config.stages.teacher, steps=0)}
    config = replace(config, stages=replace(config.stages, **off))
    trained, _ = build_model(Stage(replace(config, objective=ObjectiveConfig()), "cascade"))
    assert trained.teacher is not None
    trained.teacher.temperature = 0.75
    folder = tmp_path / "teacher"
    trained.teacher.save(folder, dict(trained.teacher.state_dict()))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_model / name).read_bytes())
    config = replace(config, teacher=replace(config.teacher, path=str(folder)))
    check_inputs(config, load_beir(config.data.path, "train"))
    assert build_model(Stage(config, "cascade"))[0].objective.settings.tau_ce == 0.75
