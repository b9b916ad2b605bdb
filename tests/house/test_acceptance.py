"""The acceptance run: its runner with checks that hang, fail and die, and its checks at the size
for a CPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from acceptance import checks, material
from acceptance.__main__ import PART_SECONDS
from acceptance.runner import Runner, merge
from support.acceptance_fakes import CHECKS
from support.processes import ROOT

HEAD = {"machine": {"cpu": "x"}, "commit": "abc", "size": "cpu"}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def run(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *names: str, seconds: float = 300
) -> dict[str, dict[str, Any]]:
    path = [ROOT, ROOT / "kernels", ROOT / "benchmarks", ROOT / "tests"]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, path)))
    found: list[dict[str, Any]] = []
    runner = Runner("support.acceptance_fakes", CHECKS, "cpu", folder, time.monotonic() + seconds)
    runner.run(names, 4, found.append)
    return {result["name"]: result for result in found}


def test_every_end_of_a_check_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = [check.name for check in CHECKS]
    began = time.monotonic()
    found = run(monkeypatch, tmp_path, *names)
    assert time.monotonic() - began < 120
    assert list(found) == [*(n for n in names if n != "fail"), "fail"]  # what measures comes last
    told = {name: (result["status"], result["reason"]) for name, result in found.items()}
    assert told["succeed"] == ("passed", "")
    assert told["fail"] == ("failed", "too slow by half")
    assert told["stumble"] == ("failed", "ZeroDivisionError: nobody thought of this")
    assert told["skip"] == ("skipped", "the tool is absent")
    assert told["needy"] == ("skipped", "no_such_module is not installed")
    assert told["hang"] == ("failed", "not done after 6 s")
    status, reason = told["die"]
    assert status == "failed"
    assert reason.startswith("ended with status -6: last words")
    figures = {name: result["figures"] for name, result in found.items()}
    assert figures["fail"] == {"before": 2}  # told before it failed, and before it died
    assert figures["die"] == {"before": 3}
    assert figures["hang"]["seen"] == 1
    assert figures["succeed"] == {
        "gpus": "", "offline": "1", "folder": str(tmp_path / "succeed"), "gpu": False
    }  # fmt: skip
    assert not alive(figures["hang"]["pid"])
    assert not alive(figures["leave_behind"]["pid"])


def test_no_check_begins_after_the_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = run(monkeypatch, tmp_path, "succeed", seconds=0.5)
    assert found["succeed"]["status"] == "skipped"
    assert "no time was left" in found["succeed"]["reason"]


def result(name: str, status: str = "passed") -> dict[str, Any]:
    return {"name": name, "status": status, "seconds": 1.0, "reason": "", "figures": {}}


def test_results_of_two_commands_are_kept_together(tmp_path: Path) -> None:
    file = tmp_path / "acceptance.json"
    merge(file, HEAD, [result("a", "failed"), result("b", "skipped")])
    content = merge(file, HEAD, [result("c")])
    assert content == json.loads(file.read_text())
    assert content.keys() == {*HEAD, "status", "skipped", "checks"}
    assert [check["name"] for check in content["checks"]] == ["a", "b", "c"]
    assert (content["status"], content["skipped"]) == ("failed", ["b"])
    assert merge(file, HEAD, [result("a")])["status"] == "passed"
    # Of another commit nothing is kept.
    content = merge(file, HEAD | {"commit": "def"}, [result("c")])
    assert [check["name"] for check in content["checks"]] == ["c"]


def test_every_check_is_there_and_fits_its_part() -> None:
    for check in checks.CHECKS:
        module, function = check.function.split(":")
        path = ROOT / "benchmarks" / f"{module.replace('.', '/')}.py"
        assert f"def {function}(context: Context)" in path.read_text()
    for part in (1, 2):  # on a GPU what measures runs one after the other, within a part's time
        alone = [c.limit("gpu") for c in checks.CHECKS if c.alone and c.part == part]
        assert sum(alone) <= PART_SECONDS
    assert len({check.name for check in checks.CHECKS}) == len(checks.CHECKS)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ([{"step": 1, "loss": 4.0, "de": 2.0, "accuracy_de": 0.5}], 0.0),
        ([{"step": 1, "loss": 4.1, "de": 2.0, "accuracy_de": 0.1}], 0.025),
        ([{"step": 1, "loss": 4.0, "de": 2.2, "accuracy_de": 0.5}], 0.05),
        ([{"step": 1, "loss": 4.0, "accuracy_de": 0.5}], float("inf")),
        ([], float("inf")),
        ([{"step": 1, "loss": float("nan"), "de": 2.0, "accuracy_de": 0.5}], float("inf")),
    ],
)
def test_the_largest_difference_of_two_traces(own: list[dict[str, float]], expected: float) -> None:
    wanted = [{"step": 1, "loss": 4.0, "de": 2.0, "accuracy_de": 0.5}]
    assert material.largest_difference(own, wanted) == pytest.approx(expected)


def accept(out: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """The shell script; exit status, JSON and what it printed."""
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "gpu_acceptance.sh"), "--out", str(out), "--size", "cpu",
         *arguments],
        env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True, cwd=out.parent,
    )  # fmt: skip
    file = out / "acceptance.json"
    content = json.loads(file.read_text()) if file.exists() else {}
    return done.returncode, content, done.stdout + done.stderr


def test_two_quick_checks_by_the_script(tmp_path: Path) -> None:
    status, content, said = accept(tmp_path / "out", "--only", "machine,collectives")
    assert status == 0, said
    assert content["status"] == "passed"
    assert (content["size"], content["machine"]["gpu"]) == ("cpu", None)
    found = {check["name"]: check for check in content["checks"]}
    assert found["machine"]["figures"]["requirements"] == {}
    assert found["collectives"]["figures"]["gathered"] == ["float32", "bfloat16"]
    assert found["collectives"]["figures"]["backend"] == "gloo"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "machine,unheard"), "--only unheard: one of machine"),
        (("--jobs", "0"), "--jobs 0: must be 1 or more"),
        (("--wheels", "nowhere"), "--wheels nowhere: no wheels there"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    status, content, said = accept(tmp_path / "out", *arguments)
    assert (status, content) == (2, {})
    assert message in said


@pytest.mark.slow
@pytest.mark.distributed
def test_all_checks_at_the_size_for_a_cpu(tmp_path: Path) -> None:
    status, content, said = accept(tmp_path / "out")
    assert status == 0, said
    assert {check["name"] for check in content["checks"]} == {c.name for c in checks.CHECKS}
    assert content["skipped"] == ["sanitizer"], said
