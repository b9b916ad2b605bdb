"""BEIR layout in, TREC runs and negatives out; every odd line is named by file and line.

corpus.jsonl    {"_id": str, "title": str, "text": str}
queries.jsonl   {"_id": str, "text": str}
qrels/SPLIT.tsv query-id <tab> corpus-id <tab> score, with that header
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from erniesearch.errors import UserError, nearest
from erniesearch.stages import write_atomically

Run = dict[str, dict[str, float]]
"""Scores by query id and passage id."""


@dataclass(frozen=True)
class RetrievalData:
    """A collection in memory.

    ``pids`` and ``passages`` are parallel, ``passages`` with titles already joined; ``queries``
    maps qid to text; ``qrels`` maps qid to {pid: grade} for one split.
    """

    pids: list[str]
    passages: list[str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]

    @property
    def index_of(self) -> dict[str, int]:
        """Position of each pid in ``pids``."""
        return {pid: i for i, pid in enumerate(self.pids)}

    def relevant(self) -> dict[str, list[str]]:
        """Passages of grade above 0 by query, queries without any left out."""
        found = {q: [p for p, g in grades.items() if g > 0] for q, grades in self.qrels.items()}
        return {q: pids for q, pids in found.items() if pids}


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) for every line that is not blank.

    Raises:
        UserError: for a missing file, bytes that are not UTF-8, or a line that is no JSON object.
    """
    try:
        handle = path.open("rb")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    with handle:
        for number, raw in enumerate(handle, 1):
            if not raw.strip():
                continue
            try:
                value = json.loads(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{number}: not UTF-8: {error.reason}") from None
            except (json.JSONDecodeError, RecursionError) as error:
                problem = getattr(error, "msg", "nested too deeply")
                raise UserError(f"{path}:{number}: not valid JSON: {problem}") from None
            if not isinstance(value, dict):
                raise UserError(
                    f"{path}:{number}: expected a JSON object, found {type(value).__name__}"
                )
            yield number, value


def _text(record: dict[str, Any], key: str, path: Path, number: int, default: str | None) -> str:
    value = record.get(key, default)
    if value is None and default is not None:
        return default
    if value is None:
        raise UserError(f"{path}:{number}: no key '{key}'{nearest(key, record)}")
    if key == "_id" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"{path}:{number}: '{key}' must be text, found {type(value).__name__}")
    if key == "_id" and (not value or any(c.isspace() for c in value)):
        raise UserError(
            f"{path}:{number}: id {value!r} is empty or has white space: a TREC run cannot hold it"
        )
    return value


def read_corpus(path: Path, use_titles: bool) -> tuple[list[str], list[str]]:
    """Passage ids and texts (title, space, text), in file order.

    Raises:
        UserError: also for duplicate ids and an empty corpus.
    """
    seen: dict[str, int] = {}
    passages = []
    for number, record in read_jsonl(path):
        pid = _text(record, "_id", path, number, None)
        if pid in seen:
            raise UserError(f"{path}:{number}: duplicate id '{pid}', first on line {seen[pid]}")
        seen[pid] = number
        text = _text(record, "text", path, number, None)
        title = _text(record, "title", path, number, "") if use_titles else ""
        passages.append(f"{title} {text}".strip() if title else text)
    if not seen:
        raise UserError(f"{path}: the corpus is empty")
    return list(seen), passages


def read_queries(path: Path) -> dict[str, str]:
    """Query texts by id, in file order."""
    queries: dict[str, str] = {}
    for number, record in read_jsonl(path):
        qid = _text(record, "_id", path, number, None)
        if qid in queries:
            raise UserError(f"{path}:{number}: duplicate query id '{qid}'")
        queries[qid] = _text(record, "text", path, number, None)
    if not queries:
        raise UserError(f"{path}: no queries")
    return queries


def read_qrels(
    path: Path, queries: dict[str, str], known_pids: dict[str, int]
) -> dict[str, dict[str, int]]:
    """Grades by query and passage.

    Raises:
        UserError: for a malformed line, or an id that corpus or queries do not have.
    """
    if not path.is_file():
        splits = sorted(p.stem for p in path.parent.glob("*.tsv"))
        there = f"; splits here: {', '.join(splits)}" if splits else ""
        raise UserError(f"{path}: no such file{there}")
    qrels: dict[str, dict[str, int]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: {error.reason}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        columns = line.split("\t")
        if number == 1 and columns[-1].strip() == "score":
            continue
        if len(columns) != 3:
            raise UserError(
                f"{path}:{number}: expected query-id<tab>corpus-id<tab>score, found {len(columns)}"
                " columns"
            )
        qid, pid, grade = (column.strip() for column in columns)
        if qid not in queries:
            raise UserError(f"{path}:{number}: query '{qid}' is not in queries.jsonl")
        if pid not in known_pids:
            raise UserError(f"{path}:{number}: passage '{pid}' is not in corpus.jsonl")
        try:
            qrels.setdefault(qid, {})[pid] = int(grade)
        except ValueError:
            raise UserError(f"{path}:{number}: score {grade!r} is not a whole number") from None
    if not any(grade > 0 for grades in qrels.values() for grade in grades.values()):
        raise UserError(f"{path}: no query has a relevant passage")
    return qrels


def load_beir(root: str | Path, split: str, use_titles: bool = True) -> RetrievalData:
    """Read a folder in BEIR layout.

    Raises:
        UserError: naming the file, the line and the remedy.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; data.path must hold corpus.jsonl, queries.jsonl")
    pids, passages = read_corpus(root / "corpus.jsonl", use_titles)
    queries = read_queries(root / "queries.jsonl")
    return with_split(RetrievalData(pids, passages, queries, {}), root, split)


def with_split(data: RetrievalData, root: str | Path, split: str) -> RetrievalData:
    """The same collection with another split's qrels; corpus and queries are not read again.

    Raises:
        UserError: as :func:`read_qrels`.
    """
    path = Path(root) / "qrels" / f"{split}.tsv"
    return replace(data, qrels=read_qrels(path, data.queries, data.index_of))


def write_trec_run(path: Path, run: Run, tag: str) -> None:
    """``qid Q0 docid rank score tag``, rank from 1, scores not increasing, ties by docid."""
    lines = []
    for qid, scores in run.items():
        ranked = sorted(scores.items(), key=lambda item: (-item[1], item[0]))
        for position, (pid, score) in enumerate(ranked, 1):
            lines.append(f"{qid} Q0 {pid} {position} {score:.9g} {tag}\n")
    write_atomically(path, "".join(lines))


def write_negatives(
    path: Path, negatives: dict[str, list[str]], positives: dict[str, list[str]]
) -> None:
    """Hard negatives as JSON lines that Tevatron reads too:
    ``{"query_id", "positive_document_ids", "negative_document_ids"}``."""
    write_atomically(
        path,
        "".join(
            json.dumps(
                {
                    "query_id": qid,
                    "positive_document_ids": positives[qid],
                    "negative_document_ids": pids,
                }
            )
            + "\n"
            for qid, pids in negatives.items()
        ),
    )


def read_negatives(path: Path) -> dict[str, list[str]]:
    """Negative passage ids by query, hardest first."""
    negatives = {}
    for number, record in read_jsonl(path):
        pids = record.get("negative_document_ids")
        if not isinstance(pids, list) or "query_id" not in record:
            raise UserError(f"{path}:{number}: expected query_id and negative_document_ids")
        negatives[str(record["query_id"])] = [str(pid) for pid in pids]
    return negatives
