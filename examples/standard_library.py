"""What the examples train on, made where they run: functions of Python's standard library, each
with the first line of its documentation as the question."""

import ast
import inspect
import json
import random
import shutil
import statistics
import textwrap


def pairs() -> list[dict[str, str]]:
    """Rows of ``query`` and ``positive``."""
    rows = []
    for module in (ast, inspect, json, random, shutil, statistics, textwrap):
        for name, found in inspect.getmembers(module, inspect.isfunction):
            about = inspect.getdoc(found)
            if about and not name.startswith("_"):
                code = inspect.getsource(found).replace(about.splitlines()[0], "")
                rows.append({"query": about.splitlines()[0], "positive": code})
    return rows


def triplets() -> list[dict[str, str]]:
    """The same with a ``negative``: the function that comes next."""
    rows = pairs()
    return [row | {"negative": other["positive"]}
            for row, other in zip(rows, rows[1:] + rows[:1], strict=True)]  # fmt: skip
