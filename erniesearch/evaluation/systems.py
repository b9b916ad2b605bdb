"""Runs of the systems to evaluate: run files, a model's search, rerankers.

A dual-encoder searches the corpus exhaustively, or an index; late interaction searches an index of
token vectors. Otherwise it and a cross-encoder rerank a first stage: BM25, a run file, or such a
search.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from erniesearch.config.options import EvaluateOptions
from erniesearch.data.collection import RetrievalData, Run
from erniesearch.data.trec import read_trec_run
from erniesearch.errors import UserError
from erniesearch.evaluation.measures import bm25_run
from erniesearch.progress import Meter
from erniesearch.retrieval import ranking
from erniesearch.retrieval.first_stage import Index, is_token_index, open_index
from erniesearch.retrieval.load import load_retriever, load_scorer, read_folder
from erniesearch.retrieval.vector_index import VectorIndex, require_faiss

BLOCK = 256
"""Queries reranked at a time: the passages of one block are in memory as token vectors."""
PASSAGE_BLOCK = 50_000
"""Passages encoded at a time: besides the index, the vectors of one block are in memory."""


def paths(options: EvaluateOptions) -> list[str]:
    """Run files and model folders, in the order of the table."""
    return [*options.trec, *([options.model] if options.model else []), *options.rerankers]


def names(options: EvaluateOptions) -> dict[str, str]:
    """A row's name by path: the file's or folder's own name where it is unique."""
    own = {path: Path(path).name.removesuffix(".trec") for path in paths(options)}
    return {
        path: name if list(own.values()).count(name) == 1 else path for path, name in own.items()
    }


def _loading(options: EvaluateOptions) -> dict[str, Any]:
    """Options of load_retriever and load_scorer."""
    kept = ("batch_size", "max_query_length", "max_passage_length", "precision")
    return {name: getattr(options, name) for name in kept}


def check(options: EvaluateOptions) -> None:
    """Refuse what cannot work before anything large is read.

    Raises:
        UserError: naming the option and the folder.
    """
    if options.rerankers and not options.model:
        raise UserError("--rerankers rerank the run of --model: give that too")
    if not options.model and not options.trec:
        raise UserError("nothing to evaluate: give --model EXPORT or --trec FILE")
    if not options.data:
        raise UserError("no data set: give --data DIR, or several")
    of_one_set = {"trec": options.trec, "index": options.index, "run_out": options.run_out,
                  "first_stage": Path(options.first_stage).is_file()}  # fmt: skip
    for name, value in of_one_set.items():
        if value and len(options.data) > 1:
            raise UserError(f"--{name} belongs to one data set: give one --data, or leave it out")
    for folder in options.data:
        if options.data.count(folder) > 1:
            raise UserError(f"--data {folder}: given twice")
    given = paths(options)
    for path in given:
        if given.count(path) > 1:
            raise UserError(f"{path}: given twice")
    for folder in options.rerankers:
        if read_folder(folder).kind == "dual_encoder":
            raise UserError(f"--rerankers {folder}: a dual-encoder does not rerank")
    if options.index and not Path(options.index).is_dir():
        raise UserError(f"--index {options.index}: no such folder; `erniesearch index` writes one")
    if options.model:
        _check_model(options, options.model)
    elif options.dim is not None:
        raise UserError(f"--dim {options.dim}: no dual-encoder searches here; leave it out")


def _check_model(options: EvaluateOptions, model: str) -> None:
    """What --model, --first_stage, --index and --dim say together."""
    found, first, late = read_folder(model).kind, options.first_stage, _index_of_tokens(options)
    if options.kind and found not in (options.kind, "student"):
        raise UserError(f"--kind {options.kind}: {model} holds a {found}")
    kind = options.kind or found
    if late and kind == "dual_encoder":
        raise UserError(
            f"--index {options.index} holds token vectors, which a dual-encoder does not make:"
            " give --model a late-interaction folder"
        )
    searches = _searches(options, kind)
    if first != "bm25" and not Path(first).is_file():
        try:
            vectors = read_folder(first).has_vectors
        except UserError as error:
            raise UserError(
                f"--first_stage {first}: bm25, a run file or a dual-encoder's folder ({error})"
            ) from None
        if not vectors and not late:
            raise UserError(
                f"--first_stage {first}: no dual-encoder (a late-interaction model searches an"
                " --index of token vectors)"
            )
        searches = True
    if options.index and not searches:
        raise UserError(
            f"--index {options.index}: nothing searches it: --model {model} reranks --first_stage"
            f" {first}"
        )
    if options.dim is not None and (late or not searches):
        raise UserError(f"--dim {options.dim}: no dual-encoder searches here; leave it out")


