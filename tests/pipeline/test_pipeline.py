"""The whole pipeline on tiny models: one command, every stage, kill, continue, search; and every
launcher starts the same training."""

import json
import os
import re
import shutil
import signal
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from support.processes import losses_of, orphans, run_command, run_python, start
from support.progress_lines import OF_TRAINING, read_progress
from support.tiny import ALL_TERMS, ConfigMaker, write_beir

from erniesearch import stages
from erniesearch.config.keys import RunConfig
from erniesearch.config.stage_keys import LossWeights, PostTrainConfig, StageConfig
from erniesearch.config.yaml_file import to_yaml
from erniesearch.distributed import free_port
from erniesearch.evaluation.table import Report
from erniesearch.models.backbone import load_tokenizer
from erniesearch.models.cross_encoder import CrossEncoder
from erniesearch.models.encoder import StudentEncoder
from erniesearch.pipeline import launcher
from erniesearch.pipeline.launcher import StageFailed, num_processes
from erniesearch.pipeline.run import run_pipeline
from erniesearch.retrieval.retriever import Retriever
from erniesearch.run_folder import RunFolder, mark_done
from erniesearch.training.checkpoints.checkpointer import find_checkpoints, step_of

pytestmark = pytest.mark.distributed


def full_config(make_config: ConfigMaker, run_dir: Path) -> RunConfig:
    """Every stage, few steps."""
    config = make_config(run_dir=run_dir, save_every=20, num_processes=2)
    small = StageConfig(steps=4, queries_per_rank=2, num_negatives=2)
    settings = replace(
        config.stages,
        post_train=PostTrainConfig(
            steps=4, queries_per_rank=2, weights=LossWeights(mlm=1.0, de=1.0, li=1.0)
        ),
        contrastive=replace(small, weights=LossWeights(de=1.0)),
        interaction=replace(small, weights=LossWeights(de=1.0, li=1.0, li_to_de=1.0)),
        teacher=replace(small, easy_steps=2, weights=LossWeights(ce=1.0)),
        mine=replace(config.stages.mine, depth=8, num_negatives=4, max_queries=20),
        # Long enough to be caught in the middle.
        cascade=replace(small, steps=80, negatives="mined", weights=ALL_TERMS),
    )
    return replace(config, stages=settings)


def kill_in_cascade(command: tuple[str, ...], run_dir: Path) -> None:
    """Start a run and kill it after three updates of its cascade."""
    folder = RunFolder(run_dir).stage("cascade")
    process = start(*command)
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 400
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        assert process.poll() is None, process.stdout.read()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while orphans(run_dir) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert orphans(run_dir) == []  # no rank goes on writing without its pipeline
    assert not (folder / "done.json").exists()


