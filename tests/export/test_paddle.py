"""A random ERNIE under Paddle's names comes back with the same outputs."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer, ErnieConfig
from transformers import AutoModelForSequenceClassification as AutoClassifier

from erniesearch.cli import main
from erniesearch.config.keys import StudentConfig, TeacherConfig
from erniesearch.errors import UserError
from erniesearch.export.paddle import convert_paddle
from erniesearch.export.paddle_ernie import Overrides
from erniesearch.models.backbone import load_classifier, load_encoder, load_tokenizer
from erniesearch.retrieval.load import load_retriever

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "apple", "pie", "##s"]
OTHER = Overrides(num_attention_heads=4, hidden_act="relu")
TO_PADDLE = [  # from the longest to the shortest
    ("attention.output.LayerNorm", "norm1"),
    ("attention.output.dense", "self_attn.out_proj"),
    ("attention.self.query", "self_attn.q_proj"),
    ("attention.self.key", "self_attn.k_proj"),
    ("attention.self.value", "self_attn.v_proj"),
    ("intermediate.dense", "linear1"),
    ("output.LayerNorm", "norm2"),
    ("output.dense", "linear2"),
    ("embeddings.LayerNorm", "embeddings.layer_norm"),
    ("encoder.layer.", "encoder.layers."),
]


def ernie(**changes: Any) -> ErnieConfig:
    settings: dict[str, Any] = {
        "vocab_size": 12, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 20, "type_vocab_size": 4,
        "hidden_act": "relu", "initializer_range": 0.3,
    }  # fmt: skip
    return ErnieConfig(**settings | changes)


def paddle_arrays(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The model's weights as PaddleNLP names and lays them out."""
    arrays = {}
    for name, tensor in model.state_dict().items():
        linear = tensor.dim() == 2 and "_embeddings" not in name
        for ours, theirs in TO_PADDLE:
            name = name.replace(ours, theirs)
        arrays[name] = (tensor.T if linear else tensor).numpy()
    return arrays


def write(folder: Path, arrays: dict[str, Any], own: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_state.pdparams").write_bytes(pickle.dumps(arrays, protocol=2))
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    if own is not None:
        (folder / "config.json").write_text(json.dumps(own))
    return folder


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Every weight random: a bias of zeros would hide a swap."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model.eval()


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:] = 0
    types = torch.zeros(3, 9, dtype=torch.long)
    types[:, 4:] = 1
    ids = torch.randint(5, 12, (3, 9), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


@pytest.mark.parametrize("tasks", [0, 5], ids=["base", "task types"])
@pytest.mark.parametrize("prefix", ["", "ernie."])
@torch.no_grad()
def test_dual_encoder_keeps_its_outputs(tmp_path: Path, tasks: int, prefix: str) -> None:
    config = ernie(use_task_id=bool(tasks), task_type_vocab_size=tasks or 3)
    model = randomised(AutoModel.from_config(config))
    arrays = {prefix + name: array for name, array in paddle_arrays(model).items()}
    converted = convert_paddle(write(tmp_path / "in", arrays), tmp_path / "out", overrides=OTHER)
    assert converted.left_out == []
    loaded = AutoModel.from_pretrained(tmp_path / "out").eval()
    assert loaded.config.use_task_id == bool(tasks)
    expected, found = model(**inputs()), loaded(**inputs())
    for key in ("last_hidden_state", "pooler_output"):
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=1e-6)


