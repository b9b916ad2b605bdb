"""A small encoder without pretrained weights: a vocabulary of the corpus's own, random weights.

For languages and domains for which no weights are at hand; ``post_train`` is its pretraining.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import BertWordPieceTokenizer
from transformers import BertConfig, BertForMaskedLM, BertTokenizer

from erniesearch.errors import UserError
from erniesearch.files import written_aside
from erniesearch.progress import metered, waiting

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
MIN_FREQUENCY = 2


@dataclass(frozen=True)
class EncoderSize:
    """Sizes of a BERT; the feed-forward layers are four times ``hidden`` wide, a head has 32
    dimensions."""

    vocab_size: int = 8000
    """Most tokens of the vocabulary."""
    hidden: int = 256
    """Hidden size."""
    layers: int = 4
    """Transformer layers."""
    max_length: int = 256
    """Longest input in tokens."""


def write_encoder(texts: Iterable[str], out: Path, size: EncoderSize, seed: int = 42) -> int:
    """Write a transformers folder with a WordPiece vocabulary of ``texts`` and random weights, the
    language-model head included. The same texts, sizes and seed give the same bytes.

    Returns:
        the number of tokens in the vocabulary.

    Raises:
        UserError: for impossible sizes, or if ``out`` exists.
    """
    if out.exists():
        raise UserError(f"--out {out}: exists already; name a new folder")
    for name, least in (("vocab_size", 64), ("hidden", 32), ("layers", 1), ("max_length", 3)):
        if getattr(size, name) < least:
            raise UserError(f"--{name} {getattr(size, name)}: must be {least} or more")
    if size.hidden % 32:
        raise UserError(f"--hidden {size.hidden}: must be a multiple of 32")
    vocabulary = train_vocabulary(texts, size.vocab_size)
    torch.manual_seed(seed)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=len(vocabulary), hidden_size=size.hidden, num_hidden_layers=size.layers,
            num_attention_heads=size.hidden // 32, intermediate_size=4 * size.hidden,
            max_position_embeddings=size.max_length,
        )
    )  # fmt: skip
    try:
        with written_aside(out) as aside:
            aside.mkdir()
            file = aside / "vocab.txt"
            file.write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
            BertTokenizer(str(file), model_max_length=size.max_length).save_pretrained(aside)
            model.save_pretrained(aside)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror}") from None
    return len(vocabulary)


def train_vocabulary(texts: Iterable[str], vocab_size: int) -> list[str]:
    """A WordPiece vocabulary, BERT's five special tokens first.

    Text is lowered and split as BERT does it: at white space and punctuation, and around every
    Chinese character, which is a word of its own. At most three quarters of the vocabulary are
    single characters, the most frequent ones.

    Raises:
        UserError: if no character occurs twice.
    """
    tokenizer = BertWordPieceTokenizer(lowercase=True)
    words: Counter[str] = Counter()
    for text in metered(texts, "counting words", "passages"):
        pieces = tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))
        words.update(word for word, _ in pieces)
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            counts[character] += count
    inside = {character for word in words for character in word[1:]}
    room, alphabet = vocab_size * 3 // 4, []
    for character in sorted(counts, key=lambda c: (-counts[c], c)):
        room -= 2 if character in inside else 1  # as ##c too
        if room < 0 or counts[character] < MIN_FREQUENCY:
            break
        alphabet.append(character)
    if not alphabet:
        raise UserError("the corpus is too small for a vocabulary: no character occurs twice")
    # The trainer numbers characters inside words in the order of a hash table, which differs from
    # run to run, and breaks ties between merges by number. Named beforehand, they have an order.
    continued = sorted(f"##{character}" for character in inside & set(alphabet))
    with waiting("training the vocabulary"):
        tokenizer.train_from_iterator(
            (word for word, count in words.items() for word in [word] * count),
            vocab_size=vocab_size, min_frequency=MIN_FREQUENCY, limit_alphabet=len(alphabet),
            initial_alphabet=sorted(alphabet), special_tokens=SPECIAL_TOKENS + continued,
            show_progress=False,
        )  # fmt: skip
    ids = tokenizer.get_vocab()
    return sorted(ids, key=lambda token: ids[token])
