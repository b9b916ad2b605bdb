"""How the texts of a side become token ids, and what each token is there for.

    [CLS] prefix prompt text [SEP] expansion

Plain texts have neither prefix nor prompt nor expansion, and every token has every role. Published
models have them: ColBERT puts a marker token behind [CLS] and fills queries up with [MASK] tokens,
which take part in MaxSim though the transformer may not attend to them; it scores no punctuation
in passages. Instructed encoders read a prompt before the text.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from erniesearch.data.corpus.texts import Rows
from erniesearch.data.corpus.tokens import SpecialTokens, TokenStore
from erniesearch.errors import UserError

Side = Literal["query", "passage"]
FORMAT_FILE = "text_format.json"
"""Lies with a stage's student whose texts are not plain."""
ATTENDED, SCORED, POOLED, TEXT = 1, 2, 4, 8
"""Roles of a token, bits of a number: the transformer attends to it; it takes part in MaxSim; it
counts in mean pooling; it is of the text itself ([CLS] and [SEP] included), which is what the
cross-encoder reads."""
EVERY_ROLE = ATTENDED | SCORED | POOLED | TEXT


@dataclass(frozen=True)
class SideFormat:
    """A side's texts, in words; :class:`TextReader` knows their ids.

    Attributes:
        prompt: put before the text and tokenised with it.
        prefix: one token, put behind the first ([CLS]).
        pool_prompt: whether mean pooling counts [CLS] and the prompt's tokens.
        skip: words whose tokens take no part in MaxSim.
        skip_unknown: whether words of ``skip`` that the vocabulary has not stand for its unknown
            token (PyLate), or for nothing.
        expand: whether short texts are filled up.
        at_least: to this many tokens; 0: to the most that a text may have.
        attend: whether the transformer attends to what fills up.
        expansion_token: what fills up; empty is the tokenizer's mask token.
    """

    prompt: str = ""
    prefix: str = ""
    pool_prompt: bool = True
    skip: tuple[str, ...] = ()
    skip_unknown: bool = False
    expand: bool = False
    at_least: int = 0
    attend: bool = False
    expansion_token: str = ""


@dataclass(frozen=True)
class TextFormat:
    """Both sides' texts; ``layout`` is the library whose files say it on export."""

    query: SideFormat = SideFormat()
    passage: SideFormat = SideFormat()
    layout: Literal["pylate", "sentence_transformers"] = "pylate"

    def of(self, side: Side) -> SideFormat:
        """A side's."""
        return self.query if side == "query" else self.passage

    def prompted(self, query: str | None, passage: str | None) -> "TextFormat":
        """With these prompts; None leaves a side's own."""
        made = self
        if query is not None:
            made = replace(made, query=replace(made.query, prompt=query))
        if passage is not None:
            made = replace(made, passage=replace(made.passage, prompt=passage))
        return made

    @property
    def is_plain(self) -> bool:
        """Whether texts are read as they stand."""
        return self.query == self.passage == SideFormat()

    @property
    def prompts(self) -> dict[Side, str]:
        """Both sides'."""
        return {"query": self.query.prompt, "passage": self.passage.prompt}

    @property
    def of_late_interaction(self) -> bool:
        """Whether only a late-interaction model reads texts so."""
        own = bool(self.prefixes or self.query.expand or self.query.skip or self.passage.skip)
        return own or self.layout == "sentence_transformers"

    @property
    def prefixes(self) -> list[str]:
        """The tokens that late interaction puts behind [CLS]."""
        return [form.prefix for form in (self.query, self.passage) if form.prefix]

    def save(self, folder: Path) -> None:
        """Write it beside a model, unless it is plain."""
        if not self.is_plain:
            content = json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"
            (folder / FORMAT_FILE).write_text(content, encoding="utf-8")


