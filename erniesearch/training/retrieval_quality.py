"""How well a stage's models rank while they are trained: MRR, nDCG and recall on held-out queries.

    dual-encoder         searches a part of the corpus exactly
    late interaction,    rerank the dual-encoder's best, or, where the stage trains none, fixed
    cross-encoder        lists: the positives and BM25's best of that part

Ranks share passages and queries out. All work goes through the engine, and every rank calls it as
often as the others: ZeRO-3 gathers parameters around each call.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from erniesearch import distributed
from erniesearch.config.keys import RunConfig, TrainingConfig, training_stages
from erniesearch.config.terms import reads, trains_teacher
from erniesearch.data.batches import Batch, GroupCollator, StepBatches
from erniesearch.data.bm25 import BM25
from erniesearch.data.collection import RetrievalData, Run, draw_rows, with_split
from erniesearch.data.corpus.texts import rows_of, take
from erniesearch.data.ranking_metrics import Metric, parse_metrics, per_query
from erniesearch.data.sampler import Group
from erniesearch.errors import UserError
from erniesearch.models.joint import Chunk, JointModel, Work
from erniesearch.objectives.objective import Objective
from erniesearch.objectives.outputs import Encoded, Outputs
from erniesearch.stages import Stage

MODELS = ("de", "li", "ce")
"""As in the names of the figures: dual-encoder, late interaction, cross-encoder."""
LOWER_IS_BETTER = ("loss", "ce", "li", "de")
MEASURED = (*LOWER_IS_BETTER, *(f"accuracy_{model}" for model in MODELS))
"""What the validation loss is made of (:mod:`erniesearch.training.validation`)."""


def trained_models(stage: Stage) -> tuple[str, ...]:
    """Those of :data:`MODELS` that the stage's terms reach."""
    weights = stage.weights
    found = {
        "de": reads(weights, "vectors"),
        "li": reads(weights, "tokens"),
        "ce": reads(weights, "teacher")
        and trains_teacher(weights, stage.config.objective.detach_targets)
        and stage.settings.teacher_scores == "live",
    }
    return tuple(model for model in MODELS if found[model])


def retrieval_metrics(training: TrainingConfig) -> list[Metric]:
    """``validation_metrics``, and what ``best_metric`` names beside them.

    Raises:
        UserError: for a name that is unknown, or a model that is.
    """
    option = "training.validation_metrics"
    names = training.validation_metrics
    metrics = parse_metrics(",".join(names), option) if names else []
    if training.best_metric not in MEASURED:
        wanted = parse_metrics(_split(training.best_metric)[0], "training.best_metric")
        metrics += [m for m in wanted if m.name not in {metric.name for metric in metrics}]
    for metric in metrics:
        if metric.measure is None:
            raise UserError(f"{option} {metric.name}: answer strings are for `evaluate`; take R@K")
    return metrics


def check_best_metric(config: RunConfig) -> None:
    """Raises: UserError: if ``training.best_metric`` or a metric is none that can be measured."""
    retrieval_metrics(config.training)
    name = config.training.best_metric
    model = name.removeprefix("accuracy_") if name in MEASURED else _split(name)[1]
    if model not in MODELS:
        return
    stages = [Stage(config, s) for s, own in training_stages(config).items() if own.steps]
    if not any(model in trained_models(stage) for stage in stages):
        raise UserError(f"training.best_metric {name}: no stage of this run trains that model")


def best_metric(stage: Stage) -> tuple[str, bool] | None:
    """The figure that makes a checkpoint of this stage the best, and whether it should be high;
    None if the stage has none."""
    name = stage.config.training.best_metric
    if name in MEASURED:
        return name, name not in LOWER_IS_BETTER
    models, (base, wanted) = trained_models(stage), _split(name)
    if not models:
        return None
    (metric,) = parse_metrics(base)
    return f"{metric.name}_{wanted if wanted in models else models[0]}", True


def _split(name: str) -> tuple[str, str]:
    """``nDCG@10_li`` to its metric and its model, which may be empty."""
    base, _, model = name.rpartition("_")
    return (base, model) if model in MODELS else (name, "")