def test_run_kill_continue_and_search(make_config: ConfigMaker, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(full_config(make_config, run_dir)))
    folder = RunFolder(run_dir)
    command = ("-m", "erniesearch.cli", "run", str(file))

    kill_in_cascade(command, run_dir)
    checkpoints = find_checkpoints(folder.stage("cascade") / "checkpoints")
    began = step_of(checkpoints[-1]) if checkpoints else 0
    output, errors = run_command("run", str(file), "--progress", "json")
    told = read_progress(errors, others=True)
    said = "\n".join(line["message"] for line in told if "message" in line)
    for name in ("bm25", "post_train", "contrastive", "interaction", "teacher", "teacher_check",
                 "mine"):  # fmt: skip
        assert f"{name}: done before" in said
    updates = [line for line in told if line.get("what") == "training"]
    assert {line["stage"] for line in updates} == {"cascade"}
    assert (updates[0]["done"], updates[-1]["done"]) == (began, 80)
    assert updates[-1].keys() > OF_TRAINING
    trace = losses_of(folder.stage("cascade"))
    assert [line["step"] for line in trace] == list(range(1, 81))

    rows = [row["name"] for row in json.loads((run_dir / "evaluation.json").read_text())["rows"]]
    assert rows == [
        "BM25", "dual-encoder, before training", "dual-encoder, contrastive alone",
        "dual-encoder, after post-training", "dual-encoder, after interaction",
        "dual-encoder, after cascade", "BM25 + dual-encoder, fused", "late interaction, reranking",
        "cross-encoder, reranking",
    ]  # fmt: skip
    summary = (run_dir / "summary.md").read_text()
    assert "Before the cascade: what its teachers gain" in summary
    assert all(row in summary and row in output for row in rows)
    shown = StringIO()
    Report.load(run_dir).show(Console(file=shown, width=110))
    assert output == shown.getvalue()  # the result and nothing else
    assert "ceiling" in output
    for path in ("exports/dual_encoder/modules.json", "exports/late_interaction/modules.json",
                 "exports/cross_encoder/config.json", "index/index", "config.yaml",
                 "environment.json", "runs/bm25.trec", "runs/per_query.parquet", "report.html",
                 "stages/cascade/costs.json", "stages/mine/costs.json"):  # fmt: skip
        assert (run_dir / path).is_file(), path
    report = (run_dir / "report.html").read_text()
    assert all(row in report for row in rows)
    assert "cascade: 80 updates" in report
    assert f"report: {run_dir / 'report.html'}" in said
    assert not [line for line in told if line.get("message", "").startswith("report: ")
                and line["level"] == "warning"]  # fmt: skip

    card = (run_dir / "exports" / "late_interaction" / "README.md").read_text()
    assert all(row in card for row in rows)

    # A second run does nothing.
    before = {path: path.stat().st_mtime_ns for path in run_dir.glob("stages/*/done.json")}
    status, output = run_python(*command, timeout=200)
    assert status == 0
    assert len(re.findall("done before", output)) == len(before) == 10
    assert before == {path: path.stat().st_mtime_ns for path in before}

    for rerank in ("none", "late_interaction", "cross_encoder"):
        output, errors = run_command(
            "search", "--run", str(run_dir), "baran desel", "--depth", "3", "--rerank", rerank
        )
        assert re.findall(r"^ *(\d)\. p\d+", output, re.MULTILINE) == ["1", "2", "3"]
        assert all(re.match(r" *\d\. p\d| ", line) for line in output.splitlines())
        assert "cascade" not in errors


@pytest.mark.slow
def test_a_killed_run_ends_as_a_whole_one_and_another_setting_redoes_a_stage(
    make_config: ConfigMaker, tmp_path: Path
) -> None:
    run_dir, whole = tmp_path / "run", tmp_path / "whole"
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(full_config(make_config, run_dir)))
    command = ("-m", "erniesearch.cli", "run", str(file))
    kill_in_cascade(command, run_dir)
    status, output = run_python(*command, timeout=400)
    assert status == 0, output[-3000:]

    shutil.copytree(run_dir, whole)
    shutil.rmtree(whole / "stages" / "cascade")
    chosen = ("--run_dir", str(whole), "--only", "cascade", "--quiet")
    output, errors = run_command("run", str(file), *chosen)
    assert output == ""
    assert "cascade" not in errors
    traces = [losses_of(RunFolder(folder).stage("cascade")) for folder in (run_dir, whole)]
    assert traces[0] == traces[1]

    # The stage is done again and what follows it; the old result is kept aside.
    status, output = run_python(*command, "--stages.cascade.steps", "2", timeout=300)
    assert status == 0, output[-3000:]
    assert "mine: done before" in output
    assert "cascade: done before" not in output
    assert (run_dir / "stages" / "cascade.stale-1" / "done.json").is_file()


