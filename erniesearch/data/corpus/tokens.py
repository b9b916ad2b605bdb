"""Passages tokenised once: memory-mapped token ids that every step and every epoch reads.

    tokens.arrow   column ids: a passage's token ids without special tokens
    lengths.npy    their numbers, int32

They lie in the corpus' cache folder, keyed by the tokenizer.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tokenizers
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from erniesearch.config.keys import MAX_TOKENS
from erniesearch.data.corpus.arrow import Blocks, BlockWriter
from erniesearch.data.corpus.cache import cached, key_of
from erniesearch.data.corpus.texts import ArrowColumn, Rows
from erniesearch.errors import UserError
from erniesearch.progress import PATIENCE, Meter, metered

VERSION = 1
BATCH_TEXTS, BATCH_CHARACTERS = 1024, 1 << 20
"""A tokenizer call ends at either: it holds about a hundred bytes a token."""
LONG_TEXT = 32 * MAX_TOKENS
"""Characters from which on a text's beginning is tried first."""


@dataclass(frozen=True)
class SpecialTokens:
    """What the tokenizer puts before and after a single text, and its padding."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    pad_id: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "SpecialTokens":
        """Read off the tokenizer's own output: BERT ``[CLS] … [SEP]``, RoBERTa ``<s> … </s>``."""
        ids = tokenizer("a", verbose=False)["input_ids"]
        content = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
        for start in range(len(ids) - len(content) + 1):
            if content and ids[start : start + len(content)] == content:
                prefix, suffix = ids[:start], ids[start + len(content) :]
                return cls(tuple(prefix), tuple(suffix), int(tokenizer.pad_token_id))
        raise UserError("the tokenizer does not put its special tokens around a text")

    def tensors(self, sequences: list[np.ndarray], max_length: int) -> tuple[Tensor, Tensor]:
        """Token ids and mask, both ``[len(sequences), longest]``: each sequence cut so that it
        has at most ``max_length`` tokens with its special ones; equal to the tokenizer's own
        truncation and padding."""
        room = max_length - len(self.prefix) - len(self.suffix)
        rows = [[*self.prefix, *tokens[:room].tolist(), *self.suffix] for tokens in sequences]
        width = max(map(len, rows), default=0)
        ids = torch.full((len(rows), width), self.pad_id)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = True
        return ids, mask


class TokenStore:
    """Token ids of every passage of a corpus, at most :data:`MAX_TOKENS` (8,192) each.

    Attributes:
        lengths: ``[num_passages]`` int32, tokens of each passage without special tokens.
        special: what a reader puts around them.
    """

    def __init__(self, folder: Path, special: SpecialTokens) -> None:
        self.folder, self.special = folder, special
        self.lengths = np.asarray(np.load(folder / "lengths.npy", mmap_mode="r"))
        self._blocks = Blocks(folder / "tokens.arrow")
        if len(self.lengths) != len(self._blocks):
            raise ValueError("tokens and lengths differ in number")
        columns = self._blocks.column("ids")
        self._values = [column.values.to_numpy() for column in columns]
        self._offsets = [column.offsets.to_numpy() for column in columns]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder, self.special)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, rows: Rows) -> list[np.ndarray]:
        """Token ids of these passages without special tokens, int32; the memory is the file's."""
        found = []
        for block, position in zip(*self._blocks.locate(np.asarray(rows)), strict=True):
            start, stop = self._offsets[block][position : position + 2]
            found.append(self._values[block][start:stop])
        return found

    def tensors(self, rows: Rows, max_length: int) -> tuple[Tensor, Tensor]:
        """Token ids and mask, both ``[len(rows), longest]``, special tokens included, as
        ``tokenizer(texts, truncation=True, max_length=max_length, padding=True)`` gives them.
        ``max_length`` may be at most :data:`MAX_TOKENS`."""
        assert max_length <= MAX_TOKENS
        return self.special.tensors(self[rows], max_length)

    def part(self, rows: Rows) -> "PartStore":
        """These passages, in memory: to be sent to a process that may not see the files."""
        return PartStore(self.lengths[rows], np.concatenate([*self[rows], _NONE]), self.special)


_NONE = np.empty(0, np.int32)


class PartStore(TokenStore):
    """The same for some passages in memory, whose ``values`` stand one after the other."""

    def __init__(self, lengths: np.ndarray, values: np.ndarray, special: SpecialTokens) -> None:
        self.lengths, self.values, self.special = lengths, values, special
        self._ends = lengths.cumsum(dtype=np.int64)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.lengths, self.values, self.special)

    def __getitem__(self, rows: Rows) -> list[np.ndarray]:
        return [self.values[self._ends[row] - self.lengths[row] : self._ends[row]] for row in rows]


