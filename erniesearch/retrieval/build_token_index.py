"""Token vectors on disk to a late-interaction index, part by part.

Finished parts lie in ``.NAME.parts`` beside the index until all are there: the same command
continues after an interrupt. The same embeddings give the same bytes with the same number of
threads.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from math import log2
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap

from erniesearch.config.options import IndexOptions
from erniesearch.errors import UserError
from erniesearch.files import hold_lock, sync, write_atomically, written_aside
from erniesearch.progress import Meter, say, waiting
from erniesearch.retrieval.embeddings import Embeddings, Shard
from erniesearch.retrieval.parts import Parts
from erniesearch.retrieval.vector_index import faiss, faiss_call, require_faiss, write_index

BLOCK = 1 << 16
"""Token vectors encoded at a time."""
POINTS_PER_CENTROID = 40
"""Token vectors per centroid to train on by default; FAISS advises 39 at least."""
SMALL = 1 << 16
"""Below so many token vectors an index keeps them as they are by default, and has few lists."""
ITERATIONS, CODEBOOK_ITERATIONS, CODEBOOK_POINTS = 4, 10, 64
"""Of k-means: over the centroids as PLAID has them; over each codebook of 256, and the vectors per
code that it is trained on."""
NPROBE = 8


@dataclass(frozen=True)
class TokenPlan:
    """What building will take; ``starts`` are the first tokens of each shard, and their number."""

    bits: int
    centroids: int
    sample: int
    starts: list[int]
    codec: Any

    @property
    def tokens(self) -> int:
        """Token vectors in all."""
        return self.starts[-1]

    @property
    def id_bytes(self) -> int:
        """Of a token's centroid."""
        return 2 if self.centroids <= 1 << 16 else 4

    @property
    def bytes_per_token(self) -> int:
        """Code and centroid of a token vector; the lists add at most four."""
        return int(self.codec.code_size) + self.id_bytes


def plan_token_index(source: Embeddings, options: IndexOptions) -> TokenPlan:
    """Make the empty codec and estimate the work.

    Raises:
        UserError: for options of vectors, and sizes that do not fit one another.
    """
    require_faiss()
    for name, default in (("factory", None), ("metric", "ip"), ("shards", 1), ("ef_search", None),
                          ("gpu", False)):  # fmt: skip
        if getattr(options, name) != default:
            raise UserError(
                f"--{name} is for one vector a passage, and {source.folder} holds token vectors:"
                " leave it out"
            )
    starts = [0]
    for shard in source:
        assert shard.offsets is not None
        starts.append(starts[-1] + int(shard.offsets[-1]))
    tokens, dim = starts[-1], source.manifest.dim
    if not tokens:
        raise UserError(f"{source.folder}: no token vectors at all: nothing to index")
    bits = options.bits or (16 if tokens < SMALL else 4)
    centroids = options.num_centroids or default_centroids(tokens)
    sample = min(tokens, options.train_sample or max(SMALL, POINTS_PER_CENTROID * centroids))
    least = max(centroids, 256 if bits < 8 else 1)
    if sample < least:
        told = "--train_sample" if sample < tokens else "the collection's"
        raise UserError(
            f"{centroids:,} centroids and codes of {bits} bits cannot be trained on {told}"
            f" {sample:,} token vectors: {least:,} at least, or fewer --num_centroids, or --bits 16"
        )
    return TokenPlan(bits, centroids, sample, starts, _codec(dim, centroids, bits, options.seed))


