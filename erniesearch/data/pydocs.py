"""The embedded corpus: docstrings of the standard library and of installed packages.

A docstring's summary line is the query, the rest of it the relevant passage. Real text, on every
machine, nothing downloaded and nothing shipped. Sources are parsed, never imported. What comes
out depends on the installed versions and on nothing else.
"""

import ast
import hashlib
import importlib.util
import inspect
import json
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from erniesearch.errors import UserError
from erniesearch.stages import write_atomically

PACKAGES = (
    "accelerate", "bm25s", "datasets", "deepspeed", "fsspec", "huggingface_hub", "ir_measures",
    "jsonargparse", "networkx", "numpy", "packaging", "pandas", "pip", "psutil", "pydantic",
    "rich", "scipy", "setuptools", "sympy", "torch", "tqdm", "yaml",
)  # fmt: skip
"""Besides the standard library: what our own dependencies install."""
SKIPPED_FOLDERS = {
    "test", "tests", "testing", "idlelib", "lib2to3", "turtledemo", "site-packages", "_vendor",
    "vendored",
}  # fmt: skip
SPLITS = (("test", 15), ("dev", 5), ("train", 80))
"""Share of the modules in each split, in per cent."""


@dataclass(frozen=True)
class Pair:
    """One docstring: ``name`` is the dotted name of what it documents."""

    name: str
    module: str
    summary: str
    body: str


def extract(root: Path, package: str) -> Iterator[Pair]:
    """Docstrings below a folder (or in one file), in the order of paths and lines."""
    files = [root] if root.is_file() else sorted(root.rglob("*.py"))
    base = root.parent
    for path in files:
        relative = path.relative_to(base)
        if SKIPPED_FOLDERS & set(relative.parts[:-1]):
            continue
        parts = [*relative.parts[:-1], relative.stem]
        if package == "stdlib":
            parts = parts[1:]
        module = ".".join(part for part in parts if part != "__init__") or package
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError):
            continue
        yield from _docstrings(tree, module, module)


def _docstrings(node: ast.AST, name: str, module: str) -> Iterator[Pair]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        pair = _split(ast.get_docstring(node, clean=False), name, module)
        if pair:
            yield pair
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _docstrings(child, f"{name}.{child.name}", module)


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


def _roots() -> Iterator[tuple[str, Path]]:
    yield "stdlib", Path(sysconfig.get_path("stdlib"))
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec and spec.submodule_search_locations:
            yield package, Path(next(iter(spec.submodule_search_locations)))


def _split_of(module: str) -> str:
    """A module's split, by the hash of its name."""
    bucket = int(hashlib.sha256(module.encode()).hexdigest(), 16) % 100
    for split, share in SPLITS:
        if bucket < share:
            return split
        bucket -= share
    raise AssertionError("shares add up to 100")


def build(out: Path, max_pairs: int | None = None) -> dict[str, object]:
    """Write the corpus in BEIR layout to ``out`` and return what was read.

    Identical bodies count once. Docstrings with the same summary (at most three) share one query
    with several relevant passages; summaries shared by more are boilerplate and left out.

    Args:
        max_pairs: keep this many pairs, chosen by a hash of their names; None keeps all.

    Raises:
        UserError: for a number below 100, or if ``out`` is a file.
    """
    if max_pairs is not None and max_pairs < 100:
        raise UserError(f"--max_pairs is {max_pairs}: must be 100 or more")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file, expected a folder to write to")
    pairs: dict[str, Pair] = {}
    bodies: set[str] = set()
    packages: dict[str, int] = {}
    for package, root in _roots():
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
    groups = [group for group in by_summary.values() if len(group) <= 3]
    groups.sort(key=lambda group: hashlib.sha256(group[0].name.encode()).hexdigest())
    if max_pairs is not None:
        groups = groups[:max_pairs]
    groups.sort(key=lambda group: group[0].name)
    corpus, queries = [], []
    qrels: dict[str, list[str]] = {split: [] for split, _ in SPLITS}
    for group in groups:
        qid = f"q:{group[0].name}"
        queries.append({"_id": qid, "text": group[0].summary})
        for pair in group:
            corpus.append({"_id": pair.name, "title": "", "text": pair.body})
            qrels[_split_of(group[0].module)].append(f"{qid}\t{pair.name}\t1\n")
    for name, records in (("corpus", corpus), ("queries", queries)):
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_atomically(out / f"{name}.jsonl", text)
    for split, lines in qrels.items():
        header = "query-id\tcorpus-id\tscore\n"
        write_atomically(out / "qrels" / f"{split}.tsv", header + "".join(lines))
    return {
        "python": sys.version.split()[0],
        "passages": len(corpus),
        "queries": len(queries),
        "qrels": {split: len(lines) for split, lines in qrels.items()},
        "docstrings": packages,
    }
