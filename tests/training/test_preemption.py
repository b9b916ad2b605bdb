"""SIGUSR1 and SIGTERM: all ranks save at the same update, end with 75, and continue exactly."""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest
from support.processes import losses_of, orphans, run_python, start, wait_for_step
from support.tiny import ConfigMaker

from erniesearch.config.yaml_file import to_yaml
from erniesearch.errors import UserError
from erniesearch.pipeline.launcher import StageFailed, check_devices, launch, num_processes, stop
from erniesearch.pipeline.run import run_pipeline
from erniesearch.run_folder import RunFolder
from erniesearch.training.checkpoints.checkpointer import find_checkpoints
from erniesearch.training.faults import preemption

STEPS = 40


def ranks_below(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    """The training processes, in rank order."""
    found = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "--stage" in child.cmdline() and "deepspeed.launcher" not in " ".join(child.cmdline())
    ]
    return sorted(found, key=lambda child: int(child.environ()["RANK"]))


@pytest.mark.slow
@pytest.mark.distributed
def test_one_signalled_rank_stops_all_at_the_same_update(
    make_config: ConfigMaker, tmp_path: Path
) -> None:
    """A signal to one rank, then one to the pipeline; each time the run continues."""
    for name in ("whole", "stopped"):
        file = tmp_path / f"{name}.yaml"
        file.write_text(
            to_yaml(make_config(run_dir=tmp_path / name, steps=STEPS, num_processes=2,
                                queries_per_rank=2, schedule="linear"))
        )  # fmt: skip
    train = ("-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "29751",
             "launch/train.py", "--stage", "cascade", "--config")  # fmt: skip
    status, output = run_python(*train, str(tmp_path / "whole.yaml"))
    assert status == 0, output[-3000:]

    stage = RunFolder(tmp_path / "stopped").stage("cascade")
    process = start(*train, str(tmp_path / "stopped.yaml"))
    wait_for_step(stage, 3)
    ranks_below(process)[1].send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 75, output[-3000:]
    assert "Traceback" not in output
    seen = len(losses_of(stage))
    assert f"stage cascade stopped after update {seen}, saved" in output
    assert 3 <= seen < STEPS
    assert find_checkpoints(stage / "checkpoints")[-1].name == f"step-{seen:06d}"
    assert not (stage / "done.json").exists()

    run = ("-m", "erniesearch.cli", "run", str(tmp_path / "stopped.yaml"), "--only", "cascade")
    process = start(*run)
    wait_for_step(stage, seen + 3)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 75, output[-3000:]
    assert "Traceback" not in output
    assert "run the same command again to continue" in output
    assert orphans(tmp_path / "stopped") == []
    assert len(losses_of(stage)) > seen
    status, output = run_python(*run)
    assert status == 0, output[-3000:]
    traces = [
        losses_of(RunFolder(tmp_path / name).stage("cascade")) for name in ("whole", "stopped")
    ]
    assert [line["step"] for line in traces[0]] == list(range(1, STEPS + 1))
    assert traces[0] == traces[1]


def test_handlers_come_back_and_the_request_is_noted() -> None:
    before = [signal.getsignal(number) for number in preemption.SIGNALS]
    calls = []
    with preemption.listening(lambda: calls.append(1)):
        assert not preemption.requested()
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 5
        while not calls and time.monotonic() < deadline:
            time.sleep(0.01)
        assert preemption.requested()
    assert calls == [1]
    assert [signal.getsignal(number) for number in preemption.SIGNALS] == before
    with preemption.listening():
        assert not preemption.requested()


