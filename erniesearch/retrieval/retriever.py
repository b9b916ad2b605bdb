"""Encode texts with a trained student; score pairs with a cross-encoder."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, Self, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from erniesearch.config.keys import Precision, StudentConfig, TeacherConfig
from erniesearch.data.corpus.texts import ArrowColumn, take
from erniesearch.data.corpus.tokens import TokenStore, has_tokens, open_tokens
from erniesearch.data.text_format import SCORED, TextFormat, TextReader, Tokens, encode_texts
from erniesearch.distributed import HostCopy
from erniesearch.errors import UserError
from erniesearch.models.backbone import load_tokenizer
from erniesearch.models.cross_encoder import CrossEncoder, PairLayout, Pairs, assemble_pairs
from erniesearch.models.encoder import Side, StudentEncoder
from erniesearch.models.precision import convert, use_bf16
from erniesearch.objectives.outputs import Encoded
from erniesearch.progress import PATIENCE, Meter

Made = TypeVar("Made")
SIDES: dict[Side, str] = {"query": "queries", "passage": "passages"}
CHARACTERS_A_TOKEN = 5


def default_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def length_sorted_batches(
    texts: Sequence[str], batch_size: int
) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Positions and texts, longest first, so that a batch pads little."""
    for positions in _longest_first(text_lengths(texts), batch_size):
        yield positions, take(texts, positions)


