"""What a check is, and what it is given.

A check tells figures as it finds them; what it told is kept when it fails, hangs or dies.
"""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Size = Literal["cpu", "gpu"]
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Check:
    """A check's name, where it is, and what it takes.

    Attributes:
        function: ``module:function``; takes a :class:`Context`.
        part: of the two commands into which a GPU's run is cut.
        seconds: time limits for the sizes cpu and gpu.
        needs: modules without which it is skipped.
        alone: it measures, so that nothing else may run meanwhile.
    """

    name: str
    function: str
    part: int
    seconds: tuple[int, int]
    needs: tuple[str, ...] = ()
    alone: bool = False

    def limit(self, size: Size) -> int:
        """Seconds that it may take."""
        return self.seconds[size == "gpu"]


class Skipped(Exception):
    """The check cannot be made here; says why."""


class Failed(Exception):
    """The check was made, and what it found is wrong."""


@dataclass
class Context:
    """What a check is given.

    Attributes:
        size: "gpu" for real sizes, "cpu" for tiny ones.
        folder: its own, empty.
        result: file that what it tells goes to.
    """

    size: Size
    folder: Path
    result: Path
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def gpu(self) -> bool:
        """Whether the work runs on a GPU."""
        return self.size == "gpu"

    def tell(self, **figures: Any) -> None:
        """Add figures to the result, at once."""
        self.figures |= figures
        self.write("running", "")

    def write(self, status: str, reason: str) -> None:
        """The result as it stands."""
        content = {"status": status, "reason": reason, "figures": self.figures}
        aside = self.result.with_suffix(".tmp")
        aside.write_text(json.dumps(content))
        os.replace(aside, self.result)

    def python(self, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
        """Run Python to its end in the repository's root, with further variables; returns what it
        wrote.

        Raises:
            Failed: for another exit status than 0, with the last lines.
        """
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=os.environ | dict(environment or {}),
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        with (self.folder / "log.txt").open("a") as file:
            file.write(f"$ python {' '.join(arguments)}\n{done.stdout}\n")
        if done.returncode:
            raise Failed(
                f"`python {' '.join(arguments)}` ended with status {done.returncode}:"
                f" {last_lines(done.stdout)}"
            )
        return done.stdout

    def erniesearch(self, *arguments: str) -> str:
        """Run a command of the command line, with a cache of the check's own; see
        :meth:`python`."""
        environment = {"ERNIESEARCH_CACHE": str(self.folder / "cache")}
        return self.python("-m", "erniesearch.cli", *arguments, environment=environment)


def require(condition: bool, reason: str) -> None:
    """Fail the check unless the condition holds."""
    if not condition:
        raise Failed(reason)


def last_lines(text: str, length: int = 800) -> str:
    """The end of a log."""
    return text.strip()[-length:]


def missing(modules: Sequence[str]) -> list[str]:
    """Those that are not installed."""
    return [name for name in modules if importlib.util.find_spec(name) is None]


def run_check(check: Check, context: Context) -> None:
    """Make the check in this process and write its result."""
    context.write("running", "")
    try:
        if lacking := missing(check.needs):
            verb = "is" if len(lacking) == 1 else "are"
            raise Skipped(f"{', '.join(lacking)} {verb} not installed")
        module, name = check.function.split(":")
        function: Callable[[Context], None] = getattr(importlib.import_module(module), name)
        function(context)
    except Skipped as reason:
        context.write("skipped", str(reason))
    except Failed as reason:
        context.write("failed", str(reason))
    except Exception as error:
        traceback.print_exc()
        context.write("failed", f"{type(error).__name__}: {error}"[:2000])
    else:
        context.write("passed", "")
