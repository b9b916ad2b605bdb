"""The end of a process: its status, streams and handlers, and threads that are still at work."""

import subprocess
import sys
from pathlib import Path

import pytest

THREAD_AT_WORK = """
import threading, time
import torch

class Slow:  # the interpreter is some time in pieces
    def __del__(self, sleep=time.sleep):
        sleep(1.5)

slow = Slow()

def work():
    x = torch.ones(1000, 1000)
    while True:
        x = x @ x  # without the interpreter's lock, which it then wants back

def main():
    threading.Thread(target=work, daemon=True).start()
    time.sleep(0.5)
"""


def end_of(program: str, tmp_path: Path) -> tuple[int, str, str]:
    file = tmp_path / "program.py"
    file.write_text(program)
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, timeout=120,
                          check=False)  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_a_thread_at_work_does_not_abort_the_process(tmp_path: Path) -> None:
    status, _, errors = end_of(f"{THREAD_AT_WORK}\nmain()\n", tmp_path)
    assert (status, "terminate called" in errors) == (-6, True)  # what this is about
    ended = f"{THREAD_AT_WORK}\nfrom erniesearch import exiting\nexiting.run(main)\n"
    assert end_of(ended, tmp_path) == (0, "", "")


@pytest.mark.parametrize(
    ("body", "status", "errors"),
    [
        ("return None", 0, ""),
        ("return 75", 75, ""),
        ("sys.exit(2)", 2, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit('told')", 1, "told"),
        ("raise ValueError('told')", 1, "ValueError: told"),
    ],
)
def test_status_streams_and_handlers(body: str, status: int, errors: str, tmp_path: Path) -> None:
    program = (
        "import atexit, sys\nfrom erniesearch import exiting\n"
        "def main():\n    atexit.register(lambda: print('handled'))\n"
        f"    print('out')\n    {body}\nexiting.run(main)\n"
    )
    found = end_of(program, tmp_path)
    assert found[:2] == (status, "out\nhandled\n")
    assert errors in found[2]
    assert bool(errors) == bool(found[2])
