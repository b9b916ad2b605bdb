"""Encode a collection shard by shard, on as many ranks as there are.

Shard k is done by rank k mod W. What a shard holds depends on its rows alone, so that neither the
number of ranks nor a restart changes a byte; ranks exchange nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from erniesearch import distributed
from erniesearch.config.options import EncodeOptions
from erniesearch.data.collection import read_qrels, read_queries
from erniesearch.data.corpus.texts import open_corpus
from erniesearch.data.corpus.tokens import open_tokens
from erniesearch.errors import UserError
from erniesearch.files import hash_files
from erniesearch.models.encoder import Side
from erniesearch.progress import Meter, say
from erniesearch.retrieval.embeddings import (
    DTYPES,
    Manifest,
    claim,
    is_whole,
    shard_path,
    write_shard,
)
from erniesearch.retrieval.load import load_retriever
from erniesearch.retrieval.model_folder import as_named, fingerprint, read_folder
from erniesearch.retrieval.retriever import Retriever, StoredTokens, Texts

SHARD_SIZES = {"vectors": 50_000, "tokens": 5_000}
"""Rows of a shard by default: some hundred megabytes, which one rank holds in memory."""


@dataclass(frozen=True)
class Collection:
    """What to encode: parallel ids and texts, and a hash of the files they come from."""

    ids: Sequence[str]
    texts: Sequence[str]
    fingerprint: str


def read_collection(root: Path, side: Side, split: str | None, use_titles: bool) -> Collection:
    """The passages of a folder in BEIR layout, or its queries.

    Args:
        split: only queries of this qrels file; None takes all. Passages belong to every split.

    Raises:
        UserError: naming file and line.
    """
    corpus = root / "corpus.jsonl"
    if side == "passage":
        if split is not None:
            raise UserError("--split selects queries: leave it out, or give --side query")
        opened = open_corpus(corpus, use_titles)
        kind = "titles" if use_titles else "texts"
        return Collection(opened.pids, opened.passages, f"{hash_files([corpus])}-{kind}")
    files = [root / "queries.jsonl"]
    queries = read_queries(files[0])
    if split is not None:
        files.append(root / "qrels" / f"{split}.tsv")
        qrels = read_qrels(files[1], queries, open_corpus(corpus, use_titles).index_of)
        queries = {qid: queries[qid] for qid in qrels}
    return Collection(list(queries), list(queries.values()), hash_files(files))


def encode_collection(options: EncodeOptions) -> None:
    """Encode this rank's shards of a collection; those already there are left as they are.

    Raises:
        UserError: for a model or collection that does not load, or an ``out`` that holds other
            embeddings.
    """
    model, side, out = options.model, options.side, Path(options.out)
    device = distributed.read_launcher()
    found = read_folder(model, options.pooling)
    what = options.what or ("vectors" if found.has_vectors else "tokens")
    if not (found.has_vectors if what == "vectors" else found.has_tokens):
        raise UserError(f"model '{model}' is a {found.kind.replace('_', '-')}: it makes no {what}")
    if what == "tokens" and options.dim is not None:  # a stage's student makes both
        raise UserError(f"--dim {options.dim}: token vectors are not shortened; leave it out")
    if found.only and found.only != side:
        raise UserError(f"model '{model}' is the {found.only} tower: --side {found.only}")
    collection = read_collection(Path(options.data), side, options.split, options.use_titles)
    retriever = load_retriever(
        model, batch_size=options.batch_size, device=device, pooling=options.pooling,
        max_query_length=options.max_length if side == "query" else None,
        max_passage_length=options.max_length if side == "passage" else None,
        precision=options.precision, trust_remote_code=options.trust_remote_code,
    ).truncate(options.dim)  # fmt: skip
    manifest = Manifest(
        what=what, side=side, dtype=options.dtype,
        dim=retriever.dim if what == "vectors" else retriever.token_dim,
        rows=len(collection.ids), shard_size=options.shard_size or SHARD_SIZES[what],
        max_length=retriever.lengths[side], precision=retriever.precision,
        model=fingerprint(found),
        data=collection.fingerprint,
        source={name: as_named(getattr(options, name)) for name in ("model", "data")},
    )  # fmt: skip
    claim(out, manifest)
    encode_shards(retriever, collection, out, manifest)


def encode_shards(
    retriever: Retriever, collection: Collection, folder: Path, manifest: Manifest
) -> None:
    """This rank's shards of a folder that is claimed.

    Raises:
        UserError: for values that the manifest's dtype cannot hold, and a full disk.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    mine = range(rank, manifest.num_shards, world_size)
    todo = [k for k in mine if not is_whole(folder, manifest, k)]
    total, rows = (sum(e - s for s, e in map(manifest.bounds, own)) for own in (mine, todo))
    store = None
    if manifest.side == "passage" and rows > 0 and retriever.reads_stored_tokens:
        prompt = retriever.text_format.passage.prompt
        store = open_tokens(collection.texts, retriever.tokenizer, prompt)
    unit = "passages" if manifest.side == "passage" else "queries"
    say(
        f"encode: {manifest.rows:,} {unit} to {manifest.what} of {manifest.dim} in"
        f" {manifest.dtype}, {manifest.num_shards} shards on {world_size} ranks;"
        f" rank 0 has {len(mine)}, {len(mine) - len(todo)} are there"
    )
    with Meter(
        f"encoding {manifest.what}, rank 0's share", unit, total, rows > 0, done=total - rows
    ) as meter:
        for k in todo:
            start, end = manifest.bounds(k)
            texts = (
                StoredTokens(store, np.arange(start, end)) if store else collection.texts[start:end]
            )
            if manifest.what == "vectors":
                encoded, offsets = _vectors(retriever, texts, manifest, meter), None
            else:
                encoded, offsets = _tokens(retriever, texts, manifest, meter)
            if not torch.isfinite(encoded).all():
                raise UserError(
                    f"{shard_path(folder, k)}: values that {manifest.dtype} cannot hold: --dtype"
                    " bf16 or fp32, or a model without overflows"
                )
            write_shard(folder, manifest, k, collection.ids[start:end], encoded, offsets)
    if rows:
        say(f"encode: rank 0 done, {meter.rate:,.1f} {unit}/s")


def _vectors(retriever: Retriever, texts: Texts, manifest: Manifest, meter: Meter) -> Tensor:
    out = torch.empty(len(texts), manifest.dim, dtype=DTYPES[manifest.dtype])
    for positions, batch in retriever.vector_batches(texts, manifest.side, out.dtype):
        out[torch.from_numpy(positions)] = batch
        meter.advance(len(positions))
    return out


def _tokens(
    retriever: Retriever, texts: Texts, manifest: Manifest, meter: Meter
) -> tuple[Tensor, Tensor]:
    parts: list[Tensor] = [torch.empty(0)] * len(texts)
    dtype = DTYPES[manifest.dtype]
    for positions, batch in retriever.token_batches(texts, manifest.side, dtype):
        for position, vectors in zip(positions, batch, strict=True):
            parts[position] = vectors
        meter.advance(len(positions))
    lengths = torch.tensor([0, *map(len, parts)])
    return torch.cat(parts), lengths.cumsum(0)
