"""Command lines of the documentation, checked without running them.

``erniesearch …``, also behind a launcher, goes through the real parser; of other commands the
files, options and extras that they name must be there."""

import re
import shlex
import tomllib
from pathlib import Path

import jsonargparse
import pytest
from support.processes import ROOT

from erniesearch import cli
from erniesearch.commands import parsing

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ENTRIES = {"launch/train.py": ["train"], "launch/encode.py": ["encode"],
           "slurm/pipeline.sbatch": ["run"], "slurm/ablate.sbatch": ["ablate"]}  # fmt: skip
"""Scripts that hand their arguments to a command."""
ORDINARY = {".", "source", "cd", "cp", "export", "git", "mkdir", "apt-get", "docker", "curl", "jq"}


understood: set[tuple[str, ...]] = set()
"""Arguments that need not be parsed again: pages repeat one another's, with other configurations;
the shipped ones have tests of their own."""


class Parsed(Exception):
    """A command line was understood; nothing is to be done."""


def commands(code: str) -> list[list[str]]:
    """The commands of a block, as words: comments, assignments and embedded scripts left out."""
    code = re.sub(r"<<'(\w+)'\n.*?^\1$", "", code.replace("\\\n", " "), flags=re.DOTALL | re.M)
    variables: dict[str, str] = {}
    found = []
    for line in code.splitlines():
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        words: list[str] = []
        line = re.sub(r"\s\d?>>?\s?(?:&\d|\S+)", "", line)  # where output goes
        for word in [*shlex.split(line, comments=True), ";"]:
            if word in ("&&", "||", "|", "&", ";") or word.endswith(";"):
                words += [word[:-1]] if len(word) > 1 and word.endswith(";") else []
                while words and re.match(r"[A-Za-z_]\w*=", words[0]):
                    name, value = words.pop(0).split("=", 1)
                    variables[name] = value
                found += [words] if words else []
                words = []
            else:
                words.append(word)
    return found


def check(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail on a command that would be refused, or that nothing here knows how to check."""
    first, *rest = words
    if first == "erniesearch":
        parse(rest, monkeypatch)
    elif first in ("torchrun", "deepspeed", "python", "srun", "bash", "sbatch"):
        script(rest, monkeypatch)
    elif first == "pip":
        installs(rest)
    elif first == "pytest":
        assert all((ROOT / word).exists() for word in rest if word.startswith("tests")), words
    elif first == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {*rest} <= {*targets}, words
    else:
        assert first in ORDINARY, f"no check for `{first}`: add one, or `<!-- not run: why -->`"


def parse(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The real parser reads it; the command itself does not begin."""
    key = tuple("a.yaml" if word.endswith(".yaml") else word for word in argv)
    if key in understood:
        return
    real = jsonargparse.ArgumentParser.parse_args
    validate = parsing.validate

    def parse_args(self: jsonargparse.ArgumentParser, *given: object, **more: object) -> object:
        found = real(self, *given, **more)  # type: ignore[arg-type]
        if "training" not in found:  # a configuration is validated first
            raise Parsed
        return found

    def validated(config: object) -> object:
        validate(config)  # type: ignore[arg-type]
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(jsonargparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(parsing, "validate", validated)
        try:
            status: object = cli.main(argv)
        except Parsed:
            understood.add(key)
            return
        except SystemExit as done:  # --help, --print_config
            status = done.code
    assert status == 0, shlex.join(["erniesearch", *argv])


def script(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A script, or a module of ours, behind an interpreter or a launcher."""
    for flag in ("-m", "--module"):
        if flag in words and words[words.index(flag) + 1] == "erniesearch":
            parse(words[words.index(flag) + 2 :], monkeypatch)
            return
    place = next((i for i, word in enumerate(words) if re.search(r"\.(py|sh|sbatch)$", word)), None)
    if place is None:
        assert words[:1] in (["-"], ["-m"]), words
        return
    name, rest = words[place], words[place + 1 :]
    assert (ROOT / name).is_file(), name
    if name in ENTRIES:
        parse([*ENTRIES[name], *rest], monkeypatch)
    elif not name.startswith("slurm/"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for module in re.findall(r"-m (\w+) \"\$@\"", text):  # what a launch script starts
            folder = ROOT / "benchmarks" / module
            text += "".join(file.read_text(encoding="utf-8") for file in folder.glob("*.py"))
        options = [word.split("=")[0] for word in rest if word.startswith("--")]
        missing = [option for option in options if not re.search(rf"{option}\b", text)]
        assert not missing, f"{name} has no {missing}"


def installs(words: list[str]) -> None:
    """Extras are extras of this project, and the files named with -c and -r are there."""
    for before, word in zip(["", *words], words, strict=False):
        if before in ("-c", "-r"):
            assert (ROOT / word).is_file(), word
        elif ours := re.search(r"^(?:\.|erniesearch|.*erniesearch-\*\.whl\))\[([\w,-]+)\]", word):
            assert {*ours[1].split(",")} <= {*PROJECT["optional-dependencies"]}, word


def needed_files(words: list[str]) -> list[Path]:
    """Configurations that a command names and that a reader has, and a checkout has not."""
    names = [word for word in words if word.endswith(".yaml")]
    return [Path(name) for name in names if not (ROOT / name).is_file()]
