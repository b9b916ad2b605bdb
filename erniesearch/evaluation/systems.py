"""Runs of the systems to evaluate: run files, a model's search, rerankers.

A dual-encoder searches the corpus exhaustively. Late interaction and cross-encoder rerank a first
stage: BM25, a run file or a dual-encoder.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from erniesearch.data.bm25 import Tokenizer
from erniesearch.data.collection import RetrievalData, Run
from erniesearch.data.trec import read_trec_run
from erniesearch.errors import UserError
from erniesearch.evaluation.measures import bm25_run
from erniesearch.retrieval import ranking
from erniesearch.retrieval.load import load_retriever, load_scorer, read_folder
from erniesearch.retrieval.vector_index import VectorIndex, require_faiss

BLOCK = 256
"""Queries reranked at a time: the passages of one block are in memory as token vectors."""
PASSAGE_BLOCK = 50_000
"""Passages encoded at a time: besides the index, the vectors of one block are in memory."""
console = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Systems:
    """What is evaluated, as the command line names it.

    Attributes:
        runs: TREC run files.
        model: export folder, or None.
        rerank: export folders that rerank the model's run, each by itself.
        first_stage: ``bm25``, a run file or a dual-encoder's folder, for a ``model`` that reranks.
        kind: what ``model`` is; None reads it off the folder.
        depth: passages kept per query, of which ``rerank_depth`` are reranked.
        stemmer: of BM25.
        tokenizer: of BM25.
        index: folder of `erniesearch index` that the dual-encoder searches; None encodes the
            corpus.
    """

    runs: tuple[str, ...] = ()
    model: str | None = None
    rerank: tuple[str, ...] = ()
    first_stage: str = "bm25"
    kind: str | None = None
    depth: int = 100
    rerank_depth: int = 100
    batch_size: int = 32
    max_query_length: int | None = None
    max_passage_length: int | None = None
    stemmer: str | None = "english"
    tokenizer: Tokenizer = "words"
    index: str | None = None

    @property
    def paths(self) -> list[str]:
        """Run files and model folders, in the order of the table."""
        return [*self.runs, *([self.model] if self.model else []), *self.rerank]

    @property
    def names(self) -> dict[str, str]:
        """A row's name by path: the file's or folder's own name where it is unique."""
        own = {path: Path(path).name.removesuffix(".trec") for path in self.paths}
        return {
            path: name if list(own.values()).count(name) == 1 else path
            for path, name in own.items()
        }

    @property
    def loading(self) -> dict[str, Any]:
        """Options of load_retriever and load_scorer."""
        return {
            "batch_size": self.batch_size,
            "max_query_length": self.max_query_length,
            "max_passage_length": self.max_passage_length,
        }


def check(systems: Systems) -> None:
    """Refuse what cannot work before anything large is read.

    Raises:
        UserError: naming the option and the folder.
    """
    if systems.rerank and not systems.model:
        raise UserError("--rerank reranks the run of --model: give that too")
    if not systems.model and not systems.runs:
        raise UserError("nothing to evaluate: give --model EXPORT or --run FILE")
    paths = systems.paths
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"{path}: given twice")
    for folder in systems.rerank:
        if read_folder(folder).kind == "dual_encoder":
            raise UserError(f"--rerank {folder}: a dual-encoder does not rerank")
    if systems.index and not Path(systems.index).is_dir():
        raise UserError(f"--index {systems.index}: no such folder; `erniesearch index` writes one")
    if systems.model:
        found = read_folder(systems.model).kind
        if systems.kind and found not in (systems.kind, "student"):
            raise UserError(f"--kind {systems.kind}: {systems.model} holds a {found}")
        first = Path(systems.first_stage)
        if systems.first_stage != "bm25" and not first.exists():
            raise UserError(f"--first_stage {first}: bm25, a run file or a dual-encoder's folder")
        if first.is_dir() and not read_folder(first).has_vectors:
            raise UserError(f"--first_stage {first}: no dual-encoder")


