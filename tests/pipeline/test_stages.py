"""A stage's fingerprint changes with what its result depends on, and with nothing else."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.tiny import ConfigMaker

from erniesearch import stages
from erniesearch.config.keys import RunConfig
from erniesearch.config.stage_keys import LossWeights, PostTrainConfig, StageConfig
from erniesearch.config.yaml_file import to_yaml
from erniesearch.models.encoder import StudentEncoder
from erniesearch.retrieval.model_folder import read_folder
from erniesearch.retrieval.trained import trained_student
from erniesearch.run_folder import RunFolder
from erniesearch.training.build import part_settings

SETTINGS = {
    "post_train": LossWeights(mlm=1.0),
    "contrastive": LossWeights(de=1.0),
    "interaction": LossWeights(li=1.0, de=1.0, li_to_de=1.0),
    "teacher": LossWeights(ce=1.0),
    "cascade": LossWeights(de=1.0, ce_to_de=1.0, ce_to_li=1.0, attention=1.0, virt=1.0),
}
CASES = {
    # part, changes, stages that are redone (mine and cascade follow what is before them)
    "tau_ce": ("objective", {"tau_ce": 2.0}, {"cascade"}),
    "auto": ("objective", {"tau_ce": "auto"}, {"cascade"}),
    "tau_de_kl": ("objective", {"tau_de_kl": 2.0}, {"interaction", "mine", "cascade"}),
    "tau_li_kl": ("objective", {"tau_li_kl": 2.0}, {"cascade"}),
    "tau_li_target": ("objective", {"tau_li_target": 2.0}, {"interaction", "mine", "cascade"}),
    "tau_att": ("objective", {"tau_att": 2.0}, {"cascade"}),
    "tau_de": ("objective", {"tau_de": 2.0}, {"contrastive", "interaction", "mine", "cascade"}),
    "virt_layers": ("objective", {"virt_layers": [0]}, {"cascade"}),
    "candidates": ("objective", {"candidates": "group"},
                   {"contrastive", "interaction", "mine", "cascade"}),
    "kernels": ("objective", {"kernels": "eager"}, set()),
    "layers": ("student", {"layers": 1},
               {"post_train", "contrastive", "interaction", "mine", "cascade"}),
    "teacher": ("teacher", {"dropout": 0.2}, {"teacher", "mine", "cascade"}),
}  # fmt: skip


@pytest.fixture
def config(make_config: ConfigMaker) -> RunConfig:
    config = make_config()
    own: dict[str, Any] = {
        name: StageConfig(steps=1, weights=weights, negatives="random")
        for name, weights in SETTINGS.items()
    }
    own["post_train"] = PostTrainConfig(steps=1, weights=SETTINGS["post_train"])
    own["cascade"] = replace(own["cascade"], negatives="mined")
    return replace(config, stages=replace(config.stages, **own))


@pytest.mark.parametrize("case", CASES)
def test_a_setting_redoes_the_stages_that_read_it(config: RunConfig, case: str) -> None:
    part, changes, redone = CASES[case]
    other = replace(config, **{part: replace(getattr(config, part), **changes)})
    if "mine" in redone:  # it builds on what mining builds on
        redone = redone | {"teacher_check"}
    names = [*SETTINGS, "mine", "teacher_check"]
    differ = {n for n in names if stages.fingerprint(config, n) != stages.fingerprint(other, n)}
    # What follows post_train is redone with it.
    assert differ == redone


def test_ranks_count_with_in_batch_candidates(config: RunConfig) -> None:
    """On one rank they are the cross-batch ones; on more they are fewer."""

    def made(queries_per_rank: int, ranks: int, candidates: str, stage: str = "contrastive") -> str:
        changed: dict[str, Any] = {
            "post_train": PostTrainConfig(),
            stage: replace(getattr(config.stages, stage), queries_per_rank=queries_per_rank),
        }
        objective = replace(config.objective, candidates=candidates)
        own = replace(config, stages=replace(config.stages, **changed), objective=objective)
        return stages.fingerprint(own, stage, ranks)

    assert made(8, 1, "cross_batch") == made(4, 2, "cross_batch") == made(8, 1, "in_batch")
    assert len({made(8, 1, "in_batch"), made(4, 2, "in_batch"), made(2, 4, "in_batch")}) == 3
    assert made(8, 1, "group") == made(4, 2, "group")
    # The cross-encoder compares groups in any case.
    assert made(8, 1, "in_batch", "teacher") == made(4, 2, "in_batch", "teacher")


def test_a_stages_student_is_not_cut_again(config: RunConfig, tmp_path: Path) -> None:
    config = replace(config, student=replace(config.student, layers=1))
    assert part_settings(config, "post_train")[0].layers == 1
    assert trained_student(config, None).layers == 1
    folder = RunFolder(config.run_dir)
    student = StudentEncoder(config.student)
    student.save(folder.model("interaction", "student"), dict(student.state_dict()))
    folder.model("teacher", "teacher").mkdir(parents=True)
    (folder.root / "config.yaml").write_text(to_yaml(config))
    found = [
        part_settings(config, "cascade")[0], trained_student(config, "interaction"),
        read_folder(folder.model("interaction", "student")).settings,
    ]  # fmt: skip
    for settings in found:
        assert settings.layers is None
        assert StudentEncoder(settings).query_tower.config.num_hidden_layers == 1