def _longest_first(lengths: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    order = np.argsort(-lengths, kind="stable")
    return (order[i : i + batch_size] for i in range(0, len(order), batch_size))


def _on_host(batches: Iterator[tuple[Made, Tensor]]) -> Iterator[tuple[Made, Tensor]]:
    """What batches made, on the CPU. From a GPU each is handed out when the next is in its queue,
    so that it does not run dry while the host prepares more."""
    before: tuple[Made, HostCopy] | None = None
    for key, made in batches:
        own = key, HostCopy(made)
        if before is not None:
            yield before[0], before[1].wait()
        before = own
    if before is not None:
        yield before[0], before[1].wait()


@dataclass(frozen=True)
class StoredTokens:
    """Passages at some rows of a token store that knows the prompt, in place of their texts."""

    store: TokenStore
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each, ``[len(rows)]``."""
        return self.store.lengths[self.rows].astype(np.int64)

    def part(self, positions: np.ndarray) -> "StoredTokens":
        """Those at some positions, in memory."""
        return StoredTokens(self.store.part(self.rows[positions]), np.arange(len(positions)))


Texts = Sequence[str] | StoredTokens


def text_lengths(texts: Texts) -> np.ndarray:
    """Of each, in characters, of stored ones in tokens, ``[len(texts)]``."""
    if isinstance(texts, StoredTokens):
        return texts.lengths
    return np.fromiter(map(len, texts), np.int64, len(texts))


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What an exported folder may hold beside its encoder.

    Attributes:
        text_format: how its texts are read; None: as the student's folder says.
        head, passage_path: as in :class:`StudentEncoder`.
        only: the side whose tower this is, when the other one lies elsewhere.
        dense: folder of a linear layer applied to the pooled vectors.
    """

    text_format: TextFormat | None = None
    head: Path | None = None
    passage_path: Path | None = None
    only: Side | None = None
    dense: Path | None = None


class PassageReader:
    """A model that reads passages of a corpus by its token store.

    Attributes:
        reads_stored_tokens: whether it takes passages as :class:`StoredTokens`.
        prompt: what stands before a passage.
    """

    reads_stored_tokens = True
    tokenizer: PreTrainedTokenizerBase
    prompt = ""

    def passages(self, texts: Sequence[str], rows: np.ndarray | None = None) -> Texts:
        """Passages of a corpus for this model, all or those at ``rows``: their tokens if the corpus
        lies in a cache, so that not every model of a run tokenises it; else the texts. For some
        rows nothing is tokenised that is not there."""
        store = None
        if self.reads_stored_tokens and isinstance(texts, ArrowColumn):
            store = _open_store(texts, self.tokenizer, self.prompt, rows is None)
        if store is None:
            return texts if rows is None else take(texts, rows)
        return StoredTokens(store, np.arange(len(texts)) if rows is None else rows)


@lru_cache(maxsize=4)
def _open_store(
    texts: ArrowColumn, tokenizer: PreTrainedTokenizerBase, prompt: str, made: bool
) -> TokenStore | None:
    """Opened once for all blocks of queries: its key takes the whole vocabulary to compute."""
    there = made or has_tokens(texts, tokenizer, prompt)
    return open_tokens(texts, tokenizer, prompt) if there else None


class Retriever(PassageReader):
    """A student ready to encode.

    Args:
        settings: ``settings.path`` is a pretrained encoder or a stage's student.
        precision: computed in (:func:`use_bf16`); returned are fp32 (vectors) or fp16 (tokens).

    Attributes:
        told: whether work of more than a few seconds says how far it is.
        makes_vectors: whether its dual-encoder vectors mean anything.
        names_tokens: whether it can say which token a token vector is of.
    """

    told = False
    makes_vectors = True
    names_tokens = True

    def __init__(
        self,
        settings: StudentConfig,
        max_query_length: int,
        max_passage_length: int,
        batch_size: int = 128,
        device: torch.device | None = None,
        seed: int = 0,
        precision: Precision = "fp32",
        extras: Extras = Extras(),
    ) -> None:
        self.device = device or default_device()
        torch.manual_seed(seed)  # a checkpoint without a late-interaction head gets a random one
        # A linear layer's vectors are normalised, not those that it reads; so are shortened ones.
        self._truncate: int | None = None
        self._wants_length_1 = settings.normalize
        settings = replace(settings, normalize=settings.normalize and not extras.dense)
        student = StudentEncoder(settings, head=extras.head, passage_path=extras.passage_path)
        self.student = student.to(self.device).eval()
        self.tokenizer = load_tokenizer(student.settings)
        self.text_format = extras.text_format or student.text_format
        bf16 = use_bf16(precision, self.device)
        convert(self.student, bf16)
        self.precision: Literal["fp32", "bf16"] = "bf16" if bf16 else "fp32"
        self.lengths: dict[Side, int] = {"query": max_query_length, "passage": max_passage_length}
        self.readers = {
            side: TextReader(self.tokenizer, self.text_format.of(side), length)
            for side, length in self.lengths.items()
        }
        self.prompt, self.only = self.text_format.passage.prompt, extras.only
        self.batch_size = batch_size
        # In fp32 like the pooled vectors that it reads.
        self.dense = _load_linear(extras.dense).to(self.device) if extras.dense else None

    @property
    def dim(self) -> int:
        """Dimensions of a dual-encoder vector."""
        return self._truncate or self.whole_dim

    def truncate(self, dim: int | None) -> Self:
        """Keep the first ``dim`` dimensions of a dual-encoder's vectors alone; None keeps all.

        Raises:
            UserError: if its vectors do not have so many.
        """
        if dim is not None and not self.makes_vectors:
            raise UserError(f"--dim {dim}: token vectors are not shortened; leave it out")
        if dim is not None and dim > self.whole_dim:
            raise UserError(f"--dim {dim}: this model has vectors of {self.whole_dim} dimensions")
        self._truncate = dim
        return self

    @property
    def whole_dim(self) -> int:
        """The same before any are left out."""
        return self.dense.out_features if self.dense else self.student.hidden_size

    @property
    def token_dim(self) -> int:
        """Dimensions of a token vector."""
        return self.student.settings.late_interaction_dim

    def query_length(self, query: str) -> tuple[int, int]:
        """Tokens of a query with all that stands around it, uncut; and how many are its own."""
        return self.readers["query"].length(query)

    def vectors(self, texts: Texts, side: Side) -> np.ndarray:
        """Dual-encoder vectors ``[len(texts), dim]``, fp32."""
        out = np.empty((len(texts), self.dim), dtype=np.float32)
        with Meter(f"encoding {side}s", SIDES[side], len(texts), self.told, PATIENCE) as meter:
            for positions, batch in self.vector_batches(texts, side):
                out[positions] = batch.numpy()
                meter.advance(len(positions))
        return out

    def tokens(self, texts: Texts, side: Side) -> list[Tensor]:
        """Late-interaction token vectors of each text, ``[num_tokens, dim]``, fp16 on the CPU."""
        out: list[Tensor] = [torch.empty(0)] * len(texts)
        with Meter(
            f"encoding {side} tokens", SIDES[side], len(texts), self.told, PATIENCE
        ) as meter:
            for positions, batch in self.token_batches(texts, side, torch.float16):
                for position, row in zip(positions, batch, strict=True):
                    out[position] = row
                meter.advance(len(positions))
        return out

    def vector_batches(
        self, texts: Texts, side: Side, dtype: torch.dtype = torch.float32
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Positions in ``texts`` and their vectors ``[batch, dim]`` on the CPU, batch by batch."""

        @torch.inference_mode()
        def made() -> Iterator[tuple[np.ndarray, Tensor]]:
            for positions, read in self._inputs(texts, side):
                vectors = self._encoded(read, side, tokens=False).vectors
                if self.dense:
                    vectors = self.dense(vectors.float())
                vectors = vectors[:, : self._truncate]
                if self._wants_length_1 and (self.dense or self._truncate):
                    vectors = torch.nn.functional.normalize(vectors, dim=-1)
                yield positions, vectors.to(dtype)

        return _on_host(made())

    @torch.inference_mode()
    def token_batches(
        self, texts: Texts, side: Side, dtype: torch.dtype = torch.float32
    ) -> Iterator[tuple[np.ndarray, list[Tensor]]]:
        """Positions in ``texts`` and each one's token vectors ``[num_tokens, dim]`` on the CPU,
        batch by batch."""

        def made() -> Iterator[tuple[tuple[np.ndarray, Tensor], Tensor]]:
            for positions, read in self._inputs(texts, side):
                encoded = self._encoded(read, side, vectors=False).tokens
                yield (positions, read.having(SCORED)), encoded.to(dtype)

        for (positions, mask), batch in _on_host(made()):
            yield positions, [row[real] for row, real in zip(batch, mask, strict=True)]

    def _encoded(self, read: Tokens, side: Side, **wanted: bool) -> Encoded:
        ids, mask, roles = (
            None if part is None else part.to(self.device, non_blocking=True) for part in read
        )
        encoded: Encoded = self.student(ids, mask, side, **wanted, roles=roles)
        return encoded

    def _inputs(self, texts: Texts, side: Side) -> Iterator[tuple[np.ndarray, Tokens]]:
        """Positions and tokens of each batch, longest texts first."""
        if self.only and side != self.only:
            raise UserError(
                f"model '{self.student.settings.path}' is the {self.only} tower of an untied model:"
                f" give the folder's name without _{self.only} to load both"
            )
        reader = self.readers[side]
        if isinstance(texts, StoredTokens):
            for positions in _longest_first(texts.lengths, self.batch_size):
                yield positions, reader.stored(texts.store, texts.rows[positions])
        else:
            for positions, part in length_sorted_batches(texts, self.batch_size):
                yield positions, reader.texts(part)


def _load_linear(module: Path) -> torch.nn.Linear:
    state = load_file(module / "model.safetensors")
    size_out, size_in = state["linear.weight"].shape
    layer = torch.nn.Linear(size_in, size_out, bias="linear.bias" in state)
    layer.load_state_dict({k.removeprefix("linear."): v.float() for k, v in state.items()})
    return layer.eval()


class PairScorer(PassageReader):
    """A cross-encoder ready to score (query, passage) pairs; ``told`` as in :class:`Retriever`."""

    told = False

    def __init__(
        self,
        settings: TeacherConfig,
        max_query_length: int,
        max_passage_length: int,
        batch_size: int = 128,
        device: torch.device | None = None,
        precision: Precision = "fp32",
    ) -> None:
        self.device = device or default_device()
        self.tokenizer = load_tokenizer(settings)
        self.layout = PairLayout.of(self.tokenizer)
        self.model = CrossEncoder(settings).to(self.device).eval()
        convert(self.model, use_bf16(precision, self.device))
        self.lengths = (max_query_length, max_passage_length)
        self.batch_size = batch_size

    @torch.inference_mode()
    def scores(self, queries: list[str], passages: Texts) -> np.ndarray:
        """Scores ``[len(queries)]`` of the pairs (queries[i], passages[i])."""
        out = np.empty(len(queries), dtype=np.float32)
        with Meter("scoring", "pairs", len(queries), self.told, PATIENCE) as meter:
            for positions, scores in _on_host(self._batches(queries, passages)):
                out[positions] = scores.numpy()
                meter.advance(len(positions))
        return out

    def _batches(self, queries: list[str], passages: Texts) -> Iterator[tuple[np.ndarray, Tensor]]:
        lengths = pair_lengths(queries, passages)
        for positions in _longest_first(lengths, self.batch_size):
            (query, query_mask), (passage, passage_mask) = (
                self._read(texts, positions, length)
                for texts, length in zip((queries, passages), self.lengths, strict=True)
            )
            pairs = assemble_pairs(
                query, query_mask, passage, passage_mask,
                self.layout, int(self.tokenizer.pad_token_id),
            )  # fmt: skip
            moved = Pairs(*(part.to(self.device, non_blocking=True) for part in pairs))
            yield positions, self.model(moved)

    def _read(self, texts: Texts, positions: np.ndarray, length: int) -> tuple[Tensor, Tensor]:
        if isinstance(texts, StoredTokens):
            return texts.store.tensors(texts.rows[positions], length)
        return encode_texts(self.tokenizer, [texts[i] for i in positions], length)


def pair_lengths(queries: list[str], passages: Texts) -> np.ndarray:
    """What pairs are sorted by, ``[len(queries)]``: characters, of stored passages nearly."""
    scale = CHARACTERS_A_TOKEN if isinstance(passages, StoredTokens) else 1
    return text_lengths(queries) + scale * text_lengths(passages)
