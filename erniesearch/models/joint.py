"""Teacher and students in one module: ``forward(batch)`` returns every loss term.

    encode → gather over ranks → scores → losses → weighted sum

One module means one DeepSpeed engine: several engines and one shared backward break as soon as
one of them runs its forward twice.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from erniesearch import distributed
from erniesearch.config import LossWeights, ObjectiveConfig, StageConfig
from erniesearch.data.collate import Batch
from erniesearch.models.cross_encoder import CrossEncoder, PairLayout, Pairs, assemble_pairs
from erniesearch.models.encoder import Encoded, Side, StudentEncoder, content_mask
from erniesearch.models.terms import Objective, Outputs
from erniesearch.objectives import scores

Work = Literal["query", "passage", "pair", "masked"]


class Chunk(NamedTuple):
    """A part of a micro-step's encoder work: ``rows`` of its queries, its passages, its pairs or
    its passages with masked words, in dropout pass ``number``."""

    kind: Work
    number: int
    rows: slice


class JointModel(nn.Module):
    """Computes the terms whose weight is above 0, and nothing for the others.

    Args:
        student: None if no term runs it.
        teacher: None if no term runs it.
        weights: the stage's weights.
        objective: temperatures and switches; ``tau_ce`` is a number.
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
        self.objective = Objective(weights, objective)
        self.seed = seed
        self.pad_id = int(tokenizer.pad_token_id)
        self.layout = PairLayout.of(tokenizer) if teacher else None
        special = torch.tensor([tokenizer.cls_token_id, tokenizer.sep_token_id])
        self.register_buffer("special_ids", special, persistent=False)
        self.needs_student = self.objective.needs_vectors or self.objective.needs_tokens
        if student is not None and not self.objective.needs_tokens:
            student.projection.requires_grad_(False)

    def forward(
        self, batch: Batch, chunk: Chunk | None = None
    ) -> dict[str, Tensor] | tuple[Tensor, ...]:
        """The terms of a micro-step (:meth:`Objective.terms`), everything at once; or one chunk.

        A chunk of queries or passages gives :class:`Encoded`, padded to the batch's length; one of
        pairs ``[n]`` scores; one of masked words the sum of its cross-entropies. All the work goes
        through here, because ZeRO-3 gathers parameters around this call.
        """
        if chunk is None:
            return self.objective.terms(batch, self.outputs(batch), self.training)
        self._seed_pass(batch, chunk.number, int(chunk.kind == "query"), chunk.rows.start)
        if chunk.kind == "masked":
            return (self._masked_lm_loss(batch, chunk.rows, reduction="sum"),)
        if chunk.kind == "pair":
            assert self.teacher is not None
            return (self.teacher(self.pairs(batch, chunk.rows)),)
        return self._encode_chunk(batch, chunk)

    def outputs(self, batch: Batch) -> Outputs:
        """All of the encoders' work, with the graph that a backward pass needs."""
        outputs = Outputs()
        everything = slice(0, len(batch.passage_ids))
        if self.weights.mlm:
            self._seed_pass(batch, 0)
            outputs = outputs._replace(mlm=self._masked_lm_loss(batch, everything))
        if self.needs_student:
            vectors, tokens = self.objective.needs_vectors, self.objective.needs_tokens
            queries, passages = self._encode(batch, 1, vectors, tokens)
            outputs = outputs._replace(queries=queries, passages=passages)
        if self.weights.dual_reg:
            queries, passages = self._encode(batch, 2, vectors=True, tokens=False)
            outputs = outputs._replace(
                second_queries=queries.vectors, second_passages=passages.vectors
            )
        if self.teacher is not None:
            pairs = assemble_pairs(
                batch.query_ids, batch.query_mask, batch.passage_ids, batch.passage_mask,
                self._layout, self.pad_id,
            )  # fmt: skip
            self._seed_pass(batch, 3)
            wanted = torch.is_grad_enabled() and self.objective.trains_teacher
            with torch.set_grad_enabled(wanted):
                outputs = outputs._replace(teacher_scores=self.teacher(pairs))
            if self.weights.attention:
                assert outputs.queries is not None
                assert outputs.passages is not None
                attention = self.attention_term(
                    batch, everything, pairs, outputs.queries.tokens, outputs.passages.tokens
                )
                outputs = outputs._replace(attention=attention)
        return outputs

    def chunks(self, batch: Batch, size: int) -> Iterator[Chunk]:
        """All of the encoders' work in chunks of at most ``size`` texts or pairs."""
        work: list[tuple[Work, int]] = []
        for number in (1, 2) if self.weights.dual_reg else (1,):
            if self.needs_student:
                work += [("query", number), ("passage", number)]
        if self.teacher is not None:
            work.append(("pair", 3))
        if self.weights.mlm:
            work.append(("masked", 0))
        for kind, number in work:
            total = len(batch.query_ids if kind == "query" else batch.passage_ids)
            for begin in range(0, total, size):
                yield Chunk(kind, number, slice(begin, min(begin + size, total)))

    def _encode_chunk(self, batch: Batch, chunk: Chunk) -> Encoded:
        assert self.student is not None
        side: Side = "query" if chunk.kind == "query" else "passage"
        first = chunk.number == 1
        every_id, every_mask = (
            (batch.query_ids, batch.query_mask)
            if side == "query"
            else (batch.passage_ids, batch.passage_mask)
        )
        mask = every_mask[chunk.rows]
        width = distributed.longest_row(mask)
        encoded = self.student(
            every_id[chunk.rows, :width], mask[:, :width], side,
            self.objective.needs_vectors or not first, self.objective.needs_tokens and first,
        )  # fmt: skip
        if not encoded.tokens.numel():
            return encoded
        missing = every_mask.shape[1] - width
        return encoded._replace(tokens=F.pad(encoded.tokens, (0, 0, 0, missing)))

    def pairs(self, batch: Batch, rows: slice) -> Pairs:
        """The cross-encoder's input of some of the B·G pairs."""
        query = torch.arange(rows.start, rows.stop, device=batch.query_ids.device)
        query = query // batch.group_size
        return assemble_pairs(
            batch.query_ids[query], batch.query_mask[query], batch.passage_ids[rows],
            batch.passage_mask[rows], self._layout, self.pad_id,
        )  # fmt: skip

    def attention_term(
        self, batch: Batch, rows: slice, pairs: Pairs, query_tokens: Tensor, passage_tokens: Tensor
    ) -> Tensor:
        """The attention KL, a mean over the pairs ``rows`` that the teacher has just read.

        ``passage_tokens`` ``[n, Lp, dim]`` are these pairs'; ``query_tokens`` ``[n / k, Lq, dim]``
        those of their queries, one for every k pairs.
        """
        assert self.teacher is not None
        step = len(passage_tokens) // len(query_tokens)
        query = torch.arange(rows.start, rows.stop, step, device=batch.query_ids.device)
        query = query // batch.group_size
        attention = self.teacher.attention(pairs)
        return scores.attention_kl(
            query_tokens,
            content_mask(batch.query_ids[query], batch.query_mask[query], self.special_ids),
            passage_tokens,
            content_mask(batch.passage_ids[rows], batch.passage_mask[rows], self.special_ids),
            attention.queries, attention.keys, attention.lse,
            self.objective.settings.tau_att, self.objective.settings.kernels,
        )  # fmt: skip

    def _masked_lm_loss(
        self, batch: Batch, rows: slice, reduction: Literal["mean", "sum"] = "mean"
    ) -> Tensor:
        assert self.student is not None
        assert batch.mlm_ids is not None
        assert batch.mlm_labels is not None
        return self.student.masked_lm_loss(
            batch.mlm_ids[rows], batch.passage_mask[rows], batch.mlm_labels[rows], reduction
        )

    def _encode(
        self, batch: Batch, number: int, vectors: bool, tokens: bool
    ) -> tuple[Encoded, Encoded]:
        assert self.student is not None
        self._seed_pass(batch, number)
        return (
            self.student(batch.query_ids, batch.query_mask, "query", vectors, tokens),
            self.student(batch.passage_ids, batch.passage_mask, "passage", vectors, tokens),
        )

    @property
    def _layout(self) -> PairLayout:
        assert self.layout is not None
        return self.layout

    def _seed_pass(self, batch: Batch, number: int, *chunk: int) -> None:
        """Dropout as a pure function of (seed, step, micro-step, rank, pass, chunk)."""
        if self.training:
            distributed.seed_everything(
                self.seed, 3, batch.step, batch.micro_step, distributed.rank(), number, *chunk
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

    def parameter_groups(self, stage: StageConfig, weight_decay: float) -> Iterator[dict[str, Any]]:
        """AdamW groups per part; biases and norms do not decay, frozen parameters are left out.
        The cross-encoder's head is a part of its own where it has a rate of its own."""
        student = self.student
        towers = [student.query_tower, student.passage_tower] if student is not None else []
        in_tower = {id(parameter) for tower in towers for parameter in tower.parameters()}
        teacher_head = set()
        if self.teacher is not None and stage.teacher_head_lr is not None:
            teacher_head = {id(parameter) for parameter in self.teacher.head}
        parts: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                own = "student" if id(parameter) in in_tower else "head"
                part = "teacher" if name.startswith("teacher.") else own
                part = "teacher_head" if id(parameter) in teacher_head else part
                parts.setdefault((part, parameter.ndim >= 2), []).append(parameter)
        rates = {"student": stage.student_lr, "head": stage.head_lr, "teacher": stage.teacher_lr,
                 "teacher_head": stage.teacher_head_lr}  # fmt: skip
        for (part, decays), parameters in parts.items():
            yield {
                "params": parameters,
                "lr": rates[part],
                "weight_decay": weight_decay if decays else 0.0,
                "name": f"{part}{'' if decays else '_no_decay'}",
            }
