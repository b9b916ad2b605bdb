"""How far work is, told in every mode: bars, lines, JSON lines, and nothing."""

import json
import math
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.processes import ROOT
from support.progress_lines import OF_TRAINING, read_progress

from erniesearch import cli, progress
from erniesearch.errors import UserError
from erniesearch.progress import MODES, VARIABLE, Meter, duration, metered, say, waiting

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _as_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setitem(progress._process, "stage", "mine")


@pytest.fixture
def mode(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda name: monkeypatch.setenv(VARIABLE, name)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Time passes when it is called."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def passes(seconds: float) -> None:
        now[0] += seconds

    return passes


def train(clock: Callable[[float], None], updates: int = 60, seconds: float = 1) -> None:
    """A stage of 100 updates that goes on after 40 and has an update in a second."""
    with Meter("training", "updates", 100, done=40) as meter:
        for step in range(41, 41 + updates):
            clock(seconds)
            meter.reach(step, f"loss {1 / step:.3f}", loss=1 / step)


def test_json_lines_of_a_resumed_training(
    mode: Callable[[str], None], clock: Callable[[float], None], capsys: Capture
) -> None:
    mode("json")
    train(clock)
    told = read_progress(capsys.readouterr().err)
    first, second, last = told[0], told[1], told[-1]
    assert (first["done"], first["rate"], first["seconds_left"]) == (40, None, None)
    # Six updates in six seconds: the forty of another process are no work of this one.
    assert (second["done"], second["rate"], second["seconds_left"]) == (46, 1.0, 54.0)
    assert second["loss"] == pytest.approx(1 / 46)
    assert (last["done"], last["total"], last["seconds_left"]) == (100, 100, 0.0)
    assert len(told) == 1 + 10  # one in more than five seconds; the last is one of them
    assert {line["stage"] for line in told} == {"mine"}


def test_plain_lines_come_at_a_bounded_rate(
    clock: Callable[[float], None], capsys: Capture
) -> None:
    train(clock)  # auto, and standard error is no terminal
    assert capsys.readouterr().err.splitlines() == [
        "mine: training 61/100 updates  loss 0.016  39 s left",
        "mine: training 82/100 updates  loss 0.012  18 s left",
        "mine: training 100/100 updates  loss 0.010  0 s left",
    ]


def test_where_it_stopped_is_told(clock: Callable[[float], None], capsys: Capture) -> None:
    train(clock, updates=3)
    assert capsys.readouterr().err == "mine: training 43/100 updates  loss 0.023  57 s left\n"


def test_quiet_leaves_warnings_and_errors(
    mode: Callable[[str], None], clock: Callable[[float], None], capsys: Capture
) -> None:
    mode("quiet")
    train(clock)
    say("of no weight")
    progress.begin("mine")
    say("odd", "warning")
    say("bad", "error")
    assert capsys.readouterr().err == "warning: odd\nerniesearch: error: bad\n"


def test_a_loss_that_is_not_finite_is_null(mode: Callable[[str], None], capsys: Capture) -> None:
    mode("json")
    with Meter("training", "updates", 1) as meter:
        meter.reach(1, loss=math.nan)
    assert read_progress(capsys.readouterr().err)[-1]["loss"] is None


@pytest.mark.parametrize(
    ("variables", "speaks"),
    [({"RANK": "0"}, True), ({"RANK": "1"}, False), ({"SLURM_PROCID": "1"}, True),
     ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, False),
     ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "RANK": "0"}, True)],
)  # fmt: skip
def test_only_rank_0_speaks(
    variables: dict[str, str], speaks: bool, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    say("hello")
    for _ in metered(range(3), "reading", "lines", 3):
        pass
    with Meter("mining", "queries", 1) as meter:
        meter.advance(1)
    assert bool(capsys.readouterr().err) == speaks
    say("bad", "error")
    assert capsys.readouterr().err == "erniesearch: error: bad\n"


def test_meters_in_a_part_move_the_outer_one(
    mode: Callable[[str], None], clock: Callable[[float], None], capsys: Capture
) -> None:
    mode("json")
    with Meter("mining", "queries", 20) as outer:
        for _ in range(2):
            with outer.part(10):
                for inner in ("encoding", "scoring"):  # the second begins anew
                    with Meter(inner, "pairs", 100) as meter:
                        for _ in range(10):
                            clock(1)
                            meter.advance(10)
    told = read_progress(capsys.readouterr().err)
    assert {line["what"] for line in told} == {"mining"}
    assert [line["done"] for line in told] == [0, 6, 10, 10, 14, 20, 20]  # at 6, 12, … 36 s


def test_patience(clock: Callable[[float], None], capsys: Capture) -> None:
    for seconds, said in ((1, ""), (3, "mine: reading 3/3 lines  0.33 lines/s  0 s left\n")):
        for _ in metered(range(3), "reading", "lines", 3):
            clock(seconds)
        assert capsys.readouterr().err == said


def test_work_that_says_nothing_is_counted_in_seconds(
    mode: Callable[[str], None], capsys: Capture
) -> None:
    mode("json")
    with waiting("training on 5 vectors", 0):
        time.sleep(1.2)
    told = read_progress(capsys.readouterr().err)
    assert [(line["unit"], line["done"], line["total"]) for line in told] == [
        ("seconds", 0, None), ("seconds", 1, None)
    ]  # fmt: skip


def test_an_ablations_arm_is_named(
    mode: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv(progress.ARM, "no-cascade seed 1")
    say("hello")
    with Meter("training", "updates", 1) as meter:
        meter.advance(1)
    assert capsys.readouterr().err.splitlines()[-1].startswith("no-cascade seed 1: mine: training")
    mode("json")
    say("hello")
    assert json.loads(capsys.readouterr().err)["arm"] == "no-cascade seed 1"


def test_durations() -> None:
    seconds = (0.4, 90, 600, 4000, 9000, 200_000)
    assert [duration(s) for s in seconds] == [
        "0 s", "90 s", "10 min", "67 min", "2 h 30 min", "2 d 7 h"
    ]  # fmt: skip


ON_A_TERMINAL = """
import time
from erniesearch.progress import Meter, say
with Meter("training", "updates", 3) as meter:
    for step in range(3):
        time.sleep(0.15)
        meter.advance(1)
    say("one line")
"""


def on_a_terminal(**variables: str) -> str:
    """What is shown on a terminal of 100 columns; the escapes are left out."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL], stderr=theirs, env=environment | variables
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # the end of a terminal
            break
    assert process.wait() == 0
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())


def test_a_terminals_line_is_rewritten_in_place() -> None:
    shown = on_a_terminal()
    assert "training" in shown
    assert "3/3" in shown
    assert shown.count("\r") > shown.count("\n")
    assert re.search(r"one line *\r\n", shown)
    assert shown.count("\n") == 2  # the line that was said, and the bar at its end
    plain = on_a_terminal(**{VARIABLE: "plain"})
    assert plain.splitlines()[-1] == "one line"


# --- the command line ---------------------------------------------------------------------------


def test_every_command_has_the_flag(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    seen: list[tuple[list[str], str | None]] = []

    def command(argv: list[str]) -> int:
        seen.append((argv, os.environ.get(VARIABLE)))
        return 0

    monkeypatch.setattr(cli, "_load", lambda name: command)
    for name in cli.COMMANDS:
        words = name.split()
        for expected, *flag in (
            ("quiet", "--quiet"), ("json", "--progress", "json"), ("plain", "--progress=plain")
        ):  # fmt: skip
            assert cli.main([*words, "--x", *flag, "1"]) == 0
            assert cli.main([*flag, *words, "--x", "1"]) == 0
            assert seen[-2:] == [(["--x", "1"], expected)] * 2
            assert VARIABLE not in os.environ  # the next command has its own
        for wrong, told in (
            (["--progress", "jsno"], "--progress 'jsno': one of auto, plain, json, quiet (did you"),
            (["--progress"], "--progress ''"), (["--quiet", "--progress", "json"], "at once"),
        ):  # fmt: skip
            assert cli.main([*words, *wrong]) == 2
            assert told in capsys.readouterr().err
    assert cli.main(["search", "--", "--quiet"]) == 0
    assert seen[-1] == (["--", "--quiet"], None)


def test_the_variable_says_the_same(mode: Callable[[str], None], capsys: Capture) -> None:
    mode("loud")
    with pytest.raises(UserError, match="ERNIESEARCH_PROGRESS 'loud': one of auto"):
        Meter("training", "updates", 1)
    assert cli.main(["report", "--run", "nowhere"]) == 2
    assert "ERNIESEARCH_PROGRESS 'loud'" in capsys.readouterr().err
    mode("json")
    assert cli.main(["no-such"]) == 2
    (line,) = read_progress(capsys.readouterr().err)
    assert (line["level"], line["message"][:25]) == ("error", "unknown command 'no-such'")


@pytest.mark.parametrize("command", ["report", "run"])  # with and without the configuration's keys
def test_help_explains_it(command: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name, told in MODES.items():
        assert f"{name}, {told}" in shown
    assert "--quiet is short for --progress quiet" in shown


# --- everywhere alike ---------------------------------------------------------------------------


def test_nothing_else_speaks() -> None:
    """Standard error is written by one module, and no library's bar is shown."""
    for path in sorted((ROOT / "erniesearch").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if path.name not in ("progress.py", "exiting.py"):
            assert "sys.stderr" not in text, path
            assert "Console(stderr" not in text, path
        assert "tqdm" not in text or path.name == "python_sources.py", path
        assert "show_progress_bar=True" not in text, path
        assert "show_progress=True" not in text, path


@pytest.mark.parametrize("page", ["progress.md", "progress.zh-CN.md"])
def test_the_page_has_every_mode_and_field(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    fields = {"time", "stage", "what", "unit", "done", "total", "rate", "seconds_left", "level",
              "message", "arm", "records", *OF_TRAINING}  # fmt: skip
    for word in (*MODES, *fields):
        assert f"`{word}`" in text, word


def test_one_line_an_object(mode: Callable[[str], None], tmp_path: Path, capsys: Capture) -> None:
    mode("json")
    say('two\nlines and a "quote"')
    (line,) = read_progress(capsys.readouterr().err)
    assert line["message"] == 'two\nlines and a "quote"'
