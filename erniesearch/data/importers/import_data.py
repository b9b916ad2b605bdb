"""``erniesearch data import``: one reader, one writer, nothing half-written."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from erniesearch.config.options import ImportOptions
from erniesearch.data.importers import (
    beir,
    dpr,
    dureader,
    msmarco,
    pairs,
    pylate,
    squad,
    tables,
    tevatron,
)
from erniesearch.data.importers.beir_writer import BeirWriter, put_in_place
from erniesearch.data.importers.records import BadLines, Reader, Record
from erniesearch.errors import UserError, nearest
from erniesearch.progress import PATIENCE, Meter, metered

FORMATS: dict[str, Reader] = {
    "beir": beir.read,
    "msmarco": msmarco.read,
    "dpr": dpr.read,
    "nq": dpr.read,
    "tevatron": tevatron.read,
    "flagembedding": pairs.read,
    "pylate": pylate.read,
    "dureader": dureader.read,
    "squad": squad.read,
    "hf": tables.read,
    "parquet": tables.read,
}


def convert(
    name: str,
    sources: list[Path],
    out: Path,
    options: ImportOptions,
) -> dict[str, Any]:
    """Read ``sources`` in the format ``name`` and write a BEIR folder; returns import.json.

    The folder is written aside and renamed at the end; after an error nothing is left.

    Raises:
        UserError: naming file, line and remedy.
    """
    if name not in FORMATS:
        raise UserError(f"format '{name}': one of {', '.join(FORMATS)}{nearest(name, FORMATS)}")
    held_out = _hold_out(options.hold_out)
    if out.exists() and not options.overwrite:
        raise UserError(f"{out}: is there already; choose another --out, or --overwrite")
    if out.exists():
        _check_replaceable(out, sources)
    aside = out.with_name(f".{out.name}.import-{os.getpid()}")
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out.parent}: cannot be written: {error.strerror}") from None
    bad = BadLines(options.skip_bad)
    writer = BeirWriter(aside, bad, options.max_negatives)
    try:
        for record in _metered(FORMATS[name](sources, options, bad), sources):
            try:
                writer.write(record)
            except UserError as error:
                bad.skip(error)
        for split, number in held_out.items():
            writer.hold_out(split, number, options.seed)
        facts = writer.finish({"format": name, "sources": [str(path) for path in sources]})
        put_in_place(aside, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from None
    finally:
        writer.close()
        shutil.rmtree(aside, ignore_errors=True)
    return facts


def _metered(records: Iterator[Record], sources: list[Path]) -> Iterator[Record]:
    """The records, and how far the sources are read: by where this process stands in them, which
    Linux tells, compressed or not and whichever library reads."""
    files = {file for source in sources for file in (source, *source.rglob("*")) if file.is_file()}
    sizes = {str(file.resolve()): file.stat().st_size for file in files}
    if not sizes or not psutil.LINUX:  # a dataset by its name
        yield from metered(records, "importing", "records")
        return
    process, at, looked, number = psutil.Process(), dict.fromkeys(sizes, 0), 0.0, 0
    with Meter("importing", "bytes", sum(sizes.values()), patience=PATIENCE) as meter:
        for number, record in enumerate(records, 1):
            if (now := time.monotonic()) - looked > 1:
                looked, before = now, {path for path, position in at.items() if position}
                opened = {file.path: file.position for file in process.open_files()}
                for path in (before | opened.keys()) & sizes.keys():  # what is closed has been read
                    at[path] = max(at[path], opened.get(path, sizes[path]))
                meter.reach(sum(at.values()), f"{number:,} records", records=number)
            yield record
        meter.reach(sum(sizes.values()), records=number)


def _hold_out(text: str) -> dict[str, int]:
    found = {}
    for part in filter(None, text.split(",")):
        split, _, number = part.partition("=")
        if not split.isidentifier() or not number.isdigit() or int(number) < 1 or split == "train":
            raise UserError(f"--hold_out {text}: expected SPLIT=NUMBER, for example dev=200")
        found[split] = int(number)
    return found


def _check_replaceable(out: Path, sources: list[Path]) -> None:
    if out.is_symlink() or not out.is_dir() or not (out / "corpus.jsonl").is_file():
        raise UserError(f"{out}: holds no corpus.jsonl, so --overwrite does not replace it")
    for source in sources:
        if source.resolve().is_relative_to(out.resolve()):
            raise UserError(f"{out}: holds the source {source}; choose another --out")
