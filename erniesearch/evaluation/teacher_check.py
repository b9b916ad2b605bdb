"""Is the teacher a teacher? What the cascade's teachers gain over the student they are to teach.

Each reranks the passages that the student itself finds: its ``depth`` best. The gain is the
difference in MRR@10 by query; intervals are 95 % bootstrap intervals over queries. The ceiling is
the share of queries with a relevant passage among the candidates, which is what a perfect
reranker's MRR@10 would be. A target that ranks no better than its learner teaches it nothing.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from erniesearch.data.collection import RetrievalData, Run
from erniesearch.data.ranking_metrics import parse_metrics, per_query
from erniesearch.evaluation.measures import Estimate, estimate
from erniesearch.retrieval import ranking
from erniesearch.retrieval.retriever import PairScorer, Retriever
from erniesearch.retrieval.vector_index import SearchOn, VectorIndex

METRIC = "MRR@10"
REMEDIES = {
    "late_interaction": "train the stage interaction longer or with a higher head_lr, or set"
    " li_to_de to 0",
    "cross_encoder": "train the stage teacher longer, on longer lists or at another learning rate,"
    " or set ce_to_li, ce_to_de, margin_mse_li, margin_mse_de and attention to 0",
}


@dataclass(frozen=True)
class Teacher:
    """MRR@10 of one teacher's ranking, and what it gains over the student's."""

    mrr: Estimate
    gain: Estimate


@dataclass(frozen=True)
class TeacherCheck:
    """What was found; None for a model that the cascade distils nothing from.

    ``trained_on``: the queries are the training split's.
    """

    queries: int
    passages: int
    depth: int
    split: str
    trained_on: bool
    student: Estimate
    ceiling: Estimate
    late_interaction: Teacher | None
    cross_encoder: Teacher | None

    @classmethod
    def from_facts(cls, content: dict[str, Any]) -> "TeacherCheck":
        """The inverse of ``asdict``; other keys are left out."""
        values = {name: content[name] for name in cls.__dataclass_fields__}
        for name in ("student", "ceiling"):
            values[name] = Estimate(**values[name])
        for name in REMEDIES:
            if values[name] is not None:
                parts = {key: Estimate(**value) for key, value in values[name].items()}
                values[name] = Teacher(**parts)
        return cls(**values)

    @property
    def teachers(self) -> dict[str, Teacher]:
        """Those that were measured, by name."""
        found = {name: getattr(self, name) for name in REMEDIES}
        return {name: teacher for name, teacher in found.items() if teacher is not None}

    @property
    def caption(self) -> str:
        """What was measured on what."""
        text = (
            f"{self.queries} queries of {self.split}, {self.passages} passages; each teacher"
            f" reranks the top {self.depth} of the student that it is to teach; {METRIC}"
        )
        if self.trained_on:
            text += "; student and teachers may have been trained on these queries, for want of a"
            text += " split dev"
        return text

    def lines(self) -> list[str]:
        """The figures, one model a line: name, MRR@10, gain."""
        rows = [f"student {_told(self.student)}"]
        for name, teacher in self.teachers.items():
            gain = f"{teacher.gain.mean:+.3f} [{teacher.gain.low:+.3f}, {teacher.gain.high:+.3f}]"
            rows.append(f"{name.replace('_', '-')} {_told(teacher.mrr)}, gain {gain}")
        return [*rows, f"ceiling {_told(self.ceiling)}"]

    def warnings(self) -> list[str]:
        """One for each teacher that does not rank better, or not certainly."""
        found = []
        for name, teacher in self.teachers.items():
            if teacher.gain.low > 0:
                continue
            verb = "does not rank" if teacher.gain.mean <= 0 else "does not certainly rank"
            found.append(
                f"the {name.replace('_', '-')} model {verb} better than the student it is to teach"
                f" (gain in {METRIC} {teacher.gain.mean:+.3f}, {teacher.gain.low:+.3f} to"
                f" {teacher.gain.high:+.3f}): {REMEDIES[name]}"
            )
        return found


def check_teachers(
    data: RetrievalData,
    retriever: Retriever,
    scorer: PairScorer | None,
    late_interaction: bool,
    depth: int,
    seed: int,
    search_on: SearchOn = "cpu",
) -> dict[str, Any]:
    """Search ``data`` with the student, rerank its ``depth`` best, and compare.

    Args:
        data: the passages to search, the queries and their judgements.
        scorer: the cross-encoder; None leaves it out.
        late_interaction: whether to rerank with late interaction.
        search_on: ``training.vector_search``.

    Returns:
        The figures of :class:`TeacherCheck`, all but where the queries come from.
    """
    vectors = retriever.vectors(retriever.passages(data.passages), "passage")
    index = VectorIndex.build(vectors, data.pids)
    run = ranking.dense_run(retriever, index.on(search_on, depth), data.queries, depth)
    measures = parse_metrics(f"{METRIC},success@{depth}")

    def values(ranked: Run, column: int = 0) -> np.ndarray:
        return per_query(ranked, data.qrels, list(data.qrels), measures)[measures[column].name]

    student = values(run)

    def measured(reranked: Run) -> Teacher:
        own = values(reranked)
        return Teacher(estimate(own, seed), estimate(own - student, seed))

    found: dict[str, Teacher | None] = dict.fromkeys(REMEDIES)
    if late_interaction:
        reranked = ranking.rerank_late_interaction(retriever, data, run, depth)
        found["late_interaction"] = measured(reranked)
    if scorer is not None:
        found["cross_encoder"] = measured(ranking.rerank_cross_encoder(scorer, data, run, depth))
    return {
        "queries": len(data.qrels),
        "passages": len(data.pids),
        "depth": depth,
        "student": estimate(student, seed),
        "ceiling": estimate(values(run, 1), seed),
        **found,
    }


def _told(value: Estimate) -> str:
    return f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"
