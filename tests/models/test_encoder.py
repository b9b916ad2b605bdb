"""The student over every model family: loads, encodes, predicts words, saves and loads again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    ErnieConfig,
    ErnieForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)

from erniesearch.config.keys import StudentConfig
from erniesearch.errors import UserError
from erniesearch.models.backbone import kept_layers, max_positions, resolve
from erniesearch.models.encoder import HEAD_FILE, StudentEncoder, content_mask

FAMILIES = {
    "bert": (BertConfig, BertForMaskedLM),
    "ernie": (ErnieConfig, ErnieForMaskedLM),
    "roberta": (RobertaConfig, RobertaForMaskedLM),
    "electra": (ElectraConfig, ElectraForMaskedLM),
    "xlm-roberta": (XLMRobertaConfig, XLMRobertaForMaskedLM),
}
IDS = torch.tensor([[0, 5, 6, 7, 2], [0, 8, 2, 1, 1]])
MASK = IDS != 1


def checkpoint(folder: Path, family: str, num_layers: int = 2) -> StudentConfig:
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(0)
    config = config_class(
        vocab_size=30, hidden_size=32, num_hidden_layers=num_layers, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=40, pad_token_id=1,
    )  # fmt: skip
    model_class(config).save_pretrained(folder)
    return StudentConfig(str(folder), late_interaction_dim=16)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("masked_lm", [False, True])
def test_family_loads_encodes_and_survives_saving(
    family: str, masked_lm: bool, tmp_path: Path
) -> None:
    settings = checkpoint(tmp_path / "base", family)
    student = StudentEncoder(settings, masked_lm).eval()
    encoded = student(IDS, MASK, "passage")
    assert encoded.vectors.shape == (2, 32)
    assert encoded.tokens.shape == (2, 5, 16)
    torch.testing.assert_close(encoded.tokens.norm(dim=-1), torch.ones(2, 5))
    if masked_lm:
        labels = torch.where(IDS == 6, IDS, -100)
        student.masked_lm_loss(IDS, MASK, labels).backward()
        assert next(student.query_tower.parameters()).grad is not None
    student.save(tmp_path / "saved", dict(student.state_dict()))
    again = StudentEncoder(StudentConfig(str(tmp_path / "saved"), late_interaction_dim=16)).eval()
    for ours, theirs in zip(again(IDS, MASK, "passage"), encoded, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_words_are_the_models(family: str, tmp_path: Path) -> None:
    """Loss and gradients as by the logits of every token; of no word, nothing."""
    student = StudentEncoder(checkpoint(tmp_path / "base", family), True).eval()
    assert student.masked_lm is not None
    labels = torch.where((IDS == 6) | (IDS == 7), IDS, -100)
    logits = student.masked_lm(input_ids=IDS, attention_mask=MASK.long()).logits
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    found = student.masked_lm_loss(IDS, MASK, labels)
    torch.testing.assert_close(found, expected)
    parameters = dict(student.masked_lm.named_parameters())
    ours, theirs = (
        torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for loss in (found, expected)
    )
    for name, own, other in zip(parameters, ours, theirs, strict=True):
        torch.testing.assert_close(own, other, msg=lambda m, n=name: f"{n}: {m}")
    nothing = student.masked_lm_loss(IDS, MASK, torch.full_like(IDS, -100))
    assert nothing == 0
    nothing.backward()


def test_untied_towers_are_saved_apart(tmp_path: Path) -> None:
    settings = checkpoint(tmp_path / "base", "bert")
    settings = StudentConfig(settings.path, tied=False, late_interaction_dim=16)
    student = StudentEncoder(settings).eval()
    with torch.no_grad():
        next(student.passage_tower.parameters()).mul_(2)
    student.save(tmp_path / "saved", dict(student.state_dict()))
    again = StudentEncoder(
        StudentConfig(str(tmp_path / "saved"), tied=False, late_interaction_dim=16)
    ).eval()
    for side in ("query", "passage"):
        expected = student(IDS, MASK, side).vectors
        torch.testing.assert_close(again(IDS, MASK, side).vectors, expected)
    assert not torch.allclose(
        again(IDS, MASK, "query").vectors, again(IDS, MASK, "passage").vectors
    )


def test_head_of_another_size_is_refused(tmp_path: Path) -> None:
    student = StudentEncoder(checkpoint(tmp_path / "base", "bert"))
    student.save(tmp_path / "saved", dict(student.state_dict()))
    with pytest.raises(UserError, match=rf"{HEAD_FILE}: shape \(16, 32\).*\(8, 32\)"):
        StudentEncoder(StudentConfig(str(tmp_path / "saved"), late_interaction_dim=8))


def test_mean_pooling_averages_real_tokens_only(tmp_path: Path) -> None:
    settings = checkpoint(tmp_path / "base", "bert")
    student = StudentEncoder(
        StudentConfig(settings.path, pooling="mean", normalize=True, late_interaction_dim=16)
    ).eval()
    states = student.query_tower(IDS, attention_mask=MASK.long()).last_hidden_state
    mean = states[1, :3].mean(0)
    torch.testing.assert_close(student(IDS, MASK, "query").vectors[1], mean / mean.norm())


def test_content_is_neither_special_nor_padding() -> None:
    content = content_mask(IDS, MASK, torch.tensor([0, 2]))
    assert content.tolist() == [[False, True, True, True, False], [False, True] + [False] * 3]


def test_positions_of_roberta_start_after_the_padding_id() -> None:
    assert max_positions(RobertaConfig(max_position_embeddings=514, pad_token_id=1)) == 512
    assert max_positions(BertConfig(max_position_embeddings=512)) == 512


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("package:no_such_package", "the Python package 'no_such_package' is not installed"),
        ("package:json", "the package holds no config.json"),
        ("./no/such/folder", "no such folder"),
    ],
)
def test_models_that_are_not_there(path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(path)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pickles are not read"):
        resolve(str(tmp_path))


# --- layers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "total", "kept"),
    [(None, 3, [0, 1, 2]), (2, 6, [0, 5]), (3, 12, [0, 6, 11]), (4, 12, [0, 4, 7, 11]), (1, 6, [0]),
     (6, 6, [0, 1, 2, 3, 4, 5]), ([1, 4], 6, [1, 4])],
)  # fmt: skip
def test_layers_that_are_kept(layers: int | list[int] | None, total: int, kept: list[int]) -> None:
    config = BertConfig(num_hidden_layers=total)
    assert kept_layers(config, StudentConfig("base", layers=layers)) == kept


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("masked_lm", [False, True])
def test_a_cut_student_is_its_layers_and_survives_saving(
    family: str, masked_lm: bool, tmp_path: Path
) -> None:
    settings = replace(checkpoint(tmp_path / "base", family, num_layers=4), layers=[1, 3])
    student = StudentEncoder(settings, masked_lm).eval()
    whole = StudentEncoder(replace(settings, layers=None)).eval().query_tower
    tower = student.query_tower
    for ours, index in zip(tower.encoder.layer, (1, 3), strict=True):
        for own, theirs in zip(
            ours.parameters(), whole.encoder.layer[index].parameters(), strict=True
        ):
            assert torch.equal(own, theirs)
    whole.encoder.layer = torch.nn.ModuleList([whole.encoder.layer[1], whole.encoder.layer[3]])
    expected = whole(input_ids=IDS, attention_mask=MASK.long()).last_hidden_state
    assert torch.equal(tower(input_ids=IDS, attention_mask=MASK.long()).last_hidden_state, expected)
    student.save(tmp_path / "saved", dict(student.state_dict()))
    content = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert content["num_hidden_layers"] == 2
    about = {"base_model": settings.path, "layers": [1, 3], "of": 4}
    assert content["erniesearch"] == about
    again = StudentEncoder(replace(settings, path=str(tmp_path / "saved"), layers=None)).eval()
    assert again.query_tower.config.erniesearch == about
    for ours, theirs in zip(again(IDS, MASK, "query"), student(IDS, MASK, "query"), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("layers", [3, [0, 2]])
def test_layers_that_are_not_there_are_named(layers: int | list[int], tmp_path: Path) -> None:
    settings = replace(checkpoint(tmp_path / "base", "bert"), layers=layers)
    with pytest.raises(UserError, match=r"student.layers is .* has 2 layers, 0 to 1"):
        StudentEncoder(settings)


def test_layers_of_an_encoder_that_shares_them_are_refused(tmp_path: Path) -> None:
    config = AlbertConfig(
        vocab_size=30, embedding_size=16, hidden_size=32, num_hidden_layers=4,
        num_attention_heads=2, intermediate_size=64, max_position_embeddings=40,
    )  # fmt: skip
    AlbertModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"albert.*are not one plain stack"):
        StudentEncoder(StudentConfig(str(tmp_path), layers=2))
