"""What a command has told on standard error with ``--progress json``."""

import json
from typing import Any

MOVES = {"time", "stage", "what", "unit", "done", "total", "rate", "seconds_left"}
SAYS = {"time", "stage", "level", "message"}
OF_TRAINING = {"loss", "queries_per_second", "tokens_per_second"}


def read_progress(errors: str, others: bool = False) -> list[dict[str, Any]]:
    """Every line's object, after the checks that hold for all: fields, rising time and counts,
    and a time left that follows from the rate.

    Args:
        others: whether libraries may have written lines of their own.
    """
    lines = errors.splitlines()
    told = [json.loads(line) for line in lines if line.startswith("{") or not others]
    assert [line["time"] for line in told] == sorted(line["time"] for line in told)
    reached: dict[tuple[str, str], int] = {}
    for line in told:
        assert isinstance(line["stage"], str)
        assert line["stage"]
        if "message" in line:
            assert line.keys() == SAYS
            assert line["level"] in ("note", "warning", "stopped", "error")
            continue
        assert line.keys() - OF_TRAINING - {"records"} == MOVES
        before = reached.get((line["stage"], line["what"]), 0)
        again = before == line["total"]  # the same kind of work, begun anew
        assert line["done"] >= (0 if again else before), line
        reached[line["stage"], line["what"]] = line["done"]
        if line["total"] is not None:
            assert 0 <= line["done"] <= line["total"], line
        if line["rate"] and line["total"] is not None:
            left = (line["total"] - line["done"]) / line["rate"]
            assert abs(line["seconds_left"] - left) <= 0.06 + 0.01 * left, line
    return told
