"""training.trackers: the same figures as in metrics.jsonl, from rank 0, continued after a kill."""

import json
import os
from dataclasses import replace
from pathlib import Path

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


def run_monitor(config: RunConfig, folder: Path, start: int, end: int, offset: float) -> None:
    with Monitor(folder, "cascade", start, 4, open_trackers(config, folder, start)) as monitor:
        for step in range(start + 1, end + 1):
            speed = {"queries_per_second": 1.0, "tokens_per_second": 2.0}
            monitor.log(step, {"loss": step + offset}, {"encoder": 0.5}, speed)
        monitor.log_validation(end, {"loss": offset})


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
