"""MS MARCO passage ranking: tab-separated files, known by their names.

collection.tsv or para.txt        pid, text
para.title.txt                    pid, title (RocketQA's; read with ``--titles``)
queries.SPLIT.tsv, SPLIT.query.txt  qid, text
qrels.SPLIT.tsv                   qid, 0, pid, grade; no header
*triples*.tsv                     qid, positive pid, negative pid
"""

from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from erniesearch.config.options import ImportOptions
from erniesearch.data.importers.beir import judgement
from erniesearch.data.importers.records import (
    BadLines,
    HardNegatives,
    Line,
    Passage,
    Query,
    Record,
    listed,
    read_each,
    read_lines,
    stem,
)
from erniesearch.errors import UserError

WINDOW = 20_000
"""Titles read ahead of the passages."""


def read(sources: list[Path], options: ImportOptions, bad: BadLines) -> Iterator[Record]:
    """Folders or files; each file may be gzipped.

    Raises:
        UserError: if there is not one collection, or no queries or qrels; or with ``--titles`` no
            file of titles.
    """
    files: dict[str, list[Path]] = {}
    for path in listed(sources):
        kind = _kind(path)
        if not kind:
            bad.note("file of no known name, not read", str(path))
        files.setdefault(kind, []).append(path)
    collections = files.get("collection", [])
    if len(collections) != 1:
        found = ", ".join(str(path) for path in collections) or "none"
        raise UserError(f"expected one collection.tsv or para.txt, found {found}")
    for kind, name in (("queries", "queries.SPLIT.tsv"), ("qrels", "qrels.SPLIT.tsv")):
        if kind not in files:
            raise UserError(f"{', '.join(map(str, sources))}: no {name}")
    titles = None
    if options.titles:
        if len(files.get("titles", [])) != 1:
            raise UserError("--titles needs one para.title.txt among the sources")
        titles = _Titles(files["titles"][0])
    yield from read_each(read_lines(collections[0]), partial(_passage, titles=titles), bad)
    if titles:
        titles.finish(bad)
    for path in files["queries"]:
        yield from read_each(read_lines(path), _query, bad)
    for path in files["qrels"]:
        yield from read_each(read_lines(path), _judgement, bad)
    for path in files.get("triples", []):
        yield from read_each(read_lines(path), _triple, bad)


def _kind(path: Path) -> str:
    name = stem(path)
    if name in ("collection", "para"):
        return "collection"
    if name == "para.title":
        return "titles"
    if "triples" in name:
        return "triples"
    if name.startswith("queries.") or name.endswith(".query"):
        return "queries"
    return "qrels" if name.startswith("qrels.") else ""


class _Titles:
    """Titles of a file in about the order of the collection, which may lack some: read along with
    it, at most :data:`WINDOW` ahead, so that memory does not hold them all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = read_lines(path)
        self.ahead: dict[str, str] = {}

    def of(self, pid: str) -> str:
        """The passage's title; empty where there is none, or a dash (RocketQA's)."""
        if len(self.ahead) < WINDOW // 2:
            for line in islice(self.lines, WINDOW - len(self.ahead)):
                key, title = line.columns(2)
                self.ahead[key] = title
        title = self.ahead.pop(pid, "")
        return "" if title == "-" else title

    def finish(self, bad: BadLines) -> None:
        """Count titles without a passage.

        Raises:
            UserError: if the file is in another order than the collection.
        """
        if line := next(self.lines, None):
            raise UserError(f"{line.at}: this title is out of the collection's order: sort both")
        for pid in self.ahead:
            bad.note("title of an unknown passage", f"{self.path}: {pid}")


def _passage(line: Line, titles: _Titles | None) -> Iterator[Record]:
    pid, text = line.columns(2)
    yield Passage(pid, text, line.at, titles.of(pid) if titles else "")


def _query(line: Line) -> Iterator[Record]:
    qid, text = line.columns(2)
    yield Query(qid, text, line.at)


def _judgement(line: Line) -> Iterator[Record]:
    columns = line.columns(1, 4)
    if len(columns) == 1:  # some copies are separated by spaces
        columns = columns[0].split()
    if len(columns) != 4:
        raise UserError(f"{line.at}: expected qid, 0, pid, grade, found {len(columns)} columns")
    qid, _, pid, grade = columns
    yield judgement(stem(line.path).removeprefix("qrels."), qid, pid, grade, line.at)


def _triple(line: Line) -> Iterator[Record]:
    columns = line.columns(1, 3)
    if len(columns) == 1:
        columns = columns[0].split()
    if len(columns) != 3 or any(" " in column for column in columns):
        raise UserError(f"{line.at}: expected qid, positive pid, negative pid (ids, not texts)")
    yield HardNegatives(columns[0], (columns[2],), line.at)