def stored_format(folder: Path) -> TextFormat | None:
    """What :meth:`TextFormat.save` has written; None if there is nothing.

    Raises:
        UserError: for a damaged file.
    """
    path = folder / FORMAT_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        sides = {side: SideFormat(**content[side] | {"skip": tuple(content[side]["skip"])})
                 for side in ("query", "passage")}  # fmt: skip
        return TextFormat(**sides, layout=content["layout"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: damaged; train the stage again") from None


PLAIN = TextFormat()
"""Texts as they stand."""


class Tokens(NamedTuple):
    """Texts as token ids ``[N, L]``, a mask that is True on all but padding, and each token's roles
    ``[N, L]`` uint8, None where all of them have every role."""

    ids: Tensor
    mask: Tensor
    roles: Tensor | None = None

    def having(self, role: int) -> Tensor:
        """Mask of the tokens with a role."""
        return having(self.mask, self.roles, role)


def having(mask: Tensor, roles: Tensor | None, role: int) -> Tensor:
    """Tokens with a role, of ``mask`` alone where ``roles`` is None."""
    return mask if roles is None else (roles & role).bool()


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int
) -> tuple[Tensor, Tensor]:
    """Token ids and mask, both ``[len(texts), longest]``, truncated to ``max_length``."""
    encoded = tokenizer(texts, truncation=True, max_length=max_length, padding=True,
                        return_tensors="pt", return_token_type_ids=False)  # fmt: skip
    return encoded["input_ids"], encoded["attention_mask"].bool()


class TextReader:
    """Texts of one side to :class:`Tokens`.

    Args:
        max_length: longest text in tokens, everything included.

    Raises:
        UserError: for a prefix or an expansion token that is no single token of the vocabulary, and
            a length that prompt and special tokens alone take up.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, form: SideFormat, max_length: int
    ) -> None:
        self.tokenizer, self.form, self.max_length = tokenizer, form, max_length
        self.is_plain = form == SideFormat()
        self._prompt_tokens, self._least, self._fill = 0, 0, 0
        self.prompt_ids: list[int] = []
        if self.is_plain:
            return
        self.prompt_ids = self._content([form.prompt])[0] if form.prompt else []
        self._prompt_tokens = _common(self.prompt_ids, self._content([form.prompt + "a"])[0])
        if self.room <= self._prompt_tokens:
            raise UserError(
                f"texts of {max_length} tokens: prompt and special tokens take"
                f" {max_length - self.room + self._prompt_tokens}; allow more, or shorten"
                f" the prompt {form.prompt!r}"
            )
        fill = form.expansion_token or str(tokenizer.mask_token or "")
        self._fill = _token(tokenizer, fill, "expansion token") if form.expand else 0
        if form.expand:
            self._least = min(form.at_least or max_length, max_length)
        self._skip = np.array(sorted(set(self._skipped())), np.int64)

    @cached_property
    def special(self) -> SpecialTokens:
        """What the tokenizer puts around a text."""
        return SpecialTokens.of(self.tokenizer)

    @cached_property
    def _head(self) -> tuple[int, ...]:
        first, rest = self.special.prefix[:1], self.special.prefix[1:]
        prefix = self.form.prefix
        return (*first, *([_token(self.tokenizer, prefix, "prefix")] if prefix else []), *rest)

    @property
    def room(self) -> int:
        """Tokens that prompt and text may have."""
        return self.max_length - len(self._head) - len(self.special.suffix)

    def length(self, text: str) -> tuple[int, int]:
        """Tokens of the text with all that stands around it, uncut and not filled up; and how many
        of them are the text's own."""
        tokens = self.tokenizer(
            self.form.prompt + text, add_special_tokens=False, truncation=False, verbose=False
        )["input_ids"]
        around = len(self._head) + len(self.special.suffix)
        return len(tokens) + around, len(tokens) - self._prompt_tokens

    def places(self, text: str) -> list[tuple[int, int] | None]:
        """Where each token of :meth:`texts` stands in the text, in code points; None: nowhere."""
        prompt = len(self.form.prompt)
        encoded = self.tokenizer(
            self.form.prompt + text, add_special_tokens=False, truncation=True,
            max_length=self.room, return_offsets_mapping=True,
        )  # fmt: skip
        own = [(max(0, start - prompt), end - prompt) if end > prompt else None
               for start, end in encoded["offset_mapping"]]  # fmt: skip
        found = [*[None] * len(self._head), *own, *[None] * len(self.special.suffix)]
        return found + [None] * (self._least - len(found))

    def texts(self, texts: list[str]) -> Tokens:
        """Texts as they stand, prompt and all that belongs to the format added."""
        if self.is_plain:
            return Tokens(*encode_texts(self.tokenizer, texts, self.max_length))
        return self.rows(self._content([self.form.prompt + text for text in texts]))

    def stored(self, store: TokenStore, rows: Rows) -> Tokens:
        """Passages of a token store that was made with the same prompt."""
        if self.is_plain:
            return Tokens(*store.tensors(rows, self.max_length))
        return self.rows(store[rows])

    def rows(self, sequences: Sequence[Sequence[int] | np.ndarray]) -> Tokens:
        """Token ids of prompt and text, without special tokens; cut to the length."""
        if self.is_plain:
            found = [np.asarray(tokens) for tokens in sequences]
            return Tokens(*self.special.tensors(found, self.max_length))
        made = [self._row(np.asarray(tokens, np.int64)) for tokens in sequences]
        width = max((len(ids) for ids, _ in made), default=0)
        ids = torch.full((len(made), width), self.special.pad_id)
        roles = torch.zeros(ids.shape, dtype=torch.uint8)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for row, (own_ids, own_roles) in enumerate(made):
            ids[row, : len(own_ids)] = torch.from_numpy(own_ids)
            roles[row, : len(own_ids)] = torch.from_numpy(own_roles)
            mask[row, : len(own_ids)] = True
        return Tokens(ids, mask, roles)

    def _row(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        form, head = self.form, len(self._head)
        ids = np.array([*self._head, *tokens[: self.room], *self.special.suffix], np.int64)
        roles = np.full(len(ids), EVERY_ROLE, np.uint8)
        if form.prefix:
            roles[1] &= ~np.uint8(TEXT)
        roles[head : head + self._prompt_tokens] &= ~np.uint8(TEXT)
        if form.prompt and not form.pool_prompt:
            # All that sentence-transformers counts as the prompt, [CLS] included.
            roles[: head + len(self.prompt_ids)] &= ~np.uint8(POOLED)
        if (missing := self._least - len(ids)) > 0:
            ids = np.append(ids, np.full(missing, self._fill))
            role = SCORED | (ATTENDED if form.attend else 0)
            roles = np.append(roles, np.full(missing, role, np.uint8))
        roles[np.isin(ids, self._skip)] &= ~np.uint8(SCORED)
        return ids, roles

    def _content(self, texts: list[str]) -> list[list[int]]:
        encoded = self.tokenizer(
            texts, add_special_tokens=False, truncation=True, max_length=max(1, self.room),
            verbose=False, return_attention_mask=False, return_token_type_ids=False,
        )  # fmt: skip
        return list(encoded["input_ids"])

    def _skipped(self) -> list[int]:
        unknown = self.tokenizer.unk_token_id
        ids: Any = self.tokenizer.convert_tokens_to_ids(list(self.form.skip))
        named = zip(self.form.skip, ids, strict=True)
        return [
            token for word, token in named
            if token is not None
            and (self.form.skip_unknown or token != unknown or word == self.tokenizer.unk_token)
        ]  # fmt: skip


def _token(tokenizer: PreTrainedTokenizerBase, word: str, what: str) -> int:
    token: Any = tokenizer.convert_tokens_to_ids(word)
    if token is None or (token == tokenizer.unk_token_id and word != tokenizer.unk_token):
        raise UserError(f"the {what} {word!r} is no token of the model's vocabulary")
    return int(token)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning: a prompt's last token may join the text's first."""
    number = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        number += 1
    return number
