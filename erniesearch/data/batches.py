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
from erniesearch.errors import UserError

ON_THE_CPU = ("query_mask_on_cpu", "passage_mask_on_cpu", "mlm_words")


@dataclass(frozen=True)
class Batch:
    """One rank's micro-batch of B queries with G passages each; masks are True on real tokens.

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
        query_mask_on_cpu, passage_mask_on_cpu: the masks once more.
        mlm_words: where words are predicted in the flattened ``mlm_labels``.

    The last three follow from the others and stay on the CPU, so that nothing that asks for a
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
    query_mask_on_cpu: Tensor = field(init=False)
    passage_mask_on_cpu: Tensor = field(init=False)
    mlm_words: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        words = None
        if self.mlm_labels is not None:
            words = (self.mlm_labels != -100).flatten().nonzero().squeeze(1)
        known = self.query_mask, self.passage_mask, words
        for name, value in zip(ON_THE_CPU, known, strict=True):
            object.__setattr__(self, name, value)

    @property
    def group_size(self) -> int:
        """G = 1 + n."""
        return self.passage_ids.shape[0] // self.query_ids.shape[0]

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


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int
) -> tuple[Tensor, Tensor]:
    """Token ids and mask, both ``[len(texts), longest]``, truncated to ``max_length``."""
    encoded = tokenizer(texts, truncation=True, max_length=max_length, padding=True,
                        return_tensors="pt", return_token_type_ids=False)  # fmt: skip
    return encoded["input_ids"], encoded["attention_mask"].bool()


class GroupCollator:
    """Groups of queries and passages to a :class:`Batch`."""

    def __init__(
        self,
        data: RetrievalData,
        qids: list[str],
        tokenizer: PreTrainedTokenizerBase,
        max_query_length: int,
        max_passage_length: int,
    ) -> None:
        self.passages = open_tokens(data.passages, tokenizer)
        self.queries = [data.queries[qid] for qid in qids]
        self.tokenizer = tokenizer
        self.max_query_length = max_query_length
        self.max_passage_length = max_passage_length

    def __call__(self, groups: list[Group], step: int = 0, micro_step: int = 0) -> Batch:
        query_ids, query_mask = encode_texts(
            self.tokenizer, [self.queries[g.query] for g in groups], self.max_query_length
        )
        index = np.concatenate([g.passages for g in groups])
        passage_ids, passage_mask = self.passages.tensors(index, self.max_passage_length)
        relevant = np.full((len(groups), max(len(g.relevant) for g in groups)), -1)
        for row, group in zip(relevant, groups, strict=True):
            row[: len(group.relevant)] = group.relevant
        scores = [g.teacher_scores for g in groups if g.teacher_scores is not None]
        return Batch(
            query_ids, query_mask, passage_ids, passage_mask,
            torch.from_numpy(index), torch.from_numpy(relevant), step, micro_step,
            torch.from_numpy(np.concatenate(scores)) if scores else None,
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
    ) -> None:
        if mask_words and tokenizer.mask_token_id is None:
            raise UserError("weights.mlm is above 0, but the tokenizer has no mask token")
        self.passages = open_tokens(data.passages, tokenizer)
        self.tokenizer = tokenizer
        self.lengths = (max_query_length, max_passage_length)
        self.seed = seed
        self.mask_words = mask_words
        self.special_ids = np.array(sorted(tokenizer.all_special_ids))

    def __call__(self, groups: list[Group], step: int = 0, micro_step: int = 0) -> Batch:
        index = np.array([g.passages[0] for g in groups])
        ids = self.passages[index]
        # One generator per passage: the batch does not depend on how ranks share it out.
        rngs = [np.random.default_rng([self.seed, 2, step, int(i)]) for i in index]
        spans = [
            [self._span(r, tokens, n) for r, tokens in zip(rngs, ids, strict=True)]
            for n in self.lengths
        ]
        (query_ids, query_mask), (passage_ids, passage_mask) = map(self._pad, spans)
        batch = Batch(
            query_ids, query_mask, passage_ids, passage_mask,
            torch.from_numpy(index), torch.from_numpy(index[:, None]), step, micro_step,
        )  # fmt: skip
        if not self.mask_words:
            return batch
        masked = [
            self._mask_words(rng, np.array(span)) for rng, span in zip(rngs, spans[1], strict=True)
        ]
        mlm_ids, mlm_labels = passage_ids.clone(), torch.full_like(passage_ids, -100)
        for row, (word_ids, labels) in enumerate(masked):
            mlm_ids[row, : len(word_ids)] = torch.from_numpy(word_ids)
            mlm_labels[row, : len(labels)] = torch.from_numpy(labels)
        return replace(batch, mlm_ids=mlm_ids, mlm_labels=mlm_labels)

    def _span(self, rng: np.random.Generator, tokens: np.ndarray, max_length: int) -> list[int]:
        # At most two thirds of the passage, so that the two spans seldom coincide.
        length = max(1, min(max_length - 2, 2 * len(tokens) // 3))
        start = int(rng.integers(max(1, len(tokens) - length + 1)))
        words = tokens[start : start + length].tolist()
        return [self.tokenizer.cls_token_id, *words, self.tokenizer.sep_token_id]

    def _pad(self, sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
        width = max(map(len, sequences))
        ids = torch.full((len(sequences), width), int(self.tokenizer.pad_token_id or 0))
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence)
            mask[row, : len(sequence)] = True
        return ids, mask

    def _mask_words(
        self, rng: np.random.Generator, ids: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        maskable = ~np.isin(ids, self.special_ids)
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
