"""A run folder's models, ready to encode and to score."""

from dataclasses import replace
from pathlib import Path

from erniesearch import stages
from erniesearch.config.build_config import config_from
from erniesearch.config.keys import RunConfig, StudentConfig, TeacherConfig
from erniesearch.config.yaml_file import read_yaml
from erniesearch.errors import UserError
from erniesearch.retrieval.crew import Model
from erniesearch.retrieval.retriever import PairScorer, Retriever
from erniesearch.run_folder import RunFolder

FORMER_POST_TRAIN = ("num_negatives", "negatives", "teacher_scores", "easy_steps", "teacher_lr",
                     "teacher_head_lr")  # fmt: skip
"""Keys of ``stages.post_train`` in the records of older runs; they did nothing."""


def load_run_config(run_dir: str | Path) -> RunConfig:
    """The config that a run recorded; ``run_dir`` is the folder as it is named now.

    Raises:
        UserError: if there is none, or one that no run has written.
    """
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        raise UserError(f"{path}: no such file; --run names the folder of a finished run")
    content = read_yaml(path)
    former = (content.get("stages") or {}).get("post_train")
    if isinstance(former, dict):
        for key in FORMER_POST_TRAIN:
            former.pop(key, None)
    return config_from(content | {"run_dir": str(run_dir)}, str(path))


def trained_student(config: RunConfig, stage: str | None) -> StudentConfig:
    """Settings that load a stage's student; the pretrained one for None."""
    if stage is None:
        return config.student
    path = RunFolder(config.run_dir).model(stage, "student")
    return replace(config.student, path=str(path), revision=None, layers=None)


def trained_teacher(config: RunConfig) -> TeacherConfig | None:
    """Settings that load the last cross-encoder; None if the run trains none."""
    stage = stages.final_teacher(config)
    if stage is None:
        return None
    path = RunFolder(config.run_dir).model(stage, "teacher")
    return replace(config.teacher, path=str(path), revision=None)


def make_retriever(config: RunConfig, settings: StudentConfig, told: bool = False) -> Retriever:
    """A student with the run's lengths, precision and batch size, shared with a crew's ranks."""
    retriever = _ready(config, settings, told)
    assert isinstance(retriever, Retriever)
    return retriever


def make_scorer(config: RunConfig, settings: TeacherConfig, told: bool = False) -> PairScorer:
    """A cross-encoder with the run's lengths, precision and batch size, shared as students are."""
    scorer = _ready(config, settings, told)
    assert isinstance(scorer, PairScorer)
    return scorer


def _ready(
    config: RunConfig, settings: StudentConfig | TeacherConfig, told: bool
) -> Retriever | PairScorer:
    lengths = (config.data.max_query_length, config.data.max_passage_length)
    loaded = Model(
        settings, lengths, config.evaluation.batch_size, config.seed, config.training.precision
    ).load()
    loaded.told = told
    return loaded
