"""Shipped configurations by name, ``python -m erniesearch``, and whose commit is recorded."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.processes import ROOT, run_python, start

from erniesearch import __version__, installation
from erniesearch.cli import main
from erniesearch.commands.parsing import config_parser, parse_config
from erniesearch.config.keys import RunConfig, TrainingConfig
from erniesearch.errors import UserError
from erniesearch.training.engine import zero_section

NAMES = [
    file.relative_to(ROOT / "configs").with_suffix("").as_posix()
    for file in sorted((ROOT / "configs").rglob("*.yaml"))
    if file.parent.name != "ablation"  # grids, which `erniesearch ablate` takes by name
]


def parse(*argv: str) -> RunConfig:
    return parse_config(config_parser("train", ""), list(argv))[0]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that is no checkout."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_shipped_config_is_found_by_name(name: str, elsewhere: Path) -> None:
    by_path = parse("--config", str(ROOT / "configs" / f"{name}.yaml"))
    assert parse("--config", name) == parse(f"--config={name}") == by_path


def test_wheel_keeps_its_configs_in_the_package(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = elsewhere / "site-packages" / "erniesearch" / "configs"
    inside.mkdir(parents=True)
    (inside / "own.yaml").write_text((ROOT / "configs" / "quickstart.yaml").read_text())
    monkeypatch.setattr(installation, "PACKAGE", inside.parent)
    assert installation.config_names() == ["own"]
    assert parse("--config", "own").run_dir == "runs/quickstart"


def test_file_wins_over_a_name_and_a_folder_does_not(elsewhere: Path) -> None:
    (elsewhere / "quickstart").mkdir()
    assert parse("--config", "quickstart").run_dir == "runs/quickstart"
    (elsewhere / "quickstart").rmdir()
    content = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    (elsewhere / "quickstart").write_text(yaml.safe_dump(content | {"run_dir": "mine"}))
    assert parse("--config", "quickstart").run_dir == "mine"


@pytest.mark.parametrize("command", [("run", "quikstart"), ("plan", "configs/quikstart.yaml"),
                                     ("train", "--config", "quikstart")])  # fmt: skip
def test_unknown_name_lists_those_there_are(
    command: tuple[str, ...], elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(list(command)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"erniesearch: error: {command[-1]}: no such config file")
    assert "did you mean 'quickstart'?" in error
    assert error.endswith(f"{', '.join(NAMES)}\n")


def test_what_quickstart_lacks_is_named_with_its_command(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "quickstart"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("erniesearch: error: data/pycode: no such folder")
    assert "`erniesearch data pycode --out data/pycode --max_pairs 4000`" in error


def test_init_config_copies_and_overwrites_nothing(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["init", "config", "beir-cpu", "--out", "my.yaml"]
    assert main(command) == 0
    assert Path("my.yaml").read_bytes() == (ROOT / "configs" / "beir-cpu.yaml").read_bytes()
    Path("my.yaml").write_text("edited")
    assert main(command) == 2
    assert "my.yaml: is there already" in capsys.readouterr().err
    assert Path("my.yaml").read_text() == "edited"
    assert main(["init", "config", "beir", "--out", "other.yaml"]) == 2
    assert "did you mean 'beir-cpu'?" in capsys.readouterr().err


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_settings_by_name(stage: int, elsewhere: Path) -> None:
    named = zero_section(TrainingConfig(zero_json=f"zero{stage}"))
    assert named["stage"] == stage
    assert zero_section(TrainingConfig(zero_stage=stage)) == named, "the shipped values"
    if stage == 1:
        assert zero_section(TrainingConfig()) == named
    (elsewhere / f"zero{stage}").write_text('{"zero_optimization": {"stage": 1, "own": 1}}')
    assert zero_section(TrainingConfig(zero_json=f"zero{stage}"))["own"] == 1


def test_unknown_zero_settings_are_refused(elsewhere: Path) -> None:
    with pytest.raises(UserError, match="zero4: no such file"):
        zero_section(TrainingConfig(zero_json="zero4"))


def test_module_is_the_command_line_with_the_launchers_argument_in_front() -> None:
    """DeepSpeed's ``--module`` puts ``--local_rank`` before the command."""
    assert run_python("-m", "erniesearch", "--local_rank=1", "--version") == (
        0,
        f"erniesearch {__version__}\n",
    )
    status, output = run_python("-m", "erniesearch", "no-such-command")
    assert status == 2
    assert output.startswith("erniesearch: error: unknown command 'no-such-command'")


