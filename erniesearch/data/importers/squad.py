"""SQuAD and what shares its form: SQuAD 1.1 and 2.0, CMRC 2018, DRCD, XQuAD, KorQuAD 1.0.

    {"data": [{"title", "paragraphs": [{"context", "qas": [
        {"id", "question", "answers": [{"text", "answer_start"}]}]}]}]}
    [{"context_id", "context_text", "title", "qas": [          CMRC 2018's older form
        {"query_id", "query_text", "answers": [text]}]}]

A paragraph is a passage, or is cut into several; white space is folded, and a text that came
before is no second passage. A passage is relevant to a question if it holds an answer.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from erniesearch.config.options import ImportOptions
from erniesearch.data.importers.cut import Span, by_chars, by_words, whole
from erniesearch.data.importers.records import (
    BadLines,
    Judgement,
    Passage,
    Query,
    Record,
    content_id,
    listed,
    open_source,
    read_each,
    read_json,
    require,
    split_in,
)
from erniesearch.errors import UserError, nearest


@dataclass(frozen=True, slots=True)
class Paragraph:
    """A paragraph as the file has it."""

    title: str
    content: Any
    split: str
    at: str


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer and where it starts in the text; None if the file does not say."""

    text: str
    start: int | None


@dataclass(frozen=True, slots=True)
class Question:
    """A question and its answers; ``at`` is where it was read."""

    qid: str
    text: str
    answers: tuple[Answer, ...]
    at: str


def read(sources: list[Path], options: ImportOptions, bad: BadLines) -> Iterator[Record]:
    """JSON files, each may be gzipped. Without a split by article, a file is a split: the one in
    its name, else ``options.split``. With one, the articles not chosen are ``options.split``, and
    articles come by split, file and title: set and draw do not depend on their order in a file.

    Raises:
        UserError: for a file of another form, or an article that is not there.
    """
    files = [path for path in listed(sources)
             if path in sources or path.name.removesuffix(".gz").endswith(".json")]  # fmt: skip
    parse = Parser(options, bad).records
    if not options.dev_articles and not options.test_articles:
        for path in files:
            split = split_in(path, options.split)
            yield from read_each(_paragraphs(path, split, bad), parse, bad)
        return
    found = [one for path in files
             for one in sorted(_paragraphs(path, "", bad), key=lambda one: one.title)]  # fmt: skip
    chosen = _chosen({one.title for one in found}, options)
    for split in (options.split, "dev", "test"):
        ours = (Paragraph(one.title, one.content, split, one.at) for one in found
                if chosen.get(one.title, options.split) == split)  # fmt: skip
        yield from read_each(ours, parse, bad)


def _paragraphs(path: Path, split: str, bad: BadLines) -> Iterator[Paragraph]:
    with open_source(path) as file:
        flat = re.match(rb"(\xef\xbb\xbf)?\s*\[", file.read(64))
    expected = 'articles: {"data": [{"title", "paragraphs"}]}, or a list'
    for number, article in read_json(path, "item" if flat else "data.item", expected):
        at = f"{path}: article {number}"
        try:
            if not isinstance(article, dict):
                raise UserError(f"{at}: expected an object, found {type(article).__name__}")
            title = _fold(require(article, "title", str, at) if "title" in article else "")
            alone = "context_text" in article
            contents = [article] if alone else require(article, "paragraphs", list, at)
        except UserError as error:
            bad.skip(error)
            continue
        for place, content in enumerate(contents, 1):
            where = at if alone else f"{at}, paragraph {place}"
            yield Paragraph(title.replace("_", " "), content, split, where)


def _chosen(titles: set[str], options: ImportOptions) -> dict[str, str]:
    """The split of the articles that go to dev and test."""
    chosen: dict[str, str] = {}
    free = np.random.default_rng(options.seed).permutation(sorted(titles)).tolist()
    wanted = {"dev": options.dev_articles, "test": options.test_articles}
    for split, value in wanted.items():
        for title in _listed_titles(value, split) if value and not value.isdigit() else ():
            if title not in titles:
                raise UserError(f"{value}: no article '{title}'{nearest(title, titles)}")
            if chosen.setdefault(title, split) != split:
                raise UserError(f"{value}: article '{title}' is among those of dev already")
    for split, value in wanted.items():
        if value.isdigit():
            left = [title for title in free if title not in chosen]
            if not 0 < int(value) < len(left):
                raise UserError(
                    f"--{split}_articles {value}: {len(left)} articles to draw from; at least one"
                    " must be drawn, and one must stay"
                )
            chosen |= dict.fromkeys(left[: int(value)], split)
    return chosen


def _listed_titles(value: str, split: str) -> list[str]:
    try:
        lines = Path(value).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        problem = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(
            f"--{split}_articles {value}: cannot be read: {problem}; expected a file with one title"
            " a line, or how many articles to draw"
        ) from None
    return [_fold(line).replace("_", " ") for line in lines if line.strip()]


