"""Every script in examples/ runs, on a tiny random model over single characters, and leaves what it
says."""

import json
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.finished_run import write_run
from support.processes import ROOT, TWO_RANKS, losses_of, run_python, start
from support.tiny import ALL_TERMS, write_model

from erniesearch import load_config
from erniesearch.config.yaml_file import to_yaml
from erniesearch.export import export_all

EXAMPLES = ROOT / "examples"
SCRIPTS = {path.stem for path in EXAMPLES.glob("*.py")} - {"standard_library"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    words = [*letters, *("##" + letter for letter in letters)]
    folder = tmp_path_factory.mktemp("letters")
    return str(write_model(folder, words=words, max_position_embeddings=192))


def run(name: str, *arguments: str) -> str:
    """In a process of its own, as a training leaves a process group; what it printed."""
    status, output = run_python(str(EXAMPLES / f"{name}.py"), *arguments)
    assert status == 0, output[-3000:]
    return output


def test_each_script_has_a_test() -> None:
    text = Path(__file__).read_text()
    assert len(SCRIPTS) >= 6
    assert not {name for name in SCRIPTS if f'"{name}' not in text}


def test_datasets_in_memory(model: str, tmp_path: Path) -> None:
    assert "(1, 32)" in run("datasets_in_memory", model, str(tmp_path / "run"))
    stage = tmp_path / "run" / "stages" / "interaction"
    lines = losses_of(stage)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert all(line["li"] > 0 and line["de"] > 0 for line in lines)
    validated = (stage / "validation.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in validated] == [4, 8]
    for kind in ("dual_encoder", "late_interaction"):
        assert (tmp_path / "run" / "exports" / kind / "model.safetensors").is_file()


def test_corpus_in_memory(model: str, tmp_path: Path) -> None:
    run("corpus_in_memory", model, str(tmp_path / "run"))
    stage = tmp_path / "run" / "stages" / "contrastive"
    assert (stage / "model" / "student" / "model.safetensors").is_file()
    assert (tmp_path / "run" / "data" / "qrels" / "dev.tsv").is_file()


def test_own_loss_term(model: str, tmp_path: Path) -> None:
    run("own_loss_term", model, str(tmp_path / "run"))
    for line in losses_of(tmp_path / "run" / "stages" / "contrastive"):
        assert line["hinge"] > 0
        assert line["loss"] == pytest.approx(line["de"] + 0.5 * line["hinge"], rel=1e-5)


@pytest.mark.distributed
def test_a_script_on_two_ranks(model: str, tmp_path: Path) -> None:
    """The same script under a launcher: both ranks make the collection, one is written."""
    script, name = str(EXAMPLES / "own_loss_term.py"), "contrastive"
    status, output = run_python(*TWO_RANKS, script, model, str(tmp_path / "two"))
    assert status == 0, output[-3000:]
    lines = losses_of(tmp_path / "two" / "stages" / name)
    assert [line["step"] for line in lines] == list(range(1, 7))
    done = json.loads((tmp_path / "two" / "stages" / name / "done.json").read_text())
    assert done["world_size"] == 2


def test_stop_early(model: str, tmp_path: Path) -> None:
    output = run("stop_early", model, str(tmp_path / "run"))
    assert "contrastive ended after update 3 of 40" in output
    done = json.loads((tmp_path / "run" / "stages" / "contrastive" / "done.json").read_text())
    assert (done["steps"], done["stopped"]) == (3, "EarlyStopping")


def test_load_and_search(tiny_data: Path, tiny_model: Path, tmp_path: Path) -> None:
    export_all(write_run(tmp_path / "run", tiny_data, tiny_model, ALL_TERMS))
    lines = run("load_and_search", str(tmp_path / "run"), "baran desel").splitlines()
    assert len(lines) == 5
    assert "cross_encoder" in lines[0]
    assert lines[3].startswith("dual-encoder [[")
    assert lines[4].startswith("cross-encoder [")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_run_pipeline(tiny_data: Path, tmp_path: Path) -> None:
    """It is the Python of the READMEs, which test_readme.py compares with it."""
    corpus, queries = (
        dict(load_texts(tiny_data / f"{name}.jsonl")) for name in ("corpus", "queries")
    )
    judged = (tiny_data / "qrels" / "train.tsv").read_text().splitlines()[1:]
    found = [line.split("\t") for line in judged]
    lines = [json.dumps({"query": queries[q], "positive": corpus[p]}) for q, p, _ in found]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    short: dict[str, Any] = {"steps": 2, "queries_per_rank": 4, "chunk_size": None}
    config = load_config(
        "quickstart",
        {"student.path": str(write_model(tmp_path / "model", max_position_embeddings=192)),
         "student.layers": None, "data.path": "", "stages.mine.depth": 20},
        stages={name: short for name in ("contrastive", "interaction", "teacher", "cascade")},
        training={"num_processes": 1},
        evaluation={"max_queries": None, "num_distractors": None},
    )  # fmt: skip
    (tmp_path / "my.yaml").write_text(to_yaml(config))
    process = start(str(EXAMPLES / "run_pipeline.py"), cwd=tmp_path)
    output, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, output[-3000:]
    assert "dual-encoder, after cascade" in output
    assert len([line for line in output.splitlines() if "'dual_encoder': " in line]) == 3


def load_texts(path: Path) -> Iterator[tuple[str, str]]:
    """Id and text of every line."""
    for line in path.read_text().splitlines():
        row = json.loads(line)
        yield row["_id"], row["text"]