# --- the commit that a run records --------------------------------------------------------------


def git(folder: Path, *arguments: str) -> str:
    own = ["-c", "user.name=x", "-c", "user.email=x@x", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", str(folder), *own, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def repository(root: Path) -> str:
    """A repository with one commit, which is returned."""
    root.mkdir(parents=True, exist_ok=True)
    git(root, "init", "--quiet")
    git(root, "commit", "--quiet", "--allow-empty", "--message", "first")
    return git(root, "rev-parse", "HEAD")


RECORD = """
import json, sys
from pathlib import Path
from erniesearch.run_folder import RunFolder
from erniesearch.config.keys import DataConfig, RunConfig, StudentConfig
out = Path(sys.argv[1])
RunFolder(out).record(RunConfig("runs/x", DataConfig("data/x"), StudentConfig("models/x")))
print(json.loads((out / "environment.json").read_text())["commit"])
"""


def recorded(site: Path, out: Path, **environment: str) -> str:
    """The commit in the record of a run of the packages that lie in ``site``."""
    # Not in the checkout: with -c the working directory comes first on the path.
    process = start("-c", RECORD, str(out), cwd=out, PYTHONPATH=str(site), **environment)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    return output.splitlines()[-1]


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A copy of the packages in site-packages of an environment in another project's repository."""
    repository(tmp_path / "project")
    site = tmp_path / "project" / "venv" / "lib" / "site-packages"
    site.mkdir(parents=True)
    for package in (ROOT / "erniesearch", ROOT / "kernels" / "erniesearch_kernels"):
        subprocess.run(["cp", "-r", str(package), str(site)], check=True)
    (tmp_path / "project" / "pyproject.toml").write_text("[project]\nname = 'foreign'\n")
    return site


def test_another_projects_commit_is_not_recorded(installed: Path, tmp_path: Path) -> None:
    assert recorded(installed, tmp_path) == "None"


def test_run_does_not_need_git(installed: Path, tmp_path: Path) -> None:
    assert recorded(installed, tmp_path, PATH=str(Path(sys.executable).parent)) == "None"


def test_own_commit_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = repository(tmp_path)
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'erniesearch'\n")
    (tmp_path / "erniesearch").mkdir()
    monkeypatch.setattr(installation, "PACKAGE", tmp_path / "erniesearch")
    assert installation.commit() == commit
    git(tmp_path, "worktree", "add", "--quiet", str(tmp_path / "tree"))
    (tmp_path / "tree" / "pyproject.toml").write_text("[project]\nname = 'erniesearch'\n")
    monkeypatch.setattr(installation, "PACKAGE", tmp_path / "tree" / "erniesearch")
    assert installation.commit() == commit


def test_options_of_the_quickstart_are_not_an_extra(tmp_path: Path) -> None:
    """A sourced script sees the arguments of the one that sources it, unless it gets its own."""
    (tmp_path / "launch").mkdir()
    script = tmp_path / "launch" / "quickstart.sh"
    script.write_text((ROOT / "launch" / "quickstart.sh").read_text())
    (tmp_path / "launch" / "setup.sh").write_text('echo "extra: ${1:-none}"; exit 0\n')
    said = subprocess.run(["bash", str(script), "--run_dir", "x"], capture_output=True, text=True)
    assert said.stdout == "extra: none\n"
