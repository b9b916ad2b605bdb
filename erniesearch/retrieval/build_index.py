"""Embeddings on disk to a FAISS index of any factory, shard by shard.

Training sees a sample drawn with a seed; vectors are added in blocks of a fixed size in the order
of rows. The same embeddings give the same bytes: Flat, IVF and PQ with any number of threads, HNSW
with one (OMP_NUM_THREADS=1), since threads race for links.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from erniesearch.config.options import IndexOptions
from erniesearch.errors import UserError
from erniesearch.files import written_aside
from erniesearch.progress import Meter, say, waiting
from erniesearch.retrieval.build_token_index import build_token_index
from erniesearch.retrieval.embeddings import Embeddings
from erniesearch.retrieval.vector_index import (
    faiss,
    faiss_call,
    require_faiss,
    require_gpu,
    tune,
    write_index,
)

BLOCK = 1 << 16
"""Vectors added at a time."""
POINTS_PER_CENTROID = 64
"""Training vectors per centroid by default; FAISS advises 39 at least and uses 256 at most."""


@dataclass(frozen=True)
class Plan:
    """What building will take: vectors trained on, bytes at the most in memory, bytes on disk."""

    index: Any
    sample: int
    memory: int
    disk: int


def plan_index(embeddings: Embeddings, options: IndexOptions) -> Plan:
    """Make the empty index and estimate the work.

    Raises:
        UserError: for options of token vectors, and a factory that FAISS does not know or that
            cannot work with so many dimensions or vectors.
    """
    require_faiss()
    manifest, shards = embeddings.manifest, options.shards
    factory = options.factory or "Flat"
    for name in ("num_centroids", "bits", "candidates"):
        if getattr(options, name) is not None:
            raise UserError(
                f"--{name} is for token vectors, and {embeddings.folder} has one vector a passage:"
                " leave it out, or encode with --what tokens"
            )
    rows, dim = manifest.rows, manifest.dim
    if shards > rows:
        raise UserError(f"--shards {shards}: there are only {rows} vectors")
    kind = faiss.METRIC_INNER_PRODUCT if options.metric == "ip" else faiss.METRIC_L2
    what = f"--factory {factory} for {dim} dimensions"
    index = faiss_call(partial(faiss.index_factory, dim, factory, kind), what)
    centroids = max((_num_centroids(part) for part in _nested(index)), default=0)
    if index.is_trained:
        sample = 0
    else:
        wanted = options.train_sample or max(BLOCK, POINTS_PER_CENTROID * centroids)
        sample = min(rows, wanted)
    if sample < centroids:
        told = f"--train_sample {sample}" if options.train_sample and sample < rows else f"{rows:,}"
        raise UserError(
            f"--factory {factory}: {centroids:,} centroids cannot be trained on {told} vectors;"
            f" take fewer centroids, or at least {centroids:,} vectors (39 each are advised)"
        )
    lists = [part.nlist for part in _nested(index) if isinstance(part, faiss.IndexIVF)]
    by_size = round(max(lists) ** 0.5) if lists else None
    tune(index, options.nprobe or by_size, options.ef_search)
    per_vector = _bytes_per_vector(index)
    fixed = centroids * dim * 4
    largest = -(-rows // shards)
    memory = max(sample * dim * 4, largest * per_vector + BLOCK * dim * 4) + fixed
    return Plan(index, sample, memory, rows * per_vector + shards * fixed)


def build_index(options: IndexOptions) -> None:
    """Build an index folder; ``out`` appears when it is whole.

    Raises:
        UserError: as :func:`plan_index`, and for an ``out`` that is there.
    """
    source, folder = Embeddings(options.embeddings), Path(options.out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is there already: name another --out, or delete it")
    if source.manifest.what == "tokens":
        return build_token_index(options, source)
    options = replace(options, factory=options.factory or "Flat")
    if options.gpu:
        require_gpu("--gpu")
    plan = plan_index(source, options)
    trained_on = f"trained on {plan.sample:,}" if plan.sample else "no training"
    say(
        f"index: {len(source):,} vectors of {source.manifest.dim}, {options.factory},"
        f" {options.metric}, {options.shards} part(s); {trained_on}; about {_size(plan.memory)} of"
        f" memory and {_size(plan.disk)} on disk"
    )
    record = {
        "factory": options.factory, "metric": options.metric, "dim": source.manifest.dim,
        "rows": len(source), "shards": options.shards, "train_sample": plan.sample,
        "seed": options.seed,
        "embeddings": asdict(source.manifest),
    }  # fmt: skip
    try:
        with written_aside(folder) as aside:
            aside.mkdir()
            _build(source, aside, plan, options)
            (aside / "index.json").write_text(json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}; change --out") from None
    written = sum(path.stat().st_size for path in folder.rglob("*"))
    say(f"index: {folder}, {_size(written)}")


def _build(source: Embeddings, aside: Path, plan: Plan, options: IndexOptions) -> None:
    what, shards, gpu = f"--factory {options.factory}", options.shards, options.gpu
    resources = faiss.StandardGpuResources() if gpu else None

    def moved(index: Any) -> Any:
        if resources is None:
            return index
        return faiss_call(partial(faiss.index_cpu_to_gpu, resources, 0, index), f"--gpu, {what}")

    trained = plan.index
    if plan.sample:
        drawn = np.random.default_rng([options.seed, 8]).permutation(len(source))[: plan.sample]
        sample = source.rows(np.sort(drawn))
        trainer = moved(trained)
        with waiting(f"training on {plan.sample:,} vectors", 0):
            faiss_call(partial(trainer.train, sample), what)
        trained = faiss.index_gpu_to_cpu(trainer) if gpu else trainer
        del sample, trainer
    with Meter("adding", "vectors", len(source)) as meter:
        for k in range(shards):
            part = moved(trained if shards == 1 else faiss.clone_index(trained))
            folder = aside if shards == 1 else aside / f"shard-{k:02d}"
            folder.mkdir(exist_ok=True)
            bounds = k * len(source) // shards, (k + 1) * len(source) // shards
            with (folder / "docid").open("w", encoding="utf-8") as docid:
                for ids, block in _blocks(source, *bounds):
                    faiss_call(partial(part.add, block), what)
                    docid.writelines(f"{pid}\n" for pid in ids)
                    meter.advance(len(ids))
            write_index(faiss.index_gpu_to_cpu(part) if gpu else part, folder)


def _blocks(source: Embeddings, start: int, end: int) -> Iterator[tuple[list[str], np.ndarray]]:
    """Ids and fp32 vectors of rows ``start`` to ``end``."""
    size = source.manifest.shard_size
    for number in range(start // size, -(-end // size)):
        shard = source.shard(number)
        first, last = max(start - shard.start, 0), min(end - shard.start, len(shard.ids))
        for low in range(first, last, BLOCK):
            high = min(low + BLOCK, last)
            yield shard.ids[low:high], shard.embeddings[low:high].float().numpy()


def _nested(index: Any) -> list[Any]:
    """The index and those inside it, each as its own class."""
    index = faiss.downcast_index(index)
    inner = [getattr(index, name, None) for name in ("index", "storage", "base_index",
                                                     "refine_index", "quantizer")]  # fmt: skip
    return [index, *(part for found in inner if found is not None for part in _nested(found))]


def _num_centroids(index: Any) -> int:
    """Centroids of an IVF's lists or of each sub-quantizer, whichever are more."""
    pq = getattr(index, "pq", None)
    return max(int(getattr(index, "nlist", 0)), int(pq.ksub) if pq is not None else 0)


def _bytes_per_vector(index: Any) -> int:
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return _bytes_per_vector(index.index)
    if isinstance(index, faiss.IndexRefine):
        return _bytes_per_vector(index.base_index) + _bytes_per_vector(index.refine_index)
    if isinstance(index, faiss.IndexHNSW):
        links = index.hnsw.nb_neighbors(0) + 1  # type: ignore[attr-defined]  # the upper layers hold few
        return _bytes_per_vector(index.storage) + 4 * links + 16
    if isinstance(index, faiss.IndexIVF):
        return int(index.code_size) + 8
    return int(index.sa_code_size())


def _size(number: int) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**28 else f"{number / 2**20:.1f} MiB"
