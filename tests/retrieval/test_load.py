"""Model folders: everything a model needs to encode as in training is read from the folder."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.finished_run import LONG, TEXTS, finished_run, retriever_of
from support.tiny import ConfigMaker, write_model

from erniesearch.config.keys import RunConfig, TeacherConfig
from erniesearch.config.yaml_file import to_yaml
from erniesearch.errors import UserError
from erniesearch.export import export_all
from erniesearch.retrieval.load import load_retriever, load_scorer
from erniesearch.retrieval.model_folder import read_folder
from erniesearch.retrieval.retriever import PairScorer
from erniesearch.run_folder import RunFolder

CPU = torch.device("cpu")


def exported(make_config: ConfigMaker, **changes: Any) -> tuple[RunConfig, Path]:
    config = finished_run(make_config, **changes)
    export_all(config)
    return config, RunFolder(config.run_dir).root / "exports"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("normalize", [False, True])
def test_dual_encoder_pools_and_normalises_as_trained(
    make_config: ConfigMaker, pooling: str, normalize: bool
) -> None:
    config, exports = exported(make_config, pooling=pooling, normalize=normalize)
    ours = load_retriever(exports / "dual_encoder", device=CPU)
    expected = retriever_of(config).vectors([*TEXTS, LONG], "passage")
    np.testing.assert_allclose(ours.vectors([*TEXTS, LONG], "passage"), expected, atol=1e-6)
    assert ours.lengths == {"query": 16, "passage": 16}  # a dual-encoder's layout has one length
    shorter = load_retriever(exports / "dual_encoder", device=CPU, max_query_length=8)
    expected = retriever_of(config).vectors([LONG], "query")
    np.testing.assert_allclose(shorter.vectors([LONG], "query"), expected, atol=1e-6)
    assert np.abs(shorter.vectors([LONG], "passage") - expected).max() > 1e-3


@pytest.mark.parametrize("similarity", ["cosine", "dot", None])
def test_similarity_is_the_folders(make_config: ConfigMaker, similarity: str | None) -> None:
    """Without a module that normalises: cosine does, and so it does where none is named."""
    _, exports = exported(make_config, normalize=False)
    about = exports / "dual_encoder" / "config_sentence_transformers.json"
    edit(about, similarity_fn_name=similarity)
    vectors = load_retriever(exports / "dual_encoder", device=CPU).vectors(TEXTS, "passage")
    unit = np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert unit == (similarity != "dot")


def test_late_interaction_has_its_head_and_lengths(make_config: ConfigMaker) -> None:
    config, exports = exported(make_config)
    found = read_folder(exports / "late_interaction")
    assert (found.kind, found.has_tokens, found.has_vectors) == ("late_interaction", True, False)
    ours = load_retriever(exports / "late_interaction", device=CPU)
    for side in ("query", "passage"):
        for own, theirs in zip(ours.tokens([*TEXTS, LONG], side),
                               retriever_of(config).tokens([*TEXTS, LONG], side),
                               strict=True):  # fmt: skip
            torch.testing.assert_close(own, theirs, atol=1e-3, rtol=0)


def test_cross_encoder_scores_as_trained(make_config: ConfigMaker) -> None:
    config, exports = exported(make_config)
    path = str(RunFolder(config.run_dir).model("cascade", "teacher"))
    expected = PairScorer(TeacherConfig(path), 8, 16, device=CPU)
    ours = load_scorer(exports / "cross_encoder", device=CPU)
    assert ours.lengths == (8, 16)
    queries, passages = [*TEXTS, LONG], [LONG, *TEXTS]
    np.testing.assert_allclose(
        ours.scores(queries, passages), expected.scores(queries, passages), atol=1e-6
    )
    foreign = exports / "cross_encoder" / "config.json"
    edit(foreign, erniesearch={})
    assert load_scorer(exports / "cross_encoder", device=CPU).lengths == (16, 48)  # 64 positions


def test_stage_model_is_told_by_its_run(make_config: ConfigMaker) -> None:
    config = finished_run(make_config, pooling="mean", normalize=True)
    run = RunFolder(config.run_dir)
    (run.root / "config.yaml").write_text(to_yaml(config))
    path = run.model("cascade", "student")
    found = read_folder(path)
    assert (found.kind, found.lengths) == ("student", {"query": 8, "passage": 16})
    ours, expected = load_retriever(path, device=CPU), retriever_of(config)
    np.testing.assert_array_equal(
        ours.vectors([LONG, *TEXTS], "query"), expected.vectors([LONG, *TEXTS], "query")
    )
    assert torch.equal(ours.tokens(TEXTS, "query")[0], expected.tokens(TEXTS, "query")[0])
    assert load_scorer(run.model("cascade", "teacher"), device=CPU).lengths == (8, 16)


def test_untied_towers_load_together_and_alone(make_config: ConfigMaker) -> None:
    config, exports = exported(make_config, tied=False)
    expected = retriever_of(config)
    both = load_retriever(exports / "dual_encoder", device=CPU)
    late = load_retriever(exports / "late_interaction", device=CPU)
    for side in ("query", "passage"):
        wanted = expected.vectors(TEXTS, side)
        np.testing.assert_allclose(both.vectors(TEXTS, side), wanted, atol=1e-6)
        alone = load_retriever(exports / f"dual_encoder_{side}", device=CPU)
        np.testing.assert_allclose(alone.vectors(TEXTS, side), wanted, atol=1e-6)
        torch.testing.assert_close(
            late.tokens(TEXTS, side)[0], expected.tokens(TEXTS, side)[0], atol=1e-3, rtol=0
        )
    with pytest.raises(UserError, match="is the query tower of an untied model"):
        load_retriever(exports / "dual_encoder_query", device=CPU).vectors(TEXTS, "passage")


def test_prompts_stand_before_the_text(make_config: ConfigMaker) -> None:
    _, exports = exported(make_config)
    plain = load_retriever(exports / "dual_encoder", device=CPU)
    about = exports / "dual_encoder" / "config_sentence_transformers.json"
    edit(about, prompts={"query": "baran ", "passage": "desel "})
    prompted = load_retriever(exports / "dual_encoder", device=CPU)
    for side, word in (("query", "baran "), ("passage", "desel ")):
        np.testing.assert_array_equal(
            prompted.vectors(["fitor"], side), plain.vectors([word + "fitor"], side)
        )


def test_a_runs_prompts_leave_with_its_exports(make_config: ConfigMaker, tmp_path: Path) -> None:
    config, exports = exported(
        make_config, pooling="mean", query_prompt="baran ", passage_prompt="desel "
    )
    trained = retriever_of(config)
    dual = load_retriever(exports / "dual_encoder", device=CPU, max_query_length=8)
    late = load_retriever(exports / "late_interaction", device=CPU)
    bare = retriever_of(finished_run(make_config, run_dir=tmp_path / "bare", pooling="mean"))
    for side, word in (("query", "baran "), ("passage", "desel ")):
        expected = trained.vectors([*TEXTS, LONG], side)
        np.testing.assert_allclose(dual.vectors([*TEXTS, LONG], side), expected, atol=1e-6)
        prompted = [word + text for text in (*TEXTS, LONG)]
        np.testing.assert_allclose(bare.vectors(prompted, side), expected, atol=1e-6)
        torch.testing.assert_close(
            late.tokens([LONG], side), trained.tokens([LONG], side), atol=1e-3, rtol=0
        )
    said = json.loads((exports / "dual_encoder" / "config_sentence_transformers.json").read_text())
    assert said["prompts"] == {"query": "baran ", "document": "desel "}
    assert 'encode_query(["a query"]' in (exports / "dual_encoder" / "README.md").read_text()
    card = (exports / "late_interaction" / "README.md").read_text()
    assert 'is_query=True, prompt_name="query"' in card


def test_bf16_is_close_and_not_equal(make_config: ConfigMaker) -> None:
    config, exports = exported(make_config, normalize=True)
    exact = retriever_of(config).vectors(TEXTS, "query")
    rough = load_retriever(exports / "dual_encoder", device=CPU, precision="bf16")
    difference = np.abs(rough.vectors(TEXTS, "query") - exact).max()
    assert 0 < difference < 0.1


def test_plain_encoder_needs_a_pooling(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "plain")
    with pytest.raises(UserError, match="nothing says how it pools; --pooling cls or"):
        read_folder(folder)
    assert load_retriever(folder, pooling="mean", device=CPU).lengths["passage"] == 64
    with pytest.raises(UserError, match="a passage of 65 tokens; from 3 to 64"):
        load_retriever(folder, pooling="mean", device=CPU, max_passage_length=65)


@pytest.mark.parametrize(
    ("file", "changes", "problem"),
    [
        ("late_interaction/1_Dense/config.json", {"use_residual": True}, "is linear here"),
        ("dual_encoder/1_Pooling/config.json", {"pooling_mode_max_tokens": True},
         "readable: cls or mean"),
        ("dual_encoder/sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case"),
        ("dual_encoder/config_sentence_transformers.json", {"similarity_fn_name": "euclidean"},
         "similarity_fn_name is 'euclidean'"),
        ("cross_encoder/config.json", {"id2label": {"0": "a", "1": "b"}}, "2 labels"),
    ],
)  # fmt: skip
def test_what_is_not_built_here_is_refused(
    make_config: ConfigMaker,
    file: str,
    changes: dict[str, Any],
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # it would run some of them
    _, exports = exported(make_config)
    edit(exports / file, **changes)
    with pytest.raises(UserError, match=problem):
        load_retriever(exports / Path(file).parts[0])


def test_folders_that_hold_something_else_are_refused(
    make_config: ConfigMaker, tmp_path: Path
) -> None:
    _, exports = exported(make_config)
    with pytest.raises(UserError, match="is a cross-encoder"):
        load_retriever(exports / "cross_encoder")
    with pytest.raises(UserError, match="is no cross-encoder"):
        load_scorer(exports / "dual_encoder")
    with pytest.raises(UserError, match="no such folder"):
        read_folder(tmp_path / "absent")
    (exports / "dual_encoder" / "modules.json").write_text('[{"type": "a.Transformer"}]')
    with pytest.raises(UserError, match="expected objects with type and path"):
        read_folder(exports / "dual_encoder")
    (exports / "late_interaction" / "modules.json").write_text("{")
    with pytest.raises(UserError, match=r"modules.json: not readable as JSON"):
        read_folder(exports / "late_interaction")


def test_towers_that_do_not_belong_together_are_refused(make_config: ConfigMaker) -> None:
    _, exports = exported(make_config, tied=False)
    pooling = exports / "dual_encoder_passage" / "1_Pooling" / "config.json"
    edit(pooling, pooling_mode_cls_token=False, pooling_mode_mean_tokens=True)
    with pytest.raises(UserError, match="differ in pooling"):
        read_folder(exports / "dual_encoder")
    assert replace(read_folder(exports / "dual_encoder_passage"), only=None).kind == "dual_encoder"
