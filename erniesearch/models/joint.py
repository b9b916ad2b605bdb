"""Teacher and students in one module: ``forward(batch)`` returns every loss term.

    encode → gather over ranks → scores → losses → weighted sum

One module means one DeepSpeed engine: several engines and one shared backward break as soon as
one of them runs its forward twice.
"""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from erniesearch import distributed
from erniesearch.config import LossWeights, ObjectiveConfig
from erniesearch.data.collate import Batch
from erniesearch.models.cross_encoder import CrossEncoder, PairLayout, Pairs, assemble_pairs
from erniesearch.models.encoder import Encoded, StudentEncoder, content_mask
from erniesearch.objectives import losses, scores

GATE_MOMENTUM = 0.9


class StudentOutput(NamedTuple):
    """What the students made of a batch; scores are ``[B, all passages]``, ``labels`` the column
    of each query's positive, ``mask`` True on candidates."""

    queries: Encoded
    passages: Encoded
    all_vectors: Tensor
    dual_scores: Tensor | None
    late_scores: Tensor | None
    labels: Tensor
    mask: Tensor


class JointModel(nn.Module):
    """Computes the terms whose weight is above 0, and nothing for the others.

    Args:
        student: None if no term runs it.
        teacher: None if no term runs it.
        weights: the stage's weights.
        objective: temperatures and switches.
        tokenizer: the one vocabulary of both.
        seed: the run's seed; dropout seeds derive from (seed, step, micro-step, rank, pass).
    """

    special_ids: Tensor

    def __init__(
        self,
        student: StudentEncoder | None,
        teacher: CrossEncoder | None,
        weights: LossWeights,
        objective: ObjectiveConfig,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.weights = weights
        self.objective = objective
        self.seed = seed
        self.pad_id = int(tokenizer.pad_token_id)
        self.layout = PairLayout.of(tokenizer) if teacher else None
        special = torch.tensor([tokenizer.cls_token_id, tokenizer.sep_token_id])
        self.register_buffer("special_ids", special, persistent=False)
        # The competence gate's state, saved in checkpoints; a buffer would turn bf16 with the rest.
        self.running_accuracy: dict[str, float] = {}
        w = weights
        self.needs_vectors = any((w.de, w.ce_to_de, w.li_to_de, w.dual_reg))
        self.needs_tokens = any((w.li, w.ce_to_li, w.li_to_de, w.attention))
        if student is not None and not self.needs_tokens:
            student.projection.requires_grad_(False)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Scalars by name: each term, ``accuracy_*`` (no gradient), and ``loss``, their weighted
        sum. Students' terms are means over this rank's queries against every rank's passages."""
        terms: dict[str, Tensor] = {}
        if self.weights.mlm:
            terms["mlm"] = self._masked_lm_term(batch)
        student = None
        if self.needs_vectors or self.needs_tokens:
            student = self._run_student(batch)
            terms |= self._student_terms(batch, student)
        if self.teacher is not None:
            terms |= self._teacher_terms(batch, student)
        weights = asdict(self.weights)
        terms["loss"] = torch.stack(
            [weights[name] * term for name, term in terms.items() if name in weights]
        ).sum()
        return terms

    def _masked_lm_term(self, batch: Batch) -> Tensor:
        assert self.student is not None
        assert batch.mlm_ids is not None
        assert batch.mlm_labels is not None
        self._seed_pass(batch, 0)
        return self.student.masked_lm_loss(batch.mlm_ids, batch.passage_mask, batch.mlm_labels)

    def _run_student(self, batch: Batch) -> StudentOutput:
        """Encode, gather, score: this rank's queries against every rank's passages."""
        objective = self.objective
        num_queries, num_passages = len(batch.query_ids), len(batch.passage_ids)
        rows = torch.arange(num_queries, device=batch.query_ids.device)
        labels = distributed.rank() * num_passages + rows * batch.group_size
        all_index = distributed.gather_rows(batch.passage_index)
        mask = scores.candidate_mask(batch.relevant_index, all_index, labels)
        queries, passages = self._encode(batch, 1, self.needs_vectors, self.needs_tokens)
        all_vectors = passages.vectors
        dual_scores = late_scores = None
        if self.needs_vectors:
            all_vectors = distributed.gather_rows(passages.vectors)
            dual_scores = scores.dual_encoder_scores(queries.vectors, all_vectors, objective.tau_de)
        if self.needs_tokens:
            all_tokens, all_mask = distributed.gather_tokens(passages.tokens, batch.passage_mask)
            late_scores = scores.late_interaction_scores(
                queries.tokens, batch.query_mask, all_tokens, all_mask,
                objective.tau_li, objective.kernels,
            )  # fmt: skip
        return StudentOutput(queries, passages, all_vectors, dual_scores, late_scores, labels, mask)

    def _student_terms(self, batch: Batch, student: StudentOutput) -> dict[str, Tensor]:
        w, labels, mask = self.weights, student.labels, student.mask
        terms: dict[str, Tensor] = {}
        for name, logits, weight in (
            ("li", student.late_scores, w.li), ("de", student.dual_scores, w.de)
        ):  # fmt: skip
            if logits is not None:
                terms[f"accuracy_{name}"] = losses.accuracy(logits, labels, mask)
            if logits is not None and weight:
                terms[name] = losses.contrastive_loss(logits, labels, mask)
        if w.li_to_de:
            assert student.late_scores is not None
            assert student.dual_scores is not None
            self._track({name: terms[f"accuracy_{name}"] for name in ("li", "de")})
            terms["li_to_de"] = self._gate("li", "de") * losses.kl_divergence(
                student.late_scores, student.dual_scores, mask, self.objective.detach_targets
            )
        if w.dual_reg:
            terms["dual_reg"] = self._dual_reg_term(batch, student)
        return terms

    def _dual_reg_term(self, batch: Batch, student: StudentOutput) -> Tensor:
        """A second pass with other dropout: query side plus passage side."""
        assert student.dual_scores is not None
        tau = self.objective.tau_de
        queries, passages = self._encode(batch, 2, vectors=True, tokens=False)
        by_query = scores.dual_encoder_scores(queries.vectors, student.all_vectors, tau)
        all_vectors = distributed.gather_rows(passages.vectors)
        by_passage = scores.dual_encoder_scores(student.queries.vectors, all_vectors, tau)
        return losses.symmetric_kl(
            student.dual_scores, by_query, student.mask
        ) + losses.symmetric_kl(student.dual_scores, by_passage, student.mask)

    def _teacher_terms(self, batch: Batch, student: StudentOutput | None) -> dict[str, Tensor]:
        assert self.teacher is not None
        assert self.layout is not None
        w, detach = self.weights, self.objective.detach_targets
        terms: dict[str, Tensor] = {}
        pairs = assemble_pairs(
            batch.query_ids, batch.query_mask, batch.passage_ids, batch.passage_mask,
            self.layout, self.pad_id,
        )  # fmt: skip
        self._seed_pass(batch, 3)
        # A teacher that only gives targets needs no graph.
        trained = bool(w.ce) or not detach
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            teacher_scores = self.teacher(pairs).view(-1, batch.group_size)
        labels = torch.zeros(len(teacher_scores), dtype=torch.long, device=teacher_scores.device)
        mask = self._group_mask(batch)
        terms["accuracy_ce"] = losses.accuracy(teacher_scores, labels, mask)
        if w.ce:
            terms["ce"] = losses.contrastive_loss(teacher_scores, labels, mask)
        if student is None:
            return terms
        own = {
            name: scores.own_group(logits, student.labels, batch.group_size)
            for name, logits in (("li", student.late_scores), ("de", student.dual_scores))
            if logits is not None
        }
        accuracies = {f"group_{n}": losses.accuracy(x, labels, mask) for n, x in own.items()}
        self._track({"group_ce": terms["accuracy_ce"], **accuracies})
        for weight, name in ((w.ce_to_li, "li"), (w.ce_to_de, "de")):
            if weight:
                kl = losses.kl_divergence(teacher_scores, own[name], mask, detach)
                terms[f"ce_to_{name}"] = self._gate("group_ce", f"group_{name}") * kl
        if w.attention:
            attention = self._attention_term(batch, student, pairs)
            terms["attention"] = self._gate("group_ce", "group_li") * attention
        return terms

    def _attention_term(self, batch: Batch, student: StudentOutput, pairs: Pairs) -> Tensor:
        assert self.teacher is not None
        attention = self.teacher.attention(pairs)
        return scores.attention_kl(
            student.queries.tokens,
            content_mask(batch.query_ids, batch.query_mask, self.special_ids),
            student.passages.tokens,
            content_mask(batch.passage_ids, batch.passage_mask, self.special_ids),
            attention.queries, attention.keys, attention.lse,
            self.objective.tau_att, self.objective.kernels,
        )  # fmt: skip

    def _group_mask(self, batch: Batch) -> Tensor:
        """Candidates within the own group ``[B, G]``: no other relevant passage among them."""
        index = batch.passage_index.view(-1, batch.group_size)
        relevant = (batch.relevant_index[:, :, None] == index[:, None, :]).any(1)
        relevant[:, 0] = False
        return ~relevant

    def _track(self, accuracies: dict[str, Tensor]) -> None:
        """Update the running accuracies, the same on every rank (competence gate only)."""
        if self.objective.competence_gate and self.training:
            for name, value in distributed.mean_over_ranks(accuracies).items():
                before = self.running_accuracy.get(name, 0.0)
                self.running_accuracy[name] = before + (1 - GATE_MOMENTUM) * (value - before)

    def _gate(self, teacher: str, student: str) -> float:
        """1 while the teacher's running accuracy exceeds the student's, else 0; always 1 without
        the competence gate."""
        running = self.running_accuracy
        open_ = running.get(teacher, 0.0) > running.get(student, 0.0)
        return float(open_ or not self.objective.competence_gate)

    def _encode(
        self, batch: Batch, number: int, vectors: bool, tokens: bool
    ) -> tuple[Encoded, Encoded]:
        assert self.student is not None
        self._seed_pass(batch, number)
        return (
            self.student(batch.query_ids, batch.query_mask, "query", vectors, tokens),
            self.student(batch.passage_ids, batch.passage_mask, "passage", vectors, tokens),
        )

    def _seed_pass(self, batch: Batch, number: int) -> None:
        """Dropout as a pure function of (seed, step, micro-step, rank, pass)."""
        if self.training:
            distributed.seed_everything(
                self.seed, 3, batch.step, batch.micro_step, distributed.rank(), number
            )

    def enable_activation_checkpointing(self) -> None:
        """Recompute activations in the backward pass. Non-reentrant: the reentrant form fails
        under ZeRO when an encoder runs twice in a step."""
        towers: list[PreTrainedModel] = []
        if self.student is not None:
            towers += [self.student.query_tower, self.student.passage_tower]
        if self.teacher is not None:
            towers.append(self.teacher.model)
        for tower in towers:
            tower.gradient_checkpointing_enable({"use_reentrant": False})

    def parameter_groups(
        self, student_lr: float, head_lr: float, teacher_lr: float, weight_decay: float
    ) -> Iterator[dict[str, Any]]:
        """AdamW groups per part; biases and norms do not decay, frozen parameters are left out."""
        student = self.student
        towers = [student.query_tower, student.passage_tower] if student is not None else []
        in_tower = {id(parameter) for tower in towers for parameter in tower.parameters()}
        parts: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                own = "student" if id(parameter) in in_tower else "head"
                part = "teacher" if name.startswith("teacher.") else own
                parts.setdefault((part, parameter.ndim >= 2), []).append(parameter)
        rates = {"student": student_lr, "head": head_lr, "teacher": teacher_lr}
        for (part, decays), parameters in parts.items():
            yield {
                "params": parameters,
                "lr": rates[part],
                "weight_decay": weight_decay if decays else 0.0,
                "name": f"{part}{'' if decays else '_no_decay'}",
            }
