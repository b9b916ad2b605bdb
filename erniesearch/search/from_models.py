"""A search system of models that no run made: folders and hub names, and an index of theirs."""

from dataclasses import fields
from pathlib import Path

from erniesearch.config.options import SystemOptions
from erniesearch.data.collection import RetrievalData
from erniesearch.data.corpus.texts import open_corpus
from erniesearch.errors import UserError
from erniesearch.retrieval.first_stage import open_index
from erniesearch.retrieval.load import load_retriever, load_scorer
from erniesearch.retrieval.model_folder import read_folder
from erniesearch.retrieval.retriever import PairScorer, Retriever
from erniesearch.retrieval.token_index import TokenIndex
from erniesearch.search.system import SearchSystem

OF_A_RUN = ("run", "first_stage")


def open_system(options: SystemOptions, cross_encoder: bool = True) -> SearchSystem:
    """The run that the options name, or their models.

    Args:
        cross_encoder: False leaves a run's cross-encoder unloaded.

    Raises:
        UserError: for options that do not belong together; also as :meth:`SearchSystem.from_run`,
            :func:`load_retriever` and :func:`open_index`.
    """
    _check(options)
    if options.run is not None:
        first = options.first_stage or "dual_encoder"
        return SearchSystem.from_run(options.run, cross_encoder, first)
    return _of_models(options)


def _check(options: SystemOptions) -> None:
    own = {"model": options.model, "index": options.index, "data": options.data}
    if options.run is not None:
        usual = SystemOptions()
        for name in (field.name for field in fields(SystemOptions)):
            if name not in OF_A_RUN and getattr(options, name) != getattr(usual, name):
                raise UserError(f"--{name}: --run says it; leave one of the two out")
        return
    missing = [f"--{name}" for name, value in own.items() if not value]
    if len(missing) == len(own):
        raise UserError("nothing to search: give --run DIR, or --model, --index and --data")
    if missing:
        raise UserError(f"{' and '.join(missing)}: missing; models of your own need --model,"
                        " --index and --data")  # fmt: skip
    if options.first_stage:
        raise UserError("--first_stage: the index says it; leave it out, or give --run")


def _of_models(options: SystemOptions) -> SearchSystem:
    assert options.model is not None
    assert options.index is not None
    assert options.data is not None
    for option, folder in (("index", options.index), ("data", options.data)):
        if not Path(folder).is_dir():
            raise UserError(f"--{option} {folder}: no such folder")
    found = read_folder(options.model)
    index = open_index(Path(options.index), found)
    corpus = open_corpus(Path(options.data) / "corpus.jsonl", options.use_titles)
    loading = {"precision": options.precision, "trust_remote_code": options.trust_remote_code}
    kinds = _rerankers(options.rerankers)
    if "late_interaction" in kinds and isinstance(index, TokenIndex):
        raise UserError(
            f"--rerankers {kinds['late_interaction']}: late interaction searches --index"
            f" {options.index} already"
        )
    retriever = load_retriever(options.model, **loading)  # type: ignore[arg-type]
    late: Retriever | None = retriever if isinstance(index, TokenIndex) else None
    if "late_interaction" in kinds:
        late = load_retriever(kinds["late_interaction"], **loading)  # type: ignore[arg-type]
    scorer: PairScorer | None = None
    if "cross_encoder" in kinds:
        scorer = load_scorer(kinds["cross_encoder"], precision=options.precision)
    data = RetrievalData(corpus.pids, corpus.passages, {}, {})
    return SearchSystem(retriever, index, data, scorer, late)


def _rerankers(folders: list[str]) -> dict[str, str]:
    """Folders by what they rerank as."""
    found: dict[str, str] = {}
    for folder in folders:
        model = read_folder(folder)
        if model.kind != "cross_encoder" and not model.has_tokens:
            raise UserError(f"--rerankers {folder}: a dual-encoder does not rerank")
        kind = "cross_encoder" if model.kind == "cross_encoder" else "late_interaction"
        if kind in found:
            raise UserError(
                f"--rerankers {found[kind]} {folder}: two {kind.replace('_', '-')} models; give one"
            )
        found[kind] = folder
    return found
