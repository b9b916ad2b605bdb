"""The loss terms of a micro-step, from what the models made of it.

    outputs → passages to compare with → scores → losses → weighted sum

Nothing here has parameters: the terms' gradient with respect to the outputs is all that the
encoders need (gradient caching rests on it).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, arange, long, stack, zeros, zeros_like

from erniesearch import distributed
from erniesearch.config.keys import ObjectiveConfig
from erniesearch.config.stage_keys import LossWeights
from erniesearch.config.terms import (
    TERMS,
    comparing,
    own_terms,
    reads,
    trains_teacher,
    weight_of,
)
from erniesearch.data.batches import Batch
from erniesearch.data.text_format import SCORED
from erniesearch.objectives import losses, scores
from erniesearch.objectives.exchange import Exchange
from erniesearch.objectives.outputs import Outputs
from erniesearch.objectives.own_terms import Scores, value_of

GATE_MOMENTUM = 0.9


class Distance(NamedTuple):
    """How far a student's scores are from a target's, and what is logged of the two sides."""

    loss: Callable[[Tensor, Tensor, Tensor, bool], Tensor]
    statistics: Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]


class StudentScores(NamedTuple):
    """Scores are ``[B, P]`` over the passages that ``objective.candidates`` names, ``labels`` the
    column of each query's positive, ``mask`` True on candidates, ``vectors`` the P passages' (or
    ``[B, G, hidden]``, every query's own); ``prefixes`` are scores like ``dual`` by the first
    dimensions alone, one for each of ``objective.matryoshka_dims``."""

    dual: Tensor | None
    late: Tensor | None
    vectors: Tensor | None
    labels: Tensor
    mask: Tensor
    prefixes: list[Tensor]


class Objective:
    """A stage's weighted terms, and the competence gate's running accuracies.

    Args:
        weights: terms of weight 0 are not computed.
        settings: temperatures and switches; ``tau_ce`` is a number.
        normalize: whether the dual-encoder's vectors have length 1; their prefixes get it too.
    """

    def __init__(
        self, weights: LossWeights, settings: ObjectiveConfig, normalize: bool = False
    ) -> None:
        self.weights = weights
        self.settings = settings
        self.normalize = normalize
        # The competence gate's state, saved in checkpoints; a buffer would turn bf16 with the rest.
        self.running_accuracy: dict[str, float] = {}
        self.needs_vectors = reads(weights, "vectors")
        self.needs_tokens = reads(weights, "tokens")
        self.needs_projections = reads(weights, "projections")
        # A teacher that only gives targets needs no gradient.
        self.trains_teacher = trains_teacher(weights, settings.detach_targets)

    @property
    def candidates(self) -> str:
        """``objective.candidates``, or the group where no term compares anything else."""
        return self.settings.candidates if comparing(self.weights, "candidates") else "group"

    def exchange(self, batch: Batch) -> Exchange | None:
        """The way of a micro-step's passages to all ranks; None where queries meet their own rank's
        alone. Every rank must ask."""
        if self.candidates != "cross_batch":
            return None
        rings = self.settings.late_interaction_exchange == "ring"
        return Exchange(batch, self.needs_tokens, rings)

    def terms(self, batch: Batch, outputs: Outputs, training: bool) -> dict[str, Tensor]:
        """Scalars by name: each term, ``accuracy_*`` and :func:`losses.kl_statistics` of each KL
        (no gradient), and ``loss``, the terms' weighted sum. Terms are means over this rank's
        queries."""
        terms: dict[str, Tensor] = {}
        if outputs.mlm is not None:
            terms["mlm"] = outputs.mlm
        student = None
        if outputs.queries is not None:
            outputs = outputs._replace(exchange=outputs.exchange or self.exchange(batch))
            student = self.score(batch, outputs)
            terms |= self._student_terms(outputs, student, training)
        teacher = _teacher_scores(batch, outputs)
        if teacher is not None:
            terms |= self._teacher_terms(batch, outputs, student, teacher, training)
        terms |= self._own_terms(batch, student, teacher)
        weights = weight_of(self.weights)
        terms["loss"] = stack(
            [weights[name] * term for name, term in terms.items() if name in weights]
        ).sum()
        return terms

    def score(self, batch: Batch, outputs: Outputs) -> StudentScores:
        """This rank's queries against the passages that they are compared with."""
        queries, passages = outputs.queries, outputs.passages
        assert queries is not None
        assert passages is not None
        exchange = outputs.exchange or self.exchange(batch)
        num_queries = len(batch.query_ids)
        rows = arange(num_queries, device=batch.query_ids.device)
        labels = rows * batch.group_size
        if self.candidates == "cross_batch":
            labels = labels + distributed.rank() * len(batch.passage_ids)
        elif self.candidates == "group":
            labels = zeros_like(labels)
        if exchange is not None:
            index = exchange.index(batch.passage_index)
        else:
            index = self._compared(batch.passage_index, num_queries)
        mask = scores.candidate_mask(batch.relevant_index, index, labels)
        vectors = dual = late = None
        prefixes: list[Tensor] = []
        if self.needs_vectors:
            vectors = self._vectors(1, passages.vectors, num_queries, exchange)
            dual, *prefixes = self._dual_encoder(queries.vectors, vectors)
        if self.needs_tokens:
            late = self._late_interaction(batch, queries.tokens, passages.tokens, exchange)
        return StudentScores(dual, late, vectors, labels, mask, prefixes)

    def _dual_encoder(self, queries: Tensor, passages: Tensor) -> list[Tensor]:
        """Scores by the whole vectors, then by each of ``objective.matryoshka_dims``."""
        tau, pairs = self.settings.tau_de, [(queries, passages)]
        for dim in self.settings.matryoshka_dims:
            queries_cut, passages_cut = (
                scores.prefix(rows, dim, self.normalize) for rows in (queries, passages)
            )
            pairs.append((queries_cut, passages_cut))
        return [scores.dual_encoder_scores(*pair, tau) for pair in pairs]

    def _compared(self, rows: Tensor, num_queries: int) -> Tensor:
        """``[B·G, …]``, one row a passage, to the own rank's passages that queries are compared
        with: these, or ``[B, G, …]``."""
        return rows if self.candidates == "in_batch" else rows.unflatten(0, (num_queries, -1))

    def _vectors(
        self, number: int, own: Tensor, num_queries: int, exchange: Exchange | None
    ) -> Tensor:
        """Passages' vectors of a dropout pass, all that queries are compared with."""
        if exchange is not None:
            return exchange.vectors(number, own)
        return self._compared(own, num_queries)

    def _late_interaction(
        self, batch: Batch, queries: Tensor, passages: Tensor, exchange: Exchange | None
    ) -> Tensor:
        settings = self.settings
        if exchange is not None:
            assert exchange.tokens is not None
            return scores.cross_batch_late_interaction_scores(
                queries, batch.queries(SCORED), passages, batch.passages(SCORED),
                exchange.tokens,
                settings.tau_li, settings.kernels, settings.late_interaction_exchange,
            )  # fmt: skip
        return scores.late_interaction_scores(
            queries, batch.queries(SCORED), self._compared(passages, len(queries)),
            self._compared(batch.passages(SCORED), len(queries)), settings.tau_li, settings.kernels,
        )  # fmt: skip

    def _distill(
        self, name: str, distance: Distance, target: Tensor, student: Tensor, mask: Tensor,
        prefixes: Sequence[Tensor] = (),
    ) -> dict[str, Tensor]:  # fmt: skip
        """The term ``name``, a mean over the whole vectors and their prefixes, 0 while its gate is
        closed, and what its two sides look like."""
        statistics = distance.statistics(target, student, mask)
        if self.is_open(name):
            detach = self.settings.detach_targets
            term = _mean([distance.loss(target, logits, mask, detach)
                          for logits in (student, *prefixes)])  # fmt: skip
        else:
            term = _nothing(student)
        return {name: term} | {f"{name}_{key}": value for key, value in statistics.items()}

    def _student_terms(
        self, outputs: Outputs, student: StudentScores, training: bool
    ) -> dict[str, Tensor]:
        w, labels, mask = self.weights, student.labels, student.mask
        terms: dict[str, Tensor] = {}
        for name, logits, weight in (("li", student.late, w.li), ("de", student.dual, w.de)):
            if logits is not None:
                terms[f"accuracy_{name}"] = losses.accuracy(logits, labels, mask)
            if logits is not None and weight:
                every = [logits, *(student.prefixes if name == "de" else ())]
                terms[name] = _mean([losses.contrastive_loss(x, labels, mask) for x in every])
        if w.li_to_de:
            assert student.late is not None
            assert student.dual is not None
            settings = self.settings
            terms |= self._distill(
                "li_to_de", Distance(losses.kl_divergence, losses.kl_statistics),
                _at_temperature(student.late, settings.tau_li, settings.tau_li_target),
                _at_temperature(student.dual, settings.tau_de, settings.tau_de_kl), mask,
                [_at_temperature(x, settings.tau_de, settings.tau_de_kl) for x in student.prefixes],
            )  # fmt: skip
            self._track({name: terms[f"accuracy_{name}"] for name in ("li", "de")}, training)
        if w.dual_reg:
            terms["dual_reg"] = self._dual_reg_term(outputs, student)
        return terms

    def _dual_reg_term(self, outputs: Outputs, student: StudentScores) -> Tensor:
        """Query side plus passage side of the two dropout passes."""
        assert outputs.queries is not None
        assert outputs.second_queries is not None
        assert outputs.second_passages is not None
        assert student.dual is not None
        assert student.vectors is not None
        by_query = self._dual_encoder(outputs.second_queries, student.vectors)
        second_vectors = self._vectors(
            2, outputs.second_passages, len(outputs.second_queries), outputs.exchange
        )
        by_passage = self._dual_encoder(outputs.queries.vectors, second_vectors)
        first = [student.dual, *student.prefixes]
        return _mean([
            losses.symmetric_kl(x, y, student.mask) + losses.symmetric_kl(x, z, student.mask)
            for x, y, z in zip(first, by_query, by_passage, strict=True)
        ])  # fmt: skip

    def _own_terms(
        self, batch: Batch, student: StudentScores | None, teacher: tuple[Tensor, Tensor] | None
    ) -> dict[str, Tensor]:
        """The stage's :class:`LossTerm` values."""
        own = own_terms(self.weights)
        if not own:
            return {}
        of_teacher, over_group = teacher or (None, group_mask(batch))
        labels = zeros(len(over_group), dtype=long, device=over_group.device)
        given = Scores(
            student.dual if student else None, student.late if student else None, of_teacher,
            student.labels if student else labels, student.mask if student else over_group,
            over_group,
        )  # fmt: skip
        return {term.name: value_of(term, given, batch) for term in own}

    def _teacher_terms(
        self, batch: Batch, outputs: Outputs, student: StudentScores | None,
        teacher: tuple[Tensor, Tensor], training: bool,
    ) -> dict[str, Tensor]:  # fmt: skip
        w = self.weights
        terms: dict[str, Tensor] = {}
        own_scores, mask = teacher
        labels = zeros(len(own_scores), dtype=long, device=own_scores.device)
        terms["accuracy_ce"] = losses.accuracy(own_scores, labels, mask)
        if w.ce:
            terms["ce"] = losses.contrastive_loss(own_scores, labels, mask)
        target, mask = self._teacher_target(batch, outputs, mask)
        if student is None:
            return terms
        own = {
            name: scores.own_group(logits, student.labels, batch.group_size)
            for name, logits in (("li", student.late), ("de", student.dual))
            if logits is not None
        }
        settings = self.settings
        kl = Distance(losses.kl_divergence, losses.kl_statistics)
        margin_mse = Distance(losses.margin_mse, losses.margin_statistics)
        for name, side, distance, tau, wanted in (
            ("ce_to_li", "li", kl, settings.tau_li, settings.tau_li_kl),
            ("ce_to_de", "de", kl, settings.tau_de, settings.tau_de_kl),
            ("margin_mse_li", "li", margin_mse, settings.tau_li, settings.tau_li_margin),
            ("margin_mse_de", "de", margin_mse, settings.tau_de, settings.tau_de_margin),
        ):
            if getattr(w, name):
                prefixes = [
                    _at_temperature(
                        scores.own_group(x, student.labels, batch.group_size), tau, wanted
                    )
                    for x in (student.prefixes if side == "de" else ())
                ]
                logits = _at_temperature(own[side], tau, wanted)
                terms |= self._distill(name, distance, target, logits, mask, prefixes)
        assert outputs.queries is not None
        for name, made, read in (
            ("attention", outputs.attention, outputs.queries.tokens),
            ("virt", outputs.virt, outputs.queries.projections),
        ):
            if getattr(w, name):
                terms[name] = _nothing(read) if made is None else made
        accuracies = {f"group_{n}": losses.accuracy(x, labels, mask) for n, x in own.items()}
        # Beside accuracy_ce, on the same lists: is there anything to distil?
        terms |= {f"accuracy_{name}": value for name, value in accuracies.items()}
        self._track({"group_ce": losses.accuracy(target, labels, mask), **accuracies}, training)
        return terms

    def _teacher_target(
        self, batch: Batch, outputs: Outputs, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A teacher's scores of the groups at their temperatures, ``[B, G]``, and which of ``mask``
        have one: the cross-encoder's, stored ones, or the mean of the two.

        The mean of logits is that of log-probabilities up to a constant, which no term sees: the
        softmax is the geometric mean of both distributions.
        """
        settings, stored = self.settings, batch.teacher_scores
        targets = []
        if outputs.teacher_scores is not None:
            assert settings.tau_ce != "auto"
            live = outputs.teacher_scores.view_as(mask)
            targets.append(_at_temperature(live, 1.0, settings.tau_ce))
        if stored is not None:  # a random passage that fills a group up has none: it is left out
            tau = settings.tau_ce if settings.tau_stored is None else settings.tau_stored
            assert tau != "auto"
            mask = mask & stored.isfinite().view_as(mask)
            targets.append(_at_temperature(stored.nan_to_num().view_as(mask), 1.0, tau))
        return sum(targets[1:], targets[0]) / len(targets), mask

    def _track(self, accuracies: dict[str, Tensor], training: bool) -> None:
        """Update the running accuracies, the same on every rank (competence gate only)."""
        if self.settings.competence_gate and training:
            for name, value in distributed.mean_over_ranks(accuracies).items():
                before = self.running_accuracy.get(name, 0.0)
                self.running_accuracy[name] = before + (1 - GATE_MOMENTUM) * (value - before)

    def is_open(self, term: str) -> bool:
        """Whether a distillation term counts: always without the competence gate; with it, while
        the running accuracy of its teacher, over the steps before this one, exceeds that of its
        student."""
        teacher, student = TERMS[term].gate
        running = self.running_accuracy
        if not self.settings.competence_gate or teacher not in running:
            return True
        return running[teacher] > running.get(student, 0.0)


def _teacher_scores(batch: Batch, outputs: Outputs) -> tuple[Tensor, Tensor] | None:
    """The cross-encoder's scores of the groups, or stored ones where it does not run, and their
    mask, both ``[B, G]``; None without."""
    if outputs.teacher_scores is None and batch.teacher_scores is None:
        return None
    mask = group_mask(batch)
    if outputs.teacher_scores is not None:
        return outputs.teacher_scores.view_as(mask), mask
    assert batch.teacher_scores is not None
    # A random passage that fills a group up has none, and the KL leaves it out.
    mask = mask & batch.teacher_scores.isfinite().view_as(mask)
    return batch.teacher_scores.nan_to_num().view_as(mask), mask


def _mean(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else stack(values).mean()


def _nothing(rows: Tensor) -> Tensor:
    """0, with a graph to ``rows`` through which nothing goes back."""
    return rows.flatten()[:0].float().sum()


def _at_temperature(logits: Tensor, tau: float, wanted: float | None) -> Tensor:
    """``s / tau`` to ``s / wanted``; None leaves it."""
    return logits if wanted is None or wanted == tau else logits * (tau / wanted)


def group_mask(batch: Batch) -> Tensor:
    """Candidates within the own group ``[B, G]``: no other relevant passage among them."""
    index = batch.passage_index.view(-1, batch.group_size)
    labels = zeros(len(index), dtype=long, device=index.device)
    return scores.candidate_mask(batch.relevant_index, index, labels)