@pytest.mark.parametrize(
    ("per_node", "tasks", "expected"), [(0, "4(x2)", 8), (0, "1", 2), (3, "4(x2)", 6)]
)
def test_slurm_says_how_many_ranks(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch, per_node: int, tasks: str,
    expected: int,
) -> None:  # fmt: skip
    for name, value in (("JOB_ID", "7"), ("JOB_NUM_NODES", "2"), ("TASKS_PER_NODE", tasks)):
        monkeypatch.setenv(f"SLURM_{name}", value)
    config = make_config(num_processes=per_node)
    assert num_processes(config) == expected
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "2,1")
    if not per_node:
        with pytest.raises(UserError, match="2,1 tasks per node"):
            num_processes(config)
    monkeypatch.setenv("SLURM_STEP_ID", "0")  # a task of the job: srun is not for it to start
    assert num_processes(config) == (per_node or 2)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "visible", "seen", "status"),
    [
        (2, "4,5,6,7", "4,5", 0), (2, "GPU-6fa1,GPU-90be", "GPU-6fa1,GPU-90be", 75),
        (2, "", "-1,-1", 2), (1, "GPU-6fa1,GPU-90be", "GPU-6fa1", 0), (1, "", "-1", 75),
        (1, "3", "3", 2),
    ],
)  # fmt: skip
def test_ranks_get_the_gpus_that_are_visible(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ranks: int,
    visible: str, seen: str, status: int,
) -> None:  # fmt: skip
    """By the real launcher, or without one; a rank's exit status comes through."""
    package = tmp_path / "erniesearch"  # stands in for the real one in the ranks
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "cli.py").write_text(
        "import os, sys\n"
        "with open('rank-' + os.environ['RANK'], 'w') as file:\n"
        "    print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['LOCAL_RANK'],\n"
        "          os.environ['WORLD_SIZE'], *sys.argv[1:], file=file)\n"
        f"sys.exit({status} * (int(os.environ['RANK']) == {ranks - 1}))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    config = make_config()
    if status == 0:
        launch(config, "cascade", ranks)
    else:
        wanted = preemption.Preempted if status == 75 else StageFailed
        with pytest.raises(wanted) as ended:
            launch(config, "cascade", ranks)
        assert status == getattr(ended.value, "status", 75)
    for rank in range(ranks):
        assert (tmp_path / f"rank-{rank}").read_text().split() == [
            seen, str(rank), str(ranks), "train", "--config", f"{config.run_dir}/config.yaml",
            "--stage", "cascade",
        ]  # fmt: skip


def test_more_processes_than_gpus_are_refused_before_a_start(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    config = make_config(num_processes=8)
    with pytest.raises(UserError, match=r"num_processes is 8, but the GPUs .* are 4: lower it"):
        run_pipeline(config)
    assert not Path(config.run_dir).exists()
    check_devices(make_config(num_processes=4))
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # the job's nodes may have others
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    check_devices(config)


def test_stop_reaches_what_runs(make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch,
                                tmp_path: Path) -> None:  # fmt: skip
    """Also a launcher that has no ranks yet: they would start, and train to the end."""
    (tmp_path / "deepspeed" / "launcher").mkdir(parents=True)
    (tmp_path / "deepspeed" / "launcher" / "launch.py").write_text("import time; time.sleep(60)\n")
    monkeypatch.chdir(tmp_path)
    alarm = threading.Timer(2, os.kill, (os.getpid(), signal.SIGTERM))
    alarm.start()
    started = time.monotonic()
    with (
        preemption.listening(stop),
        pytest.raises(preemption.Preempted, match="in or after stage cascade"),
    ):
        launch(make_config(), "cascade", 2)
    alarm.join()
    assert time.monotonic() - started < 30
    with preemption.listening():
        pass  # forgets the request


def test_stage_of_a_slurm_job_starts_through_srun(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On all nodes, the first of them as master; what srun's exit status means."""
    for name, value in (("JOB_ID", "7"), ("JOB_NUM_NODES", "2"), ("CPUS_PER_TASK", "3")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    for name in ("MASTER_ADDR", "SLURM_STEP_ID", "SRUN_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    config = make_config()
    with pytest.raises(UserError, match="srun is not on PATH"):
        launch(config, "cascade", 4)

    def install(command: str, text: str) -> None:
        (tmp_path / command).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / command).chmod(0o755)

    install("srun", f'echo "$MASTER_ADDR $SRUN_CPUS_PER_TASK $@" > {tmp_path}/told; exit $STATUS')
    install("scontrol", "exit 1")
    with pytest.raises(UserError, match="export MASTER_ADDR"):
        launch(config, "cascade", 4)
    install("scontrol", "echo first; echo second")
    monkeypatch.setenv("STATUS", "0")
    launch(config, "cascade", 4)
    told = (tmp_path / "told").read_text()
    assert told.startswith("first 3 --nodes 2 --ntasks 4 --ntasks-per-node 2 ")
    assert told.endswith(f"train --config {config.run_dir}/config.yaml --stage cascade\n")
    monkeypatch.setenv("STATUS", "75")
    with pytest.raises(preemption.Preempted, match="cascade"):
        launch(config, "cascade", 4)
    monkeypatch.setenv("STATUS", "3")
    with pytest.raises(StageFailed, match="stage cascade failed with exit status 3"):
        launch(config, "cascade", 4)
