"""training.trackers: the same figures as in metrics.jsonl, from rank 0, continued after a kill."""

import json
import os
import sqlite3
import struct
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from support.processes import ROOT, run_python, train_cascade
from support.tiny import ConfigMaker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from erniesearch.cli import main
from erniesearch.config.keys import RunConfig
from erniesearch.config.yaml_file import to_yaml
from erniesearch.errors import UserError
from erniesearch.stages import fingerprint
from erniesearch.training.checkpoints.manifest import Quality
from erniesearch.training.monitor import Monitor
from erniesearch.training.trackers import check_trackers, open_trackers

STAND_IN = """
import json, os
def note(what, values, step=None):
    with open(os.environ["NOTES"], "a") as notes:
        notes.write(json.dumps([what, values, step]) + "\\n")
class Run:
    def log(self, values, step=None):
        note("log", values, step)
    def finish(self):
        note("finish", {})
def init(**options):
    if "FAIL" in os.environ:
        raise RuntimeError("no API key\\nconfigured")
    note("init", options)
    return Run()
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> dict[str, str]:
    """An environment in which a `wandb` is installed that notes what it is told."""
    site = tmp_path / "site"
    (site / "wandb").mkdir(parents=True)
    (site / "wandb" / "__init__.py").write_text(STAND_IN)
    (site / "wandb-1.0.dist-info").mkdir()
    (site / "wandb-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: wandb\nVersion: 1.0\n"
    )
    path = [site, ROOT, ROOT / "kernels", ROOT / "tests"]
    return {"PYTHONPATH": os.pathsep.join(map(str, path)), "NOTES": str(tmp_path / "notes")}


def notes_of(environment: dict[str, str]) -> list[list]:
    return [json.loads(line) for line in Path(environment["NOTES"]).read_text().splitlines()]


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """TensorBoard's figures as it shows them: by tag and step."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


def measured(loss: float) -> Quality:
    return Quality(loss, "loss", loss, False, False)


def run_monitor(config: RunConfig, folder: Path, start: int, end: int, offset: float) -> None:
    with Monitor(folder, "cascade", start, 4, open_trackers(config, folder, start)) as monitor:
        for step in range(start + 1, end + 1):
            speed = {"queries_per_second": 1.0, "tokens_per_second": 2.0}
            monitor.log(step, {"loss": step + offset}, {"encoder": 0.5}, speed)
        monitor.log_validation(end, {"loss": offset, "seconds": 0.5}, measured(offset))


def test_tensorboard_continues_and_hides_what_a_killed_run_left(
    make_config: ConfigMaker, tmp_path: Path
) -> None:
    config, folder = make_config(), tmp_path / "stages" / "cascade"
    run_monitor(config, folder, 0, 3, 0.0)
    run_monitor(config, folder, 2, 4, 10.0)
    shown = scalars(folder / "tensorboard")
    assert shown["loss/loss"] == {1: 1.0, 2: 2.0, 3: 13.0, 4: 14.0}
    assert shown["learning_rate/encoder"] == dict.fromkeys((1, 2, 3, 4), 0.5)
    assert shown["speed/tokens_per_second"] == dict.fromkeys((1, 2, 3, 4), 2.0)
    assert shown["validation/loss"] == {4: 10.0}


