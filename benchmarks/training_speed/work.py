"""The loop of a worker: an answer in JSON for every line on standard input."""

import json
import resource
import sys
from collections.abc import Callable
from time import perf_counter


def serve(
    loss: Callable[[], float],
    step: Callable[[], object],
    versions: Callable[[], dict[str, str]] = dict,
) -> None:
    """Answer until the input ends.

    Args:
        loss: of the first batch, nothing trained yet.
        step: trains on the next batch.
    """
    for line in sys.stdin:
        if line.strip() == "loss":
            answer: dict[str, object] = {"loss": loss()}
        elif line.strip() == "versions":
            answer = dict(versions())
        else:
            began = perf_counter()
            step()
            answer = {
                "seconds": perf_counter() - began,
                "peak_MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
        sys.stdout.write("\n" + json.dumps(answer) + "\n")
        sys.stdout.flush()
