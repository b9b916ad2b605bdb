"""TREC run files, ``qid Q0 docid rank score tag``: written, strictly read, and looked up."""

import math
import mmap
from collections.abc import Container, Mapping
from pathlib import Path

from erniesearch.data.collection import Run
from erniesearch.errors import UserError
from erniesearch.files import write_atomically


def write_trec_run(path: Path, run: Run, tag: str) -> None:
    """``qid Q0 docid rank score tag``, rank from 1, scores not increasing, ties by docid."""
    lines = []
    for qid, scores in run.items():
        ranked = sorted(scores.items(), key=lambda item: (-item[1], item[0]))
        for position, (pid, score) in enumerate(ranked, 1):
            lines.append(f"{qid} Q0 {pid} {position} {score:.9g} {tag}\n")
    write_atomically(path, "".join(lines))


def read_trec_run(
    path: str | Path, queries: Container[str] | None = None, pids: Container[str] | None = None
) -> Run:
    """Scores by query and passage.

    Args:
        queries, pids: ids that exist; None takes any.

    Raises:
        UserError: naming file and line, for a malformed line, a rank that does not follow its
            query's last one, a score that is no finite number or rises with the rank, a passage
            that stands twice under its query, or an id that does not exist.
    """
    path = Path(path)
    run: Run = {}
    last: dict[str, float] = {}
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    _read_line(line, f"{path}:{number}", run, last, queries, pids)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: {error.reason}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not run:
        raise UserError(f"{path}: the run is empty")
    return run


def _read_line(
    line: str,
    where: str,
    run: Run,
    last: dict[str, float],
    queries: Container[str] | None,
    pids: Container[str] | None,
) -> None:
    columns = line.split()
    if len(columns) != 6:
        raise UserError(
            f"{where}: expected 'qid Q0 docid rank score tag', found {len(columns)} columns"
        )
    qid, _, pid, rank_text, score_text, _ = columns
    if queries is not None and qid not in queries:
        raise UserError(f"{where}: query '{qid}' is not in queries.jsonl")
    if pids is not None and pid not in pids:
        raise UserError(f"{where}: passage '{pid}' is not in corpus.jsonl")
    found = run.setdefault(qid, {})
    if pid in found:
        raise UserError(f"{where}: passage '{pid}' stands twice under query '{qid}'")
    expected = len(found) + 1
    if rank_text != str(expected):
        raise UserError(
            f"{where}: rank {rank_text} of query '{qid}', expected {expected}: ranks start at 1 and"
            " rise by 1"
        )
    try:
        score = float(score_text)
    except ValueError:
        raise UserError(f"{where}: score {score_text!r} is not a number") from None
    if not math.isfinite(score):
        raise UserError(f"{where}: score {score_text} is not finite")
    if score > last.get(qid, math.inf):
        raise UserError(
            f"{where}: score {score_text} of query '{qid}' is above that of the rank before it"
            f" ({last[qid]:.9g}): trec_eval orders by score, so ranks and scores must agree"
        )
    found[pid] = last[qid] = score


def ranked_passages(path: Path, wanted: Mapping[str, float], depth: int) -> dict[str, list[str]]:
    """The first ``depth`` passages of some queries of a run that :func:`write_trec_run` wrote; the
    rest of the file is not read.

    Args:
        wanted: each query, and where about in the file it stands (0 to 1).

    Raises:
        UserError: if the file cannot be read.
    """
    try:
        with (
            path.open("rb") as handle,
            mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as lines,
        ):
            if len(lines.readline().split()) != 6:
                raise UserError(f"{path}:1: expected 'qid Q0 docid rank score tag'")
            return {
                qid: _passages(lines, qid.encode(), place, depth) for qid, place in wanted.items()
            }
    except UserError:
        raise
    except (OSError, ValueError) as error:  # a file of no bytes is a ValueError
        raise UserError(f"{path}: cannot be read: {error}") from None


def _passages(lines: mmap.mmap, qid: bytes, place: float, depth: int) -> list[str]:
    start = qid + b" Q0 "
    guess = max(0, int((place - 0.05) * len(lines)))
    position = 0 if lines[: len(start)] == start else lines.find(b"\n" + start, guess) + 1
    if not position and lines[: len(start)] != start:
        position = lines.find(b"\n" + start) + 1
        if not position:
            return []
    lines.seek(position)
    found: list[str] = []
    while len(found) < depth and (line := lines.readline()).startswith(start):
        found.append(line.split()[2].decode("utf-8", "replace"))
    return found
