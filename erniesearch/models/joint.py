"""Teacher and students in one module: ``forward(batch)`` returns every loss term.

    encode → gather over ranks → scores → losses → weighted sum

One module means one DeepSpeed engine: several engines and one shared backward break as soon as
one of them runs its forward twice.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from erniesearch import distributed
from erniesearch.config.keys import ObjectiveConfig
from erniesearch.config.stage_keys import LossWeights, TrainingStageConfig
from erniesearch.config.terms import comparing
from erniesearch.data.batches import Batch
from erniesearch.data.text_format import SCORED, TEXT
from erniesearch.models.cross_encoder import (
    CrossEncoder,
    PairLayout,
    Pairs,
    assemble_pairs,
    of_the_text,
)
from erniesearch.models.encoder import Side, StudentEncoder, content_mask
from erniesearch.models.projections import matched_layers, split_heads
from erniesearch.objectives import scores
from erniesearch.objectives.objective import Objective
from erniesearch.objectives.outputs import Encoded, Outputs

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
        normalize = student is not None and student.settings.normalize
        self.objective = Objective(weights, objective, normalize)
        self.seed = seed
        self.pad_id = int(tokenizer.pad_token_id)
        self.layout = PairLayout.of(tokenizer) if teacher else None
        special = torch.tensor([tokenizer.cls_token_id, tokenizer.sep_token_id])
        self.register_buffer("special_ids", special, persistent=False)
        self.needs_student = (
            self.objective.needs_vectors
            or self.objective.needs_tokens
            or self.objective.needs_projections
        )
        self.virtual_layers: list[tuple[int, int]] = []
        if weights.virt:
            assert student is not None
            assert teacher is not None
            self.virtual_layers = connect_layers(student, teacher, objective.virt_layers)
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
            return (self._masked_lm_loss(batch, chunk.rows),)
        if chunk.kind == "pair":
            assert self.teacher is not None
            return (self.teacher(self.pairs(batch, chunk.rows)),)
        return self._encode_chunk(batch, chunk)

    def outputs(self, batch: Batch) -> Outputs:
        """All of the encoders' work, with the graph that a backward pass needs."""
        outputs = Outputs(exchange=self.objective.exchange(batch) if self.needs_student else None)
        everything = slice(0, len(batch.passage_ids))
        if self.weights.mlm:
            self._seed_pass(batch, 0)
            total = self._masked_lm_loss(batch, everything)
            outputs = outputs._replace(mlm=total / self.masked_words(batch))
        if self.needs_student:
            vectors, tokens = self.objective.needs_vectors, self.objective.needs_tokens
            queries, passages = self._encode(
                batch, 1, vectors, tokens, self.objective.needs_projections
            )
            outputs = outputs._replace(queries=queries, passages=passages)
            if outputs.exchange is not None:
                outputs.exchange.start(1, passages.vectors, passages.tokens)
        if self.weights.dual_reg:
            queries, passages = self._encode(batch, 2, vectors=True, tokens=False)
            if outputs.exchange is not None:
                outputs.exchange.start(2, passages.vectors, passages.tokens)
            outputs = outputs._replace(
                second_queries=queries.vectors, second_passages=passages.vectors
            )
        if self.teacher is not None:
            pairs, lengths = self._pairs(batch, slice(None), everything)
            self._seed_pass(batch, 3)
            wanted = torch.is_grad_enabled() and self.objective.trains_teacher
            with torch.set_grad_enabled(wanted):
                outputs = outputs._replace(teacher_scores=self.teacher(pairs, lengths))
            if outputs.queries is not None and outputs.passages is not None:
                terms = self.pair_terms(batch, everything, pairs, outputs.queries, outputs.passages)
                outputs = outputs._replace(attention=terms.get("attention"), virt=terms.get("virt"))
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
        every_id, every_mask, on_cpu, roles = (
            (batch.query_ids, batch.query_mask, batch.query_mask_on_cpu, batch.query_roles)
            if side == "query"
            else (
                batch.passage_ids, batch.passage_mask, batch.passage_mask_on_cpu,
                batch.passage_roles,
            )
        )  # fmt: skip
        part = chunk.rows, slice(int(distributed.row_lengths(on_cpu[chunk.rows]).max()))
        encoded: Encoded = self.student(
            every_id[part], every_mask[part], side,
            self.objective.needs_vectors or not first, self.objective.needs_tokens and first,
            self.objective.needs_projections and first,
            roles=None if roles is None else roles[part],
        )  # fmt: skip
        return encoded.padded(every_mask.shape[1])

    def pairs(self, batch: Batch, rows: slice) -> Pairs:
        """The cross-encoder's input of some of the B·G pairs."""
        query = torch.arange(rows.start, rows.stop) // batch.group_size
        return self._pairs(batch, query, rows)[0]

    def _pairs(self, batch: Batch, queries: Tensor | slice, rows: slice) -> tuple[Pairs, Tensor]:
        """The pairs of these queries with their passages ``rows``, and the pairs' lengths. The
        cross-encoder reads the texts alone, without what the student reads besides."""
        on_cpu = (
            batch.queries(TEXT, on_cpu=True)[queries], batch.passages(TEXT, on_cpu=True)[rows]
        )  # fmt: skip
        lengths = self._layout.lengths(*on_cpu)
        if isinstance(queries, Tensor):
            queries = queries.to(batch.query_ids.device, non_blocking=True)
        sides = []
        for ids, mask, roles in (
            (batch.query_ids[queries], batch.queries(TEXT)[queries], batch.query_roles),
            (batch.passage_ids[rows], batch.passages(TEXT)[rows], batch.passage_roles),
        ):
            sides.append((ids, mask, None) if roles is None else of_the_text(ids, mask))
        (query_ids, query_mask, query_place), (passage_ids, passage_mask, passage_place) = sides
        pairs = assemble_pairs(
            query_ids, query_mask, passage_ids, passage_mask,
            self._layout, self.pad_id, int(lengths.max()),
        )  # fmt: skip
        if query_place is not None:
            own = _per_pair(query_place, passage_ids)
            pairs = pairs._replace(query_columns=pairs.query_columns.gather(1, own))
        if passage_place is not None:
            columns = pairs.passage_columns.gather(1, passage_place)
            pairs = pairs._replace(passage_columns=columns)
        return pairs, lengths

    def open_pair_terms(self) -> list[str]:
        """The terms over the teacher's attention that count in this step."""
        over_pairs = comparing(self.weights, "pairs")
        return [name for name in over_pairs if self.objective.is_open(name)]

    def pair_terms(
        self, batch: Batch, rows: slice, pairs: Pairs, queries: Encoded, passages: Encoded
    ) -> dict[str, Tensor]:
        """``attention`` and ``virt``, means over the pairs ``rows`` that the teacher has just read;
        its projections are gone afterwards.

        ``passages`` are these n pairs', ``queries`` those of their queries, one for every k pairs.
        """
        terms: dict[str, Tensor] = {}
        wanted = self.open_pair_terms()
        if not wanted:
            return terms
        assert self.teacher is not None
        assert self.teacher.tap is not None
        num_queries = len(queries.tokens if "attention" in wanted else queries.projections)
        step = (rows.stop - rows.start) // num_queries
        query = torch.arange(rows.start, rows.stop, step, device=batch.query_ids.device)
        query = query // batch.group_size
        # Tokens of the text that late interaction compares: the teacher reads no others.
        of_queries = batch.queries(TEXT) & batch.queries(SCORED)
        of_passages = batch.passages(TEXT) & batch.passages(SCORED)
        masks = (
            content_mask(batch.query_ids[query], of_queries[query], self.special_ids),
            content_mask(batch.passage_ids[rows], of_passages[rows], self.special_ids),
        )
        settings = self.objective.settings
        if "attention" in wanted:
            terms["attention"] = scores.attention_kl(
                queries.tokens, masks[0], passages.tokens, masks[1],
                self.teacher.attention(pairs), settings.tau_att, settings.kernels,
            )  # fmt: skip
        if "virt" in wanted:
            terms["virt"] = self._virtual_interaction(pairs, queries, passages, masks)
        self.teacher.tap.clear()
        return terms

    def _virtual_interaction(
        self, pairs: Pairs, queries: Encoded, passages: Encoded, masks: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Query to passage plus passage to query, a mean over the layers."""
        assert self.teacher is not None
        heads, kernels = self.teacher.num_heads, self.objective.settings.kernels
        terms = []
        for number, (layer, _) in enumerate(self.virtual_layers):
            (query_q, query_k), (passage_q, passage_k) = (
                [split_heads(part, heads) for part in side.projections[:, :, number].unbind(2)]
                for side in (queries, passages)
            )
            of_query, of_passage = self.teacher.sides(pairs, layer)
            terms += [
                scores.attention_map_kl(
                    query_q, passage_k, masks[0], masks[1], of_query.queries, of_passage.keys,
                    kernels,
                ),
                scores.attention_map_kl(
                    passage_q, _per_pair(query_k, passage_q), masks[1],
                    _per_pair(masks[0], passage_q), of_passage.queries, of_query.keys, kernels,
                ),
            ]  # fmt: skip
        return torch.stack(terms).sum() / len(self.virtual_layers)

    def masked_words(self, batch: Batch) -> float | Tensor:
        """Masked words of a rank, averaged over the ranks: sums divided by it have as their mean
        over ranks the mean over all ranks' words. Every rank must call it."""
        assert batch.mlm_words is not None
        return distributed.mean_of(len(batch.mlm_words), batch.query_ids.device)

    def _masked_lm_loss(self, batch: Batch, rows: slice) -> Tensor:
        """Sum of the cross-entropies."""
        assert self.student is not None
        assert batch.mlm_ids is not None
        assert batch.mlm_labels is not None
        assert batch.mlm_words is not None
        labels = batch.mlm_labels[rows]
        words = batch.mlm_words - rows.start * labels.shape[1]
        words = words[(words >= 0) & (words < labels.numel())]
        return self.student.masked_lm_loss(
            batch.mlm_ids[rows], batch.passage_mask[rows], labels,
            words.to(labels.device, non_blocking=True),
        )  # fmt: skip

    def _encode(
        self, batch: Batch, number: int, vectors: bool, tokens: bool, projections: bool = False
    ) -> tuple[Encoded, Encoded]:
        assert self.student is not None
        self._seed_pass(batch, number)
        wanted = vectors, tokens, projections
        return (
            self.student(
                batch.query_ids, batch.query_mask, "query", *wanted, batch.query_mask_on_cpu,
                batch.query_roles,
            ),
            self.student(
                batch.passage_ids, batch.passage_mask, "passage", *wanted,
                batch.passage_mask_on_cpu, batch.passage_roles,
            ),
        )  # fmt: skip

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
        for tower in self.towers():
            tower.gradient_checkpointing_enable({"use_reentrant": False})

    def towers(self) -> list[PreTrainedModel]:
        """The student's (one of them twice if tied) and the cross-encoder."""
        towers: list[PreTrainedModel] = []
        if self.student is not None:
            towers += [self.student.query_tower, self.student.passage_tower]
        if self.teacher is not None:
            towers.append(self.teacher.model)
        return towers

    def parameter_groups(
        self, stage: TrainingStageConfig, weight_decay: float
    ) -> Iterator[dict[str, Any]]:
        """AdamW groups per part; biases and norms do not decay, frozen parameters are left out.
        The cross-encoder's head is one group, biases included, where it has a rate of its own."""
        student = self.student
        towers = [student.query_tower, student.passage_tower] if student is not None else []
        in_tower = {id(parameter) for tower in towers for parameter in tower.parameters()}
        teacher_head: set[int] = set()
        if self.teacher is not None and stage.teacher_head_lr is not None:
            teacher_head = {id(parameter) for parameter in self.teacher.head}
        parts: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                own = "student" if id(parameter) in in_tower else "head"
                part = "teacher" if name.startswith("teacher.") else own
                part = "teacher_head" if id(parameter) in teacher_head else part
                # The classifier's bias alone is one number: as a group of its own it would leave
                # ranks with padding only, which DeepSpeed cannot read back on other ranks.
                decays = parameter.ndim >= 2 or part == "teacher_head"
                parts.setdefault((part, decays), []).append(parameter)
        rates = {"student": stage.student_lr, "head": stage.head_lr, "teacher": stage.teacher_lr,
                 "teacher_head": stage.teacher_head_lr}  # fmt: skip
        for (part, decays), parameters in parts.items():
            yield {
                "params": parameters,
                "lr": rates[part],
                "weight_decay": weight_decay if decays else 0.0,
                "name": f"{part}{'' if decays else '_no_decay'}",
            }


def connect_layers(
    student: StudentEncoder, teacher: CrossEncoder, layers: Sequence[int]
) -> list[tuple[int, int]]:
    """Let the student hand out the projections that the teacher's ``layers`` are targets of; the
    pairs (teacher's layer, student's layer).

    Raises:
        UserError: if they do not fit (:func:`matched_layers`), or the student has none.
    """
    assert teacher.tap is not None
    matched = matched_layers(
        layers, teacher.model.config, student.query_tower.config, teacher.tap.path
    )
    student.tap_layers([own for _, own in matched])
    return matched


def _per_pair(rows: Tensor, pairs: Tensor) -> Tensor:
    """Rows of queries, repeated for each of their pairs."""
    return rows.repeat_interleave(len(pairs) // len(rows), 0)
