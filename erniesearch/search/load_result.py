"""What a training or a run left, ready to use: one function for all of it."""

from pathlib import Path
from typing import Any

from erniesearch.retrieval.load import load_retriever, load_scorer
from erniesearch.retrieval.model_folder import read_folder
from erniesearch.retrieval.retriever import PairScorer, Retriever
from erniesearch.search.system import SearchSystem


def load(path: str | Path, **options: Any) -> SearchSystem | Retriever | PairScorer:
    """A run's folder as a :class:`SearchSystem`, a model's as what encodes or scores with it.

    A cross-encoder becomes a :class:`PairScorer`, another model a :class:`Retriever`; of what
    ``Trainer.train`` returns it is the student if there is one, else the teacher.

    Args:
        path: ``run_dir``, a folder of its ``exports``, what ``Trainer.train`` returns, or another
            model folder.
        options: ``cross_encoder`` of :meth:`SearchSystem.from_run`; ``batch_size``, ``device``,
            ``max_query_length``, ``max_passage_length``, ``precision`` and ``pooling`` of
            :func:`load_retriever` and :func:`load_scorer`.

    Raises:
        UserError: if nothing that can be read lies there.
    """
    folder = Path(path)
    if (folder / "config.yaml").is_file():
        return SearchSystem.from_run(folder, **options)
    for part in ("student", "teacher"):
        if (folder / part / "config.json").is_file():
            path = folder / part
            break
    pooling = {"pooling": options["pooling"]} if "pooling" in options else {}
    if read_folder(path, **pooling).kind == "cross_encoder":
        return load_scorer(path, **options)
    return load_retriever(path, **options)
