"""A run's last models as folders that other libraries load (``erniesearch.export.layout``)."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from erniesearch import stages
from erniesearch.config.keys import RunConfig
from erniesearch.data.text_format import FORMAT_FILE, PLAIN, TextFormat, stored_format
from erniesearch.errors import UserError
from erniesearch.export.layout import (
    cross_encoder_layout,
    cut_of,
    dual_encoder_layout,
    late_interaction_layout,
)
from erniesearch.export.model_card import model_card
from erniesearch.export.onnx import export_onnx, require_onnx
from erniesearch.files import write_atomically, written_aside
from erniesearch.models.encoder import HEAD_FILE
from erniesearch.progress import waiting
from erniesearch.run_folder import RunFolder

OWN_FILES = (HEAD_FILE, FORMAT_FILE, "passage_tower")
"""What a stage's student has besides a transformers folder; the layouts say it in their way."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
)


@dataclass(frozen=True)
class _Target:
    """One export folder: ``kind`` and ``suffix`` make its name, ``model`` is where it comes from,
    ``add`` writes the layout's files, ``reading`` is how the student's texts are read."""

    kind: str
    suffix: str
    model: Path
    add: Callable[[Path, RunConfig], None]
    reading: TextFormat = PLAIN


def export_all(config: RunConfig, onnx: bool = False, results: str | None = None) -> list[Path]:
    """Export the last stage's student and teacher; returns the folders written.

    Args:
        onnx: also write the dual-encoder's transformer as ``onnx/model.onnx``.
        results: the evaluation in Markdown, for the model cards.

    Raises:
        UserError: if the run trains no student or teacher, or has not trained it yet.
    """
    if onnx:
        require_onnx()
    targets = _targets(config)
    if not targets:
        raise UserError("nothing to export: no stage with steps above 0 trains a model")
    folders = []
    for target in targets:
        with waiting(f"exporting {target.kind}{target.suffix}"):
            folders.append(_write(target, config, onnx, results))
    return folders


def write_cards(config: RunConfig, results: str) -> None:
    """Write the cards of the folders that are there again, now with the evaluation's results."""
    for target in _targets(config):
        folder = RunFolder(config.run_dir).export(target.kind + target.suffix)
        if folder.is_dir():
            onnx = (folder / "onnx" / "model.onnx").is_file()
            cut = cut_of(folder)
            card = model_card(
                target.kind, target.suffix, config, results, onnx, cut, target.reading
            )  # fmt: skip
            write_atomically(folder / "README.md", card)


def _targets(config: RunConfig) -> list[_Target]:
    folder = RunFolder(config.run_dir)
    targets = []
    student_stage, teacher_stage = stages.final_student(config), stages.final_teacher(config)
    if student_stage:
        student = folder.model(student_stage, "student")
        _require(student, student_stage)
        towers = {"": student}
        if not config.student.tied:
            towers = {"_query": student, "_passage": student / "passage_tower"}
        reading = stored_format(student) or PLAIN
        late = partial(late_interaction_layout, reading=reading, head=student / HEAD_FILE)
        dual = partial(dual_encoder_layout, reading=reading)
        for suffix, tower in towers.items():
            if not (reading.query.expand and reading.query.attend):  # no dual-encoder can be told
                targets.append(_Target("dual_encoder", suffix, tower, dual, reading))
            # A head that came with the start leaves, even if no stage trained it further.
            if stages.trains_late_interaction(config) or reading.of_late_interaction:
                targets.append(_Target("late_interaction", suffix, tower, late, reading))
    if teacher_stage:
        teacher = folder.model(teacher_stage, "teacher")
        _require(teacher, teacher_stage)
        targets.append(_Target("cross_encoder", "", teacher, cross_encoder_layout))
    return targets


def _require(path: Path, stage: str) -> None:
    if not path.is_dir():
        raise UserError(f"nothing to export: stage {stage} is not trained yet ({path} is missing)")


def _write(target: _Target, config: RunConfig, onnx: bool, results: str | None) -> Path:
    """Copy a transformers folder, add the layout's files, then move it into place."""
    folder = RunFolder(config.run_dir).export(target.kind + target.suffix)
    model = target.model
    with written_aside(folder) as aside:
        shutil.copytree(model, aside, ignore=shutil.ignore_patterns(*OWN_FILES))
        # An untied passage tower has no tokenizer of its own.
        for name in TOKENIZER_FILES:
            if not (aside / name).exists() and (model.parent / name).is_file():
                shutil.copy(model.parent / name, aside / name)
        target.add(aside, config)
        with_onnx = onnx and target.kind == "dual_encoder"
        if with_onnx:
            export_onnx(aside)
        cut = cut_of(aside)
        card = model_card(
            target.kind, target.suffix, config, results, with_onnx, cut, target.reading
        )  # fmt: skip
        (aside / "README.md").write_text(card, encoding="utf-8")
    return folder
