"""The command line of ``launch/gpu_acceptance.sh``."""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from acceptance.check import ROOT, Check, Size
from acceptance.checks import CHECKS
from acceptance.runner import Result, Runner, environment, merge

PART_SECONDS = 470
"""Of one part on a GPU: some machines are lent for ten minutes a command."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments, with what is wrong with them told on one line and exit status 2."""
    parser = argparse.ArgumentParser(
        prog="launch/gpu_acceptance.sh",
        description="Checks training on this machine: correctness (part 1) and figures (part 2)."
        " No network. Without a GPU the same checks run at tiny size.",
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "acceptance",
        help="Folder for acceptance.json, a log and a folder of each check. Results of other checks"
        " that lie there from the same commit and machine are kept.",
    )  # fmt: skip
    parser.add_argument("--part", type=int, choices=[1, 2], help="One half of the checks.")
    parser.add_argument("--only", help=f"Of {','.join(check.name for check in CHECKS)}.")
    parser.add_argument(
        "--size", choices=["auto", "cpu", "gpu"], default="auto",
        help="cpu hides the GPU; auto takes one that PyTorch sees.",
    )  # fmt: skip
    parser.add_argument(
        "--jobs",
        type=int,
        default=min(4, os.cpu_count() or 1),
        help="Checks at a time, except those that measure; by default one a core, 4 at most.",
    )
    parser.add_argument(
        "--seconds", type=int,
        help=f"Time for the whole command; {PART_SECONDS} for a part on a GPU, else without end.",
    )  # fmt: skip
    parser.add_argument(
        "--wheels", type=Path, help="Folder of wheels that are installed first, without network."
    )
    settings = parser.parse_args(argv)
    names = [check.name for check in CHECKS]
    for name in (settings.only or "").split(","):
        if name and name not in names:
            parser.error(f"--only {name}: one of {', '.join(names)}")
    for option in ("jobs", "seconds"):
        if getattr(settings, option) is not None and getattr(settings, option) < 1:
            parser.error(f"--{option} {getattr(settings, option)}: must be 1 or more")
    if settings.wheels and not list(settings.wheels.glob("*.whl")):
        parser.error(f"--wheels {settings.wheels}: no wheels there")
    return settings


def install(wheels: Path, site: Path) -> None:
    """Install a folder of wheels into ``site``, which the checks then see. An environment of its
    own would not see the packages of the environment that it is made from."""
    subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile",
            "--upgrade", "--target", str(site), *map(str, sorted(wheels.glob("*.whl"))),
        ],
        check=True,
    )  # fmt: skip
    os.environ["PYTHONPATH"] = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(site)])


def describe(size: str) -> dict[str, Any]:
    """The machine, asked in a process of its own."""
    shown = environment("cpu") if size == "cpu" else environment("gpu")
    done = subprocess.run(
        [sys.executable, "-m", "acceptance.machine"], cwd=ROOT, env=shown, text=True,
        stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    described: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return described


def commit() -> str:
    """Of the checkout, with + where files differ from it; without git a hash of the sources."""
    with suppress(FileNotFoundError):
        head, changes = (
            subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
        if not head.returncode:
            return head.stdout.strip() + "+" * bool(changes.stdout.strip())
    digest = hashlib.sha256()
    for folder in ("benchmarks", "erniesearch", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return f"sources {digest.hexdigest()[:16]}"


def chosen(settings: argparse.Namespace) -> list[str]:
    """Names of the checks that were asked for."""
    only = settings.only.split(",") if settings.only else [check.name for check in CHECKS]
    return [c.name for c in CHECKS if c.name in only and settings.part in (None, c.part)]


def show(result: Result) -> None:
    """One line."""
    reason = f"  {' '.join(result['reason'].split())[:200]}" if result["reason"] else ""
    print(f"{result['name']:17}{result['status']:9}{result['seconds']:6.1f} s{reason}", flush=True)


def main(argv: Sequence[str] | None = None, checks: Sequence[Check] = CHECKS) -> int:
    """Run what was asked for; 1 if a check that the JSON holds failed."""
    settings = parse(argv)
    began = time.monotonic()
    out: Path = settings.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    if settings.wheels:
        install(settings.wheels.absolute(), out / "site")
    machine = describe(settings.size)
    seen: Size = "gpu" if machine["gpu"] else "cpu"
    if settings.size not in ("auto", seen):
        print("gpu_acceptance: --size gpu: PyTorch sees no GPU here", file=sys.stderr)
        return 2
    part_limit = PART_SECONDS if seen == "gpu" and settings.part else None
    limit = settings.seconds or part_limit or float("inf")
    runner = Runner("acceptance.checks", checks, seen, out, began + limit)
    head = {"machine": machine, "commit": commit(), "size": seen}
    content: dict[str, Any] = {"status": "passed"}

    def done(result: Result) -> None:
        nonlocal content
        show(result)
        content = merge(out / "acceptance.json", head, [result])

    runner.run(chosen(settings), settings.jobs, done)
    print(f"{content['status']}: {out / 'acceptance.json'}", flush=True)
    return int(content["status"] == "failed")


if __name__ == "__main__":
    sys.exit(main())
