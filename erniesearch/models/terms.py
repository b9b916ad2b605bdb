"""The loss terms of a micro-step, from what the models made of it.

    outputs → gather over ranks → scores → losses → weighted sum

Nothing here has parameters: the terms' gradient with respect to the outputs is all that the
encoders need (gradient caching rests on it).
"""

from dataclasses import asdict
from typing import NamedTuple

from torch import Tensor, arange, long, stack, zeros

from erniesearch import distributed
from erniesearch.config import LossWeights, ObjectiveConfig
from erniesearch.data.collate import Batch
from erniesearch.models.encoder import Encoded
from erniesearch.objectives import losses, scores

GATE_MOMENTUM = 0.9


class Outputs(NamedTuple):
    """What the models made of this rank's B queries and B·G passages; None where no term asks.

    Attributes:
        queries, passages: the student's first pass.
        second_queries, second_passages: ``[B, hidden]`` and ``[B·G, hidden]``, dual-encoder vectors
            of a second pass with other dropout.
        teacher_scores: ``[B·G]``, the cross-encoder's.
        attention, mlm: these two terms themselves; they need no passage of another query.
    """

    queries: Encoded | None = None
    passages: Encoded | None = None
    second_queries: Tensor | None = None
    second_passages: Tensor | None = None
    teacher_scores: Tensor | None = None
    attention: Tensor | None = None
    mlm: Tensor | None = None


class StudentScores(NamedTuple):
    """Scores are ``[B, all passages]``, ``labels`` the column of each query's positive, ``mask``
    True on candidates, ``all_vectors`` every rank's passages."""

    dual: Tensor | None
    late: Tensor | None
    all_vectors: Tensor | None
    labels: Tensor
    mask: Tensor


