"""Which precision a CPU computes in, and what inference in bf16 does to scores."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny import write_model
from transformers import AutoModel

from erniesearch.config.keys import Precision, StudentConfig, TeacherConfig
from erniesearch.models.backbone import load_encoder, save_weights
from erniesearch.models.precision import use_bf16
from erniesearch.retrieval.retriever import PairScorer
from erniesearch.training.checkpoints.resume import Resume, goes_on_in_bf16

CPU = torch.device("cpu")


def has(monkeypatch: pytest.MonkeyPatch, avx512: bool = False, amx: bool = False) -> None:
    """A processor with these instructions."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)


@pytest.mark.parametrize(
    ("precision", "instructions", "bf16"),
    [
        ("auto", {}, False),
        ("auto", {"avx512": True}, True),
        ("auto", {"amx": True}, True),
        ("fp32", {"avx512": True}, False),
        ("bf16", {}, True),
    ],
)
def test_auto_asks_the_processor(
    precision: Precision, instructions: dict[str, bool], bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    has(monkeypatch, **instructions)
    assert use_bf16(precision, CPU) is bf16


def test_scores_in_bf16_are_close_and_not_on_its_grid(tmp_path: Path) -> None:
    """Eight bits of a score would make many passages equal."""
    settings = TeacherConfig(str(write_model(tmp_path / "model")))
    torch.manual_seed(0)  # of the new head
    exact = PairScorer(settings, 8, 16, device=CPU)
    torch.manual_seed(0)
    rough = PairScorer(settings, 8, 16, device=CPU, precision="bf16")
    queries = [f"baran desel {'fitor ' * (i % 5)}" for i in range(40)]
    passages = [f"gowen {'kuhod ' * (i % 7)}lapat" for i in range(40)]
    expected, found = (scorer.scores(queries, passages) for scorer in (exact, rough))
    assert 0 < np.abs(found - expected).max() < 0.02
    assert (torch.tensor(found).bfloat16().float().numpy() != found).mean() > 0.8


@pytest.mark.parametrize("recorded", [True, False, None])
def test_a_checkpoint_goes_on_in_its_own_precision(
    recorded: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that is started again may find itself on another processor."""
    resume = Resume(Path("checkpoints"), "step-1", 1, universal=False, bf16=recorded)
    for fast in (True, False):
        has(monkeypatch, avx512=fast)
        assert goes_on_in_bf16("auto", None, CPU) is fast
        assert goes_on_in_bf16("auto", resume, CPU) is (fast if recorded is None else recorded)
        assert goes_on_in_bf16("bf16", resume, CPU)
        assert not goes_on_in_bf16("fp32", resume, CPU)


def test_weights_trained_in_bf16_are_read_whole(tmp_path: Path) -> None:
    """transformers and sentence-transformers load in the dtype that config.json names."""
    model = load_encoder(StudentConfig(str(write_model(tmp_path / "model"))))
    masters = {name: value.clone() for name, value in model.state_dict().items()}
    save_weights(model.bfloat16(), tmp_path / "out", masters)
    again = AutoModel.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert all(torch.equal(again[name], value) for name, value in masters.items())