def make_runs(systems: Systems, data: RetrievalData) -> dict[str, Run]:
    """Every system's run by its name in the table: run files first, then the first stage if there
    is one, the model, the rerankers.

    Raises:
        UserError: also for run files that do not fit the data.
    """
    read = _RunReader(data)
    names = systems.names
    runs = {names[path]: read(path) for path in systems.runs}
    if systems.model is None:
        return runs
    kind = systems.kind or read_folder(systems.model).kind
    if kind in ("dual_encoder", "student"):
        base = runs[names[systems.model]] = _search(systems.model, systems, data)
        rerankers: tuple[str, ...] = systems.rerank
    else:
        label = "BM25" if systems.first_stage == "bm25" else systems.first_stage
        label += ", first stage" if label in runs else ""
        base = runs[label] = _first_stage(systems, data, read)
        rerankers = (systems.model, *systems.rerank)
    for folder in rerankers:
        console.print(f"{names[folder]}: reranking the top {systems.rerank_depth}")
        rerank = _reranker(folder, systems, data)
        runs[f"{names[folder]}, reranking"] = _in_blocks(rerank, base)
    return runs


class _RunReader:
    """Reads run files against the collection's ids; queries without qrels are left out."""

    def __init__(self, data: RetrievalData) -> None:
        self.data = data
        self.index_of = data.index_of

    def __call__(self, path: str) -> Run:
        run = read_trec_run(path, pids=self.index_of)
        judged = {qid: scores for qid, scores in run.items() if qid in self.data.qrels}
        if not judged:
            first = next(iter(run))
            raise UserError(f"{path}: none of its queries (the first is '{first}') has qrels here")
        return judged


def _first_stage(systems: Systems, data: RetrievalData, read: _RunReader) -> Run:
    source = systems.first_stage
    if source == "bm25":
        console.print("BM25: indexing and searching")
        return bm25_run(data, systems.depth, systems.stemmer, systems.tokenizer)
    if Path(source).is_file():
        run = read(source)
        return {qid: {pid: scores[pid] for pid in ranking.top(scores, systems.depth)}
                for qid, scores in run.items()}  # fmt: skip
    return _search(source, systems, data)


def _search(folder: str, systems: Systems, data: RetrievalData) -> Run:
    require_faiss()  # before hours of encoding
    retriever = load_retriever(folder, **systems.loading)
    if systems.index:
        index = VectorIndex.load(Path(systems.index))
        if len(index.pids) != len(data.pids):
            raise UserError(
                f"--index {systems.index}: {len(index.pids)} passages, but the corpus has"
                f" {len(data.pids)}: give an index of this corpus"
            )
    else:
        console.print(f"{folder}: encoding {len(data.pids)} passages, {len(data.queries)} queries")
        blocks = (
            data.passages[start : start + PASSAGE_BLOCK]
            for start in range(0, len(data.pids), PASSAGE_BLOCK)
        )
        parts = [
            part
            for block in blocks
            for part in VectorIndex.build(retriever.vectors(block, "passage"), []).parts
        ]
        index = VectorIndex(parts, data.pids)
    run = ranking.dense_run(retriever, index, data.queries, systems.depth)
    if systems.index:
        unknown = {pid for scores in run.values() for pid in scores if pid not in data.index_of}
        if unknown:
            raise UserError(
                f"--index {systems.index}: passage '{min(unknown)}' is not in corpus.jsonl: give an"
                " index of this corpus"
            )
    return run


def _reranker(folder: str, systems: Systems, data: RetrievalData) -> Callable[[Run], Run]:
    if read_folder(folder).kind == "cross_encoder":
        scorer = load_scorer(folder, **systems.loading)
        return lambda run: ranking.rerank_cross_encoder(scorer, data, run, systems.rerank_depth)
    retriever = load_retriever(folder, **systems.loading)
    return lambda run: ranking.rerank_late_interaction(retriever, data, run, systems.rerank_depth)


def _in_blocks(rerank: Callable[[Run], Run], run: Run) -> Run:
    qids = list(run)
    out: Run = {}
    for start in range(0, len(qids), BLOCK):
        out |= rerank({qid: run[qid] for qid in qids[start : start + BLOCK]})
    return out