def default_centroids(tokens: int) -> int:
    """As PLAID: the power of two nearest to 16 √tokens, and a sixteenth of very few tokens."""
    return max(1, min(1 << round(log2(16 * tokens**0.5)), tokens // 16))


def _codec(dim: int, centroids: int, bits: int, seed: int) -> Any:
    """An IVF index whose codes take ``bits`` per dimension."""
    if bits >= 8:
        codes = {8: "SQ8", 16: "SQfp16"}[bits]
    else:
        per_code = 8 // bits
        if dim % per_code:
            raise UserError(f"--bits {bits}: {dim} dimensions are no multiple of {per_code};"
                            " take 8 or 16")  # fmt: skip
        codes = f"PQ{dim // per_code}x8"
    make = partial(faiss.index_factory, dim, f"IVF{centroids},{codes}", faiss.METRIC_INNER_PRODUCT)
    index: Any = faiss_call(make, f"{centroids} centroids for {dim} dimensions")
    index.cp.niter, index.cp.seed, index.cp.min_points_per_centroid = ITERATIONS, seed, 1
    if bits < 8:
        index.pq.cp.niter, index.pq.cp.max_points_per_centroid = (
            CODEBOOK_ITERATIONS, CODEBOOK_POINTS,
        )  # fmt: skip
        index.pq.cp.min_points_per_centroid = 1
        index.do_polysemous_training = False  # it orders codes for Hamming distances: not for us
    # What fp16 keeps of a vector is what the embeddings have; of a difference it would be less.
    index.by_residual = bits < 16
    return index


def build_token_index(options: IndexOptions, source: Embeddings) -> None:
    """Build an index folder, or go on with one; ``out`` appears when it is whole.

    Raises:
        UserError: as :func:`plan_token_index`, and for an ``out`` that cannot be written.
    """
    folder = Path(options.out)
    plan = plan_token_index(source, options)
    manifest = source.manifest
    record = {
        "kind": "late_interaction", "dim": manifest.dim, "rows": manifest.rows,
        "tokens": plan.tokens, "bits": plan.bits, "num_centroids": plan.centroids,
        "train_sample": plan.sample, "seed": options.seed, "nprobe": options.nprobe or NPROBE,
        "candidates": options.candidates, "embeddings": asdict(manifest),
    }  # fmt: skip
    started = Parts(folder)
    parts = started.folder
    say(
        f"index: {plan.tokens:,} token vectors of {manifest.dim} of {manifest.rows:,} passages,"
        f" {plan.centroids:,} centroids trained on {plan.sample:,}, {plan.bits} bits a dimension:"
        f" {plan.bytes_per_token} bytes a token and at most 4 for the lists, about"
        f" {plan.tokens * (plan.bytes_per_token + 4) / 2**20:,.1f} MiB on disk and"
        f" {(plan.sample + BLOCK + plan.centroids) * manifest.dim * 4 / 2**20:,.0f} MiB of memory"
    )
    with hold_lock(folder.with_name(f".{folder.name}.lock"), "`erniesearch index`"):
        try:
            started.claim(json.dumps(record))
            _build(source, parts, plan, record | {"normalized": _train(source, parts, plan)})
            if folder.is_dir():
                folder.rmdir()
            os.replace(parts, folder)
            sync(folder.parent)
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be written: {error.strerror}; change --out"
            ) from None
    size = sum(path.stat().st_size for path in folder.iterdir())
    say(
        f"index: {folder}, {size / 2**20:,.1f} MiB, {size / plan.tokens:.1f} bytes a token, all"
        " files together"
    )


def _train(source: Embeddings, parts: Path, plan: TokenPlan) -> bool:
    """Train the codec, unless it is there; returns whether the vectors have length 1."""
    told = parts / "normalized.json"
    if not told.is_file():
        seed = int(plan.codec.cp.seed)
        drawn = np.random.default_rng([seed, 9]).choice(plan.tokens, plan.sample, replace=False)
        sample = _token_rows(source, np.sort(drawn), plan.starts)
        if not np.isfinite(sample).all():
            raise UserError(f"{source.folder}: values that are not finite: encode again")
        lengths = np.linalg.norm(sample[:BLOCK], axis=1)
        with waiting(f"training on {plan.sample:,} token vectors", 0):
            faiss_call(partial(plan.codec.train, sample), f"{plan.centroids} centroids")
        write_index(plan.codec, parts)
        os.replace(parts / "index", parts / "codec")
        write_atomically(told, json.dumps(bool(np.abs(lengths - 1).max() < 0.02)))
    normalized: bool = json.loads(told.read_text())
    return normalized and plan.bits < 16


def _build(source: Embeddings, parts: Path, plan: TokenPlan, record: dict[str, Any]) -> None:
    codec: Any = faiss.read_index(str(parts / "codec"))
    rows, kind = len(source), np.uint16 if plan.id_bytes == 2 else np.uint32
    offsets = _array(parts / "offsets.npy", (rows + 1,), np.int64)
    centroids = _array(parts / "centroids.npy", (plan.tokens,), kind)
    codes = _array(parts / "codes.npy", (plan.tokens, codec.code_size), np.uint8)
    progress = parts / "progress.json"
    done = json.loads(progress.read_text()) if progress.is_file() else 0
    with Meter("adding", "token vectors", plan.tokens, done=plan.starts[done]) as meter:
        for number in range(done, source.manifest.num_shards):
            shard, start = source.shard(number), plan.starts[number]
            assert shard.offsets is not None
            ends = shard.start + 1, shard.start + len(shard.offsets)
            offsets[ends[0] : ends[1]] = start + shard.offsets[1:].numpy()
            for low, vectors in _blocks(shard):
                at = slice(start + low, start + low + len(vectors))
                centroids[at], codes[at] = _split(codec, vectors)
                meter.advance(len(vectors))
            for array in (offsets, centroids, codes):
                array.flush()
            write_atomically(progress, json.dumps(number + 1))
    with waiting("writing the lists"):
        _write_lists(parts, centroids, offsets, plan)
    with written_aside(parts / "docid") as aside, aside.open("w", encoding="utf-8") as handle:
        for shard in source:
            handle.writelines(f"{pid}\n" for pid in shard.ids)
    write_atomically(parts / "index.json", json.dumps(record, indent=2) + "\n")
    for name in ("started.json", "progress.json", "normalized.json"):
        (parts / name).unlink()


def _array(path: Path, shape: tuple[int, ...], kind: type) -> np.memmap:
    """A mapped array to write to: the one that is there, or zeros."""
    if path.is_file():
        found: np.memmap = open_memmap(path, mode="r+")
        if found.shape == shape and found.dtype == kind:
            return found
    made: np.memmap = open_memmap(path, mode="w+", shape=shape, dtype=kind)
    return made


def _blocks(shard: Shard) -> Iterator[tuple[int, np.ndarray]]:
    for low in range(0, len(shard.embeddings), BLOCK):
        yield low, shard.embeddings[low : low + BLOCK].float().numpy()


def _split(codec: Any, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each vector's centroid, and the code of its difference from it."""
    encoded = codec.sa_encode(vectors)
    width = codec.coarse_code_size()
    number = np.zeros((len(encoded), 4), dtype=np.uint8)
    number[:, :width] = encoded[:, :width]
    return number.view("<u4")[:, 0], encoded[:, width:]


def _write_lists(parts: Path, centroids: np.ndarray, offsets: np.ndarray, plan: TokenPlan) -> None:
    """The passages of each centroid, once each, in rising order: counted first, then put in their
    places, so that memory holds a block of passages only."""
    counts = np.zeros(plan.centroids + 1, dtype=np.int64)
    for number, _ in _pairs(centroids, offsets):
        counts[1:] += np.bincount(number, minlength=plan.centroids)
    ends = np.cumsum(counts)
    place = ends[:-1].copy()
    lists = open_memmap(
        parts / "lists.npy", mode="w+", shape=(int(ends[-1]),), dtype=np.uint32
    )  # fmt: skip
    for number, passages in _pairs(centroids, offsets):
        own = np.bincount(number, minlength=plan.centroids)
        rank = np.arange(len(number)) - np.repeat(np.cumsum(own) - own, own)
        lists[place[number] + rank] = passages
        place += own
    lists.flush()
    np.save(parts / "list_ends.npy", ends)
    sync(parts / "list_ends.npy")


def _pairs(centroids: np.ndarray, offsets: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Centroid and passage of all tokens of a block of passages, each pair once, by centroid."""
    rows = len(offsets) - 1
    for low in range(0, rows, BLOCK):
        high = min(low + BLOCK, rows)
        own = np.repeat(np.arange(high - low), np.diff(offsets[low : high + 1]))
        number = centroids[offsets[low] : offsets[high]].astype(np.int64)
        keys = np.unique(number * BLOCK + own)
        yield keys // BLOCK, keys % BLOCK + low


def _token_rows(source: Embeddings, rows: np.ndarray, starts: list[int]) -> np.ndarray:
    """Some token vectors, counted over all shards and rising, in fp32."""
    out = np.empty((len(rows), source.manifest.dim), dtype=np.float32)
    for number, (low, high) in enumerate(pairwise(starts)):
        first, last = np.searchsorted(rows, (low, high))
        if first < last:
            picked = rows[first:last] - low
            out[first:last] = source.shard(number).embeddings[picked].float().numpy()
    return out
