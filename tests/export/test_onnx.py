"""The ONNX file gives PyTorch's states, for any batch and length; what does not is not kept."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.finished_run import LONG, TEXTS, finished_run, plain_states, retriever_of
from support.tiny import WORDS, ConfigMaker
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerFast, RobertaConfig, RobertaModel

from erniesearch.errors import UserError
from erniesearch.export import export_all, write_cards
from erniesearch.export import onnx as onnx_export
from erniesearch.run_folder import RunFolder

onnxruntime = pytest.importorskip("onnxruntime", reason="extra onnx is not installed")


def write_roberta(folder: Path) -> Path:
    """A random RoBERTa: positions count by the padding id, two separators in a pair."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="<s>", sep_token="</s>", pad_token="<pad>",
        unk_token="<unk>", mask_token="<mask>", model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    RobertaModel(RobertaConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=66, pad_token_id=1, bos_token_id=0,
        eos_token_id=2, type_vocab_size=1,
    )).save_pretrained(folder)  # fmt: skip
    return folder


def states_by_onnx(folder: Path, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=16, return_tensors="np")
    session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx")
    wanted = {entry.name for entry in session.get_inputs()}
    assert wanted == set(inputs)  # what the tokenizer gives is what the model takes
    feed = {name: np.asarray(value, dtype=np.int64) for name, value in inputs.items()}
    return session.run(["last_hidden_state"], feed)[0], inputs["attention_mask"].astype(bool)


def test_onnx_gives_our_vectors(make_config: ConfigMaker) -> None:
    config = finished_run(make_config, pooling="mean", normalize=True)
    folder = export_all(config, onnx=True)[0]
    for texts in ([LONG], TEXTS, [LONG, *TEXTS, LONG], TEXTS[:1]):
        states, mask = states_by_onnx(folder, texts)
        expected, _ = plain_states(folder, texts)
        np.testing.assert_allclose(states[mask], expected.numpy()[mask], atol=1e-4)
        pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
        vectors = F.normalize(torch.from_numpy(pooled), dim=-1)
        np.testing.assert_allclose(
            vectors, retriever_of(config).vectors(texts, "passage"), atol=1e-4
        )
    write_cards(config, "table")
    assert 'backend="onnx"' in (folder / "README.md").read_text()
    others = RunFolder(config.run_dir)
    assert not (others.export("late_interaction") / "onnx").exists()
    export_all(config)  # weights may have changed: no old ONNX file stays beside new weights
    assert not (folder / "onnx").exists()
    assert 'backend="onnx"' not in (folder / "README.md").read_text()


@pytest.mark.slow
def test_roberta_counts_its_positions_in_onnx_too(tmp_path: Path) -> None:
    folder = write_roberta(tmp_path / "roberta")
    assert onnx_export.export_onnx(folder) < 1e-5
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 16}))
    states, mask = states_by_onnx(folder, [LONG, *TEXTS])
    expected, _ = plain_states(folder, [LONG, *TEXTS])
    np.testing.assert_allclose(states[mask], expected.numpy()[mask], atol=1e-4)


def test_a_file_that_differs_is_not_kept(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = finished_run(make_config)
    before = export_all(config)[0]
    stamp = (before / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(onnx_export, "_write", lambda model, names, path: path.touch())
    monkeypatch.setattr(onnx_export, "_compare", lambda model, names, path: 0.01)
    with pytest.raises(UserError, match=r"differ by 1.0e-02 of the largest state, more than 1e-04"):
        export_all(config, onnx=True)
    assert (before / "model.safetensors").stat().st_mtime_ns == stamp  # the old folder stands
    names = {path.name for path in before.parent.iterdir()}
    assert names == {"dual_encoder", "late_interaction", "cross_encoder"}
    monkeypatch.setattr(onnx_export, "_compare", lambda model, names, path: float("nan"))
    with pytest.raises(UserError, match="differ by nan"):
        export_all(config, onnx=True)


def test_missing_packages_and_failing_models_are_told(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = finished_run(make_config)

    def fails(*arguments: object) -> None:
        raise RuntimeError("operator aten::strange\nis not supported")

    monkeypatch.setattr(onnx_export, "_write", fails)
    with pytest.raises(UserError, match=r"no ONNX of this model \(operator aten::strange is not"):
        export_all(config, onnx=True)
    monkeypatch.setattr(onnx_export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"onnx is not installed: pip install onnx onnxruntime"):
        export_all(config, onnx=True)
