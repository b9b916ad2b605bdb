"""Models that are not built here, run by sentence-transformers 6 (extra ``sentence-transformers``).

Only what encodes: such models are searched, mined and evaluated with, not trained.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from erniesearch.config.keys import Precision
from erniesearch.data.text_format import PLAIN
from erniesearch.errors import UserError
from erniesearch.models.encoder import Side
from erniesearch.models.precision import use_bf16
from erniesearch.retrieval.retriever import (
    Retriever,
    StoredTokens,
    Texts,
    default_device,
    length_sorted_batches,
)

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Lengths = dict[Side, int | None]


class ForeignRetriever(Retriever):
    """A ``SentenceTransformer`` or ``MultiVectorEncoder`` that encodes as a :class:`Retriever`
    does, each side with the prompt of its own.

    Args:
        folder: what it is loaded from.
        multi_vector: whether it makes token vectors.
        why: what of it is not built here, for messages.
        lengths: longest texts in tokens; None is the model's own.
        trust_remote_code: run code that lies with it.

    Raises:
        UserError: if sentence-transformers is missing or older than 6, cannot load it, or the
            model's similarity is no inner product.
    """

    reads_stored_tokens = False
    names_tokens = False

    def __init__(
        self, folder: Path, multi_vector: bool, why: str, lengths: Lengths, batch_size: int = 128,
        device: torch.device | None = None, precision: Precision = "fp32",
        trust_remote_code: bool = False,
    ) -> None:  # fmt: skip
        library = _library(why)
        self.device = device or default_device()
        self.precision = "bf16" if use_bf16(precision, self.device) else "fp32"
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        kind = library.MultiVectorEncoder if multi_vector else library.SentenceTransformer
        try:
            self.model: SentenceTransformer = kind(
                str(folder), device=str(self.device), trust_remote_code=trust_remote_code,
                local_files_only=True, model_kwargs={"dtype": dtype},
            )  # fmt: skip
        except Exception as error:  # whatever its modules raise
            told = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(f"{why}; sentence-transformers does not load it: {told}") from error
        self._similarity = str(self.model.similarity_fn_name)
        if self._similarity not in ("cosine", "dot", "maxsim", "meanmaxsim"):
            raise UserError(
                f"model '{folder}': its similarity is {self._similarity}; an index compares by"
                " inner product (cosine, dot)"
            )
        self.only, self.text_format, self.batch_size = None, PLAIN, batch_size
        self._asked, longest = lengths, int(self.model.max_seq_length or 512)
        own = {"query": "query_length", "passage": "document_length"}
        self.lengths = {
            side: lengths[side] or getattr(self.model[0], own[side], None) or longest
            for side in ("query", "passage")
        }  # fmt: skip
        if multi_vector:
            for side, length in lengths.items():
                if length:
                    setattr(self.model[0], own[side], length)

    @property
    def dim(self) -> int:
        """Dimensions of a vector."""
        return int(self.model.get_embedding_dimension() or 0)

    def truncate(self, dim: int | None) -> Self:
        """None alone.

        Raises:
            UserError: for a number.
        """
        if dim is not None:
            raise UserError(f"--dim {dim}: a model that sentence-transformers runs keeps its own"
                            " dimensions (truncate_dim in its folder)")  # fmt: skip
        return self

    def query_length(self, query: str) -> tuple[int, int]:
        """As of a :class:`Retriever`, without what fills a query up."""
        prompt = (self.model.prompts or {}).get("query", "")
        tokenizer: Any = self.model.tokenizer
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            around = tokenizer.num_special_tokens_to_add()
            whole, own = (
                len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
                for text in (prompt + query, query)
            )
            return whole + around, own
        # A model of word vectors alone has a tokenizer without special tokens.
        whole, own = (len(tokenizer.encode(text).ids) for text in (prompt + query, query))
        return whole, own

    @property
    def token_dim(self) -> int:
        """Dimensions of a token vector."""
        return self.dim

    def vector_batches(
        self, texts: Texts, side: Side, dtype: torch.dtype = torch.float32
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """As of a :class:`Retriever`; of length 1 where the model compares by cosine."""
        for positions, found in self._made(
            texts, side, convert_to_tensor=True, normalize_embeddings=self._similarity == "cosine"
        ):
            yield positions, found.cpu().to(dtype)  # fmt: skip

    def token_batches(
        self, texts: Texts, side: Side, dtype: torch.dtype = torch.float32
    ) -> Iterator[tuple[np.ndarray, list[Tensor]]]:
        """As of a :class:`Retriever`; a model that takes the mean over a query's tokens has it in
        their lengths."""
        mean = side == "query" and self._similarity == "meanmaxsim"
        for positions, found in self._made(texts, side):
            yield positions, [
                (row / len(row) if mean else row).cpu().to(dtype) for row in found
            ]  # fmt: skip

    def _made(self, texts: Texts, side: Side, **options: Any) -> Iterator[tuple[np.ndarray, Any]]:
        assert not isinstance(texts, StoredTokens)
        encode = self.model.encode_query if side == "query" else self.model.encode_document
        if "convert_to_tensor" in options and (length := self._asked[side]):
            self.model.max_seq_length = length
        for positions, part in length_sorted_batches(texts, self.batch_size):
            yield positions, encode(
                part, batch_size=self.batch_size, show_progress_bar=False, **options
            )  # fmt: skip


def _library(why: str) -> Any:
    try:
        import sentence_transformers
    except ModuleNotFoundError:
        raise UserError(
            f"{why}; sentence-transformers 6 can run it: pip install 'sentence-transformers>=6'"
        ) from None
    if int(sentence_transformers.__version__.split(".")[0]) < 6:
        raise UserError(
            f"{why}; sentence-transformers 6 can run it, {sentence_transformers.__version__} is"
            " installed: pip install 'sentence-transformers>=6'"
        )
    return sentence_transformers
