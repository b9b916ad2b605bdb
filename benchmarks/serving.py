"""What a search takes: each model by itself and all three, with stored token vectors and without;
and what the page waits for.

    python benchmarks/serving.py runs/quickstart --out docs/results/serving.json
    OMP_NUM_THREADS=1 python benchmarks/serving.py runs/quickstart --cpu_time

The queries are the run's evaluation queries, after a warm-up; the forms take turns, so that what
else the machine does falls on all of them alike.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch

from erniesearch.report.benchmark_report import tell_figures
from erniesearch.search.system import SearchSystem

FORMS: dict[str, dict[str, int]] = {
    "dual-encoder": {"late_interaction_depth": 0, "cross_encoder_depth": 0},
    "late interaction": {"cross_encoder_depth": 0},
    "cross-encoder": {"late_interaction_depth": 0},
    "all three": {},
}
"""By the depths that a request leaves to the service: 100 for late interaction, 20 for the
cross-encoder."""
WARM_UP = 5


def measure(
    system: SearchSystem, queries: list[str], clock: Callable[[], float]
) -> dict[str, dict[str, float]]:
    """Milliseconds by form, with the token vectors that the system has and without them."""
    stored = system.token_vectors
    assert stored is not None
    taken: dict[str, list[float]] = {}
    for number, query in enumerate(queries):
        for name, depths in FORMS.items():
            for with_vectors in (True, False):
                if not with_vectors and depths.get("late_interaction_depth") == 0:
                    continue
                system.token_vectors = stored if with_vectors else None
                began = clock()
                system.search(query, **depths)
                if number >= WARM_UP:
                    label = name if with_vectors else f"{name}, passages encoded anew"
                    taken.setdefault(label, []).append(1e3 * (clock() - began))
        system.token_vectors = stored
        for label, value in watch(system, query, clock).items():
            if number >= WARM_UP:
                taken.setdefault(label, []).append(value)
    return {
        label: {
            "median": statistics.median(values),
            "p95": statistics.quantiles(values, n=20)[-1],
        }
        for label, values in taken.items()
    }


def watch(system: SearchSystem, query: str, clock: Callable[[], float]) -> dict[str, float]:
    """Milliseconds until the page has each of its answers, and what its attention view takes."""
    began = clock()
    taken: dict[str, float] = {}
    best = ""
    for step in system.search_steps(query):
        if step.result is None:
            continue
        taken.setdefault("page: first passages", 1e3 * (clock() - began))
        late = step.result.rankings["late_interaction"]
        if late and not best:
            best = late[0].pid
            system.explain(query, best)
            taken["page: late interaction and its highlight"] = 1e3 * (clock() - began)
    taken["page: all three and the highlight"] = 1e3 * (clock() - began)
    began = clock()
    system.attention(query, best)
    taken["page: attention of a pair"] = 1e3 * (clock() - began)
    return taken


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--queries", type=int, default=60)
    parser.add_argument(
        "--cpu_time", action="store_true",
        help="count the process's own time: for a machine that does other work",
    )  # fmt: skip
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    system = SearchSystem.from_run(given.run)
    if system.token_vectors is None:
        sys.exit(f"{given.run}: no token vectors: erniesearch run {given.run}/config.yaml")
    if system.scorer is None:
        sys.exit(f"{given.run}: the run trained no cross-encoder")
    queries = [system.data.queries[qid] for qid in list(system.data.qrels)[: given.queries]]
    results: dict[str, Any] = {
        "run": str(given.run), "passages": len(system.data.pids), "queries": len(queries) - WARM_UP,
        "milliseconds": measure(system, queries, process_time if given.cpu_time else perf_counter),
        "time": "of the process" if given.cpu_time else "of the clock",
        "threads": torch.get_num_threads(), "precision": system.retriever.precision,
    }  # fmt: skip
    tell_figures(results, given.out, " ".join(["python", *sys.argv]))


if __name__ == "__main__":
    main()
