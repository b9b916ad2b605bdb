"""Mine a whole split from an index on disk, on as many ranks as there are.

Blocks of queries are dealt to ranks; each finished block is a file, so that an interrupted mining
continues, and rank 0 joins them in the order of the qrels. Neither the number of ranks nor an
interrupt changes the result.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console

from erniesearch import distributed
from erniesearch.config.options import MineOptions
from erniesearch.config.stage_keys import MineConfig
from erniesearch.data.collection import load_beir
from erniesearch.errors import UserError
from erniesearch.files import hash_files, write_atomically, written_aside
from erniesearch.progress import Meter
from erniesearch.retrieval.load import load_retriever, load_scorer
from erniesearch.retrieval.miner import (
    MinedQuery,
    Miner,
    drawn_queries,
    mined_line,
    query_blocks,
    statistics,
    told,
)
from erniesearch.retrieval.model_folder import ModelFolder, fingerprint, read_folder
from erniesearch.retrieval.vector_index import VectorIndex

PATIENCE = timedelta(days=7)
"""Ranks wait this long for the slowest; a rank that fails ends the others through the launcher."""


def mine_collection(options: MineOptions, settings: MineConfig) -> None:
    """Write negatives to ``out`` and their statistics to ``mine.json`` beside it.

    Raises:
        UserError: for input that does not load or does not belong together, and an ``out`` that
            is there.
    """
    _check(options, settings)
    target, index, seed = Path(options.out), Path(options.index), options.seed
    device = distributed.read_launcher()
    if distributed.world_size() > 1:
        distributed.initialize(PATIENCE, backend="gloo")
    collection = load_beir(options.data, options.split, options.use_titles)
    loading: dict[str, Any] = {
        "batch_size": options.batch_size, "device": device, "precision": options.precision,
    }  # fmt: skip
    retriever = load_retriever(options.model, **loading)
    scorer = load_scorer(options.teacher, **loading) if options.teacher else None
    found = VectorIndex.load(index, options.nprobe, options.ef_search, options.gpu)
    miner = Miner(
        collection, retriever, found, scorer, settings, seed, always_score=options.write_scores
    )
    qids = drawn_queries(collection, settings, seed)
    parts = target.with_name(f".{target.name}.parts")
    if distributed.is_main():
        _claim(parts, json.dumps(_record(options, settings) | {"queries": qids}))
    distributed.barrier()
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if distributed.is_main():
        if scorer is None:
            console.print("mine: no --teacher, so nothing is denoised")
        _compare_models(read_folder(options.model), index, console)
    _mine_blocks(miner, list(query_blocks(qids)), parts)
    distributed.barrier()
    if distributed.is_main():
        _join(parts, target, options.write_scores, console)


def _check(options: MineOptions, settings: MineConfig) -> None:
    if options.teacher is None:
        if options.write_scores or settings.denoise_threshold is not None:
            raise UserError("--write_scores and --denoise_threshold need the scores of a --teacher")
        if settings.selection == "spread":
            raise UserError("--selection spread goes by the scores of a --teacher: name one")
    if Path(options.out).exists():
        raise UserError(f"{options.out}: is there already: name another --out, or delete it")


def _record(options: MineOptions, settings: MineConfig) -> dict[str, Any]:
    """What the result depends on; a batch's size and the device are left out."""
    named = ("split", "seed", "use_titles", "nprobe", "ef_search", "write_scores")
    given = {name: getattr(options, name) for name in named}
    for name in ("model", "index", "data", "teacher"):
        path = getattr(options, name)
        given[name] = path and str(Path(path).absolute())
    data = Path(options.data)
    files = [data / "queries.jsonl", data / "qrels" / f"{options.split}.tsv",
             Path(options.model) / "model.safetensors",
             *Path(options.index).glob("**/index.json")]  # fmt: skip
    return given | {"settings": asdict(settings), "files": hash_files(files)}


def _compare_models(found: ModelFolder, index: Path, console: Console) -> None:
    """Say if the passages were encoded by other files than the queries: scores would be noise."""
    path = index / "index.json"
    if not path.is_file():
        return  # an index made elsewhere
    theirs = json.loads(path.read_text(encoding="utf-8"))["embeddings"]
    if theirs["model"] != fingerprint(found) and not found.only:
        console.print(
            f"mine: note: the index was encoded by {theirs['source'].get('model')}, whose files"
            f" differ from those of --model"
        )


def _claim(parts: Path, record: str) -> None:
    """Keep the parts of the same mining; those of another cannot be used."""
    path = parts / "started.json"
    if not (path.is_file() and path.read_text(encoding="utf-8") == record):
        shutil.rmtree(parts, ignore_errors=True)
        try:
            write_atomically(path, record)
        except OSError as error:
            raise UserError(
                f"{parts.parent}: cannot be written: {error.strerror}; change --out"
            ) from None


def _mine_blocks(miner: Miner, blocks: list[list[str]], parts: Path) -> None:
    rank, world_size = distributed.rank(), distributed.world_size()
    own = range(rank, len(blocks), world_size)
    todo = [k for k in own if not _part(parts, k).is_file()]
    queries = sum(len(blocks[k]) for k in todo)
    with Meter("mine, rank 0", "queries", queries, shown=rank == 0 and queries > 0) as meter:
        for k in todo:
            lines = [json.dumps(asdict(query)) + "\n" for query in miner.mine(blocks[k])]
            write_atomically(_part(parts, k), "".join(lines))
            meter.advance(len(lines))


def _part(parts: Path, number: int) -> Path:
    return parts / f"block-{number:05d}.jsonl"


def _read_parts(parts: Path) -> Iterator[MinedQuery]:
    for path in sorted(parts.glob("block-*.jsonl")):
        with path.open(encoding="utf-8") as lines:
            yield from (MinedQuery(**json.loads(line)) for line in lines)


def _join(parts: Path, target: Path, write_scores: bool, console: Console) -> None:
    facts = statistics(_read_parts(parts))
    with written_aside(target) as aside:
        with aside.open("w", encoding="utf-8") as handle:
            for query in _read_parts(parts):
                handle.write(mined_line(query, write_scores))
        write_atomically(target.with_name("mine.json"), json.dumps(facts, indent=2) + "\n")
    shutil.rmtree(parts)
    console.print(f"{told(facts)}; {target}")
