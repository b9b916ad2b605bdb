"""A checkpoint's manifest: every file's size and sha256, and a checksum of the manifest itself.

{"step": 50, "world_size": 2, "zero_stage": 1,
 "files": {"mp_rank_00_model_states.pt": {"size": …, "sha256": …}, …}, "sha256": …}
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from erniesearch.files import hash_file, write_atomically
from erniesearch.progress import metered

NAME = "manifest.json"


@dataclass(frozen=True)
class FileFacts:
    """What a file must be."""

    size: int
    sha256: str


class Quality(NamedTuple):
    """What was measured of a checkpoint: its validation loss, the metric that decides which one is
    the best with its value, and whether it was the best so far; None or NaN where there is none."""

    loss: float | None
    metric: str | None
    value: float
    greater_is_better: bool
    is_best: bool


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is: updates done, ranks and ZeRO stage that wrote it, its files, its
    validation loss and the metric that decides which one is the best if they were measured, and
    whether it is of weights in bf16 (None: unrecorded)."""

    step: int
    world_size: int
    zero_stage: int
    files: dict[str, FileFacts]
    validation_loss: float | None = None
    bf16: bool | None = None
    metric: str | None = None
    metric_value: float | None = None
    greater_is_better: bool = False

    @property
    def measured(self) -> tuple[str, float] | None:
        """The metric that it goes by, with a value of which the lowest is the best; None if there
        is none."""
        name, value = self.metric, self.metric_value
        if name is None:  # measured before there was a choice
            name, value = "loss", self.validation_loss
        if value is None or not math.isfinite(value):
            return None
        return name, -value if self.greater_is_better else value

    def write(self, checkpoint: Path) -> None:
        """Write ``manifest.json`` into the checkpoint's folder."""
        write_atomically(checkpoint / NAME, _render(asdict(self)))


class Damaged(Exception):
    """A checkpoint is not what its manifest says; the message names the first difference."""


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest, checked against its own checksum byte for byte.

    Raises:
        Damaged: if it is missing or any byte of it has changed.
    """
    try:
        text = (checkpoint / NAME).read_bytes().decode()
        content = json.loads(text)
        content.pop("sha256")
        if _render(content) != text:
            raise ValueError
        files = {name: FileFacts(**facts) for name, facts in content.pop("files").items()}
        return Manifest(files=files, **content)
    except FileNotFoundError:
        raise Damaged(f"{NAME} is missing") from None
    except OSError as error:
        raise Damaged(f"{NAME} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Damaged(f"{NAME} is damaged") from None


def verify(checkpoint: Path) -> Manifest:
    """Compare every file of a checkpoint with its manifest.

    Raises:
        Damaged: naming the first file that is missing, or has another size or content.
    """
    manifest = read_manifest(checkpoint)
    files = manifest.files.items()
    for name, facts in metered(files, f"checking {checkpoint.name}", "files", len(files)):
        path = checkpoint / name
        try:
            size = path.stat().st_size
            if size != facts.size:
                raise Damaged(f"{name} has {size} bytes, not {facts.size}")
            if hash_file(path) != facts.sha256:
                raise Damaged(f"{name} has other content than was written")
        except FileNotFoundError:
            raise Damaged(f"{name} is missing") from None
        except OSError as error:
            raise Damaged(f"{name} cannot be read: {error.strerror}") from None
    return manifest


def _render(content: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps(content | {"sha256": digest}, indent=2) + "\n"
