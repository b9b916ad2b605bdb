"""push: what arrives at a stand-in of the hub is the export folder, with results in its card; every
mistake is one line."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, constants
from support.finished_run import finished_run
from support.hub import Hub, running_hub
from support.processes import run_python
from support.tiny import ConfigMaker

from erniesearch.cli import main
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


Push = Callable[..., tuple[int, str]]


@pytest.fixture
def push(hub: Hub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Push:
    """``erniesearch push …`` here, with the hub's settings, which are otherwise read at import;
    keywords are further ones."""

    def run(*arguments: str, token: str = TOKEN, **settings: Any) -> tuple[int, str]:
        monkeypatch.setenv("HF_TOKEN", token)
        online = {"ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
        for name, value in (online | settings).items():
            monkeypatch.setattr(constants, name, value)
        capfd.readouterr()
        status = main(["push", *arguments])
        return status, "".join(capfd.readouterr())

    return run


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}  # fmt: skip


def test_the_folder_arrives_with_results_in_its_card(hub: Hub, push: Push, run_dir: Path) -> None:
    common = ("--run", str(run_dir), "--repo", "me/tiny", "--license", "apache-2.0")
    status, output = run_python(
        "-m", "erniesearch.cli", "push", *common, "--private", "--message", "First try",
        HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE="0", HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1",
    )  # fmt: skip
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
    status, output = push(*common[:4], "--export", "late_interaction", "--revision", "late")
    assert status == 0, output[-2000:]
    assert repository.branches["main"] == sent
    late = ModelCard(repository.branches["late"]["README.md"].decode())
    assert {result.metric_value for result in late.data.eval_results} == {0.5}
    assert "reranking the dual-encoder's top 10" in late.data.eval_results[0].task_name


def test_a_dry_run_lists_and_sends_nothing(hub: Hub, push: Push, run_dir: Path) -> None:
    status, output = push(
        "--run", str(run_dir), "--repo", "me/tiny", "--dry_run", token="", HF_HUB_OFFLINE=True
    )
    assert status == 0, output[-2000:]
    assert hub.requests == []
    listed = {line.split()[1]: int(line.split()[0].replace(",", ""))
              for line in output.splitlines() if "  " in line.strip()}  # fmt: skip
    exported = files_of(run_dir / "exports" / "dual_encoder")
    assert listed.keys() == exported.keys()
    assert listed["model.safetensors"] == len(exported["model.safetensors"])
    assert "3 results in the card; nothing is sent" in output


def test_results_of_other_models_are_left_out(
    hub: Hub, push: Push, run_dir: Path, make_config: ConfigMaker
) -> None:
    export_all(make_config(run_dir=run_dir))  # trained and exported anew, not evaluated
    status, output = push("--run", str(run_dir), "--repo", "me/tiny")
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


def test_mistakes_are_one_line(hub: Hub, push: Push, run_dir: Path, tmp_path: Path) -> None:
    common = ("--run", str(run_dir), "--repo", "me/tiny")
    nobody = {"token": "", "HF_TOKEN_PATH": str(tmp_path / "none")}
    assert "no token of the hub: `hf auth login`" in one_line(*push(*common, **nobody))
    assert "HF_HUB_OFFLINE is set" in one_line(*push(*common, HF_HUB_OFFLINE=True))
    assert "answers 401 about me/tiny" in one_line(*push(*common, token="hf_wrong"))
    assert hub.repositories == {}
    hub.refuses["/commit/"] = 403
    assert "answers 403 about me/tiny" in one_line(*push(*common))
    closed = "http://127.0.0.1:9"
    assert f"cannot be pushed to {closed}" in one_line(*push(*common, ENDPOINT=closed))
    for arguments, problem in (
        (("--run", str(tmp_path), "--repo", "me/tiny"), "config.yaml: no such file"),
        ((*common, "--export", "dual"), "there are cross_encoder, dual_encoder, late_interaction"),
        (("--run", str(run_dir), "--repo", "tiny"), "OWNER/NAME"),
        (("--run", str(run_dir), "--repo", "me/ti ny"), "--repo me/ti ny: "),
    ):
        assert problem in one_line(*push(*arguments)), arguments