def test_gpu_work_is_not_done_in_the_pipelines_process(
    make_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it left on a GPU would lack the ranks that train there."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model in the pipeline's process")

    config = make_config(weights=LossWeights(de=1.0, li=1.0))
    folder = RunFolder(tmp_path / "run")
    student = StudentEncoder(config.student)
    student.save(folder.model("cascade", "student"), student.state_dict())
    load_tokenizer(config.student).save_pretrained(folder.model("cascade", "student"))
    expected = stages.fingerprint(config, "cascade", num_processes(config))
    mark_done(folder.stage("cascade"), expected, steps=4)
    metrics = {"step": 4, "loss": 1.0, "speed": {"seconds": 1.0, "queries_per_second": 1.0}}
    (folder.stage("cascade") / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    for model in (StudentEncoder, CrossEncoder, Retriever):
        monkeypatch.setattr(model, "__init__", refuse)
    run_pipeline(config, ["evaluate"])
    rows = [
        row["name"] for row in json.loads((folder.root / "evaluation.json").read_text())["rows"]
    ]
    assert rows == ["BM25", "dual-encoder, before training", "dual-encoder, after cascade",
                    "BM25 + dual-encoder, fused", "late interaction, reranking"]  # fmt: skip
    assert (folder.index / "index").is_file()

    # A mistake that the step finds is told by it, once.
    shutil.rmtree(folder.stage("evaluate"))
    shutil.rmtree(folder.model("cascade", "student"))
    with pytest.raises(StageFailed) as failed:
        run_pipeline(config, ["evaluate"])
    assert failed.value.status == 2
    assert not (folder.stage("evaluate") / "done.json").exists()


@pytest.mark.parametrize(
    ("gpus", "nodes", "ranks", "shared"),
    [(0, 1, 2, False), (1, 1, 1, False), (8, 1, 8, True), (0, 2, 4, True), (1, 2, 2, True)],
)
def test_steps_that_ranks_share(
    gpus: int, nodes: int, ranks: int, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where each rank has a GPU, or there are several nodes."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr(launcher, "num_nodes", lambda: nodes)
    for name in ("teacher_check", "mine", "evaluate"):
        assert launcher.on_ranks(name, ranks) is shared
    assert launcher.on_ranks("cascade", ranks)
    assert not launcher.on_ranks("export", ranks)
    assert not launcher.on_ranks("bm25", ranks)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_step_ends_with_its_pipeline(
    make_config: ConfigMaker, tmp_path: Path, number: signal.Signals
) -> None:
    """Asked to stop or killed, the pipeline leaves no process and nothing half-written."""
    data = write_beir(tmp_path / "data", num_passages=20_000, num_queries=20_000)
    run_dir = tmp_path / "run"
    file = tmp_path / "config.yaml"
    config = make_config(run_dir=run_dir, negatives="bm25")
    file.write_text(to_yaml(replace(config, data=replace(config.data, path=str(data)))))
    step = RunFolder(run_dir).stage("bm25")
    process = start("-m", "erniesearch.cli", "run", str(file), "--only", "bm25")
    deadline = time.monotonic() + 100
    while not (step / "started.json").exists():
        assert process.poll() is None, process.stdout.read()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.5)
    assert len(orphans(run_dir)) == 1
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == (75 if number == signal.SIGTERM else -number), output[-3000:]
    assert "Traceback" not in output
    assert output.count("run the same command again to continue") == (number == signal.SIGTERM)
    deadline = time.monotonic() + 10
    while orphans(run_dir) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert orphans(run_dir) == []
    assert [path.name for path in step.iterdir()] == ["started.json"]


def test_every_launcher_starts_the_same_training(make_config: ConfigMaker, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    weights = replace(ALL_TERMS, dual_reg=0.0)
    file.write_text(to_yaml(make_config(steps=3, dropout=0.0, weights=weights)))
    arguments = ("launch/train.py", "--config", str(file), "--stage", "cascade")
    two = ("--stages.cascade.queries_per_rank", "2")
    launchers = {
        "deepspeed": ("-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port",
                      str(free_port()), *arguments, *two),
        "torchrun": ("-m", "torch.distributed.run", "--nproc_per_node=2",
                     "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", *arguments, *two),
        "plain": arguments,
    }  # fmt: skip
    traces = {}
    for name, command in launchers.items():
        run_dir = tmp_path / name
        status, output = run_python(*command, "--run_dir", str(run_dir), timeout=200)
        assert status == 0, f"{name}: {output[-3000:]}"
        traces[name] = losses_of(RunFolder(run_dir).stage("cascade"))
    assert traces["deepspeed"] == traces["torchrun"]
    for one, two_ranks in zip(traces["plain"], traces["deepspeed"], strict=True):
        assert one["loss"] == pytest.approx(two_ranks["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(two_ranks["grad_norm"], rel=1e-4)


def test_slurm_tasks_are_ranks(make_config: ConfigMaker, tmp_path: Path) -> None:
    """One task per rank, as srun starts them, with Slurm's variables only."""
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(make_config(steps=2, queries_per_rank=2)))
    slurm = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "4711", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(free_port())}  # fmt: skip
    processes = [
        start("launch/train.py", "--config", str(file), "--stage", "cascade",
              SLURM_PROCID=str(i), SLURM_LOCALID=str(i), **slurm)
        for i in range(2)
    ]  # fmt: skip
    for process in processes:
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output[-3000:]
    marker = json.loads((RunFolder(tmp_path / "run").stage("cascade") / "done.json").read_text())
    assert marker["world_size"] == 2