class Objective:
    """A stage's weighted terms, and the competence gate's running accuracies.

    Args:
        weights: terms of weight 0 are not computed.
        settings: temperatures and switches.
    """

    def __init__(self, weights: LossWeights, settings: ObjectiveConfig) -> None:
        self.weights = weights
        self.settings = settings
        # The competence gate's state, saved in checkpoints; a buffer would turn bf16 with the rest.
        self.running_accuracy: dict[str, float] = {}
        w = weights
        self.needs_vectors = any((w.de, w.ce_to_de, w.li_to_de, w.dual_reg))
        self.needs_tokens = any((w.li, w.ce_to_li, w.li_to_de, w.attention))
        # A teacher that only gives targets needs no gradient.
        self.trains_teacher = bool(w.ce) or not settings.detach_targets

    def terms(self, batch: Batch, outputs: Outputs, training: bool) -> dict[str, Tensor]:
        """Scalars by name: each term, ``accuracy_*`` (no gradient), and ``loss``, their weighted
        sum. Students' terms are means over this rank's queries against every rank's passages."""
        terms: dict[str, Tensor] = {}
        if outputs.mlm is not None:
            terms["mlm"] = outputs.mlm
        student = None
        if outputs.queries is not None:
            student = self.score(batch, outputs)
            terms |= self._student_terms(outputs, student, training)
        if outputs.teacher_scores is not None:
            terms |= self._teacher_terms(batch, outputs, student, training)
        weights = asdict(self.weights)
        terms["loss"] = stack(
            [weights[name] * term for name, term in terms.items() if name in weights]
        ).sum()
        return terms

    def score(self, batch: Batch, outputs: Outputs) -> StudentScores:
        """This rank's queries against every rank's passages."""
        queries, passages, settings = outputs.queries, outputs.passages, self.settings
        assert queries is not None
        assert passages is not None
        num_queries, num_passages = len(batch.query_ids), len(batch.passage_ids)
        rows = arange(num_queries, device=batch.query_ids.device)
        labels = distributed.rank() * num_passages + rows * batch.group_size
        all_index = distributed.gather_rows(batch.passage_index)
        mask = scores.candidate_mask(batch.relevant_index, all_index, labels)
        all_vectors = dual = late = None
        if self.needs_vectors:
            all_vectors = distributed.gather_rows(passages.vectors)
            dual = scores.dual_encoder_scores(queries.vectors, all_vectors, settings.tau_de)
        if self.needs_tokens:
            late = scores.cross_batch_late_interaction_scores(
                queries.tokens, batch.query_mask, passages.tokens, batch.passage_mask,
                settings.tau_li, settings.kernels, settings.late_interaction_exchange,
            )  # fmt: skip
        return StudentScores(dual, late, all_vectors, labels, mask)

    def _student_terms(
        self, outputs: Outputs, student: StudentScores, training: bool
    ) -> dict[str, Tensor]:
        w, labels, mask = self.weights, student.labels, student.mask
        terms: dict[str, Tensor] = {}
        for name, logits, weight in (("li", student.late, w.li), ("de", student.dual, w.de)):
            if logits is not None:
                terms[f"accuracy_{name}"] = losses.accuracy(logits, labels, mask)
            if logits is not None and weight:
                terms[name] = losses.contrastive_loss(logits, labels, mask)
        if w.li_to_de:
            assert student.late is not None
            assert student.dual is not None
            accuracies = {name: terms[f"accuracy_{name}"] for name in ("li", "de")}
            self._track(accuracies, training)
            terms["li_to_de"] = self._gate("li", "de") * losses.kl_divergence(
                student.late, student.dual, mask, self.settings.detach_targets
            )
        if w.dual_reg:
            terms["dual_reg"] = self._dual_reg_term(outputs, student)
        return terms

    def _dual_reg_term(self, outputs: Outputs, student: StudentScores) -> Tensor:
        """Query side plus passage side of the two dropout passes."""
        assert outputs.queries is not None
        assert outputs.second_queries is not None
        assert outputs.second_passages is not None
        assert student.dual is not None
        assert student.all_vectors is not None
        tau = self.settings.tau_de
        by_query = scores.dual_encoder_scores(outputs.second_queries, student.all_vectors, tau)
        second_vectors = distributed.gather_rows(outputs.second_passages)
        by_passage = scores.dual_encoder_scores(outputs.queries.vectors, second_vectors, tau)
        return losses.symmetric_kl(student.dual, by_query, student.mask) + losses.symmetric_kl(
            student.dual, by_passage, student.mask
        )

    def _teacher_terms(
        self, batch: Batch, outputs: Outputs, student: StudentScores | None, training: bool
    ) -> dict[str, Tensor]:
        assert outputs.teacher_scores is not None
        w = self.weights
        terms: dict[str, Tensor] = {}
        teacher_scores = outputs.teacher_scores.view(-1, batch.group_size)
        labels = zeros(len(teacher_scores), dtype=long, device=teacher_scores.device)
        mask = _group_mask(batch)
        terms["accuracy_ce"] = losses.accuracy(teacher_scores, labels, mask)
        if w.ce:
            terms["ce"] = losses.contrastive_loss(teacher_scores, labels, mask)
        if student is None:
            return terms
        own = {
            name: scores.own_group(logits, student.labels, batch.group_size)
            for name, logits in (("li", student.late), ("de", student.dual))
            if logits is not None
        }
        accuracies = {f"group_{n}": losses.accuracy(x, labels, mask) for n, x in own.items()}
        self._track({"group_ce": terms["accuracy_ce"], **accuracies}, training)
        for weight, name in ((w.ce_to_li, "li"), (w.ce_to_de, "de")):
            if weight:
                kl = losses.kl_divergence(
                    teacher_scores, own[name], mask, self.settings.detach_targets
                )
                terms[f"ce_to_{name}"] = self._gate("group_ce", f"group_{name}") * kl
        if outputs.attention is not None:
            terms["attention"] = self._gate("group_ce", "group_li") * outputs.attention
        return terms

    def _track(self, accuracies: dict[str, Tensor], training: bool) -> None:
        """Update the running accuracies, the same on every rank (competence gate only)."""
        if self.settings.competence_gate and training:
            for name, value in distributed.mean_over_ranks(accuracies).items():
                before = self.running_accuracy.get(name, 0.0)
                self.running_accuracy[name] = before + (1 - GATE_MOMENTUM) * (value - before)

    def _gate(self, teacher: str, student: str) -> float:
        """1 while the teacher's running accuracy exceeds the student's, else 0; always 1 without
        the competence gate."""
        running = self.running_accuracy
        open_ = running.get(teacher, 0.0) > running.get(student, 0.0)
        return float(open_ or not self.settings.competence_gate)


def _group_mask(batch: Batch) -> Tensor:
    """Candidates within the own group ``[B, G]``: no other relevant passage among them."""
    index = batch.passage_index.view(-1, batch.group_size)
    relevant = (batch.relevant_index[:, :, None] == index[:, None, :]).any(1)
    relevant[:, 0] = False
    return ~relevant
