"""Long paragraphs cut at sentence ends into passages of a few words or characters."""

import re
from collections.abc import Callable
from dataclasses import dataclass

Span = tuple[int, int]

# A sentence ends with one of these, and what closes a quotation or bracket goes with it.
_SPACED_END = re.compile(r"[.!?؟।۔][\"”')\]]{0,2}\s+(?=(\S))")
_UNSPACED_END = re.compile(r"[。！？；!?;]+[”」』）)]*")


@dataclass(frozen=True)
class Cutter:
    """Where to cut a text.

    Sentences are joined while they fit. A sentence longer than ``limit`` stays whole, and a last
    passage shorter than ``tail`` goes to the one before it, so passages can be longer.

    Attributes:
        limit: words or characters of a passage.
        tail: what is shorter is no passage of its own.
        measure: a text's length.
        ends: where the sentences of a text end; the last one need not be there.
    """

    limit: int
    tail: int
    measure: Callable[[str], int]
    ends: Callable[[str], list[int]]

    def cut(self, text: str) -> list[Span]:
        """The passages of a text as [start, end) without white space at either side."""
        stops = self.ends(text)
        if not stops or stops[-1] != len(text):
            stops.append(len(text))
        spans, start, end = [], 0, 0
        for stop in stops:
            if end > start and self.measure(text[start:stop]) > self.limit:
                spans.append((start, end))
                start = end
            end = stop
        spans.append((start, end))
        if len(spans) > 1 and self.measure(text[slice(*spans[-1])]) < self.tail:
            spans[-2:] = [(spans[-2][0], spans[-1][1])]
        return [_stripped(text, span) for span in spans]


def whole(text: str) -> list[Span]:
    """The text as one passage."""
    return [(0, len(text))]


def by_words(limit: int) -> Cutter:
    """For languages that put spaces between words; a tail is less than 12 words."""
    return Cutter(limit, min(12, limit // 5), lambda text: len(text.split()), _spaced_ends)


def by_chars(limit: int) -> Cutter:
    """For Chinese and Japanese; a tail is less than 30 characters."""
    return Cutter(limit, min(30, limit // 5), len, _unspaced_ends)


def _spaced_ends(text: str) -> list[int]:
    return [found.end() for found in _SPACED_END.finditer(text) if _starts_sentence(found[1])]


def _starts_sentence(mark: str) -> bool:
    """After "e.g." a small letter goes on. Beyond Latin, every letter that is not small
    counts; accented Latin capitals do not, and the sets in configs/squad depend on that."""
    if mark < "\u0250":
        return mark.isascii() and (mark.isupper() or mark.isdigit() or mark in '"(')
    return mark.isalpha() and not mark.islower()


def _unspaced_ends(text: str) -> list[int]:
    return [found.end() for found in _UNSPACED_END.finditer(text)]


def _stripped(text: str, span: Span) -> Span:
    start, end = span
    part = text[start:end]
    return start + len(part) - len(part.lstrip()), end - len(part) + len(part.rstrip())
