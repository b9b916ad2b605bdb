"""Pairs built from the students' ids equal the tokenizer's own pairs; the attention is exact."""

from pathlib import Path

import pytest
import torch
from support.backbones import roberta_tokenizer
from transformers import BertModel, PreTrainedTokenizerBase

from erniesearch.config.keys import StudentConfig, TeacherConfig
from erniesearch.data.text_format import encode_texts
from erniesearch.errors import UserError
from erniesearch.models.backbone import load_tokenizer
from erniesearch.models.cross_encoder import CrossEncoder, PairLayout, assemble_pairs
from erniesearch.models.encoder import StudentEncoder

QUERIES = ["baran desel", "fitor"]
PASSAGES = ["govix kuwen lazul", "mipat", "nohod baran desel fitor", "govix"]


def assembled(tokenizer: PreTrainedTokenizerBase):  # type: ignore[no-untyped-def]
    query = encode_texts(tokenizer, QUERIES, 16)
    passage = encode_texts(tokenizer, PASSAGES, 16)
    pairs = assemble_pairs(*query, *passage, PairLayout.of(tokenizer), tokenizer.pad_token_id)
    return query, passage, pairs


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_pairs_equal_the_tokenizers_own(family: str, tiny_model: Path) -> None:
    bert = load_tokenizer(StudentConfig(str(tiny_model)))
    tokenizer = bert if family == "bert" else roberta_tokenizer()
    (query_ids, query_mask), (passage_ids, passage_mask), pairs = assembled(tokenizer)
    expected = tokenizer(
        [q for q in QUERIES for _ in range(2)], PASSAGES, padding=True, return_tensors="pt",
        return_token_type_ids=True,
    )  # fmt: skip
    assert torch.equal(pairs.input_ids, expected["input_ids"])
    assert torch.equal(pairs.mask.long(), expected["attention_mask"])
    assert torch.equal(pairs.token_type_ids, expected["token_type_ids"])
    # Every real token is where the columns say; the passage's [CLS] is gone.
    for ids, mask, columns in (
        (
            query_ids.repeat_interleave(2, 0),
            query_mask.repeat_interleave(2, 0),
            pairs.query_columns,
        ),
        (passage_ids[:, 1:], passage_mask[:, 1:], pairs.passage_columns[:, 1:]),
    ):
        assert torch.equal(pairs.input_ids.gather(1, columns)[mask], ids[mask])


def test_padding_changes_no_score(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(StudentConfig(str(tiny_model)))
    model = CrossEncoder(TeacherConfig(str(tiny_model))).eval()
    together = model(assembled(tokenizer)[2])
    layout = PairLayout.of(tokenizer)
    for i, passage in enumerate(PASSAGES):
        sides = [encode_texts(tokenizer, [text], 16) for text in (QUERIES[i // 2], passage)]
        pair = assemble_pairs(*sides[0], *sides[1], layout, tokenizer.pad_token_id)
        torch.testing.assert_close(model(pair)[0], together[i], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_padding_changes_no_embedding(tiny_model: Path, pooling: str) -> None:
    tokenizer = load_tokenizer(StudentConfig(str(tiny_model)))
    student = StudentEncoder(StudentConfig(str(tiny_model), pooling=pooling)).eval()
    ids, mask = encode_texts(tokenizer, PASSAGES, 16)
    together = student(ids, mask, "passage")
    for i, passage in enumerate(PASSAGES):
        alone = student(*encode_texts(tokenizer, [passage], 16), "passage")
        torch.testing.assert_close(alone.vectors[0], together.vectors[i], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            alone.tokens[0], together.tokens[i][mask[i]], rtol=1e-5, atol=1e-5
        )


def test_the_head_is_what_the_checkpoint_has_not(tiny_model: Path, tmp_path: Path) -> None:
    def names(path: Path) -> set[str]:
        model = CrossEncoder(TeacherConfig(str(path)))
        head = {id(parameter) for parameter in model.head}
        return {name for name, p in model.model.named_parameters() if id(p) in head}

    classifier = {"classifier.weight", "classifier.bias"}
    assert names(tiny_model) == classifier
    BertModel.from_pretrained(tiny_model, add_pooling_layer=False).save_pretrained(
        tmp_path / "bare"
    )
    pooler = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert names(tmp_path / "bare") == classifier | pooler
    trained = CrossEncoder(TeacherConfig(str(tmp_path / "bare")))
    trained.save(tmp_path / "trained", dict(trained.state_dict()))
    assert names(tmp_path / "trained") == classifier


def test_the_temperature_is_kept_with_the_model(tiny_model: Path, tmp_path: Path) -> None:
    model = CrossEncoder(TeacherConfig(str(tiny_model)))
    assert model.temperature is None
    model.temperature = 1.25
    model.save(tmp_path, dict(model.state_dict()))
    assert CrossEncoder(TeacherConfig(str(tmp_path))).temperature == 1.25
    for damaged in ("{", '{"temperature": 0}', '{"temperature": "hot"}', "[]", "{}"):
        (tmp_path / "temperature.json").write_text(damaged)
        with pytest.raises(UserError, match=r"temperature.json: expected"):
            CrossEncoder(TeacherConfig(str(tmp_path)))
