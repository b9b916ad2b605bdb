"""The student over every model family: loads, encodes, predicts words, saves and loads again."""

from pathlib import Path

import pytest
import torch
from transformers import (
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

from erniesearch.config import StudentConfig
from erniesearch.errors import UserError
from erniesearch.models.backbone import max_positions, resolve
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


def checkpoint(folder: Path, family: str) -> StudentConfig:
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(0)
    config = config_class(
        vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
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
