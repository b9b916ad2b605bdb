"""A teacher's scores of given lists, by any CrossEncoder of sentence-transformers, on as many ranks
as there are."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from erniesearch import distributed
from erniesearch.config.options import ScoreOptions
from erniesearch.data.collection import RetrievalData, load_beir
from erniesearch.data.corpus.texts import rows_of, take
from erniesearch.data.negatives import NegativesOf, negatives_line, read_lists
from erniesearch.errors import UserError
from erniesearch.files import hash_files, written_aside
from erniesearch.models.precision import use_bf16, widen_head
from erniesearch.progress import Meter, say
from erniesearch.retrieval.parts import PATIENCE, Parts

LISTS_PER_BLOCK = 256
"""Lists scored, and lost by an interrupt, at a time; pairs are batched by length within a block."""


def score_lists(options: ScoreOptions) -> None:
    """Write every list of ``options.lists`` with the model's scores to ``options.out``, as stages
    with ``teacher_scores: stored`` read them.

    The positives of a query are those of its line and those of the split.

    Raises:
        UserError: for lists or a model that do not load, a list whose texts are missing, an
            ``out`` that is there, and scores that are not finite.
    """
    target = Path(options.out)
    source = Path(options.lists or Path(options.data) / "negatives.jsonl")
    if target.exists() and not options.overwrite:
        raise UserError(f"{target}: is there already: name another --out, or give --overwrite")
    device = distributed.read_launcher()
    if distributed.world_size() > 1:
        distributed.initialize(PATIENCE, backend="gloo")
    data = load_beir(options.data, options.split, options.use_titles)
    lists = read_lists(source, data)
    blocks = [lists[i : i + LISTS_PER_BLOCK] for i in range(0, len(lists), LISTS_PER_BLOCK)]
    teacher = Teacher(options, device)
    parts = Parts(target)
    if distributed.is_main():
        parts.claim(json.dumps(_record(options, source)))
    distributed.barrier()
    todo = parts.todo(len(blocks))
    total = sum(len(own.passages) for k in todo for own in blocks[k])
    with Meter("scoring, rank 0's share", "pairs", total, total > 0) as meter:
        for k in todo:
            lines = list(_scored(blocks[k], data, teacher))
            parts.write(k, lines)
            meter.advance(sum(len(own.passages) for own in blocks[k]))
    distributed.barrier()
    if distributed.is_main():
        with written_aside(target) as aside, aside.open("w", encoding="utf-8") as handle:
            handle.writelines(parts.lines())
        parts.remove()
        say(f"scored {len(lists)} lists by {options.model}; {target}")


def _record(options: ScoreOptions, source: Path) -> dict[str, Any]:
    """What the result depends on; a batch's size and the device are left out."""
    given = asdict(options)
    for name in ("batch_size", "overwrite", "out"):
        del given[name]
    data, model = Path(options.data), Path(options.model)
    given |= {"data": str(data.absolute()), "lists": str(source.absolute())}
    files = [source, data / "corpus.jsonl", data / "queries.jsonl",
             data / "qrels" / f"{options.split}.tsv", *model.glob("*.json"),
             *model.glob("*.safetensors")]  # fmt: skip
    return given | {"files": hash_files(files)}


def _scored(block: list[NegativesOf], data: RetrievalData, teacher: "Teacher") -> Iterator[str]:
    """The lines of a block."""
    pids = [pid for own in block for pid in own.passages]
    texts = take(data.passages, rows_of(data.index_of, pids))
    for pid, text in zip(pids, texts, strict=True):
        if not text.strip():
            raise UserError(f"passage '{pid}' of the lists has no text in corpus.jsonl: remove it")
    queries = [data.queries[own.qid] for own in block for _ in own.passages]
    scores = teacher.scores(list(zip(queries, texts, strict=True)))
    if wrong := np.flatnonzero(~np.isfinite(scores)).tolist():
        raise UserError(
            f"the model's score of passage '{pids[wrong[0]]}' for the query '{queries[wrong[0]]}'"
            f" is {scores[wrong[0]]}: if it was computed in bf16, try --precision fp32"
        )
    left = iter(scores.tolist())
    for own in block:
        both = [[next(left) for _ in side] for side in (own.positives, own.negatives)]
        yield negatives_line(own.qid, own.positives, own.negatives, (both[0], both[1]))


class Teacher:
    """A CrossEncoder of sentence-transformers with one score.

    Raises:
        UserError: if the library is missing, or the model does not load or has several scores.
    """

    def __init__(self, options: ScoreOptions, device: torch.device) -> None:
        try:
            from sentence_transformers import CrossEncoder
        except ImportError as error:
            raise UserError(
                "erniesearch score runs models with sentence-transformers 6 or newer, which does"
                f" not load here ({' '.join(str(error).split())}): pip install"
                " 'erniesearch[sentence-transformers]'"
            ) from None
        bf16 = use_bf16(options.precision, device)
        kind = torch.bfloat16 if bf16 else torch.float32
        try:
            self.model = CrossEncoder(
                options.model, device=str(device), max_length=options.max_length,
                trust_remote_code=options.trust_remote_code,
                model_kwargs={"dtype": kind, "use_safetensors": True},
            )  # fmt: skip
        except Exception as error:
            # Libraries below raise whatever they raise for a folder that is no model.
            problem = " ".join(str(error).split())
            raise UserError(f"model '{options.model}' does not load: {problem}") from None
        if self.model.num_labels != 1:
            raise UserError(
                f"model '{options.model}' gives {self.model.num_labels} scores a pair, a teacher"
                " gives one"
            )
        if bf16:
            widen_head(self.model)
        self.batch_size = options.batch_size
        self.activation = torch.nn.Identity() if options.activation == "none" else None

    def scores(self, pairs: list[tuple[str, str]]) -> np.ndarray:
        """Scores ``[len(pairs)]``; the library takes pairs of similar length together."""
        found: np.ndarray = self.model.predict(
            pairs, batch_size=self.batch_size, activation_fn=self.activation,
            show_progress_bar=False,
        )  # fmt: skip
        return found.astype(np.float32)
