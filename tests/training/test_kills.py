"""SIGKILL at random moments, of all ranks or of one, each followed by a new start: the training
ends with the parameters and the log of a training that nobody killed."""

import json
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.processes import SUPPORT, losses_of, run_python
from support.tiny import ConfigMaker

from erniesearch.run_folder import RunFolder

pytestmark = pytest.mark.distributed


def kill_and_compare(
    make_config: ConfigMaker, root: Path, kills: int, steps: int, timeout: float, **changes: object
) -> dict[str, object]:
    """Returns the figures of tests/support/fork_ranks.py."""
    # Dropout on; a checkpoint after every update: every other moment is one of a checkpoint.
    configs = {
        name: make_config(
            run_dir=root / name, steps=steps, save_every=1, queries_per_rank=1, num_negatives=1,
            competence_gate=True, schedule="linear", timeout_minutes=3.0, **changes,
        )
        for name in ("whole", "killed")
    }  # fmt: skip
    job = {name: asdict(config) for name, config in configs.items()}
    job |= {"kills": kills, "seed": 7, "start_seconds": 2.0, "update_seconds": 0.3}
    (root / "job.json").write_text(json.dumps(job))
    began = time.monotonic()
    status, output = run_python(str(SUPPORT / "fork_ranks.py"), str(root / "job.json"),
                                timeout=timeout)  # fmt: skip
    assert status == 0, output[-5000:]
    figures = json.loads(output.splitlines()[-1])
    figures["seconds"] = round(time.monotonic() - began)
    whole, killed = (RunFolder(config.run_dir).stage("cascade") for config in configs.values())
    assert figures["kills"] == kills, figures
    assert figures["damaged"] == 0
    assert losses_of(killed) == losses_of(whole)
    for part in ("student", "teacher"):
        ours, theirs = (
            load_file(folder / "model" / part / "model.safetensors") for folder in (killed, whole)
        )
        assert ours.keys() == theirs.keys()
        assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert not list(killed.parent.glob("cascade.stale-*"))
    return figures


@pytest.mark.slow
@pytest.mark.parametrize("async_save", [False, True], ids=["now", "async"])
def test_three_kills(make_config: ConfigMaker, tmp_path: Path, async_save: bool) -> None:
    kill_and_compare(make_config, tmp_path, 3, 12, 400, async_save=async_save)


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_fifty_kills(make_config: ConfigMaker, tmp_path: Path, zero_stage: int) -> None:
    figures = kill_and_compare(make_config, tmp_path, 50, 110, 5000, zero_stage=zero_stage)
    print(figures)  # noqa: T201
