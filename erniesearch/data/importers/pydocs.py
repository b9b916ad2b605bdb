"""The embedded corpus: docstrings of the standard library and of installed packages.

A docstring's summary line is the query, the rest of it the relevant passage. Real text, on every
machine, nothing downloaded and nothing shipped.
"""

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from erniesearch.data.importers.python_sources import (
    SPLITS,
    check_target,
    definitions,
    draw,
    read_sources,
    roots,
    split_of,
    write_beir,
)
from erniesearch.progress import metered


@dataclass(frozen=True)
class Pair:
    """One docstring: ``name`` is the dotted name of what it documents."""

    name: str
    module: str
    summary: str
    body: str


def extract(root: Path, package: str) -> Iterator[Pair]:
    """Docstrings below a folder (or in one file), in the order of paths and lines."""
    for source in read_sources(root, package):
        for name, node in definitions(source.tree, source.module):
            pair = _split(ast.get_docstring(node, clean=False), name, source.module)
            if pair:
                yield pair


def _split(docstring: str | None, name: str, module: str) -> Pair | None:
    """Summary line and the rest, or None if either says too little."""
    if not docstring:
        return None
    paragraphs = inspect.cleandoc(docstring).split("\n\n", 1)
    if len(paragraphs) < 2:
        return None
    summary, body = (" ".join(re.sub(r"[`*]{1,2}", "", p).split()) for p in paragraphs)
    if not 4 <= len(summary.split()) <= 24 or not len(body.split()) >= 10:
        return None
    if not all(re.search("[A-Za-z]{3}", text) for text in (summary, body)):
        return None
    return Pair(name, module, summary.rstrip("."), body[:2000])


def build(out: Path, max_pairs: int | None = None) -> dict[str, object]:
    """Write the corpus in BEIR layout to ``out`` and return what was read.

    Identical bodies count once. Docstrings with the same summary (at most three) share one query
    with several relevant passages; summaries shared by more are boilerplate and left out.

    Args:
        max_pairs: keep this many pairs, chosen by a hash of their names; None keeps all.

    Raises:
        UserError: for a number below 100, or if ``out`` is a file.
    """
    check_target(out, max_pairs)
    pairs: dict[str, Pair] = {}
    bodies: set[str] = set()
    packages: dict[str, int] = {}
    for package, root in metered(roots(), "reading Python sources", "packages"):
        before = len(pairs)
        for pair in extract(root, package):
            if pair.name not in pairs and pair.body not in bodies:
                bodies.add(pair.body)
                pairs[pair.name] = pair
        packages[package] = len(pairs) - before
    by_summary: dict[str, list[Pair]] = {}
    for pair in pairs.values():
        by_summary.setdefault(pair.summary.lower(), []).append(pair)
    # One split per query: a summary shared across splits stays with its first module's.
    groups = {group[0].name: group for group in by_summary.values() if len(group) <= 3}
    corpus, queries = {}, {}
    relevant: dict[str, list[tuple[str, str]]] = {split: [] for split, _ in SPLITS}
    for first in draw(groups, max_pairs):
        qid = f"q:{first}"
        queries[qid] = groups[first][0].summary
        for pair in groups[first]:
            corpus[pair.name] = pair.body
            relevant[split_of(groups[first][0].module)].append((qid, pair.name))
    write_beir(out, corpus, queries, relevant)
    return {
        "python": sys.version.split()[0],
        "passages": len(corpus),
        "queries": len(queries),
        "splits": {split: len(pairs) for split, pairs in relevant.items()},
        "docstrings": packages,
    }
