"""Exported folders: the files of each layout, and that other libraries reproduce our numbers."""

import importlib.util
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.finished_run import (
    LONG,
    TEXTS,
    content,
    finished_run,
    plain_states,
    retriever_of,
    write_teacher,
)
from support.tiny import ConfigMaker, write_model
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from erniesearch.config.keys import TeacherConfig
from erniesearch.config.stage_keys import LossWeights, StageConfig
from erniesearch.data.text_format import encode_texts
from erniesearch.errors import UserError
from erniesearch.export import export_all
from erniesearch.retrieval.retriever import PairScorer
from erniesearch.run_folder import RunFolder


def plain_vectors(folder: Path, texts: list[str]) -> np.ndarray:
    """The dual-encoder's vectors, following the exported pooling files."""
    states, mask = plain_states(folder, texts)
    pooling = content(folder, "1_Pooling/config.json")
    if pooling["pooling_mode_cls_token"]:
        pooled = states[:, 0]
    else:
        assert pooling["pooling_mode_mean_tokens"]
        pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    kinds = [module["type"].rsplit(".", 1)[1] for module in content(folder, "modules.json")]
    return (F.normalize(pooled, dim=-1) if "Normalize" in kinds else pooled).numpy()


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("normalize", [False, True])
def test_dual_encoder_gives_our_vectors(
    make_config: ConfigMaker, pooling: str, normalize: bool
) -> None:
    config = finished_run(make_config, pooling=pooling, normalize=normalize)
    folder = export_all(config)[0]
    assert folder == RunFolder(config.run_dir).export("dual_encoder")
    ours = retriever_of(config)
    vectors = plain_vectors(folder, [*TEXTS, LONG])
    assert np.abs(np.diff(vectors, axis=0)).max(1).min() > 1e-2  # not one vector for everything
    np.testing.assert_allclose(vectors, ours.vectors([*TEXTS, LONG], "passage"), atol=1e-5)
    np.testing.assert_allclose(
        plain_vectors(folder, TEXTS[:2]), ours.vectors(TEXTS[:2], "query"), atol=1e-5
    )


@pytest.mark.parametrize("normalize", [False, True])
def test_dual_encoder_has_the_files_of_sentence_transformers(
    make_config: ConfigMaker, normalize: bool
) -> None:
    config = finished_run(make_config, normalize=normalize)
    folder = export_all(config)[0]
    kinds = ["", "1_Pooling", "2_Normalize"][: 3 if normalize else 2]
    assert content(folder, "modules.json") == [
        {
            "idx": i, "name": str(i), "path": path,
            "type": "sentence_transformers.models."
            + {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}[path],
        }
        for i, path in enumerate(kinds)
    ]  # fmt: skip
    assert (folder / "2_Normalize").is_dir() == normalize
    assert content(folder, "sentence_bert_config.json")["max_seq_length"] == 16
    settings = content(folder, "config_sentence_transformers.json")
    assert settings["model_type"] == "SentenceTransformer"
    assert settings["similarity_fn_name"] == ("cosine" if normalize else "dot")
    assert settings["prompts"] == {"query": "", "document": ""}
    assert settings["default_prompt_name"] is None
    assert int(settings["__version__"]["sentence_transformers"].split(".")[0]) <= 5
    pooling = content(folder, "1_Pooling/config.json")
    assert pooling["word_embedding_dimension"] == 32
    chosen = [key for key, value in pooling.items() if key.startswith("pooling_mode") and value]
    assert chosen == ["pooling_mode_cls_token"]
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not {"late_interaction.safetensors", "passage_tower"} & names


def test_late_interaction_gives_our_token_vectors(make_config: ConfigMaker) -> None:
    config = finished_run(make_config)
    folder = RunFolder(config.run_dir).export("late_interaction")
    assert folder in export_all(config)
    states, mask = plain_states(folder, [*TEXTS, LONG])
    weights = load_file(folder / "1_Dense" / "model.safetensors")
    assert list(weights) == ["linear.weight"]
    theirs = F.normalize(states @ weights["linear.weight"].T, dim=-1)
    ours = retriever_of(config)
    ids, own_mask = encode_texts(ours.tokenizer, [*TEXTS, LONG], config.data.max_passage_length)
    assert torch.equal(own_mask, mask.bool())
    with torch.inference_mode():
        tokens = ours.student(ids, own_mask, "passage").tokens
    torch.testing.assert_close(theirs[own_mask], tokens[own_mask], atol=1e-5, rtol=0)


def test_late_interaction_has_the_files_of_pylate(make_config: ConfigMaker) -> None:
    config = finished_run(make_config)
    export_all(config)
    folder = RunFolder(config.run_dir).export("late_interaction")
    assert [module["type"] for module in content(folder, "modules.json")] == [
        "sentence_transformers.models.Transformer", "pylate.models.Dense.Dense",
    ]  # fmt: skip
    assert [module["path"] for module in content(folder, "modules.json")] == ["", "1_Dense"]
    assert content(folder, "1_Dense/config.json") == {
        "in_features": 32, "out_features": 16, "bias": False,
        "activation_function": "torch.nn.modules.linear.Identity", "use_residual": False,
    }  # fmt: skip
    settings = content(folder, "config_sentence_transformers.json")
    assert (settings["model_type"], settings["similarity_fn_name"]) == ("ColBERT", "MaxSim")
    assert (settings["query_length"], settings["document_length"]) == (8, 16)
    assert (settings["query_prefix"], settings["document_prefix"]) == ("", "")
    assert settings["skiplist_words"] == []
    assert not settings["attend_to_expansion_tokens"]
    assert not settings["do_query_expansion"]