@dataclass
class Parser:
    """Paragraphs to records. A passage is named by the paragraph's own id, and its place in the
    paragraph if that is cut; else by its number in the corpus, after a w (whole) or c (cut)."""

    options: ImportOptions
    bad: BadLines
    known: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        words, chars = self.options.max_words, self.options.max_chars
        self.cuts = bool(words or chars)
        self.spans = by_words(words).cut if words else by_chars(chars).cut if chars else whole

    def records(self, paragraph: Paragraph) -> Iterator[Record]:
        """The passages of a paragraph, its questions and their judgements.

        Raises:
            UserError: naming file, article, paragraph and key.
        """
        at = paragraph.at
        if not isinstance(paragraph.content, dict):
            found = type(paragraph.content).__name__
            raise UserError(f"{at}: expected an object, found {found}")
        context = _either(paragraph.content, ("context", "context_text"), at)
        own = next((require(paragraph.content, key, str, at) for key in ("id", "context_id")
                    if paragraph.content.get(key) is not None), None)  # fmt: skip
        questions = list(self._questions(paragraph.content, at))
        text = _fold(context)
        if not text:
            raise UserError(f"{at}: the text is empty")
        spans, pids = self.spans(text), []
        for place, (start, end) in enumerate(spans):
            part = text[start:end]
            content = content_id(part)
            if content in self.known:
                self.bad.note("passage whose text came before, taken as one", at)
            else:
                self.known[content] = self._name(own, place)
                yield Passage(self.known[content], part, at, paragraph.title)
            pids.append(self.known[content])
        for question in questions:
            yield from self._judged(question, paragraph.split, context, text, spans, pids)

    def _name(self, own: str | None, place: int) -> str:
        if own is None:
            return f"{'c' if self.cuts else 'w'}{len(self.known):05d}"
        return f"{own}-{place}" if self.cuts else own

    def _questions(self, content: dict[str, Any], at: str) -> Iterator[Question]:
        for record in require(content, "qas", list, at):
            if not isinstance(record, dict):
                raise UserError(f"{at}: 'qas' must hold objects, found {type(record).__name__}")
            qid = _either(record, ("id", "query_id"), at)
            where = f"{at}, question {qid}"
            text = _fold(_either(record, ("question", "query_text"), where))
            if record.get("is_impossible") or not text:
                what = "without text" if not text else "that cannot be answered"
                self.bad.note(f"question {what}, left out", where)
                continue
            answers = tuple(_answers(require(record, "answers", list, where), where))
            yield Question(qid, text, answers, where)

    def _judged(
        self, question: Question, split: str, context: str, text: str, spans: list[Span],
        pids: list[str],
    ) -> Iterator[Record]:  # fmt: skip
        if not question.answers:
            self.bad.note("question without an answer, left out", question.at)
            return
        relevant = sorted(
            {0} if not self.cuts else _holding(question.answers, context, text, spans)
        )
        if not relevant:
            self.bad.note("question whose answers no passage holds whole, left out", question.at)
            return
        texts = dict.fromkeys(answer.text for answer in question.answers)
        yield Query(question.qid, question.text, question.at, tuple(texts))
        for pid in dict.fromkeys(pids[place] for place in relevant):
            yield Judgement(split, question.qid, pid, question.at)


def _answers(records: Iterable[Any], at: str) -> Iterator[Answer]:
    for record in records:
        if isinstance(record, str):
            record = {"text": record}
        if not isinstance(record, dict):
            raise UserError(f"{at}: 'answers' must hold objects, found {type(record).__name__}")
        text, start = _fold(require(record, "text", str, at)), record.get("answer_start")
        if start is not None and type(start) is not int:
            raise UserError(
                f"{at}: 'answer_start' must be a whole number, found {type(start).__name__}"
            )
        if text:
            yield Answer(text, start if start is not None and start >= 0 else None)


def _holding(answers: Iterable[Answer], context: str, text: str, spans: list[Span]) -> set[int]:
    """The passages that hold an answer whole. One that does not say where it starts counts if its
    string is in one passage only."""
    found = set()
    for answer in answers:
        if answer.start is None:
            places = [i for i, (start, end) in enumerate(spans) if answer.text in text[start:end]]
            found |= set(places if len(places) == 1 else ())
        elif (begin := _place(answer, context, text)) is not None:
            end = begin + len(answer.text)
            found |= {i for i, (start, stop) in enumerate(spans) if start <= begin and end <= stop}
    return found


def _place(answer: Answer, context: str, text: str) -> int | None:
    """Where the answer starts in the folded text: what stands nearest to its answer_start, as
    some files are off by a few characters."""
    meant = len(_fold(context[: answer.start] + "|")) - 1
    places = [found.start() for found in re.finditer(f"(?={re.escape(answer.text)})", text)]
    return min(places, key=lambda place: abs(place - meant), default=None)


def _either(record: dict[str, Any], names: tuple[str, str], at: str) -> str:
    name = names[1] if names[1] in record and names[0] not in record else names[0]
    value: str = require(record, name, str, at)
    return value


def _fold(text: str) -> str:
    return " ".join(text.split())