class ListStore(TokenStore):
    """The same for texts in memory."""

    def __init__(
        self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, prompt: str = ""
    ) -> None:
        self.special = SpecialTokens.of(tokenizer)
        parts = _batches(texts, prompt)
        found = (ids for part in parts for ids in _tokenize(tokenizer, part))
        self._tokens = list(metered(found, "tokenising the corpus", "passages", len(texts)))
        self.lengths = np.array([len(tokens) for tokens in self._tokens], np.int32)

    def __getitem__(self, rows: Rows) -> list[np.ndarray]:
        return [self._tokens[int(row)] for row in rows]


def open_tokens(
    passages: Sequence[str], tokenizer: PreTrainedTokenizerBase, prompt: str = ""
) -> TokenStore:
    """The token ids of ``passages``, each behind ``prompt``: of a cached corpus from its cache,
    tokenised by the first call that asks; of a list in memory.

    Raises:
        UserError: if the cache folder cannot be written, or special tokens do not surround a text.
    """
    if not isinstance(passages, ArrowColumn):
        return ListStore(passages, tokenizer, prompt)
    special = SpecialTokens.of(tokenizer)

    def build(aside: Path) -> None:
        lengths = np.empty(len(passages), np.int32)
        schema = pa.schema([("ids", pa.list_(pa.int32()))])
        with (
            BlockWriter(aside / "tokens.arrow", schema) as writer,
            Meter("tokenising the corpus", "passages", len(passages), patience=PATIENCE) as meter,
        ):
            row = 0
            for texts in _batches(passages, prompt):
                for ids in _tokenize(tokenizer, texts):
                    lengths[row] = len(ids)
                    writer.add((ids,), len(ids))
                    row += 1
                meter.reach(row)
        np.save(aside / "lengths.npy", lengths)

    folder = _folder(passages, tokenizer, prompt)
    return cached(folder, build, lambda path: TokenStore(path, special))


def has_tokens(passages: ArrowColumn, tokenizer: PreTrainedTokenizerBase, prompt: str = "") -> bool:
    """Whether :func:`open_tokens` finds them tokenised."""
    return _folder(passages, tokenizer, prompt).is_dir()


def _folder(passages: ArrowColumn, tokenizer: PreTrainedTokenizerBase, prompt: str) -> Path:
    facts = (VERSION, describe(tokenizer), *([prompt] if prompt else []))
    return passages.folder / f"tokens-{key_of(*facts)}"


def describe(tokenizer: PreTrainedTokenizerBase) -> str:
    """Everything that decides which ids a text gets: a key for what is derived from them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return json.dumps([type(tokenizer).__name__, tokenizer.get_vocab(),
                           repr(tokenizer.init_kwargs)], sort_keys=True)  # fmt: skip
    content = json.loads(backend.to_str())
    for state in ("truncation", "padding"):  # left behind by the last call
        content.pop(state, None)
    return json.dumps([tokenizers.__version__, content], sort_keys=True)


def _batches(texts: Sequence[str], prompt: str) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(prompt + text if prompt else text)
        characters += len(text)
        if len(batch) == BATCH_TEXTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[np.ndarray]:
    """The first :data:`MAX_TOKENS` tokens of each text.

    A tokenizer reads a text to its end before it truncates, minutes for 50 MB. The beginning up to
    a white space has the same tokens, and where these are enough, the rest is not read.
    """
    beginnings = [_beginning(text) for text in texts]
    found = _encode(tokenizer, beginnings)
    for i, (text, beginning) in enumerate(zip(texts, beginnings, strict=True)):
        if len(beginning) < len(text) and len(found[i]) < MAX_TOKENS:
            found[i] = _encode(tokenizer, [text])[0]
    return found


def _beginning(text: str) -> str:
    """The text up to the last white space among its first :data:`LONG_TEXT` characters."""
    if len(text) <= LONG_TEXT:
        return text
    words = text[:LONG_TEXT].rsplit(maxsplit=1)
    return words[0] if len(words) == 2 else text


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[np.ndarray]:
    encoded = tokenizer(
        texts, add_special_tokens=False, truncation=True, max_length=MAX_TOKENS, verbose=False,
        return_attention_mask=False, return_token_type_ids=False,
    )  # fmt: skip
    return [np.array(ids, np.int32) for ids in encoded["input_ids"]]
