"""Where a training's figures are tracked: TensorBoard, Weights & Biases, trackio, MLflow.

accelerate has a class for each (``accelerate.tracking``). Rank 0 alone logs, so accelerate is told
of one process: it makes no process group, sets no threads and asks for no device.
"""

import os
import uuid
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType, clear_environment

from erniesearch.config.keys import RunConfig
from erniesearch.errors import UserError
from erniesearch.files import write_atomically

MLFLOW_RUN = "mlflow_run"
"""File in a stage's folder with the id of its run in MLflow."""


def check_trackers(names: Iterable[str]) -> None:
    """Raises: UserError: if a tracker's package is not installed."""
    for name in names:
        if LoggerType(name) not in get_available_trackers():
            raise UserError(
                f"training.trackers: the package {name} is not installed: pip install {name}"
            )


def open_trackers(config: RunConfig, folder: Path, start_step: int) -> list[GeneralTracker]:
    """The trackers of ``training.trackers`` for the stage whose folder this is, started.

    A stage that goes on after ``start_step`` continues its TensorBoard folder, what was logged
    after that update hidden, and its run in the other trackers, by an id kept in the folder.
    Each has the resolved configuration.

    Raises:
        UserError: if a tracker's package is not installed, or it will not start.
    """
    names = list(dict.fromkeys(config.training.trackers))
    check_trackers(names)
    with clear_environment():
        PartialState(cpu=True)
    trackers = []
    for name in names:
        project, options = _arguments(name, config, folder, start_step)
        tracker = LOGGER_TYPE_TO_CLASS[name](project, **options)
        try:
            tracker.start()
            if name == "mlflow" and "run_id" not in options:
                _keep_run(tracker, config, folder)
        except OSError:
            raise
        except Exception as error:  # a tracker's own, of many kinds: no key, no answer
            reason = " ".join(str(error).split())
            raise UserError(f"training.trackers: {name} does not start: {reason}") from error
        trackers.append(tracker)
    return trackers


def _keep_run(tracker: GeneralTracker, config: RunConfig, folder: Path) -> None:
    """MLflow names a run itself, and takes its parameters once."""
    tracker.store_init_configuration(_flat(asdict(config), ""))
    write_atomically(folder / MLFLOW_RUN, tracker.tracker.info.run_id)


def _flat(content: dict[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        whole = not isinstance(value, dict)
        flat |= {prefix + key: value} if whole else _flat(value, f"{prefix}{key}.")
    return flat


def _arguments(
    name: str, config: RunConfig, folder: Path, start_step: int
) -> tuple[str, dict[str, Any]]:
    """A tracker's project and the other arguments it starts with."""
    if name == "tensorboard":
        return "tensorboard", {"logging_dir": folder, "purge_step": start_step + 1}
    title = f"{Path(config.run_dir).name}/{folder.name}"
    project = os.environ.get(f"{name.upper()}_PROJECT", "erniesearch")
    path = folder / "tracker_id"
    if name == "mlflow":
        known = folder / MLFLOW_RUN
        run = {"run_id": known.read_text(encoding="utf-8")} if known.is_file() else {}
        return project, {"run_name": title} | run
    if not path.is_file():
        write_atomically(path, uuid.uuid4().hex[:8])
    identity = path.read_text(encoding="utf-8")
    own = {
        "wandb": {"id": identity, "name": title, "dir": str(folder)},
        "trackio": {"name": f"{title}-{identity}"},
    }
    return project, {"resume": "allow", "config": asdict(config)} | own[name]