def test_accelerate_touches_no_group_thread_or_environment(
    make_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As rank 0 of two, where accelerate would make a process group and set the threads."""
    monkeypatch.setattr(PartialState, "_shared_state", {})
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before, threads = dict(os.environ), torch.get_num_threads()
    (tracker,) = open_trackers(make_config(), tmp_path, 0)
    tracker.log({"loss/loss": 1.0}, step=1)
    tracker.finish()
    assert not dist.is_initialized()
    assert torch.get_num_threads() == threads
    assert dict(os.environ) == before


@pytest.mark.distributed
def test_two_ranks_track_once_what_metrics_jsonl_has(
    make_config: ConfigMaker, tmp_path: Path, stand_in: dict[str, str]
) -> None:
    config = make_config(steps=3, trackers=["wandb", "tensorboard"], run_dir=tmp_path / "my_run")
    stage = train_cascade(config, tmp_path, 2, **stand_in)
    kinds = [note[0] for note in notes_of(stand_in)]
    assert kinds == ["init", "log", "log", "log", "finish"]
    options = notes_of(stand_in)[0][1]
    assert options["project"] == "erniesearch"
    assert options["name"] == "my_run/cascade"
    assert options["resume"] == "allow"
    assert options["config"]["stages"]["cascade"]["steps"] == 3
    shown = scalars(stage / "tensorboard")
    for line, note in zip(
        map(json.loads, (stage / "metrics.jsonl").read_text().splitlines()),
        notes_of(stand_in)[1:4], strict=True,
    ):  # fmt: skip
        step = line.pop("step")
        tagged = {f"learning_rate/{k}": v for k, v in line.pop("learning_rate").items()}
        tagged |= {f"speed/{k}": v for k, v in line.pop("speed").items()}
        tagged |= {f"loss/{k}": v for k, v in line.items()}
        assert note[1:] == [tagged, step]
        assert {tag: shown[tag][step] for tag in shown} == pytest.approx(tagged)


OPEN = """
import json, sys
from pathlib import Path
from erniesearch.config.keys import RunConfig
from erniesearch.config.yaml_file import from_dict
from erniesearch.errors import UserError
from erniesearch.training.trackers import open_trackers
config = from_dict(RunConfig, json.loads(sys.argv[1]))
try:
    open_trackers(config, Path(sys.argv[2]), int(sys.argv[3]))
except UserError as error:
    print("told:", error)
"""


def test_a_resumed_stage_continues_its_run(
    make_config: ConfigMaker, tmp_path: Path, stand_in: dict[str, str]
) -> None:
    config = json.dumps(make_config(trackers=["wandb"]), default=vars)
    for folder in ("one", "one", "two"):
        (tmp_path / folder).mkdir(exist_ok=True)
        status, output = run_python("-c", OPEN, config, str(tmp_path / folder), "2", **stand_in)
        assert status == 0, output[-3000:]
    first, again, other = (note[1]["id"] for note in notes_of(stand_in))
    assert first == again != other


def test_a_tracker_that_does_not_start_is_told_in_one_line(
    make_config: ConfigMaker, tmp_path: Path, stand_in: dict[str, str]
) -> None:
    config = json.dumps(make_config(trackers=["wandb"]), default=vars)
    status, output = run_python("-c", OPEN, config, str(tmp_path), "0", FAIL="1", **stand_in)
    assert status == 0, output[-3000:]
    said = "told: training.trackers: wandb does not start: no API key configured"
    assert output.splitlines()[-1] == said


REAL = """
import json, sys
from pathlib import Path
from erniesearch.config.keys import RunConfig
from erniesearch.config.yaml_file import from_dict
from erniesearch.training.checkpoints.manifest import Quality
from erniesearch.training.monitor import Monitor
from erniesearch.training.trackers import open_trackers
config, folder = from_dict(RunConfig, json.loads(sys.argv[1])), Path(sys.argv[2])
for start, end in ((0, 3), (3, 5)):  # stopped after 3 updates, and continued
    with Monitor(folder, "cascade", start, 5, open_trackers(config, folder, start)) as monitor:
        for step in range(start + 1, end + 1):
            speed = {"queries_per_second": 8.0, "tokens_per_second": 2.0}
            monitor.log(step, {"loss": 1 / step, "accuracy_de": 0.25}, {"encoder": 0.5}, speed)
        figures, measured = {"loss": 0.125 * end}, Quality(0.125 * end, None, 0.0, False, False)
        monitor.log_validation(end, figures | {"seconds": 0.5}, measured)
"""
WANTED = {
    "loss/loss": {step: 1 / step for step in range(1, 6)},
    "loss/accuracy_de": dict.fromkeys(range(1, 6), 0.25),
    "learning_rate/encoder": dict.fromkeys(range(1, 6), 0.5),
    "speed/queries_per_second": dict.fromkeys(range(1, 6), 8.0),
    "speed/tokens_per_second": dict.fromkeys(range(1, 6), 2.0),
    "validation/loss": {3: 0.375, 5: 0.625},
    "validation/seconds": {3: 0.5, 5: 0.5},
}


def tracked(name: str, config: RunConfig, folder: Path, **environment: str) -> None:
    """Five updates in the real package ``name``, in a process of its own."""
    pytest.importorskip(name, reason=f"the package {name} is not installed")
    config = replace(config, training=replace(config.training, trackers=[name]))
    folder.mkdir(parents=True)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    status, output = run_python("-c", REAL, json.dumps(config, default=vars), str(folder),
                                **environment)  # fmt: skip
    assert status == 0, output[-3000:]


def test_wandb_offline_is_read_back(make_config: ConfigMaker, tmp_path: Path) -> None:
    folder = tmp_path / "my" / "stages" / "cascade"
    tracked("wandb", make_config(run_dir=tmp_path / "my"), folder, WANDB_MODE="offline",
            WANDB_PROJECT="mine")  # fmt: skip
    from wandb.proto import wandb_internal_pb2

    found: dict[str, dict[int, float]] = {}
    runs = []
    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2  # before the stop and after it
    for file in files:
        for data in _wandb_records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                runs.append((record.run.project, record.run.run_id, record.run.display_name))
            for key, value, step in _wandb_items(record):
                found.setdefault(key, {})[step] = value
    assert len(set(runs)) == 1  # one run, continued
    assert runs[0] == ("mine", (folder / "tracker_id").read_text(), "my/cascade")
    assert found == WANTED


def _wandb_records(content: bytes) -> Iterator[bytes]:
    """A .wandb file is a header of 7 bytes and LevelDB's log format: blocks of 32 KiB, of pieces
    with checksum (4), length (2) and kind (1: whole, 2: first, 3: middle, 4: last)."""
    block, position, parts = 32 << 10, 7, b""
    while position + 7 <= len(content):
        if block - position % block < 7:  # filled up with zeros
            position += block - position % block
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


def _wandb_items(record: Any) -> Iterator[tuple[str, float, int]]:
    if record.WhichOneof("record_type") == "history":
        items = {".".join(item.nested_key) or item.key: json.loads(item.value_json)
                 for item in record.history.item}  # fmt: skip
        for key, value in items.items():
            if not key.startswith("_"):
                yield key, value, items["_step"]


def test_trackio_is_read_back(make_config: ConfigMaker, tmp_path: Path) -> None:
    folder = tmp_path / "my" / "stages" / "cascade"
    tracked("trackio", make_config(run_dir=tmp_path / "my"), folder,
            TRACKIO_DIR=str(tmp_path / "trackio"), TRACKIO_PROJECT="mine")  # fmt: skip
    with closing(sqlite3.connect(tmp_path / "trackio" / "mine.db")) as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    name = f"my/cascade-{(folder / 'tracker_id').read_text()}"
    assert {row[0] for row in rows} == {name}
    found: dict[str, dict[int, float]] = {}
    for _, step, metrics in rows:
        for key, value in json.loads(metrics).items():
            found.setdefault(key, {})[step] = value
    assert found == WANTED


def test_mlflow_is_read_back(make_config: ConfigMaker, tmp_path: Path) -> None:
    folder = tmp_path / "my" / "stages" / "cascade"
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    config = make_config(run_dir=tmp_path / "my")
    tracked("mlflow", config, folder, MLFLOW_TRACKING_URI=store, MLFLOW_EXPERIMENT_NAME="mine")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(store)
    (experiment,) = client.search_experiments(filter_string="name = 'mine'")
    (run,) = client.search_runs([experiment.experiment_id])  # one, continued
    assert run.info.run_name == "my/cascade"
    assert run.info.run_id == (folder / "mlflow_run").read_text()
    assert run.data.params["stages.cascade.steps"] == "4"
    found = {key: {m.step: m.value for m in client.get_metric_history(run.info.run_id, key)}
             for key in run.data.metrics}  # fmt: skip
    assert found == WANTED


def test_an_unknown_or_missing_tracker_is_refused(
    make_config: ConfigMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(make_config()))
    assert main(["run", str(file), "--training.trackers", "[tensorbord]"]) == 2
    assert "training.trackers" in capsys.readouterr().err
    monkeypatch.setattr("erniesearch.training.trackers.get_available_trackers", list)
    with pytest.raises(
        UserError, match="the package trackio is not installed: pip install trackio"
    ):
        check_trackers(["trackio"])
    assert main(["run", str(file)]) == 2  # before anything is trained
    assert "package tensorboard is not installed" in capsys.readouterr().err


def test_trackers_do_not_change_the_result(make_config: ConfigMaker) -> None:
    config = make_config()
    other = replace(config, training=replace(config.training, trackers=[]))
    assert fingerprint(config, "cascade", 1) == fingerprint(other, "cascade", 1)
