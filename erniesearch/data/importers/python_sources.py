"""Python sources on this machine: the standard library and what our own dependencies install.

Files are parsed, never imported. What comes out depends on the installed versions and on nothing
else.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from erniesearch.errors import UserError
from erniesearch.files import write_atomically

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
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One parsed file: ``module`` is its dotted name, lines of ``text`` end in ``\\n`` alone."""

    module: str
    text: str
    tree: ast.Module


def roots() -> Iterator[tuple[str, Path]]:
    """The standard library as ``stdlib``, then every package of PACKAGES that is installed."""
    yield "stdlib", Path(sysconfig.get_path("stdlib"))
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec and spec.submodule_search_locations:
            yield package, Path(next(iter(spec.submodule_search_locations)))


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Python's version as ``python``, and those of the distributions that packages come from."""
    distributions = importlib.metadata.packages_distributions()
    found = {"python": sys.version.split()[0]}
    for package in packages:
        for distribution in distributions.get(package, [])[:1]:
            found[package] = importlib.metadata.version(distribution)
    return found


def read_sources(root: Path, package: str) -> Iterator[Source]:
    """Files below a folder (or one file), in the order of paths.

    Tests and vendored copies are skipped, and files that are not UTF-8 or that this Python does
    not parse.
    """
    files = [root] if root.is_file() else sorted(root.rglob("*.py"))
    for path in files:
        relative = path.relative_to(root.parent)
        if SKIPPED_FOLDERS & set(relative.parts[:-1]):
            continue
        parts = [*relative.parts[:-1], relative.stem]
        if package == "stdlib":
            parts = parts[1:]
        module = ".".join(part for part in parts if part != "__init__") or package
        try:
            text = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(text)
        except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError):
            continue
        yield Source(module, text, tree)


def definitions(
    node: ast.Module | Definition, name: str, local: bool = True
) -> Iterator[tuple[str, ast.Module | Definition]]:
    """The node and the classes and functions in it, in order, with their dotted names.

    ``local`` includes those inside functions.
    """
    yield name, node
    if local or isinstance(node, ast.Module | ast.ClassDef):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Definition):
                yield from definitions(child, f"{name}.{child.name}", local)


def split_of(module: str) -> str:
    """A module's split, by the hash of its name."""
    bucket = int(hashlib.sha256(module.encode()).hexdigest(), 16) % 100
    for split, share in SPLITS:
        if bucket < share:
            return split
        bucket -= share
    raise AssertionError("shares add up to 100")


def draw(names: Iterable[str], number: int | None) -> list[str]:
    """``number`` of the names, or all: those with the smallest hashes, in alphabetical order."""
    return sorted(sorted(names, key=lambda n: hashlib.sha256(n.encode()).hexdigest())[:number])


def check_target(out: Path, max_pairs: int | None) -> None:
    """Refuse what cannot work before anything is read.

    Raises:
        UserError: for fewer than 100 pairs, or if ``out`` is a file.
    """
    if max_pairs is not None and max_pairs < 100:
        raise UserError(f"--max_pairs is {max_pairs}: must be 100 or more")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file, expected a folder to write to")


def write_beir(
    out: Path,
    corpus: Mapping[str, str],
    queries: Mapping[str, str],
    relevant: Mapping[str, list[tuple[str, str]]],
) -> None:
    """Write texts by id without titles, and ``(query id, passage id)`` by split.

    A split without pairs gets a file with its header alone.
    """
    records = {
        "corpus": [{"_id": pid, "title": "", "text": text} for pid, text in corpus.items()],
        "queries": [{"_id": qid, "text": text} for qid, text in queries.items()],
    }
    for name, rows in records.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        write_atomically(out / f"{name}.jsonl", "".join(lines))
    for split, _ in SPLITS:
        judged = [f"{qid}\t{pid}\t1\n" for qid, pid in relevant.get(split, [])]
        text = "query-id\tcorpus-id\tscore\n" + "".join(judged)
        write_atomically(out / "qrels" / f"{split}.tsv", text)
