"""The batch scripts on a real Slurm of two nodes: time limit, dead node, cancelled, pipeline."""

import json
import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.processes import ROOT, losses_of, run_python
from support.slurm_cluster import Cluster, missing
from support.tiny import ConfigMaker

from erniesearch.config.stage_keys import LossWeights, StageConfig
from erniesearch.config.yaml_file import to_yaml
from erniesearch.run_folder import RunFolder
from erniesearch.training.checkpoints.checkpointer import find_checkpoints

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The batch scripts, edited as their heads ask for: this cluster has no GPUs."""
    folder = tmp_path_factory.mktemp("scripts")
    for script in ROOT.glob("slurm/*.sbatch"):
        kept = [x for x in script.read_text().splitlines(True) if "--gpus-per-node=" not in x]
        (folder / script.name).write_text("".join(kept))
    return folder


def whole_run(file: Path, run_dir: Path, *options: str) -> list[dict]:
    """Loss trace of the same training on two ranks, never interrupted."""
    status, output = run_python(
        "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d",
        "--rdzv_endpoint=localhost:0", "launch/train.py", "--config", str(file),
        "--stage", "cascade", "--run_dir", str(run_dir), *options,
    )  # fmt: skip
    assert status == 0, output[-3000:]
    return losses_of(RunFolder(run_dir).stage("cascade"))


def wait_for_update(cluster: Cluster, stage: Path, update: int) -> None:
    metrics = stage / "metrics.jsonl"
    cluster.wait_until(
        f"update {update}",
        lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= update,
        300,
    )


def test_time_limit_requeues_and_the_trace_is_exact(
    cluster: Cluster, scripts: Path, make_config: ConfigMaker, tmp_path: Path
) -> None:
    """A minute is the shortest limit that Slurm knows; it warns up to 30 seconds earlier than
    asked for."""
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(make_config(queries_per_rank=4, steps=20)))
    whole_run(file, tmp_path / "short")
    lines = (RunFolder(tmp_path / "short").stage("cascade") / "metrics.jsonl").read_text()
    seconds = sorted(json.loads(x)["speed"]["seconds"] for x in lines.splitlines())
    # More than fits before the first warning, whatever this machine's speed.
    steps = ("--stages.cascade.steps", str(round(32 / seconds[len(seconds) // 2])))
    job = cluster.submit(
        tmp_path, "--time=1", "--signal=B:USR1@2", "--job-name=limit",
        str(scripts / "stage.sbatch"), "cascade", str(file), *steps,
    )  # fmt: skip
    done = cluster.wait_for(job, "COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", seconds=500)
    log = (tmp_path / f"limit-{job}.log").read_text()
    assert done["JobState"] == "COMPLETED", log[-5000:]
    starts = int(done["Restarts"])
    assert starts >= 1
    updates = [int(x) for x in re.findall(r"stage cascade stopped after update (\d+), saved", log)]
    # Where a start takes most of the minute, a warning may come before any update.
    assert 1 <= len(updates) <= starts == log.count("stopped on request: back to the queue")
    assert updates == sorted(set(updates))
    assert "Traceback" not in log

    run_dir = tmp_path / "runs" / f"limit-{job}"
    for start in range(starts + 1):
        record = run_dir / "code" / f"job-{job}-start-{start}"
        assert re.fullmatch(r"[0-9a-f]{40}\n", (record / "commit").read_text())
        assert f"steps: {steps[1]}" in (record / "config.yaml").read_text()
        assert (record / "changes.diff").exists()
    trace = losses_of(RunFolder(run_dir).stage("cascade"))
    assert trace == whole_run(file, tmp_path / "whole", *steps)
    assert len(trace) == int(steps[1])


def test_killed_node_requeues_and_the_trace_is_exact(
    cluster: Cluster, scripts: Path, make_config: ConfigMaker, tmp_path: Path
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(make_config(queries_per_rank=2, steps=150, save_every=10)))
    job = cluster.submit(
        tmp_path, "--job-name=node", str(scripts / "stage.sbatch"), "cascade", str(file)
    )
    stage = RunFolder(tmp_path / "runs" / f"node-{job}").stage("cascade")
    wait_for_update(cluster, stage, 15)
    cluster.kill_node("n2")
    reached = len(losses_of(stage))
    assert reached < 150
    pending = cluster.wait_for(job, "PENDING", seconds=200)
    assert pending["Restarts"] == "1", pending
    assert not (stage / "done.json").exists()
    cluster.start_node("n2")
    done = cluster.wait_for(job, "COMPLETED", "FAILED", "CANCELLED", seconds=400)
    assert done["JobState"] == "COMPLETED", (tmp_path / f"node-{job}.log").read_text()[-5000:]
    trace = losses_of(stage)
    assert [line["step"] for line in trace] == list(range(1, 151))
    assert trace == whole_run(file, tmp_path / "whole")


def test_cancelled_job_saves_and_does_not_come_back(
    cluster: Cluster, scripts: Path, make_config: ConfigMaker, tmp_path: Path
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(make_config(queries_per_rank=2, steps=5000)))
    job = cluster.submit(
        tmp_path, "--job-name=gone", str(scripts / "stage.sbatch"), "cascade", str(file)
    )
    stage = RunFolder(tmp_path / "runs" / f"gone-{job}").stage("cascade")
    wait_for_update(cluster, stage, 3)
    cluster.call("scancel", job)
    cluster.wait_until(
        "the end", lambda: cluster.call("squeue", "-h", "-j", job, "-o", "%T") == "", 100
    )
    job_now = cluster.job(job)
    assert (job_now["JobState"], job_now["Restarts"]) == ("CANCELLED", "0")
    saved = find_checkpoints(stage / "checkpoints")
    assert [path.name for path in saved] == [f"step-{len(losses_of(stage)):06d}"]


def test_mistake_is_not_requeued(cluster: Cluster, scripts: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("sed: 1\n")
    job = cluster.submit(tmp_path, "--job-name=odd", str(scripts / "pipeline.sbatch"), str(file))
    done = cluster.wait_for(job, "FAILED", "COMPLETED")
    assert (done["ExitCode"], done["Restarts"]) == ("2:0", "0")
    log = (tmp_path / f"odd-{job}.log").read_text()
    assert log.count("unknown key 'sed' (did you mean 'seed'?)") == 1


def test_encoding_uses_both_nodes(
    cluster: Cluster, scripts: Path, tiny_data: Path, tiny_model: Path, tmp_path: Path
) -> None:
    job = cluster.submit(
        tmp_path, "--job-name=enc", str(scripts / "encode.sbatch"), "--model", str(tiny_model),
        "--pooling", "mean", "--data", str(tiny_data), "--shard_size", "16", "--max_length", "16",
    )  # fmt: skip
    done = cluster.wait_for(job, "COMPLETED", "FAILED", "CANCELLED")
    log = (tmp_path / f"enc-{job}.log").read_text()
    assert done["JobState"] == "COMPLETED", log[-5000:]
    folder = tmp_path / "runs" / f"enc-{job}" / "embeddings"
    assert len(list(folder.glob("embeddings-*.safetensors"))) == 4  # 60 passages
    assert "Traceback" not in log


def test_pipeline_uses_both_nodes_and_continues_after_a_warning(
    cluster: Cluster, scripts: Path, make_config: ConfigMaker, tmp_path: Path
) -> None:
    config = make_config(stage="cascade", steps=80, queries_per_rank=2)
    small = StageConfig(steps=3, queries_per_rank=2, num_negatives=2,
                        weights=LossWeights(de=1.0, li=1.0))  # fmt: skip
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(replace(config, stages=replace(config.stages, interaction=small))))
    job = cluster.submit(
        tmp_path, "--job-name=whole", str(scripts / "pipeline.sbatch"), str(file), "--seed", "7"
    )
    folder = RunFolder(tmp_path / "runs" / f"whole-{job}")
    wait_for_update(cluster, folder.stage("cascade"), 3)
    # As Slurm's --signal=B:USR1 does: to the batch script alone.
    cluster.call("scancel", "--batch", f"--signal={signal.SIGUSR1.name}", job)
    cluster.wait_until("requeue", lambda: cluster.job(job)["Restarts"] == "1", 100)
    done = cluster.wait_for(job, "COMPLETED", "FAILED", "CANCELLED", seconds=400)
    log = (tmp_path / f"whole-{job}.log").read_text()
    assert done["JobState"] == "COMPLETED", log[-5000:]
    assert "Traceback" not in log
    assert "interaction: done before" in log
    assert log.count("stage cascade stopped after update") == 1
    marker = json.loads((folder.stage("cascade") / "done.json").read_text())
    assert marker["world_size"] == 2
    assert len(losses_of(folder.stage("cascade"))) == 80
    assert "seed: 7" in (folder.root / "config.yaml").read_text()
    assert (folder.root / "summary.md").is_file()