def test_cross_encoder_gives_our_scores(make_config: ConfigMaker) -> None:
    config = finished_run(make_config)
    folder = RunFolder(config.run_dir).export("cross_encoder")
    assert folder in export_all(config)
    settings = content(folder, "config.json")
    assert settings["architectures"] == ["BertForSequenceClassification"]
    # Without it sentence-transformers' predict() applies a sigmoid.
    assert settings["sentence_transformers"]["activation_fn"] == "torch.nn.modules.linear.Identity"
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert model.config.num_labels == 1
    queries, passages = TEXTS[:3], TEXTS[1:]
    inputs = AutoTokenizer.from_pretrained(folder)(
        queries, passages, padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        theirs = model(**inputs).logits[:, 0].numpy()
    path = str(RunFolder(config.run_dir).model("cascade", "teacher"))
    ours = PairScorer(TeacherConfig(path), 8, 16, device=torch.device("cpu"))
    np.testing.assert_allclose(theirs, ours.scores(queries, passages), atol=1e-5)
    assert np.ptp(theirs) > 1e-2  # not one score for everything


def test_untied_towers_give_two_folders(make_config: ConfigMaker) -> None:
    config = finished_run(make_config, tied=False)
    written = [path.name for path in export_all(config)]
    assert sorted(written) == [
        "cross_encoder", "dual_encoder_passage", "dual_encoder_query",
        "late_interaction_passage", "late_interaction_query",
    ]  # fmt: skip
    ours, exports = retriever_of(config), RunFolder(config.run_dir).root / "exports"
    vectors = {side: plain_vectors(exports / f"dual_encoder_{side}", TEXTS[:2])
               for side in ("query", "passage")}  # fmt: skip
    np.testing.assert_allclose(vectors["query"], ours.vectors(TEXTS[:2], "query"), atol=1e-5)
    np.testing.assert_allclose(vectors["passage"], ours.vectors(TEXTS[:2], "passage"), atol=1e-5)
    assert np.abs(vectors["query"] - vectors["passage"]).max() > 1e-2
    heads = [exports / f"late_interaction_{side}" / "1_Dense" / "model.safetensors"
             for side in ("query", "passage")]  # fmt: skip
    assert heads[0].read_bytes() == heads[1].read_bytes()


def test_exporting_again_replaces_the_folders(make_config: ConfigMaker) -> None:
    config = finished_run(make_config)
    first = export_all(config)
    (first[0] / "left-over").write_text("")
    before = plain_vectors(first[0], TEXTS)
    student = RunFolder(config.run_dir).model("cascade", "student")
    write_model(student, seed=9)
    assert export_all(config) == first
    assert not (first[0] / "left-over").exists()
    assert np.abs(plain_vectors(first[0], TEXTS) - before).max() > 1e-2
    names = {path.name for path in (Path(config.run_dir) / "exports").iterdir()}
    assert names == {"dual_encoder", "late_interaction", "cross_encoder"}  # nothing left aside


def test_teacher_alone_is_exported_alone(make_config: ConfigMaker) -> None:
    config = make_config(stage="teacher", weights=LossWeights(ce=1.0))
    write_teacher(RunFolder(config.run_dir).model("teacher", "teacher"), Path(config.student.path))
    assert [path.name for path in export_all(config)] == ["cross_encoder"]


def test_a_stage_that_is_not_trained_yet_is_named(make_config: ConfigMaker) -> None:
    config = make_config(stage="cascade")
    with pytest.raises(UserError, match="nothing to export: stage cascade is not trained yet"):
        export_all(config)
    nothing = replace(config.stages, cascade=StageConfig())
    with pytest.raises(UserError, match="no stage with steps above 0"):
        export_all(replace(config, stages=nothing))


@pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None,
    reason="sentence-transformers is not installed (it is no dependency)",
)
@pytest.mark.parametrize("normalize", [False, True])
def test_sentence_transformers_gives_our_numbers(make_config: ConfigMaker, normalize: bool) -> None:
    from sentence_transformers import CrossEncoder as TheirCrossEncoder
    from sentence_transformers import SentenceTransformer

    config = finished_run(make_config, pooling="mean", normalize=normalize)
    export_all(config)
    folder = RunFolder(config.run_dir)
    theirs = SentenceTransformer(str(folder.export("dual_encoder")), device="cpu")
    vectors = theirs.encode([*TEXTS, LONG])
    np.testing.assert_allclose(
        vectors, retriever_of(config).vectors([*TEXTS, LONG], "passage"), atol=1e-5
    )
    pairs = list(itertools.pairwise(TEXTS))
    scores = TheirCrossEncoder(str(folder.export("cross_encoder")), device="cpu").predict(pairs)
    path = str(folder.model("cascade", "teacher"))
    ours = PairScorer(TeacherConfig(path), 8, 16, device=torch.device("cpu"))
    np.testing.assert_allclose(scores, ours.scores(*map(list, zip(*pairs, strict=True))), atol=1e-5)
