"""Stored tokens equal what the tokenizer gives for the text, whatever its layout and the limit."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from support.processes import run_python
from support.tiny import WORDS
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from erniesearch.config.keys import MAX_TOKENS, StudentConfig
from erniesearch.data.corpus import tokens
from erniesearch.data.corpus.texts import open_corpus
from erniesearch.data.corpus.tokens import SpecialTokens, describe, open_tokens
from erniesearch.errors import UserError
from erniesearch.models.backbone import load_tokenizer


@pytest.fixture
def bert(tiny_model: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(StudentConfig(str(tiny_model)))


def word_tokenizer(template: str, normalizer: normalizers.Normalizer | None = None) -> (
    PreTrainedTokenizerFast
):  # fmt: skip
    words = ["<s>", "<pad>", "</s>", "<unk>", *WORDS]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if normalizer:
        backend.normalizer = normalizer
    if template == "roberta":
        backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    else:
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 0), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token="<s>", sep_token="</s>", pad_token="<pad>",
        unk_token="<unk>",
    )  # fmt: skip


LAYOUTS = {
    "roberta": ((0,), (2,)),
    "$A </s>": ((), (2,)),  # T5
    "<s> <s> $A </s>": ((0, 0), (2,)),
}


def texts_of_all_lengths() -> list[str]:
    rng = np.random.default_rng(0)
    return ["", *(" ".join(rng.choice(WORDS, size=n)) for n in (1, 5, 6, 7, 8, 9, 30)), "é ## zzz"]


def write_corpus(folder: Path, texts: list[str]) -> Path:
    lines = (json.dumps({"_id": f"p{i}", "text": text}) + "\n" for i, text in enumerate(texts))
    (folder / "corpus.jsonl").write_text("".join(lines))
    return folder / "corpus.jsonl"


def assert_equal_to_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    texts = texts_of_all_lengths()
    corpus = open_corpus(write_corpus(folder, texts), True)
    rows = np.array([3, 0, 7, 3, 8, 5, 1, 2, 4, 6])
    for passages in (texts, corpus.passages):
        store = open_tokens(passages, tokenizer)
        part = pickle.loads(pickle.dumps(store.part(rows)))
        assert [ids.tolist() for ids in part[range(len(rows))]] == [
            ids.tolist() for ids in store[rows]
        ]
        assert part.lengths.tolist() == store.lengths[rows].tolist()
        assert len(store) == len(texts)
        assert store.lengths.dtype == np.int32
        plain = tokenizer(texts, add_special_tokens=False)["input_ids"]
        assert store.lengths.tolist() == [len(ids) for ids in plain]
        assert [ids.tolist() for ids in store[rows]] == [plain[i] for i in rows]
        for max_length in (4, 9, 64):
            ids, mask = store.tensors(rows, max_length)
            wanted = tokenizer([texts[i] for i in rows], truncation=True, max_length=max_length,
                               padding=True, return_tensors="pt")  # fmt: skip
            assert torch.equal(ids, wanted["input_ids"])
            assert torch.equal(mask, wanted["attention_mask"].bool())


def test_bert_layout(bert: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    special = SpecialTokens.of(bert)
    assert special.prefix == (bert.cls_token_id,)
    assert special.suffix == (bert.sep_token_id,)
    assert_equal_to_tokenizer(bert, tmp_path)


@pytest.mark.parametrize("template", LAYOUTS)
def test_other_layouts(template: str, tmp_path: Path) -> None:
    tokenizer = word_tokenizer(template)
    special = SpecialTokens.of(tokenizer)
    assert (special.prefix, special.suffix, special.pad_id) == (*LAYOUTS[template], 1)
    assert_equal_to_tokenizer(tokenizer, tmp_path)


def test_special_tokens_inside_a_text_are_refused(tmp_path: Path) -> None:
    tokenizer = word_tokenizer("<s> $A </s>", normalizers.Replace("a", ""))
    with pytest.raises(UserError, match="special tokens around a text"):
        open_tokens(["x"], tokenizer)


def test_a_corpus_is_tokenised_once_per_tokenizer(
    bert: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ERNIESEARCH_CACHE", str(tmp_path / "cache"))
    passages = open_corpus(write_corpus(tmp_path, texts_of_all_lengths()), True).passages
    first = open_tokens(passages, bert)
    bert(["a b c"], truncation=True, max_length=5, padding="max_length")  # leaves state behind
    other = open_tokens(passages, word_tokenizer("roberta"))
    assert other.folder != first.folder

    def refuse(*_: object) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(tokens, "_tokenize", refuse)
    again = open_tokens(passages, bert)
    assert again.folder == first.folder
    assert [x.tolist() for x in again[range(9)]] == [x.tolist() for x in first[range(9)]]
    assert pickle.loads(pickle.dumps(again)).lengths.tolist() == first.lengths.tolist()


def test_what_changes_ids_changes_the_key() -> None:
    plain = describe(word_tokenizer("roberta"))
    assert plain == describe(word_tokenizer("roberta"))
    assert plain != describe(word_tokenizer("roberta", normalizers.Lowercase()))


def test_a_passage_keeps_its_first_tokens_only(
    bert: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    text = " ".join(WORDS[i % len(WORDS)] for i in range(MAX_TOKENS + 500))
    passages = open_corpus(write_corpus(tmp_path, ["short", text]), True).passages
    store = open_tokens(passages, bert)
    assert store.lengths[1] == MAX_TOKENS
    ids, mask = store.tensors([1], 512)
    wanted = bert([text], truncation=True, max_length=512, return_tensors="pt")["input_ids"]
    assert torch.equal(ids, wanted)
    assert mask.all()


MEMORY = """
import resource, sys
from pathlib import Path
from erniesearch.config.keys import StudentConfig
from erniesearch.data.corpus.texts import open_corpus
from erniesearch.data.corpus.tokens import open_tokens
from erniesearch.models.backbone import load_tokenizer
tokenizer = load_tokenizer(StudentConfig(sys.argv[2]))
passages = open_corpus(Path(sys.argv[1]), True).passages
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
store = open_tokens(passages, tokenizer)
assert store.lengths.max() == 8192
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_very_long_passages_do_not_add_up(tmp_path: Path, tiny_model: Path) -> None:
    """60 passages of 120,000 characters, 20,000 tokens each, in 90 MiB; all at once take 138."""
    text = " ".join(WORDS * 312)
    status, output = run_python("-c", MEMORY, str(write_corpus(tmp_path, [text] * 60)),
                                str(tiny_model))  # fmt: skip
    assert status == 0, output
    assert float(output.split()[-1]) < 90, output