@torch.no_grad()
def test_cross_encoder_keeps_its_scores(tmp_path: Path) -> None:
    model = randomised(AutoClassifier.from_config(ernie(num_labels=1)))
    source = write(tmp_path / "in", paddle_arrays(model))
    convert_paddle(source, tmp_path / "out", kind="cross_encoder", overrides=OTHER)
    loaded = load_classifier(TeacherConfig(str(tmp_path / "out")))[0].eval()
    torch.testing.assert_close(
        loaded(**inputs()).logits, model(**inputs()).logits, rtol=0, atol=1e-6
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["sentence_transformers"]["activation_fn"].endswith("Identity")


@torch.no_grad()
def test_two_classes_become_their_difference(tmp_path: Path) -> None:
    """RocketQA's cross-encoder: the second class is 'relevant'."""
    model = randomised(AutoClassifier.from_config(ernie(num_labels=2)))
    source = write(tmp_path / "in", paddle_arrays(model))
    convert_paddle(source, tmp_path / "out", kind="cross_encoder", overrides=OTHER)
    score = AutoClassifier.from_pretrained(tmp_path / "out").eval()(**inputs()).logits[:, 0]
    relevant = model(**inputs()).logits.softmax(1)[:, 1]
    torch.testing.assert_close(score.sigmoid(), relevant, rtol=0, atol=1e-6)


@torch.no_grad()
def test_ernie_searchs_linear_layer_becomes_a_dense_module(tmp_path: Path) -> None:
    model = randomised(AutoModel.from_config(ernie()))
    rng = np.random.default_rng(3)
    weight, bias = rng.normal(size=(32, 16)), rng.normal(size=16)
    arrays = {f"ernie.{name}": array for name, array in paddle_arrays(model).items()}
    arrays |= {"emb_reduce_linear.weight": weight.astype(np.float32),
               "emb_reduce_linear.bias": bias.astype(np.float32),
               "classifier.weight": np.zeros((32, 2), np.float32),
               "classifier.bias": np.zeros(2, np.float32)}  # fmt: skip
    source, out = write(tmp_path / "in", arrays), tmp_path / "out"
    converted = convert_paddle(source, out, max_length=19, overrides=OTHER)
    assert converted.left_out == ["classifier.weight", "classifier.bias"]
    modules = json.loads((out / "modules.json").read_text())
    assert [module["path"] for module in modules] == ["", "1_Pooling", "2_Dense"]
    assert json.loads((out / "1_Pooling/config.json").read_text())["pooling_mode_cls_token"]
    assert json.loads((out / "sentence_bert_config.json").read_text())["max_seq_length"] == 19
    settings = json.loads((out / "2_Dense/config.json").read_text())
    assert (settings["in_features"], settings["out_features"], settings["bias"]) == (32, 16, True)
    dense = load_file(out / "2_Dense/model.safetensors")
    first = model(**inputs()).last_hidden_state[:, 0]
    found = first @ dense["linear.weight"].T + dense["linear.bias"]
    np.testing.assert_allclose(found.numpy(), first.numpy() @ weight + bias, atol=1e-5)

    # And our own reader applies it.
    texts = ["red apples", "pie"]
    retriever = load_retriever(out)
    assert retriever.dim == 16
    tokens = retriever.tokenizer(texts, padding=True, return_tensors="pt")
    pooled = model(**tokens).last_hidden_state[:, 0].numpy()
    np.testing.assert_allclose(retriever.vectors(texts, "query"), pooled @ weight + bias, atol=1e-5)
    settings["activation_function"] = "torch.nn.modules.activation.Tanh"
    (out / "2_Dense/config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"2_Dense/config\.json: a layer after pooling is linear"):
        load_retriever(out)


@torch.no_grad()
def test_one_of_two_towers(tmp_path: Path) -> None:
    towers = {side: randomised(AutoModel.from_config(ernie())) for side in ("query", "title")}
    for parameter in towers["title"].parameters():
        parameter.data += 0.1
    arrays = {
        f"{side}_ernie.ernie.{name}": array
        for side, model in towers.items()
        for name, array in paddle_arrays(model).items()
    }
    source = write(tmp_path / "in", arrays)
    with pytest.raises(UserError, match=r"--prefix query_ernie\. or title_ernie\."):
        convert_paddle(source, tmp_path / "out", overrides=OTHER)
    for side, model in towers.items():
        convert_paddle(source, tmp_path / side, prefix=f"{side}_ernie.", overrides=OTHER)
        loaded = load_encoder(StudentConfig(str(tmp_path / side))).eval()
        states = [m(**inputs()).last_hidden_state for m in (model, loaded)]
        torch.testing.assert_close(states[1], states[0], rtol=0, atol=1e-6)


def test_sizes_come_from_the_tensors_and_the_rest_from_config_json(tmp_path: Path) -> None:
    model = AutoModel.from_config(ernie(use_task_id=True, task_type_vocab_size=7))
    own = {"num_attention_heads": 8, "hidden_act": "gelu", "hidden_dropout_prob": 0.2,
           "hidden_size": 32, "layer_norm_eps": 1e-5}  # fmt: skip
    source = write(tmp_path / "in", paddle_arrays(model), own)
    changes = Overrides(num_attention_heads=2, do_lower_case=False)
    config = convert_paddle(source, tmp_path / "out", overrides=changes).config
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (12, 32, 48)
    assert (config.num_hidden_layers, config.max_position_embeddings) == (3, 20)
    assert (config.type_vocab_size, config.task_type_vocab_size) == (4, 7)
    assert config.num_attention_heads == 2  # the override, not config.json's 8
    assert (config.hidden_act, config.hidden_dropout_prob) == ("gelu", 0.2)
    assert config.layer_norm_eps == 1e-5
    tokenizer = load_tokenizer(StudentConfig(str(tmp_path / "out")))
    assert tokenizer("apples")["input_ids"] == [2, 6, 8, 3]
    assert tokenizer("Red")["input_ids"] == [2, 1, 3]  # not lowered: unknown


def test_older_config_files_are_read(tmp_path: Path) -> None:
    source = write(tmp_path / "in", paddle_arrays(AutoModel.from_config(ernie())))
    inner = {"num_attention_heads": 4, "hidden_act": "relu", "init_class": "ErnieModel"}
    (source / "model_config.json").write_text(
        json.dumps({"init_args": [inner], "init_class": "ErnieForSequenceClassification"})
    )
    assert convert_paddle(source, tmp_path / "out").config.hidden_act == "relu"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("Red")["input_ids"] == [2, 5, 3]


def broken(arrays: dict[str, Any]) -> dict[str, dict[str, Any]]:
    without = {n: a for n, a in arrays.items() if n != "encoder.layers.1.norm2.bias"}
    gap = {n: a for n, a in arrays.items() if not n.startswith("encoder.layers.1.")}
    turned = arrays | {
        "encoder.layers.2.linear1.weight": arrays["encoder.layers.2.linear1.weight"].T
    }
    return {
        r"encoder\.layer\.1\.output\.LayerNorm\.bias is missing": without,
        r"layers \[0, 2\], expected 0 to the last": gap,
        r"layer\.2\.intermediate\.dense\.weight has shape \(32, 48\), expected \(48, 32\)": turned,
        r"1 tensors that ERNIE does not have: encoder\.layers\.0\.rotary\.weight": arrays
        | {"encoder.layers.0.rotary.weight": np.zeros((2, 2), np.float32)},
        r"no tensor '\[ernie\.\]embeddings\.word_embeddings.weight'; the names begin with: bert":
        {f"bert.{name.replace('word_', '')}": array for name, array in arrays.items()},
    }  # fmt: skip


@pytest.mark.parametrize("number", range(5))
def test_what_is_missing_or_unknown_is_listed(tmp_path: Path, number: int) -> None:
    cases = broken(paddle_arrays(AutoModel.from_config(ernie())))
    message, arrays = list(cases.items())[number]
    source = write(tmp_path / "in", arrays)
    with pytest.raises(UserError, match=message):
        convert_paddle(source, tmp_path / "out", overrides=OTHER)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_what_shapes_do_not_show_is_asked_for(tmp_path: Path) -> None:
    arrays = paddle_arrays(AutoModel.from_config(ernie()))
    source, out = write(tmp_path / "in", arrays), tmp_path / "out"
    for overrides, message in (
        (Overrides(hidden_act="relu"), "hidden size 32: give --num_attention_heads"),
        (Overrides(num_attention_heads=4), "give --hidden_act relu"),
        (Overrides(num_attention_heads=5, hidden_act="relu"), "no divisor of the hidden"),
        (Overrides(num_attention_heads=4, hidden_act="rele"), "unknown activation 'rele'"),
    ):
        with pytest.raises(UserError, match=message):
            convert_paddle(source, out, overrides=overrides)
    for own, message in (
        ({"hidden_size": 64}, "hidden_size is 64 in its config.json, 32 by its shapes"),
        ({"task_id": 2}, "has task_id 2"),
    ):
        with pytest.raises(UserError, match=message):
            convert_paddle(write(tmp_path / "in", arrays, own), out, overrides=OTHER)
    (source / "config.json").unlink()
    (source / "vocab.txt").write_text("\n".join(VOCABULARY[1:]))
    with pytest.raises(UserError, match=r"vocab\.txt: no \[PAD\]"):
        convert_paddle(source, out, overrides=OTHER)
    (source / "vocab.txt").write_text("\n".join([*VOCABULARY, *"abcdef"]))
    with pytest.raises(UserError, match="15 tokens, but the word embeddings have 12 rows"):
        convert_paddle(source, out, overrides=OTHER)
    with pytest.raises(UserError, match="not a cross-encoder"):
        convert_paddle(write(source, arrays), out, kind="cross_encoder", overrides=OTHER)
    assert not out.exists()


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in", paddle_arrays(AutoModel.from_config(ernie())))
    file, out = str(source / "model_state.pdparams"), str(tmp_path / "out")
    options = ["--num_attention_heads", "4", "--hidden_act", "relu"]
    command = ["convert", "paddle", file, "--out", out, *options]
    assert main(command) == 0
    assert "3 layers, hidden 32, 4 heads, relu, vocabulary 12" in capsys.readouterr().out
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*command[:3], "--out", str(tmp_path / "o"), "--kind", "colbert"]) == 2
    assert "--kind colbert: dual_encoder or cross_encoder" in capsys.readouterr().err
