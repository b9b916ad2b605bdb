"""Mine a whole split from an index on disk, on as many ranks as there are.

Blocks of queries are dealt to ranks (:mod:`erniesearch.retrieval.parts`), and rank 0 joins them in
the order of the qrels.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from erniesearch import distributed
from erniesearch.config.options import MineOptions
from erniesearch.config.stage_keys import MineConfig
from erniesearch.data.collection import load_beir
from erniesearch.errors import UserError
from erniesearch.files import hash_files, write_atomically, written_aside
from erniesearch.progress import Meter, say
from erniesearch.retrieval.first_stage import is_token_index, open_index
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
from erniesearch.retrieval.model_folder import ModelFolder, as_named, fingerprint, read_folder
from erniesearch.retrieval.parts import PATIENCE, Parts


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
    retriever = load_retriever(
        options.model, **loading, trust_remote_code=options.trust_remote_code
    ).truncate(options.dim)
    scorer = load_scorer(options.teacher, **loading) if options.teacher else None
    found = open_index(
        index,
        read_folder(options.model),
        options.nprobe,
        options.ef_search,
        options.gpu,
        options.candidates,
    )
    miner = Miner(
        collection, retriever, found, scorer, settings, seed, always_score=options.write_scores
    )
    qids = drawn_queries(collection, settings, seed)
    parts = Parts(target)
    if distributed.is_main():
        parts.claim(json.dumps(_record(options, settings) | {"queries": qids}))
    distributed.barrier()
    if distributed.is_main():
        if scorer is None:
            say("mine: no --teacher, so nothing is denoised")
        _compare_models(read_folder(options.model), index)
    _mine_blocks(miner, list(query_blocks(qids)), parts)
    distributed.barrier()
    if distributed.is_main():
        _join(parts, target, options)


def _check(options: MineOptions, settings: MineConfig) -> None:
    if options.teacher is None:
        asked = {"write_scores": options.write_scores, **{
            name: getattr(settings, name) is not None
            for name in ("denoise_threshold", "denoise_relative_margin")
        }}  # fmt: skip
        if any(asked.values()):
            flags = " and ".join(f"--{name}" for name in asked if asked[name])
            raise UserError(f"{flags} need the scores of a --teacher: name one, or leave them out")
        if settings.selection == "spread":
            raise UserError("--selection spread goes by the scores of a --teacher: name one")
    if Path(options.out).exists():
        raise UserError(f"{options.out}: is there already: name another --out, or delete it")


def _record(options: MineOptions, settings: MineConfig) -> dict[str, Any]:
    """What the result depends on; a batch's size and the device are left out."""
    named = ("split", "seed", "use_titles", "nprobe", "ef_search", "candidates",
             "write_scores", "dim")  # fmt: skip
    given = {name: getattr(options, name) for name in named}
    for name in ("model", "index", "data", "teacher"):
        path = getattr(options, name)
        given[name] = path and as_named(path)
    data = Path(options.data)
    files = [data / "queries.jsonl", data / "qrels" / f"{options.split}.tsv",
             *Path(read_folder(options.model).settings.path).glob("*.safetensors"),
             *Path(options.index).glob("**/index.json")]  # fmt: skip
    return given | {"settings": asdict(settings), "files": hash_files(files)}


def _compare_models(found: ModelFolder, index: Path) -> None:
    """Say if the passages were encoded by other files than the queries: scores would be noise."""
    path = index / "index.json"
    if not path.is_file():
        return  # an index made elsewhere
    theirs = json.loads(path.read_text(encoding="utf-8"))["embeddings"]
    if theirs["model"] != fingerprint(found) and not found.only:
        say(
            f"the index was encoded by {theirs['source'].get('model')}, whose files differ from"
            " those of --model", "warning",
        )  # fmt: skip


def _mine_blocks(miner: Miner, blocks: list[list[str]], parts: Parts) -> None:
    todo = parts.todo(len(blocks))
    queries = sum(len(blocks[k]) for k in todo)
    with Meter("mining, rank 0's share", "queries", queries, queries > 0) as meter:
        for k in todo:
            with meter.part(len(blocks[k])):
                mined = miner.mine(blocks[k])
            parts.write(k, [json.dumps(asdict(query)) + "\n" for query in mined])


def _queries(parts: Parts) -> Iterator[MinedQuery]:
    return (MinedQuery(**json.loads(line)) for line in parts.lines())


def _join(parts: Parts, target: Path, options: MineOptions) -> None:
    late = is_token_index(Path(options.index))
    facts = statistics(_queries(parts), "late_interaction" if late else "dual_encoder")
    with written_aside(target) as aside:
        with aside.open("w", encoding="utf-8") as handle:
            for query in _queries(parts):
                handle.write(mined_line(query, options.write_scores))
        write_atomically(target.with_name("mine.json"), json.dumps(facts, indent=2) + "\n")
    parts.remove()
    say(f"{told(facts)}; {target}")