def _index_of_tokens(options: EvaluateOptions) -> bool:
    return options.index is not None and is_token_index(Path(options.index))


def _searches(options: EvaluateOptions, kind: str) -> bool:
    """Whether --model is itself the first stage."""
    late = _index_of_tokens(options) and options.first_stage == "bm25"
    return kind in ("dual_encoder", "student") or (kind == "late_interaction" and late)


def make_runs(options: EvaluateOptions, data: RetrievalData) -> dict[str, Run]:
    """Every system's run by its name in the table: run files first, then the first stage if there
    is one, the model, the rerankers.

    Raises:
        UserError: also for run files that do not fit the data.
    """
    read = _RunReader(data)
    name_of = names(options)
    runs = {name_of[path]: read(path) for path in options.trec}
    if options.model is None:
        return runs
    kind = options.kind or read_folder(options.model).kind
    if _searches(options, kind):
        base = runs[name_of[options.model]] = _search(options.model, options, data)
        rerankers = options.rerankers
    else:
        label = "BM25" if options.first_stage == "bm25" else options.first_stage
        label += ", first stage" if label in runs else ""
        base = runs[label] = _first_stage(options, data, read)
        rerankers = [options.model, *options.rerankers]
    depth = options.rerank_depth or options.depth
    for folder in rerankers:
        rerank = _reranker(folder, options, data)
        told = f"reranking the top {depth} by {name_of[folder]}"
        runs[f"{name_of[folder]}, reranking"] = _in_blocks(rerank, base, told)
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


def _first_stage(options: EvaluateOptions, data: RetrievalData, read: _RunReader) -> Run:
    source = options.first_stage
    if source == "bm25":
        return bm25_run(data, options.depth, options.bm25_stemmer, options.bm25_tokenizer)
    if Path(source).is_file():
        run = read(source)
        return {qid: {pid: scores[pid] for pid in ranking.top(scores, options.depth)}
                for qid, scores in run.items()}  # fmt: skip
    return _search(source, options, data)


def _search(folder: str, options: EvaluateOptions, data: RetrievalData) -> Run:
    require_faiss()  # before hours of encoding
    retriever = load_retriever(
        folder, **_loading(options), trust_remote_code=options.trust_remote_code
    ).truncate(options.dim)
    if options.index:
        index: Index = open_index(Path(options.index), read_folder(folder))
        if len(index.pids) != len(data.pids):
            raise UserError(
                f"--index {options.index}: {len(index.pids)} passages, but the corpus has"
                f" {len(data.pids)}: give an index of this corpus"
            )
    else:
        parts: list[Any] = []
        with Meter(f"encoding by {folder}", "passages", len(data.pids)) as meter:
            for start in range(0, len(data.pids), PASSAGE_BLOCK):
                block = data.passages[start : start + PASSAGE_BLOCK]
                with meter.part(len(block)):
                    vectors = retriever.vectors(block, "passage")
                parts += VectorIndex.build(vectors, []).parts
        index = VectorIndex(parts, data.pids)
    run = ranking.dense_run(retriever, index, data.queries, options.depth)
    if options.index:
        unknown = {pid for scores in run.values() for pid in scores if pid not in data.index_of}
        if unknown:
            raise UserError(
                f"--index {options.index}: passage '{min(unknown)}' is not in corpus.jsonl: give an"
                " index of this corpus"
            )
    return run


def _reranker(folder: str, options: EvaluateOptions, data: RetrievalData) -> Callable[[Run], Run]:
    depth = options.rerank_depth or options.depth
    if read_folder(folder).kind == "cross_encoder":
        scorer = load_scorer(folder, **_loading(options))
        return lambda run: ranking.rerank_cross_encoder(scorer, data, run, depth)
    retriever = load_retriever(
        folder, **_loading(options), trust_remote_code=options.trust_remote_code
    )
    return lambda run: ranking.rerank_late_interaction(retriever, data, run, depth)


def _in_blocks(rerank: Callable[[Run], Run], run: Run, told: str) -> Run:
    qids = list(run)
    out: Run = {}
    with Meter(told, "queries", len(qids)) as meter:
        for start in range(0, len(qids), BLOCK):
            block = qids[start : start + BLOCK]
            with meter.part(len(block)):
                out |= rerank({qid: run[qid] for qid in block})
    return out
