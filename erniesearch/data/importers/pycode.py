"""The embedded code-search corpus: functions of the standard library and of installed packages.

A docstring's first sentence is the query, the function without docstrings and comments the
passage, as in CodeSearchNet (Husain et al., 2019, arXiv:1909.09436): the signature and the
function's own name stay, decorators and the names of its class and module do not. Those are in the
passage's id.
"""

import ast
import inspect
import io
import json
import re
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erniesearch.data.importers.python_sources import (
    SPLITS,
    check_target,
    definitions,
    draw,
    read_sources,
    roots,
    split_of,
    versions,
    write_beir,
)
from erniesearch.files import write_atomically
from erniesearch.progress import metered

Function = ast.FunctionDef | ast.AsyncFunctionDef
MAX_CHARACTERS = 1000
"""Longest code that is kept, so that an encoder reads a passage whole."""
WORDS = (4, 25)
"""Fewest and most words of a query."""
MAX_SHARED = 3
"""A sentence that documents more functions than this is boilerplate."""
GENERATED = re.compile(r"^#.*(auto-?generated|generated (by|from)|do not edit)", re.I | re.M)
TEST_MODULE = re.compile(r"(^|\.)(test|tests|conftest|test_\w+|\w+_tests?)(\.|$)")
SECTION = re.compile(
    r"[:@*+>|.=~^-]|\d+[.)]\s|(args|arguments|parameters?|params|returns?|yields|raises|examples?|"
    r"notes?|usage|inputs?|outputs?|keyword args|keyword arguments|attributes)\s*:", re.I
)  # fmt: skip
"""Start of a line that no longer belongs to the first sentence: fields, lists, headings."""
MARKUP = (
    (re.compile(r"\[`+([^`\]]+)`+\](\([^)]*\))?"), r"`\1`"),  # [`pkg.Name`](url)
    (re.compile(r"\[([^\]\[]+)\]\([^)\s]*\)"), r"\1"),  # [text](url)
    (re.compile(r":[a-zA-Z][\w:+.-]*:(`[^`]+`)"), r"\1"),  # :py:meth:`Name`
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`_*"), r"\1"),  # `text <target>`_
    (re.compile(r"\s*\[\w+\]_"), ""),  # [1]_
    (re.compile(r"`+([^`]+)`+_*"), r"\1"),
    (re.compile(r"(?<![\w*])\*{1,2}(\w[^*]*\w|\w)\*{1,2}(?![\w*])"), r"\1"),  # *text*, not *args
)
TILDE = re.compile(r"`[~!][\w.]*?(\w+(?:\(\))?)`")  # `~package.Name`
SENTENCE_END = re.compile(
    r"(?<!\be\.g)(?<!\bi\.e)(?<!\betc)(?<!\bvs)(?<!\bcf)(?<!\b[A-Z])[.!?]\s+(?=[\"'(]?[A-Z])"
)
NO_PROSE = re.compile(
    r"->|>>>|::|https?:|[\\{}@$|`]|%\(|^[\w.]+\(|^[\w.]+ ?[:=]|\w=\w|\bis deprecated|^\(", re.I
)
"""Signatures, templates, addresses, grammars, formulas, mark-up left open."""
POINTER = re.compile(
    r"(see|same as|equivalent to|alias|refer to|inherited|overrides?|overridden|implements?|"
    r"wrapper (for|around|of)|deprecated|undocumented|todo|fixme|xxx|not implemented|private|"
    r"internal|for internal|do not|don't|this (function|method|class) is (deprecated|obsolete))\b",
    re.I,
)
"""Starts of sentences that say where to look or whom it concerns, not what the code does."""


@dataclass(frozen=True)
class Pair:
    """One function: ``name`` is its dotted name, ``key`` its code without name and layout."""

    name: str
    module: str
    query: str
    code: str
    key: str


def extract(root: Path, package: str, left_out: Counter[str]) -> Iterator[Pair]:
    """Functions and methods below a folder (or in one file), in the order of paths and lines.

    Functions inside functions are part of these, and no passages of their own.

    Args:
        left_out: counts, by reason, the documented functions that make no pair.
    """
    for source in read_sources(root, package):
        if TEST_MODULE.search(source.module) or GENERATED.search(source.text[:2000]):
            continue
        lines = source.text.split("\n")
        for name, node in definitions(source.tree, source.module, local=False):
            docstring = ast.get_docstring(node, clean=False)
            if not isinstance(node, Function) or not docstring:
                continue
            pair = _pair(node, docstring, lines, name, source.module)
            if isinstance(pair, Pair):
                yield pair
            else:
                left_out[pair] += 1


def _pair(node: Function, docstring: str, lines: list[str], name: str, module: str) -> Pair | str:
    """A pair, or the reason why there is none."""
    if re.match(r"__\w+__$|test", node.name):
        return "special methods and tests"
    query = first_sentence(docstring)
    if query is None:
        return "no sentence of 4 to 25 words"
    if is_trivial(node):
        return "trivial body"
    code = bare_code(node, lines)
    if len(code) > MAX_CHARACTERS:
        return f"code of more than {MAX_CHARACTERS} characters"
    if f" {_words(query)} " in f" {_words(code)} ":
        return "the sentence is in the code"
    key = "".join(re.sub(rf"def\s+{node.name}\b", "def ", code, count=1).split())
    return Pair(name, module, query, code, key)


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def first_sentence(docstring: str) -> str | None:
    """The first sentence without mark-up and full stop; None if it is none that says something."""
    first, *others = inspect.cleandoc(docstring).split("\n\n", 1)[0].split("\n")
    if SECTION.match(first):
        return None
    kept = [first]
    for line in others:
        if SECTION.match(line.strip()):
            break
        kept.append(line)
    text = TILDE.sub(r"`\1`", " ".join(" ".join(kept).split()))
    for pattern, replacement in MARKUP:
        text = pattern.sub(replacement, text)
    sentence = " ".join(SENTENCE_END.split(text, maxsplit=1)[0].split()).rstrip(".! ")
    words = [word for word in sentence.split() if re.search("[A-Za-z]{2}", word)]
    if not WORDS[0] <= len(words) <= len(sentence.split()) <= WORDS[1]:
        return None
    if sentence.endswith((":", ",", ";")) or not sentence.isascii():
        return None
    if NO_PROSE.search(sentence) or POINTER.match(sentence):
        return None
    return sentence


def is_trivial(node: Function) -> bool:
    """Whether a body only passes, raises, returns or stores something that is there already."""
    return all(_does_nothing(statement) for statement in node.body)


def _does_nothing(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Return | ast.Expr | ast.Assign | ast.AnnAssign):
        value = statement.value
        while isinstance(value, ast.Attribute):
            value = value.value
        return value is None or isinstance(value, ast.Constant | ast.Name)
    return isinstance(
        statement, ast.Pass | ast.Raise | ast.Import | ast.ImportFrom | ast.Global | ast.Nonlocal
    )


def bare_code(node: Function, lines: list[str]) -> str:
    """A function's source, dedented, without decorators, docstrings, comments and blank lines.

    Docstrings of what it defines inside go as well.

    Args:
        lines: the file's, split at ``\\n`` alone, as the parser counts them.
    """
    own = list(lines[: node.end_lineno])
    for inner in ast.walk(node):
        if isinstance(inner, Function | ast.ClassDef) and ast.get_docstring(inner) is not None:
            _cut(own, inner.body[0])
    own = [line.lstrip("\f") for line in own[node.lineno - 1 :]]
    indent = own[0][: len(own[0]) - len(own[0].lstrip())]
    own = [line.removeprefix(indent) for line in own]
    verbatim: set[int] = set()  # lines of strings, blank ones too
    for token in tokenize.generate_tokens(io.StringIO("\n".join(own) + "\n").readline):
        row, column = token.start
        if token.type == tokenize.COMMENT:
            own[row - 1] = own[row - 1][:column].rstrip()
        elif token.end[0] > row:
            verbatim |= set(range(row - 1, token.end[0]))
    kept = (line if row in verbatim else line.rstrip() for row, line in enumerate(own))
    return "\n".join(line for row, line in enumerate(kept) if line or row in verbatim)


def _cut(lines: list[str], statement: ast.stmt) -> None:
    """Blank a statement out, the rest of its lines stays. The parser counts columns in bytes."""
    assert statement.end_lineno is not None
    first, last = statement.lineno - 1, statement.end_lineno - 1
    before = lines[first].encode()[: statement.col_offset].decode()
    after = lines[last].encode()[statement.end_col_offset :].decode().lstrip()
    lines[first : last + 1] = [before + after.removeprefix(";").lstrip(), *[""] * (last - first)]


def build(out: Path, max_pairs: int | None = None) -> dict[str, Any]:
    """Write the corpus in BEIR layout to ``out``, and what it was made from to pycode.json.

    One query has one passage. Of functions with the same code apart from name and layout the first
    stays, and so of up to three with the same sentence; more make it boilerplate, and none stays.

    Args:
        max_pairs: keep this many pairs, chosen by a hash of their names; None keeps all.

    Returns:
        What is in pycode.json.

    Raises:
        UserError: for a number below 100, or if ``out`` is a file.
    """
    check_target(out, max_pairs)
    left_out: Counter[str] = Counter()
    found: dict[str, Pair] = {}
    keys: set[str] = set()
    packages = []
    for package, root in metered(roots(), "reading Python sources", "packages"):
        packages.append(package)
        for pair in extract(root, package, left_out):
            if pair.name in found or pair.key in keys:
                left_out["copy of other code"] += 1
                continue
            keys.add(pair.key)
            found[pair.name] = pair
    pairs = _unique(found.values(), left_out)
    chosen = [pairs[name] for name in draw(pairs, max_pairs)]
    relevant: dict[str, list[tuple[str, str]]] = {split: [] for split, _ in SPLITS}
    for pair in chosen:
        relevant[split_of(pair.module)].append((f"q:{pair.name}", pair.name))
    facts = {
        "versions": versions(packages),
        "pairs": len(chosen),
        "splits": {split: len(judged) for split, judged in relevant.items()},
        "documented_functions_left_out": dict(sorted(left_out.items())),
    }
    corpus = {pair.name: pair.code for pair in chosen}
    write_beir(out, corpus, {f"q:{pair.name}": pair.query for pair in chosen}, relevant)
    write_atomically(out / "pycode.json", json.dumps(facts, indent=2) + "\n")
    return facts


def _unique(found: Iterable[Pair], left_out: Counter[str]) -> dict[str, Pair]:
    """One pair per query, by the pair's name."""
    by_query: dict[str, list[Pair]] = {}
    for pair in found:
        by_query.setdefault(_words(pair.query), []).append(pair)
    kept = {}
    for first, *others in by_query.values():
        if len(others) >= MAX_SHARED:
            left_out[f"sentence of more than {MAX_SHARED} functions"] += 1 + len(others)
        else:
            kept[first.name] = first
            left_out["sentence of another function"] += len(others)
    return kept