class RetrievalQuality:
    """The retrieval metrics of a stage's models, the same on every rank.

    Args:
        stage: its config names the split, the metrics, and how much is searched.
        data: the collection; the split's qrels are read.
        batches: the stage's, for vocabulary and ranks.

    Raises:
        UserError: if the split cannot be read or a metric is unknown.
    """

    def __init__(self, stage: Stage, data: RetrievalData, batches: StepBatches) -> None:
        config, training = stage.config, stage.config.training
        assert training.validation_split is not None
        held_out = with_split(data, config.data.path, training.validation_split)
        self.qids, self.rows = draw_rows(
            held_out, training.validation_queries, training.validation_distractors, config.seed
        )
        self.pids = np.array(take(held_out.pids, self.rows))
        self.qrels = {qid: held_out.qrels[qid] for qid in self.qids}
        self.models, self.metrics = trained_models(stage), retrieval_metrics(training)
        self.collator = GroupCollator(
            held_out, self.qids, batches.collator.tokenizer, config.data.max_query_length,
            config.data.max_passage_length, batches.collator.text_format,
        )  # fmt: skip
        settings = stage.settings
        micro_step = stage.queries_per_rank * (1 + settings.num_negatives)
        # Texts or pairs at a time: what the training has room for, with its gradients.
        self.size = settings.chunk_size or micro_step
        self.depth = min(training.validation_rerank_depth, len(self.rows))
        self.deepest = min(
            max(self.depth, *(m.cutoff or 100 for m in self.metrics)), len(self.rows)
        )
        self.fixed = None if "de" in self.models else self._fixed_lists(stage, held_out)

    def _fixed_lists(self, stage: Stage, data: RetrievalData) -> np.ndarray:
        """``[num_queries, depth]``: each query's positives, at most half the list, then BM25's best
        of the others."""
        lists = None
        if distributed.is_main():
            settings = stage.config.evaluation
            bm25 = BM25(take(data.passages, self.rows), settings.bm25_stemmer,
                        settings.bm25_tokenizer)  # fmt: skip
            relevant = data.relevant()
            found, _ = bm25.search([data.queries[q] for q in self.qids], 2 * self.depth)
            lists = np.empty((len(self.qids), self.depth), np.int64)
            for row, qid, best in zip(lists, self.qids, found, strict=True):
                positives = np.searchsorted(self.rows, rows_of(data.index_of, relevant[qid]))
                kept = positives[: max(1, self.depth // 2)]
                others = best[~np.isin(best, positives)][: self.depth - len(kept)]
                rest = np.setdiff1d(np.arange(len(self.rows)), [*kept, *others])
                row[:] = [*kept, *others, *rest][: self.depth]
        return distributed.gather_objects(lists)[0]  # type: ignore[no-any-return]

    @torch.no_grad()
    def measure(
        self, engine: DeepSpeedEngine, device: torch.device, progress: Callable[[str], Any]
    ) -> dict[str, float]:
        """Every metric of every model, e.g. ``nDCG@10_de``, means over the queries. Every rank must
        call it; ``progress`` is told what is being done."""
        engine.eval()
        self._engine, self._device, self._progress = engine, device, progress
        found, scores = self.fixed, None
        if found is None:
            found, scores = self._search()
        figures: dict[str, float] = {}
        for model in self.models:
            if model == "de":
                ranked = self._run(found, scores)
            else:
                ranked = self._run(found, self._rerank(model, found[:, : self.depth]))
            figures |= self._figures(model, ranked)
        engine.train()
        del self._engine  # a result that is the best checkpoint needs its room
        return figures

    def _figures(self, model: str, run: Run) -> dict[str, float]:
        """Rank 0's, on every rank."""
        values = None
        if distributed.is_main():
            found = per_query(run, self.qrels, self.qids, self.metrics)
            values = {f"{name}_{model}": float(v.mean()) for name, v in found.items()}
        return distributed.gather_objects(values)[0]  # type: ignore[no-any-return]

    def _run(self, found: np.ndarray, scores: np.ndarray | None) -> Run:
        """Passages ``[num_queries, n]`` with the scores of the first of them; those that were not
        scored follow in their order."""
        assert scores is not None
        rest = found.shape[1] - scores.shape[1]
        below = scores.min(1, keepdims=True) - 1 - np.arange(rest)
        every = np.concatenate([scores, below], 1).tolist()
        return {
            qid: dict(zip(self.pids[row].tolist(), own, strict=True))
            for qid, row, own in zip(self.qids, found, every, strict=True)
        }

    def _search(self) -> tuple[np.ndarray, np.ndarray]:
        """The dual-encoder's best passages of each query, best first, and their scores, both
        ``[num_queries, deepest]``; an exact search."""
        queries = torch.cat([
            self._encode("query", [Group(i, self.rows[:1], self.rows[:1]) for i in part]).vectors
            for part in self._parts(np.arange(len(self.qids)))
        ]).float()  # fmt: skip
        longest_first = np.argsort(-self.collator.passages.lengths[self.rows], kind="stable")
        own = self._share(longest_first)
        real = torch.arange(len(own)) * distributed.world_size() + distributed.rank()
        best = queries.new_empty((len(queries), 0))
        places = best.long()
        for number, part in enumerate(self._parts(own)):
            self._progress(f"evaluating, {number * self.size} of {len(own)} passages")
            vectors = self._encode("passage", [Group(0, self.rows[part], self.rows[:1])]).vectors
            scores = queries @ vectors.float().T
            begin = number * self.size
            twice = real[begin : begin + len(part)] >= len(self.rows)
            scores[:, twice.to(scores.device)] = -torch.inf
            best = torch.cat([best, scores], 1)
            here = torch.from_numpy(part).to(places.device).expand(len(queries), -1)
            best, order = best.topk(min(self.deepest, best.shape[1]), 1)
            places = torch.cat([places, here], 1).gather(1, order)
        gathered = distributed.gather_objects((best.cpu().numpy(), places.cpu().numpy()))
        every, where = (np.concatenate(parts, 1) for parts in zip(*gathered, strict=True))
        # By score, and of equal ones by place, so that the number of ranks makes no difference.
        ranked = np.lexsort((where, -every), axis=1)[:, : self.deepest]
        return np.take_along_axis(where, ranked, 1), np.take_along_axis(every, ranked, 1)

    def _rerank(self, model: str, candidates: np.ndarray) -> np.ndarray:
        """A model's scores of each query's candidates, ``[num_queries, n]``."""
        joint: JointModel = self._engine.module
        made = []
        for part in self._parts(self._share(np.arange(len(self.qids))), candidates.shape[1]):
            self._progress(f"evaluating, {model} on query {part[0]} of {len(self.qids)}")
            groups = [Group(i, self.rows[candidates[i]], self.rows[:1]) for i in part]
            if model == "ce":
                batch = self.collator(groups).to(self._device)
                made.append(self._forward(batch, "pair")[0].view(len(part), -1).float())
            else:
                batch, outputs = self._encoded(groups)
                late = _grouped(joint.objective).score(batch, outputs).late
                assert late is not None
                made.append(late.float())
        gathered = np.stack(distributed.gather_objects(torch.cat(made).cpu().numpy()), 1)
        return gathered.reshape(-1, candidates.shape[1])[: len(self.qids)]

    def _encoded(self, groups: list[Group]) -> tuple[Batch, Outputs]:
        batch = self.collator(groups).to(self._device)
        queries, passages = self._forward(batch, "query"), self._forward(batch, "passage")
        return batch, Outputs(queries=Encoded(*queries), passages=Encoded(*passages))

    def _encode(self, side: Work, groups: list[Group]) -> Encoded:
        return Encoded(*self._forward(self.collator(groups).to(self._device), side))

    def _forward(self, batch: Batch, kind: Work) -> tuple[Tensor, ...]:
        """All of a batch's queries, passages or pairs, in chunks of ``size``."""
        total = len(batch.query_ids if kind == "query" else batch.passage_ids)
        number = 3 if kind == "pair" else 1
        parts = [
            self._engine(batch, Chunk(kind, number, slice(begin, min(begin + self.size, total))))
            for begin in range(0, total, self.size)
        ]
        return tuple(
            torch.cat(own) if own[0].numel() else own[0] for own in zip(*parts, strict=True)
        )

    def _share(self, places: np.ndarray) -> np.ndarray:
        """This rank's, every W-th; as many as every rank's, the last perhaps a second time."""
        ranks = distributed.world_size()
        padded = np.concatenate([places, places[-1:].repeat(-len(places) % ranks)])
        return padded[distributed.rank() :: ranks]

    def _parts(self, places: np.ndarray, each: int = 1) -> Sequence[np.ndarray]:
        """Parts of at most ``size`` texts, ``each`` of them a place."""
        step = max(1, self.size // each)
        return [places[begin : begin + step] for begin in range(0, len(places), step)]


def _grouped(objective: Objective) -> Objective:
    """The same objective over every query's own group, where ranks exchange nothing."""
    return Objective(objective.weights, replace(objective.settings, candidates="group"))
