"""What a student starts from: the transformer, its projection, and how its texts are read."""

from dataclasses import dataclass, replace
from pathlib import Path

from erniesearch.config.keys import StudentConfig
from erniesearch.data.text_format import PLAIN, TextFormat, stored_format
from erniesearch.errors import UserError
from erniesearch.models.backbone import resolve
from erniesearch.models.published import NotBuilt, Published, read_published

HEAD_FILE = "late_interaction.safetensors"
ALONE = "set student.keep to weights_only to take the transformer's weights alone"


@dataclass(frozen=True)
class Start:
    """Attributes:
    settings: the student's, ``path`` that of the transformer.
    text_format: how its texts are read.
    head: safetensors file of its late-interaction projection; it need not exist.
    lengths: longest texts in tokens that a published late-interaction model names.
    """

    settings: StudentConfig
    text_format: TextFormat
    head: Path
    lengths: dict[str, int]


def read_start(settings: StudentConfig) -> Start:
    """What ``settings.path`` holds: a stage's student, a published model, or an encoder alone.

    Raises:
        UserError: for settings that would leave out what a published model says
            (``student.keep``), and for what of it is not built here.
    """
    folder = Path(resolve(settings.path, settings.revision))
    text_format, lengths, head = stored_format(folder), {}, folder / HEAD_FILE
    if text_format is None:
        text_format = PLAIN
        published = None if settings.keep == "weights_only" else _published(folder, settings)
        if published is not None:
            text_format, head = published.text_format, published.head or head
            if published.path.resolve() != folder.resolve():
                settings = replace(settings, path=str(published.path), revision=None)
            if published.kind == "late_interaction":
                lengths = {str(side): length for side, length in published.lengths.items()}
    text_format = text_format.prompted(settings.query_prompt, settings.passage_prompt)
    return Start(settings, text_format, head, lengths)


def check_lengths(settings: StudentConfig, query: int, passage: int) -> None:
    """Hold the data's lengths against those that a published late-interaction model names.

    Raises:
        UserError: where they differ, unless ``student.keep`` says otherwise.
    """
    named = read_start(settings).lengths if settings.keep == "all" else {}
    for side, length in (("query", query), ("passage", passage)):
        if named.get(side, length) != length:
            raise UserError(
                f"data.max_{side}_length is {length}, but the model '{settings.path}' reads a"
                f" {side} as {named[side]} tokens: set it to {named[side]}, or student.keep to"
                " all_but_lengths to train and export the data's lengths"
            )


def _published(folder: Path, settings: StudentConfig) -> Published | None:
    try:
        found = read_published(folder)
    except NotBuilt as error:
        raise UserError(f"student.path: {error}; {ALONE}") from None
    if found is None:
        return None
    told = f"student.path '{settings.path}'"
    if found.dense is not None:
        raise UserError(f"{told} has a layer after pooling ({found.dense.name}), which is not"
                        f" trained here: {ALONE}")  # fmt: skip
    if found.pooling not in (None, settings.pooling):
        raise UserError(f"{told} pools by {found.pooling}, student.pooling is {settings.pooling}:"
                        f" set it to {found.pooling}, or {ALONE}")  # fmt: skip
    if found.normalizes and not settings.normalize:
        raise UserError(f"{told} scales its vectors to length 1, student.normalize is false: set it"
                        f" to true, or {ALONE}")  # fmt: skip
    if found.dim not in (None, settings.late_interaction_dim):
        raise UserError(f"{told} has token vectors of {found.dim} dimensions,"
                        f" student.late_interaction_dim is {settings.late_interaction_dim}: set it"
                        f" to {found.dim}, or {ALONE}")  # fmt: skip
    return found
