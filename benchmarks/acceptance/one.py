"""The process in which one check runs: ``python -m acceptance.one LIST NUMBER SIZE FOLDER RESULT``,
LIST a module whose CHECKS holds it."""

import importlib
import sys
from pathlib import Path

from acceptance.check import Check, Context, Size, run_check

if __name__ == "__main__":
    module, number, size, folder, result = sys.argv[1:]
    checks: tuple[Check, ...] = importlib.import_module(module).CHECKS
    chosen: Size = "gpu" if size == "gpu" else "cpu"
    run_check(checks[int(number)], Context(chosen, Path(folder), Path(result)))
