"""Answer-string recall, as DPR measures open-domain question answering.

    A@k = share of the queries with an answer string in one of their k best passages

A string is in a passage if its tokens stand there in a row. As in DPR's ``has_answer`` over
DrQA's ``SimpleTokenizer``: both sides go through Unicode normalisation NFD (an accent stays, as a
mark behind its letter), are cut into runs of letters, digits and marks or else single visible
characters, and lower-cased. Titles take no part.
"""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import regex

from erniesearch.data.collection import Run, read_jsonl
from erniesearch.errors import UserError
from erniesearch.retrieval.ranking import top

_TOKEN = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")


def tokenize(text: str) -> list[str]:
    """DPR's tokens: NFD, ``SimpleTokenizer``, lower case."""
    return [token.lower() for token in _TOKEN.findall(unicodedata.normalize("NFD", text))]


def has_answer(answers: Iterable[str], text: str) -> bool:
    """Whether one of the answers stands in the text; an answer without tokens never does."""
    return _contains(_joined(text), list(map(_joined, answers)))


def _joined(text: str) -> str:
    # No token has white space in it, so sequences of tokens are substrings between spaces.
    return f" {' '.join(tokenize(text))} "


def _contains(text: str, answers: list[str]) -> bool:
    return any(answer.strip() and answer in text for answer in answers)


def read_answers(path: Path, qids: Iterable[str]) -> dict[str, list[str]]:
    """``metadata.answers`` of queries.jsonl for the queries asked for.

    Raises:
        UserError: naming the line of a query that has no list of answer strings.
    """
    wanted = set(qids)
    answers: dict[str, list[str]] = {}
    for number, record in read_jsonl(path):
        qid = str(record.get("_id"))
        if qid not in wanted:
            continue
        metadata = record.get("metadata")
        found = metadata.get("answers") if isinstance(metadata, dict) else None
        if not isinstance(found, list) or not found or not all(isinstance(a, str) for a in found):
            raise UserError(
                f"{path}:{number}: query '{qid}' has no metadata.answers (a list of strings), which"
                " A@k needs"
            )
        answers[qid] = found
    return answers


def read_texts(path: Path, pids: Iterable[str]) -> dict[str, str]:
    """Texts without titles of the passages asked for; corpus.jsonl is read once, line by line."""
    wanted = set(pids)
    return {
        str(record["_id"]): str(record["text"])
        for _, record in read_jsonl(path)
        if str(record["_id"]) in wanted
    }


@dataclass(frozen=True)
class AnswerRecall:
    """A@k of runs over one data set.

    ``answers`` by query; ``texts`` by passage, without titles, of all passages the runs reach.
    """

    answers: dict[str, list[str]]
    texts: dict[str, str]

    @classmethod
    def read(
        cls, root: Path, qids: Iterable[str], runs: Iterable[Run], depth: int
    ) -> "AnswerRecall":
        """Read from a folder in BEIR layout what the ``depth`` best passages of the runs need.

        Raises:
            UserError: as :func:`read_answers`.
        """
        answers = read_answers(root / "queries.jsonl", qids)
        reached = {pid for run in runs for qid in answers for pid in top(run.get(qid, {}), depth)}
        return cls(answers, read_texts(root / "corpus.jsonl", reached))

    def per_query(self, run: Run, qids: list[str], depth: int) -> np.ndarray:
        """1 for every query with an answer among its ``depth`` best passages, else 0,
        ``[num_queries]``; a query without results counts as 0."""
        found = np.zeros(len(qids))
        for i, qid in enumerate(qids):
            answers = list(map(_joined, self.answers[qid]))
            found[i] = any(
                _contains(_joined(self.texts[pid]), answers) for pid in top(run.get(qid, {}), depth)
            )
        return found
