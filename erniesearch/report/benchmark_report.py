"""Figures of benchmarks: as JSON, and as a report of the same kind as a run's.

Nested figures become tables: objects with the same numbers in each are the rows of one, which also
becomes bars; an object of single values is a table of two columns.
"""

import json
import sys
from pathlib import Path
from typing import Any

from erniesearch import installation
from erniesearch.errors import UserError
from erniesearch.evaluation.table import describe_machine
from erniesearch.report.ablation_report import results_blocks
from erniesearch.report.charts import bars, number
from erniesearch.report.document import Document, Section, Table, Text, clipped, plain

SOURCE = ("about", "machine", "commit", "command", "code")
MOST_ROWS = 500


def tell_figures(figures: dict[str, Any], out: Path | None, command: str) -> None:
    """A benchmark's figures as JSON, with the machine, the commit and the command that they are of:
    to standard output and, if it is given, to a file, with the report beside it (``.html``)."""
    source = {"machine": describe_machine(), "commit": installation.commit(), "command": command}
    text = json.dumps(figures | source, indent=1) + "\n"
    if out:
        out.write_text(text)
        figures_document([out]).save(out.with_suffix(".html"))
    sys.stdout.write(text)


def figures_document(paths: list[Path]) -> Document:
    """The report of benchmarks' JSON files.

    Raises:
        UserError: for a file that is missing or no JSON object.
    """
    found = {path: _read(path) for path in paths}
    if len(paths) == 1:
        facts = _source(found[paths[0]])
        sections = [Section(words, blocks) for words, blocks in _parts(found[paths[0]]).items()]
        return Document(paths[0].stem, "Figures of a benchmark", facts, sections)
    sections = []
    for path, figures in found.items():
        blocks: list[Any] = _pairs("Where the figures come from", _source(figures))
        for part in _parts(figures).values():
            blocks += part
        sections.append(Section(path.stem, blocks))
    return Document("Benchmarks", f"Figures of {len(paths)} benchmarks", {}, sections)


def _source(figures: dict[str, Any]) -> dict[str, str]:
    return {key: _flat(figures[key]) for key in SOURCE if figures.get(key)}


def _parts(figures: dict[str, Any]) -> dict[str, list[Any]]:
    """What is measured, by name."""
    if {"arms", "comparisons", "num_clusters"} <= figures.keys():
        return {"ablation": results_blocks(figures)}
    rest = {k: v for k, v in figures.items() if k not in SOURCE}
    single = {k: v for k, v in rest.items() if not isinstance(v, dict | list)}
    parts = {"single figures": _pairs("Settings and single figures", single)} if single else {}
    nested = {_words(k): v for k, v in rest.items() if isinstance(v, dict | list)}
    return parts | {words: _blocks(words, v) for words, v in nested.items()}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path}: not readable as JSON: {plain(str(error))[:200]}") from None
    if not isinstance(found, dict) or not found:
        raise UserError(f"{path}: expected a JSON object with figures")
    return found


def _blocks(title: str, value: Any) -> list[Any]:
    """A nested value as tables and bars."""
    if isinstance(value, list):
        if not all(isinstance(item, dict) for item in value):
            return [Text(f"{title}: {_flat(value)}")]
        names = [str(item.get("name", i)) for i, item in enumerate(value, 1)]
        value = {_once(name, names, i): {k: v for k, v in item.items() if k != "name"}
                 for i, (name, item) in enumerate(zip(names, value, strict=True), 1)}  # fmt: skip
    if not value:
        return []
    if all(isinstance(item, dict) for item in value.values()):
        return _rows(title, value)
    single = {k: v for k, v in value.items() if not isinstance(v, dict | list)}
    blocks = _pairs(title, single) if single else []
    for key, inner in value.items():
        if isinstance(inner, dict | list) and inner:
            blocks += _blocks(f"{title}: {_words(key)}", inner)
    return blocks


def _once(name: str, names: list[str], position: int) -> str:
    return name if names.count(name) == 1 else f"{name} ({position})"


def _rows(title: str, value: dict[str, dict[str, Any]]) -> list[Any]:
    """Objects as the rows of one table, and what is nested in them below; without a number in any,
    each by itself."""
    columns = list(dict.fromkeys(
        key for item in value.values() for key, x in item.items() if not isinstance(x, dict | list)
    ))  # fmt: skip
    blocks: list[Any] = []
    if columns:
        rows = [[_words(name), *(_flat(item[c]) if c in item else "" for c in columns)]
                for name, item in list(value.items())[:MOST_ROWS]]  # fmt: skip
        blocks.append(Table(title, ["", *map(_words, columns)], rows))
    for column in columns:
        numbers = {_words(name): float(item[column]) for name, item in value.items()
                   if _is_number(item.get(column))}  # fmt: skip
        if 2 <= len(numbers) <= 30 and len(set(numbers.values())) > 1 and len(columns) <= 6:
            chart = bars(f"{title}: {_words(column)}", numbers, _words(column))
            blocks += [chart] if chart else []
    for name, item in value.items():
        for key, inner in item.items():
            if isinstance(inner, dict | list) and inner:
                blocks += _blocks(f"{title}, {_words(name)}: {_words(key)}", inner)
    return blocks


def _pairs(title: str, values: dict[str, Any]) -> list[Any]:
    return [Table(title, ["", "value"], [[_words(k), _flat(v)] for k, v in values.items()])]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _words(key: str) -> str:
    return clipped(str(key).replace("_", " "), 120)


def _flat(value: Any) -> str:
    if value is None:
        return "–"
    if _is_number(value):
        return number(float(value))
    if isinstance(value, dict):
        return clipped(", ".join(f"{k} {_flat(v)}" for k, v in value.items()), 400)
    if isinstance(value, list):
        return clipped(", ".join(map(_flat, value)), 400)
    return clipped(str(value), 400)
