"""Search and service with models that no run made."""

import sys
import types
from pathlib import Path

import pytest
from support.finished_run import write_run
from support.stand_in import Stand, write_pooled_by_max
from support.tiny import ALL_TERMS

from erniesearch.cli import main
from erniesearch.config.options import SystemOptions
from erniesearch.errors import UserError
from erniesearch.search.from_models import open_system
from erniesearch.search.result import MODELS
from erniesearch.search.system import SearchSystem

QUERY = "baran desel fitor"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, tiny_model: Path) -> Path:
    """A run, and an index of its student's vectors and one of its token vectors beside it."""
    folder = tmp_path_factory.mktemp("models")
    write_run(folder / "run", tiny_data, tiny_model, ALL_TERMS)
    for what in ("vectors", "tokens"):
        arguments = ["--model", student(folder), "--data", str(tiny_data), "--what", what,
                     "--precision", "fp32", "--dtype", "fp32"]  # fmt: skip
        assert main(["encode", *arguments, "--out", str(folder / f"e-{what}")]) == 0
        arguments = ["--embeddings", str(folder / f"e-{what}"), "--out", str(folder / what)]
        assert main(["index", *arguments]) == 0
    return folder


def student(root: Path) -> str:
    return str(root / "run/stages/cascade/model/student")


def teacher(root: Path) -> str:
    return str(root / "run/stages/cascade/model/teacher")


def test_a_runs_models_by_their_folders_search_as_the_run(root: Path, tiny_data: Path) -> None:
    options = SystemOptions(
        model=student(root), index=str(root / "vectors"), data=str(tiny_data),
        rerankers=[student(root), teacher(root)], precision="fp32",
    )  # fmt: skip
    system, run = open_system(options), SearchSystem.from_run(root / "run")
    assert system.models == run.models == MODELS
    ours, theirs = (each.search(QUERY, 60, 40, 15) for each in (system, run))
    for model in MODELS:
        found, expected = ({hit.pid: hit.scores[model] for hit in each.rankings[model]}
                           for each in (ours, theirs))  # fmt: skip
        assert found == pytest.approx(expected, abs=2e-3), model
    assert system.explain(QUERY, ours.hits[0].pid)


def test_an_index_of_token_vectors_is_searched_by_late_interaction(
    root: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["--model", student(root), "--index", str(root / "tokens"), "--data", str(tiny_data)]
    assert main(["search", QUERY, *own, "--rerankers", teacher(root)]) == 0
    told = capsys.readouterr().out
    assert "late-interaction" in told
    assert "cross-encoder" in told
    assert "dual-encoder" not in told


def test_what_sentence_transformers_runs_is_searched_with(
    root: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("sentence_transformers")
    module.__dict__.update(__version__="6.2.0", SentenceTransformer=Stand)
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    folder = str(write_pooled_by_max(tmp_path / "max"))
    arguments = ["--model", folder, "--data", str(tiny_data), "--out", str(tmp_path / "e")]
    assert main(["encode", *arguments]) == 0
    index = str(tmp_path / "index")
    assert main(["index", "--embeddings", str(tmp_path / "e"), "--out", index]) == 0
    system = open_system(SystemOptions(model=folder, index=index, data=str(tiny_data)))
    assert system.models == ("dual_encoder",)
    result = system.search(QUERY, depth=60)
    # Its passages are the opposite of its queries: the text least like the query's length is best.
    expected = {
        pid: float(-(len(text) * len(QUERY) + 1)
                   / ((len(text) ** 2 + 1) * (len(QUERY) ** 2 + 1)) ** 0.5)
        for pid, text in zip(system.data.pids, system.data.passages, strict=True)
    }  # fmt: skip
    found = {hit.pid: hit.scores["dual_encoder"] for hit in result.hits}
    assert found == pytest.approx(expected, abs=2e-3)
    assert (result.query_tokens, result.query_tokens_read) == (6, 6)  # "baran", and [CLS] and [SEP]


def test_token_matches_of_a_model_that_is_not_built_here_are_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch, tiny_data: Path
) -> None:
    own = SystemOptions(model=student(root), index=str(root / "tokens"), data=str(tiny_data))
    system = open_system(own)
    assert system.late_interaction is not None
    monkeypatch.setattr(system.late_interaction, "names_tokens", False, raising=False)
    with pytest.raises(UserError, match="token matches need a model that is built here"):
        system.explain(QUERY, system.data.pids[0])


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ([], "nothing to search: give --run DIR, or --model, --index and --data"),
        (["--model", "student"], "--index and --data: missing"),
        (["--run", "run", "--index", "vectors"], "--index: --run says it"),
        (["--run", "run", "--precision", "bf16"], "--precision: --run says it"),
        (["--model", "student", "--index", "vectors", "--data", "nowhere"], "nowhere: no such"),
        (["--model", "student", "--index", "nowhere", "--data", "data"], "nowhere: no such"),
        (["--model", "student", "--index", "vectors", "--data", "data", "--first_stage",
          "dual_encoder"], "--first_stage: the index says it"),
        (["--model", "student", "--index", "vectors", "--data", "data", "--rerankers", "teacher",
          "teacher"], "two cross-encoder models; give one"),
        (["--model", "student", "--index", "tokens", "--data", "data", "--rerankers", "student"],
         "late interaction searches --index"),
        (["--model", "student", "--index", "vectors", "--data", "data", "--rerankers", "plain"],
         "dual-encoder does not rerank"),
        (["--model", "teacher", "--index", "vectors", "--data", "data"], "is a cross-encoder"),
        (["--model", "student", "--index", "vectors", "--data", "data", "--rerank",
          "cross_encoder"], "--rerank cross_encoder: --run's"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_exit_code_2(
    options: list[str], problem: str, root: Path, tiny_data: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    places = {"student": student(root), "teacher": teacher(root), "data": str(tiny_data),
              "plain": str(write_pooled_by_max(tmp_path / "max"))}  # fmt: skip
    places |= {name: str(root / name) for name in ("run", "vectors", "tokens")}
    assert main(["search", "a query", *(places.get(option, option) for option in options)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert problem in lines[-1]
    assert not any("Traceback" in line for line in lines)
