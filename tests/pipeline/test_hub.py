"""push: what arrives at a stand-in of the hub is the export folder, with results in its card; every
mistake is one line."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from support.finished_run import finished_run
from support.hub import Hub, running_hub
from support.processes import run_python
from support.tiny import ConfigMaker

from erniesearch.config.yaml_file import to_yaml
from erniesearch.evaluation.measures import Estimate
from erniesearch.evaluation.table import Report, Row
from erniesearch.export import export_all

TOKEN = "hf_stand_in"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub(TOKEN) as running:
        yield running


@pytest.fixture
def run_dir(make_config: ConfigMaker, tmp_path: Path) -> Path:
    """A run with exports and the evaluation that their cards show."""
    config = finished_run(make_config)
    root = Path(config.run_dir)
    (root / "config.yaml").write_text(to_yaml(config))

    def row(name: str, file: str, mean: float) -> Row:
        names = ("MRR@10", "nDCG@10", "R@100")
        return Row(name, f"runs/{file}.trec", {n: Estimate(mean, mean / 2, 0.9) for n in names})

    report = Report(
        "my set", "test", 40, 60, 10, {}, {}, [
            row("BM25", "bm25", 0.1), row("dual-encoder", "dual_encoder-untrained", 0.2),
            row("dual-encoder, after cascade", "dual_encoder-cascade", 0.375),
            row("late interaction, reranking", "late_interaction", 0.5),
        ],
    )  # fmt: skip
    report.save(root)
    export_all(config, results=report.for_card())
    return root


def push(hub: Hub | None, *arguments: str, **environment: str) -> tuple[int, str]:
    """``erniesearch push …`` in a process of its own: the hub's settings are read at import."""
    settings = {
        "HF_ENDPOINT": hub.endpoint if hub else "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }  # fmt: skip
    return run_python("-m", "erniesearch.cli", "push", *arguments, **(settings | environment))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}  # fmt: skip


def test_the_folder_arrives_with_results_in_its_card(hub: Hub, run_dir: Path) -> None:
    common = ("--run", str(run_dir), "--repo", "me/tiny", "--license", "apache-2.0")
    status, output = push(hub, *common, "--private", "--message", "First try")
    assert status == 0, output[-2000:]
    repository = hub.repositories["me/tiny"]
    assert repository.private
    assert repository.messages == ["First try"]
    assert f"{hub.endpoint}/me/tiny/commit/" in output
    sent = repository.branches["main"]
    exported = files_of(run_dir / "exports" / "dual_encoder")
    assert sent.keys() == exported.keys()
    assert "1_Pooling/config.json" in sent
    for name, content in exported.items():
        assert name == "README.md" or sent[name] == content, name
    assert hub.requests.count("PUT large file") == 1  # the weights
    card = ModelCard(sent["README.md"].decode())
    assert card.data.license == "apache-2.0"
    assert card.data.model_name == "tiny"
    found = {result.metric_type: result for result in card.data.eval_results}
    assert {name: result.metric_value for name, result in found.items()} == {
        "mrr_at_10": 0.375, "ndcg_at_10": 0.375, "recall_at_100": 0.375,
    }  # fmt: skip
    result = found["mrr_at_10"]
    assert (result.dataset_name, result.dataset_type, result.dataset_split) == (
        "my set", "my-set", "test",
    )  # fmt: skip
    assert result.metric_args["interval_95"] == [0.1875, 0.9]
    assert ModelCard.load(run_dir / "exports" / "dual_encoder" / "README.md").text == card.text
    # Again, another model on a branch: the repository is there already.
    status, output = push(hub, *common[:4], "--export", "late_interaction", "--revision", "late")
    assert status == 0, output[-2000:]
    assert repository.branches["main"] == sent
    late = ModelCard(repository.branches["late"]["README.md"].decode())
    assert {result.metric_value for result in late.data.eval_results} == {0.5}
    assert "reranking the dual-encoder's top 10" in late.data.eval_results[0].task_name


def test_a_dry_run_lists_and_sends_nothing(hub: Hub, run_dir: Path) -> None:
    status, output = push(hub, "--run", str(run_dir), "--repo", "me/tiny", "--dry_run", HF_TOKEN="",
                          HF_HUB_OFFLINE="1")  # fmt: skip
    assert status == 0, output[-2000:]
    assert hub.requests == []
    listed = {line.split()[1]: int(line.split()[0].replace(",", ""))
              for line in output.splitlines() if "  " in line.strip()}  # fmt: skip
    exported = files_of(run_dir / "exports" / "dual_encoder")
    assert listed.keys() == exported.keys()
    assert listed["model.safetensors"] == len(exported["model.safetensors"])
    assert "3 results in the card; nothing is sent" in output


def test_results_of_other_models_are_left_out(
    hub: Hub, run_dir: Path, make_config: ConfigMaker
) -> None:
    export_all(make_config(run_dir=run_dir))  # trained and exported anew, not evaluated
    status, output = push(hub, "--run", str(run_dir), "--repo", "me/tiny")
    assert status == 0, output[-2000:]
    card = ModelCard(hub.repositories["me/tiny"].branches["main"]["README.md"].decode())
    assert not card.data.eval_results
    assert "the run has not evaluated these models" in output


def one_line(status: int, output: str) -> str:
    assert status == 2, output
    lines = [line for line in output.splitlines() if "error:" in line]
    assert len(lines) == 1, output
    assert "Traceback" not in output
    return lines[0]


def test_mistakes_are_one_line(hub: Hub, run_dir: Path, tmp_path: Path) -> None:
    common = ("--run", str(run_dir), "--repo", "me/tiny")
    nowhere = {"HF_TOKEN": "", "HF_HOME": str(tmp_path)}
    assert "no token of the hub: `hf auth login`" in one_line(*push(hub, *common, **nowhere))
    assert "HF_HUB_OFFLINE is set" in one_line(*push(hub, *common, HF_HUB_OFFLINE="1"))
    assert "answers 401 about me/tiny" in one_line(*push(hub, *common, HF_TOKEN="hf_wrong"))
    assert hub.repositories == {}
    hub.refuses["/commit/"] = 403
    assert "answers 403 about me/tiny" in one_line(*push(hub, *common))
    assert "cannot be pushed to http://127.0.0.1:9" in one_line(*push(None, *common))
    for arguments, problem in (
        (("--run", str(tmp_path), "--repo", "me/tiny"), "config.yaml: no such file"),
        ((*common, "--export", "dual"), "there are cross_encoder, dual_encoder, late_interaction"),
        (("--run", str(run_dir), "--repo", "tiny"), "OWNER/NAME"),
        (("--run", str(run_dir), "--repo", "me/ti ny"), "--repo me/ti ny: "),
    ):
        assert problem in one_line(*push(hub, *arguments)), arguments
