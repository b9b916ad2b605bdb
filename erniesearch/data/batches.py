"""Groups to tensors, padded to the longest of the batch; passages come tokenised from the store."""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from erniesearch.data.collection import RetrievalData
from erniesearch.data.corpus.tokens import open_tokens
from erniesearch.data.sampler import Group, StepSampler
from erniesearch.data.text_format import PLAIN, TEXT, TextFormat, TextReader, having
from erniesearch.errors import UserError

ON_THE_CPU = ("query_mask_on_cpu", "passage_mask_on_cpu", "query_roles_on_cpu",
              "passage_roles_on_cpu", "mlm_words")  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """One rank's micro-batch of B queries with G passages each; masks are True on all tokens but
    padding, and where a side's texts are not plain, ``roles`` say what each token is there for.

    Attributes:
        query_ids: ``[B, Lq]`` token ids, [CLS] and [SEP] included.
        query_mask: ``[B, Lq]``.
        passage_ids: ``[B·G, Lp]``, the groups one after the other, each with its positive first.
        passage_mask: ``[B·G, Lp]``.
        passage_index: ``[B·G]`` position of each passage in the corpus.
        relevant_index: ``[B, R]`` corpus positions relevant to each query, filled up with -1.
        step, micro_step: where the batch stands in the run; dropout seeds derive from them.
        teacher_scores: ``[B·G]``, stored ones of the cross-encoder, NaN where a passage has none;
            None where it scores them itself or nothing asks.
        mlm_ids: ``[B·G, Lp]`` passages with masked words (post-training only).
        mlm_labels: ``[B·G, Lp]`` the words to predict, -100 elsewhere.
        query_roles: ``[B, Lq]`` (:mod:`erniesearch.data.text_format`); None: all have every role.
        passage_roles: ``[B·G, Lp]``, likewise.
        query_mask_on_cpu and the other names on_cpu: the same once more.
        mlm_words: where words are predicted in the flattened ``mlm_labels``.

    The last five follow from the others and stay on the CPU, so that nothing that asks for a
    shape waits for a GPU.
    """

    query_ids: Tensor
    query_mask: Tensor
    passage_ids: Tensor
    passage_mask: Tensor
    passage_index: Tensor
    relevant_index: Tensor
    step: int = 0
    micro_step: int = 0
    teacher_scores: Tensor | None = None
    mlm_ids: Tensor | None = None
    mlm_labels: Tensor | None = None
    query_roles: Tensor | None = None
    passage_roles: Tensor | None = None
    query_mask_on_cpu: Tensor = field(init=False)
    passage_mask_on_cpu: Tensor = field(init=False)
    query_roles_on_cpu: Tensor | None = field(init=False)
    passage_roles_on_cpu: Tensor | None = field(init=False)
    mlm_words: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        words = None
        if self.mlm_labels is not None:
            words = (self.mlm_labels != -100).flatten().nonzero().squeeze(1)
        known = (self.query_mask, self.passage_mask, self.query_roles, self.passage_roles, words)
        for name, value in zip(ON_THE_CPU, known, strict=True):
            object.__setattr__(self, name, value)

    @property
    def group_size(self) -> int:
        """G = 1 + n."""
        return self.passage_ids.shape[0] // self.query_ids.shape[0]

    def queries(self, role: int, on_cpu: bool = False) -> Tensor:
        """``[B, Lq]`` mask of the queries' tokens with a role."""
        if on_cpu:
            return having(self.query_mask_on_cpu, self.query_roles_on_cpu, role)
        return having(self.query_mask, self.query_roles, role)

    def passages(self, role: int, on_cpu: bool = False) -> Tensor:
        """``[B·G, Lp]``, the same of the passages."""
        if on_cpu:
            return having(self.passage_mask_on_cpu, self.passage_roles_on_cpu, role)
        return having(self.passage_mask, self.passage_roles, role)

    @property
    def num_tokens(self) -> int:
        """Real tokens of queries and passages."""
        return int(self.query_mask_on_cpu.sum() + self.passage_mask_on_cpu.sum())

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device, but for what stays on the CPU."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The batch in memory from which a GPU copies while the host goes on; a DataLoader asks."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        made = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and name not in ON_THE_CPU:
                object.__setattr__(made, name, change(value))
        return made


class GroupCollator:
    """Groups of queries and passages to a :class:`Batch`."""

    def __init__(
        self,
        data: RetrievalData,
        qids: list[str],
        tokenizer: PreTrainedTokenizerBase,
        max_query_length: int,
        max_passage_length: int,
        text_format: TextFormat = PLAIN,
    ) -> None:
        self.passages = open_tokens(data.passages, tokenizer, text_format.passage.prompt)
        self.queries = [data.queries[qid] for qid in qids]
        self.tokenizer, self.text_format = tokenizer, text_format
        self.query_reader = TextReader(tokenizer, text_format.query, max_query_length)
        self.passage_reader = TextReader(tokenizer, text_format.passage, max_passage_length)

    def __call__(self, groups: list[Group], step: int = 0, micro_step: int = 0) -> Batch:
        queries = self.query_reader.texts([self.queries[g.query] for g in groups])
        index = np.concatenate([g.passages for g in groups])
        passages = self.passage_reader.stored(self.passages, index)
        relevant = np.full((len(groups), max(len(g.relevant) for g in groups)), -1)
        for row, group in zip(relevant, groups, strict=True):
            row[: len(group.relevant)] = group.relevant
        scores = [g.teacher_scores for g in groups if g.teacher_scores is not None]
        return Batch(
            queries.ids, queries.mask, passages.ids, passages.mask,
            torch.from_numpy(index), torch.from_numpy(relevant), step, micro_step,
            torch.from_numpy(np.concatenate(scores)) if scores else None,
            query_roles=queries.roles, passage_roles=passages.roles,
        )  # fmt: skip


