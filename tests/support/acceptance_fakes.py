"""Checks that end in every way; test_acceptance.py has them run by processes of their own."""

import os
import subprocess
import sys
import time
from typing import Any

from acceptance.check import Check, Context, Failed, Skipped


def hang(context: Context) -> None:
    """Starts a process in a session of its own that ignores polite signals, and waits."""
    context.tell(seen=1)
    sleeper = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", sleeper], start_new_session=True)
    context.tell(pid=child.pid)
    time.sleep(600)


def leave_behind(context: Context) -> None:
    """Ends well, and its child lives on."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"],
                             start_new_session=True)  # fmt: skip
    context.tell(pid=child.pid)


def fail(context: Context) -> None:
    context.tell(before=2)
    raise Failed("too slow by half")


def stumble(context: Context) -> None:
    raise ZeroDivisionError("nobody thought of this")


def die(context: Context) -> None:
    context.tell(before=3)
    sys.stderr.write("last words\n")
    os.abort()


def skip(context: Context) -> None:
    raise Skipped("the tool is absent")


def succeed(context: Context) -> None:
    context.tell(
        gpus=os.environ["CUDA_VISIBLE_DEVICES"], offline=os.environ["HF_HUB_OFFLINE"],
        folder=str(context.folder), gpu=context.gpu,
    )  # fmt: skip


def fake(name: str, **options: Any) -> Check:
    return Check(
        name, f"support.acceptance_fakes:{name}", 1, (options.pop("limit", 60), 60), **options
    )


CHECKS = (
    fake("succeed"), fake("hang", limit=6), fake("leave_behind"), fake("fail", alone=True),
    fake("stumble"), fake("die"), fake("skip"),
    Check("needy", "support.acceptance_fakes:succeed", 1, (60, 60), ("torch", "no_such_module")),
)  # fmt: skip
