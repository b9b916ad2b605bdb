"""Model cards: what they state is what was trained, and their code gives our numbers."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support.finished_run import finished_run, retriever_of
from support.tiny import ConfigMaker

from erniesearch.cli import main
from erniesearch.config.keys import RunConfig
from erniesearch.config.yaml_file import from_dict, to_yaml
from erniesearch.export import export_all, write_cards
from erniesearch.retrieval.load import load_scorer
from erniesearch.run_folder import RunFolder, mark_done
from erniesearch.stages import fingerprint

KINDS = ("dual_encoder", "late_interaction", "cross_encoder")


def card(config: RunConfig, kind: str) -> str:
    return (RunFolder(config.run_dir).export(kind) / "README.md").read_text()


def front(text: str) -> dict[str, Any]:
    parts = text.split("---\n")
    assert parts[0] == ""
    content: dict[str, Any] = yaml.safe_load(parts[1])
    return content


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_cards_state_what_was_trained(make_config: ConfigMaker) -> None:
    config = finished_run(make_config)
    export_all(config)
    for kind in KINDS:
        text = card(config, kind)
        about = front(text)
        assert "license" not in about  # left to whoever publishes it
        assert "# license: none is set" in text
        assert "base_model" not in about  # a folder is no name on a hub
        assert f"| base model | `{config.student.path}` |" in text
        assert "| stages | cascade (4 updates) |" in text
        assert "| longest query in training | 8 tokens |" in text
        assert "| longest passage in training | 16 tokens |" in text
        assert "Not evaluated yet" in text
        assert "PATH" in blocks(text, "python")[0]
        assert from_dict(RunConfig, yaml.safe_load(blocks(text, "yaml")[0])) == config
    assert front(card(config, "late_interaction"))["library_name"] == "PyLate"
    assert front(card(config, "cross_encoder"))["pipeline_tag"] == "text-ranking"
    assert "`max_seq_length` is 16" in card(config, "dual_encoder")


def test_cards_say_which_layers_are_left(make_config: ConfigMaker) -> None:
    config = finished_run(make_config, layers=[1])
    export_all(config)
    base = f"| base model | `{config.student.path}`"
    for kind in ("dual_encoder", "late_interaction"):
        assert f"{base}, layers 1 of 0 to 1 |" in card(config, kind)
    assert f"{base} |" in card(config, "cross_encoder")
    write_cards(config, "Good.")
    assert f"{base}, layers 1 of 0 to 1 |" in card(config, "dual_encoder")


def test_a_hub_name_is_the_base_model(make_config: ConfigMaker) -> None:
    config = finished_run(make_config)
    export_all(config)
    named = replace(config, student=replace(config.student, path="nghuyong/ernie-2.0-base-en"))
    write_cards(named, "table")
    assert front(card(named, "cross_encoder"))["base_model"] == "nghuyong/ernie-2.0-base-en"
    assert "Not evaluated" not in card(named, "cross_encoder")


def test_untied_towers_say_which_they_are(make_config: ConfigMaker) -> None:
    config = finished_run(make_config, tied=False)
    export_all(config)
    text = card(config, "dual_encoder_passage")
    assert "dual-encoder, passage tower" in text
    assert "`dual_encoder_query` encodes queries" in text


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("normalize", [False, True])
def test_the_code_for_transformers_gives_our_numbers(
    make_config: ConfigMaker, pooling: str, normalize: bool
) -> None:
    config = finished_run(make_config, pooling=pooling, normalize=normalize)
    export_all(config)
    found = {}
    for kind in KINDS:
        folder = RunFolder(config.run_dir).export(kind)
        names: dict[str, Any] = {}
        exec(blocks(card(config, kind), "python")[1].replace("PATH", str(folder)), names)
        found[kind] = names
    ours = retriever_of(config)
    np.testing.assert_allclose(
        found["dual_encoder"]["vectors"].detach(), ours.vectors(["a query"], "query"), atol=1e-5
    )
    np.testing.assert_allclose(
        found["late_interaction"]["tokens"][0].detach(),
        ours.tokens(["a query"], "query")[0].float(), atol=1e-3,
    )  # fmt: skip
    scorer = load_scorer(RunFolder(config.run_dir).export("cross_encoder"))
    np.testing.assert_allclose(
        found["cross_encoder"]["scores"].detach(), scorer.scores(["a query"], ["a passage"]),
        atol=1e-5,
    )  # fmt: skip


def evaluation(root: Path) -> None:
    estimate = {"mean": 0.25, "low": 0.125, "high": 0.375}
    row = {"name": "dual-encoder, after cascade", "run_file": "runs/x.trec",
           "metrics": {"MRR@10": estimate}}  # fmt: skip
    content = {"dataset": "data", "split": "test", "num_queries": 4, "num_passages": 9,
               "rerank_depth": 10, "machine": {}, "stages": {}, "rows": [row]}  # fmt: skip
    (root / "evaluation.json").write_text(json.dumps(content))


def test_command_exports_with_results_of_these_models_only(
    make_config: ConfigMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    config = finished_run(make_config, num_processes=1)
    folder = RunFolder(config.run_dir)
    (folder.root / "config.yaml").write_text(to_yaml(config))
    assert main(["export", "--run", config.run_dir]) == 0
    assert [Path(x).name for x in capsys.readouterr().out.split()] == list(KINDS)
    assert "Not evaluated yet" in card(config, "dual_encoder")
    evaluation(folder.root)
    mark_done(folder.stage("evaluate"), fingerprint(config, "evaluate", 1))
    assert main(["export", "--run", config.run_dir]) == 0
    text = card(config, "dual_encoder")
    assert "| dual-encoder, after cascade | 0.250 [0.125, 0.375] |" in text
    assert "data, test: 4 queries, 9 passages" in text
    mark_done(folder.stage("evaluate"), "of other models")
    assert main(["export", "--run", config.run_dir]) == 0
    assert "Not evaluated yet" in card(config, "dual_encoder")


def test_nothing_to_export_is_one_line(
    make_config: ConfigMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "--run", str(tmp_path)]) == 2
    assert "config.yaml: no such file" in capsys.readouterr().err
    config = make_config(stage="cascade")
    Path(config.run_dir).mkdir()
    (Path(config.run_dir) / "config.yaml").write_text(to_yaml(config))
    assert main(["export", "--run", config.run_dir]) == 2
    error = capsys.readouterr().err
    assert "stage cascade is not trained yet" in error
    assert error.count("\n") == 1