class SpanCollator:
    """Post-training batches: two spans of one passage as a pair, and masked words.

    The first span plays the query, the second the passage; a span is a random window of the
    passage's tokens. Words are masked as in BERT: 15 % of the tokens, of which 80 % become
    [MASK], 10 % a random token, 10 % stay.
    """

    def __init__(
        self,
        data: RetrievalData,
        tokenizer: PreTrainedTokenizerBase,
        max_query_length: int,
        max_passage_length: int,
        seed: int,
        mask_words: bool,
        text_format: TextFormat = PLAIN,
    ) -> None:
        if mask_words and tokenizer.mask_token_id is None:
            raise UserError("weights.mlm is above 0, but the tokenizer has no mask token")
        self.passages = open_tokens(data.passages, tokenizer)
        self.tokenizer, self.text_format = tokenizer, text_format
        sides = (text_format.query, max_query_length), (text_format.passage, max_passage_length)
        self.readers = [TextReader(tokenizer, form, length) for form, length in sides]
        self.seed = seed
        self.mask_words = mask_words
        self.special_ids = np.array(sorted(tokenizer.all_special_ids))

    def __call__(self, groups: list[Group], step: int = 0, micro_step: int = 0) -> Batch:
        index = np.array([g.passages[0] for g in groups])
        ids = self.passages[index]
        # One generator per passage: the batch does not depend on how ranks share it out.
        rngs = [np.random.default_rng([self.seed, 2, step, int(i)]) for i in index]
        queries, passages = (
            reader.rows([self._span(r, own, reader) for r, own in zip(rngs, ids, strict=True)])
            for reader in self.readers
        )
        batch = Batch(
            queries.ids, queries.mask, passages.ids, passages.mask,
            torch.from_numpy(index), torch.from_numpy(index[:, None]), step, micro_step,
            query_roles=queries.roles, passage_roles=passages.roles,
        )  # fmt: skip
        if not self.mask_words:
            return batch
        of_text = passages.having(TEXT)
        masked = [
            self._mask_words(rng, row[real].numpy(), own[real].numpy())
            for rng, row, real, own in zip(rngs, passages.ids, passages.mask, of_text, strict=True)
        ]
        mlm_ids, mlm_labels = passages.ids.clone(), torch.full_like(passages.ids, -100)
        for row, (word_ids, labels) in enumerate(masked):
            mlm_ids[row, : len(word_ids)] = torch.from_numpy(word_ids)
            mlm_labels[row, : len(labels)] = torch.from_numpy(labels)
        return replace(batch, mlm_ids=mlm_ids, mlm_labels=mlm_labels)

    def _span(self, rng: np.random.Generator, tokens: np.ndarray, reader: TextReader) -> list[int]:
        prompt, room = reader.prompt_ids, reader.room - len(reader.prompt_ids)
        # At most two thirds of the passage, so that the two spans seldom coincide.
        length = max(1, min(room, 2 * len(tokens) // 3))
        start = int(rng.integers(max(1, len(tokens) - length + 1)))
        return [*prompt, *tokens[start : start + length].tolist()]

    def _mask_words(
        self, rng: np.random.Generator, ids: np.ndarray, of_text: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        maskable = of_text & ~np.isin(ids, self.special_ids)
        chosen = maskable & (rng.random(ids.shape) < 0.15)
        if maskable.any() and not chosen.any():
            # One word at least, or a batch of short texts would average over nothing.
            chosen[rng.choice(np.flatnonzero(maskable))] = True
        labels = np.where(chosen, ids, -100)
        fate = rng.random(ids.shape)
        masked = np.where(chosen & (fate < 0.8), self.tokenizer.mask_token_id, ids)
        random_ids = rng.integers(len(self.tokenizer), size=ids.shape)
        masked = np.where(chosen & (fate >= 0.9), random_ids, masked)
        return masked, labels


class StepBatches(torch.utils.data.Dataset[Batch]):
    """This rank's micro-batches in order: item i is micro-step i % A of update i // A."""

    def __init__(
        self,
        sampler: StepSampler,
        collator: GroupCollator | SpanCollator,
        steps: int,
        accumulation_steps: int,
        rank: int,
        queries_per_rank: int,
        world_size: int,
    ) -> None:
        self.sampler = sampler
        self.collator = collator
        self.steps = steps
        self.accumulation_steps = accumulation_steps
        self.slice = (rank, queries_per_rank, world_size)

    def __len__(self) -> int:
        return self.steps * self.accumulation_steps

    def __getitem__(self, item: int) -> Batch:
        if not 0 <= item < len(self):
            raise IndexError(item)
        step, micro_step = divmod(item, self.accumulation_steps)
        rank, queries_per_rank, world_size = self.slice
        groups = self.sampler.micro_batch(step, micro_step, rank, queries_per_rank, world_size)
        return self.collator(groups, step, micro_step)
