"""What measurements of size share: ranks whose memory and time are known, and a collection of any
number of passages."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
WORDS_A_PASSAGE = (12, 29)
NUM_QUERIES = 200


class Started(NamedTuple):
    """A process, and where it writes."""

    process: subprocess.Popen[bytes]
    log: IO[bytes]


class Taken(NamedTuple):
    """Peak memory of each process in bytes, and the processor seconds of all."""

    peaks: list[int]
    seconds: float


def start(arguments: Iterable[str], rank: int = 0, ranks: int = 1, port: int = 0) -> Started:
    """A rank with one thread and this project's code, its output in a temporary file."""
    variables = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RANK": str(rank),
        "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    log = tempfile.TemporaryFile("w+b")  # noqa: SIM115  (finish reads it)
    process = subprocess.Popen(
        [sys.executable, *arguments], env=os.environ | variables, stdout=log, stderr=log
    )
    return Started(process, log)


def finish(started: Sequence[Started], status: int = 0) -> Taken:
    """Wait for processes.

    Raises:
        ChildProcessError: if one ends with another status, with the end of what it wrote.
    """
    peaks, seconds = [], 0.0
    for process, log in started:
        _, code, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(code)
        if process.returncode != status:
            log.seek(0)
            raise ChildProcessError(log.read().decode(errors="replace")[-3000:])
        log.close()
        peaks.append(usage.ru_maxrss * 1024)
        seconds += usage.ru_utime + usage.ru_stime
    return Taken(peaks, seconds)


def write_passages(words: Sequence[str], number: int, root: Path) -> None:
    """A folder in BEIR layout: texts of these words in a drawn order, made and written by the
    thousand, and queries of the beginnings of the first ones."""
    rng = np.random.default_rng(number)
    vocabulary = np.array(words)
    root.mkdir(parents=True)
    queries: list[str] = []
    with (root / "corpus.jsonl").open("w") as corpus:
        for first in range(0, number, 1000):
            lengths = rng.integers(*WORDS_A_PASSAGE, size=min(1000, number - first))
            drawn = vocabulary[rng.integers(len(vocabulary), size=(len(lengths), 28))]
            for row, (text, length) in enumerate(zip(drawn, lengths, strict=True), first):
                record = {"_id": f"p{row}", "title": "", "text": " ".join(text[:length])}
                corpus.write(json.dumps(record) + "\n")
                if len(queries) < NUM_QUERIES:
                    queries.append(" ".join(text[:6]))
    (root / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": f"q{i}", "text": q}) + "\n" for i, q in enumerate(queries))
    )
    (root / "qrels").mkdir()
    lines = [f"q{i}\tp{i}\t1" for i in range(len(queries))]
    (root / "qrels/test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")
