"""Records to a folder in BEIR layout: whole or not at all."""

import json
import shutil
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from erniesearch.data.corpus.texts import hash_text
from erniesearch.data.importers.records import (
    BadLines,
    HardNegatives,
    Judgement,
    Passage,
    Query,
    Record,
    TeacherScores,
    content_id,
)
from erniesearch.data.negatives import negatives_line
from erniesearch.errors import UserError
from erniesearch.files import sync


@dataclass
class _Scores:
    """A teacher's scores of a query's passages by row; ``at`` is where the first ones stand."""

    at: str
    relative_to: str
    rows: "array[int]" = field(default_factory=lambda: array("q"))
    values: "array[float]" = field(default_factory=lambda: array("d"))

    def of(self, qid: str, pids: list[str], row_of: dict[str, int]) -> list[float]:
        """The scores of these passages.

        Raises:
            UserError: if one has none.
        """
        scores = dict(zip(self.rows, self.values, strict=True))
        for pid in pids:
            if row_of[pid] not in scores:
                raise UserError(
                    f"{self.at}: query '{qid}' has a teacher's scores, but none for its passage"
                    f" '{pid}': score all of its passages, or none"
                )
        return [scores[row_of[pid]] for pid in pids]


class BeirWriter:
    """Writes corpus.jsonl and queries.jsonl as the records come, the rest at the end.

    Memory holds ids, judgements, negatives (8 bytes each) and scores (16), never texts.

    Args:
        folder: an empty folder.
        bad: told of repeated records and odd texts.
        max_negatives: negatives kept for a query, the first ones.
    """

    def __init__(self, folder: Path, bad: BadLines, max_negatives: int) -> None:
        self.folder, self.bad, self.max_negatives = folder, bad, max_negatives
        self.rows: dict[str, int] = {}
        self.contents = array("Q")
        self.queries: dict[str, int] = {}
        self.qrels: dict[str, dict[str, dict[str, int]]] = {}
        self.negatives: dict[str, array[int]] = {}
        self.scores: dict[str, _Scores] = {}
        self.corpus_file: IO[str] = (folder / "corpus.jsonl").open("w", encoding="utf-8")
        self.queries_file: IO[str] = (folder / "queries.jsonl").open("w", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Take one record.

        Raises:
            UserError: for an id that a TREC run cannot hold, another text under a known id, an
                unknown query or passage, a second grade, or scores that do not compare with
                those before.
        """
        if isinstance(record, Passage):
            self._passage(record)
        elif isinstance(record, Query):
            self._query(record)
        elif isinstance(record, Judgement):
            self._judgement(record)
        elif isinstance(record, HardNegatives):
            self._negatives(record)
        else:
            self._scores(record)

    def _passage(self, passage: Passage) -> None:
        text, title = self._clean(passage.text, passage.at), self._clean(passage.title, passage.at)
        content = hash_text(content_id(title, text))
        if (row := self.rows.get(passage.pid)) is not None:
            if self.contents[row] != content:
                raise UserError(
                    f"{passage.at}: passage '{passage.pid}' came before with another text or title"
                )
            self.bad.note("passage that came before", passage.at)
            return
        _check_id(passage.pid, passage.at)
        if not text.strip() and not title.strip():
            self.bad.note("passage without text", passage.at)
        self.rows[passage.pid] = len(self.rows)
        self.contents.append(content)
        self._line(self.corpus_file, {"_id": passage.pid, "title": title, "text": text})

    def _query(self, query: Query) -> None:
        text = self._clean(query.text, query.at)
        content = hash_text(text)
        if (known := self.queries.get(query.qid)) is not None:
            if known != content:
                raise UserError(f"{query.at}: query '{query.qid}' came before with another text")
            self.bad.note("query that came before", query.at)
            return
        _check_id(query.qid, query.at)
        if not text.strip():
            raise UserError(f"{query.at}: query '{query.qid}' has no text")
        self.queries[query.qid] = content
        record: dict[str, Any] = {"_id": query.qid, "text": text}
        if query.answers:
            answers = [self._clean(answer, query.at) for answer in query.answers]
            record["metadata"] = {"answers": answers}
        self._line(self.queries_file, record)

    def _judgement(self, judgement: Judgement) -> None:
        self._known(judgement.qid, (judgement.pid,), judgement.at)
        grades = self.qrels.setdefault(judgement.split, {}).setdefault(judgement.qid, {})
        if grades.setdefault(judgement.pid, judgement.grade) != judgement.grade:
            raise UserError(
                f"{judgement.at}: query '{judgement.qid}' and passage '{judgement.pid}' have the"
                f" grades {grades[judgement.pid]} and {judgement.grade}"
            )

    def _negatives(self, found: HardNegatives) -> None:
        self._known(found.qid, found.pids, found.at)
        kept = self.negatives.setdefault(found.qid, array("q"))
        for pid in found.pids:
            if len(kept) >= self.max_negatives:
                self.bad.note("negatives beyond --max_negatives left out", found.at)
                break
            if (row := self.rows[pid]) not in kept:
                kept.append(row)

    def _scores(self, given: TeacherScores) -> None:
        self._known(given.qid, given.pids, given.at)
        found = self.scores.setdefault(given.qid, _Scores(given.at, given.relative_to))
        if found.relative_to != given.relative_to:
            raise UserError(
                f"{given.at}: the margins of query '{given.qid}' are measured from another passage"
                f" than those before ({found.at}), and do not compare: give scores in their place"
            )
        for pid, score in zip(given.pids, given.scores, strict=True):
            if (row := self.rows[pid]) not in found.rows:
                found.rows.append(row)
                found.values.append(score)
            elif found.values[found.rows.index(row)] != score:
                self.bad.note("passage scored twice, the first score kept", given.at)

    def _known(self, qid: str, pids: tuple[str, ...], at: str) -> None:
        if qid not in self.queries:
            raise UserError(f"{at}: query '{qid}' is not among the queries")
        for pid in pids:
            if pid not in self.rows:
                raise UserError(f"{at}: passage '{pid}' is not in the corpus")

    def _clean(self, text: str, at: str) -> str:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            self.bad.note("half of a surrogate pair, replaced by '?'", at)
            return text.encode("utf-8", "replace").decode("utf-8")
        return text

    def _line(self, file: IO[str], record: dict[str, Any]) -> None:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def hold_out(self, split: str, number: int, seed: int) -> None:
        """Move this many judged queries, drawn with the seed, from ``train`` to another split.

        Raises:
            UserError: if the split is there already, or train would be left empty.
        """
        if split in self.qrels:
            raise UserError(f"--hold_out {split}: the source has judgements for {split} already")
        train = self.qrels.get("train", {})
        if number >= len(train):
            raise UserError(
                f"--hold_out {split}={number}: train has {len(train)} judged queries, one at least"
                " must stay"
            )
        qids = list(train)
        drawn = np.random.default_rng(seed).permutation(len(qids))[:number]
        self.qrels[split] = {qids[i]: train.pop(qids[i]) for i in sorted(drawn)}

    def finish(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Write qrels, negatives and import.json, all synced; returns the latter's content.

        Raises:
            UserError: if there is no passage, no query or no relevant passage.
        """
        self.close()
        relevant = self._relevant()
        for what, there in (("passage", self.rows), ("query", self.queries),
                            ("relevant passage", relevant)):  # fmt: skip
            if not there:
                raise UserError(f"the sources hold no {what}")
        for split, qrels in self.qrels.items():
            (self.folder / "qrels").mkdir(exist_ok=True)
            with (self.folder / "qrels" / f"{split}.tsv").open("w", encoding="utf-8") as file:
                file.write("query-id\tcorpus-id\tscore\n")
                for qid, grades in qrels.items():
                    file.writelines(f"{qid}\t{pid}\t{grade}\n" for pid, grade in grades.items())
        if self.negatives:
            self._write_negatives(relevant)
        facts |= {
            "passages": len(self.rows), "queries": len(self.queries),
            "qrels": {split: sum(map(len, qrels.values())) for split, qrels in self.qrels.items()},
            "judged_queries": {split: len(qrels) for split, qrels in self.qrels.items()},
            "queries_with_negatives": len(self.negatives),
            "queries_with_scores": sum(qid in self.scores for qid in self.negatives),
            **self.bad.summary(),
        }  # fmt: skip
        text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
        (self.folder / "import.json").write_text(text, encoding="utf-8", errors="replace")
        for path in [*self.folder.rglob("*"), self.folder]:
            sync(path)
        return facts

    def _relevant(self) -> dict[str, list[str]]:
        relevant: dict[str, list[str]] = {}
        for qrels in self.qrels.values():
            for qid, grades in qrels.items():
                if found := [pid for pid, grade in grades.items() if grade > 0]:
                    relevant.setdefault(qid, []).extend(found)
        return relevant

    def _write_negatives(self, relevant: dict[str, list[str]]) -> None:
        pids = list(self.rows)
        with (self.folder / "negatives.jsonl").open("w", encoding="utf-8") as file:
            for qid, rows in self.negatives.items():
                own = relevant.get(qid, [])
                wrong = [pid for row in rows if (pid := pids[row]) not in own]
                scores = None
                if found := self.scores.get(qid):
                    scores = found.of(qid, own, self.rows), found.of(qid, wrong, self.rows)
                file.write(negatives_line(qid, own, wrong, scores))

    def close(self) -> None:
        """Close the files."""
        self.corpus_file.close()
        self.queries_file.close()


def _check_id(value: str, at: str) -> None:
    if not value or any(c.isspace() for c in value) or not value.isprintable():
        raise UserError(
            f"{at}: id {value!r} is empty or has white space: a TREC run cannot hold it"
        )


def put_in_place(folder: Path, out: Path) -> None:
    """Rename a finished folder to ``out``; what was there goes."""
    old = folder.with_name(folder.name + ".old")
    if out.exists():
        out.rename(old)
    folder.rename(out)
    sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)
