"""Models that are not built here: run by sentence-transformers where it is, refused where not; and
names on the hub."""

import json
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support.finished_run import TEXTS
from support.stand_in import Stand, write_pooled_by_max
from support.tiny import write_model

from erniesearch.cli import main
from erniesearch.errors import UserError
from erniesearch.models.hub import from_hub
from erniesearch.retrieval.foreign import ForeignRetriever
from erniesearch.retrieval.load import load_retriever
from erniesearch.retrieval.model_folder import read_folder

CPU = torch.device("cpu")


@pytest.fixture
def pooled_by_max(tmp_path: Path) -> Path:
    return write_pooled_by_max(tmp_path / "max")


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """In sentence-transformers' place."""
    module = types.ModuleType("sentence_transformers")
    module.__dict__.update(__version__="6.2.0", SentenceTransformer=Stand)
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    return module


def test_it_is_told_which_library_runs_what_is_not_built(
    pooled_by_max: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = read_folder(pooled_by_max)
    assert (found.kind, found.has_vectors) == ("dual_encoder", True)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # importing it fails
    with pytest.raises(UserError, match=r"pooling \['max_tokens'\].*6 can run it: pip install"):
        load_retriever(pooled_by_max, device=CPU)


def test_an_older_library_is_refused(pooled_by_max: Path, stand: types.ModuleType) -> None:
    stand.__dict__["__version__"] = "5.3.0"
    with pytest.raises(UserError, match=r"can run it, 5\.3\.0 is installed"):
        load_retriever(pooled_by_max, device=CPU)


def test_each_side_is_encoded_by_its_own_method_in_the_texts_order(
    pooled_by_max: Path, stand: types.ModuleType
) -> None:
    retriever = load_retriever(pooled_by_max, device=CPU, batch_size=2, max_query_length=8)
    assert isinstance(retriever, ForeignRetriever)
    assert (retriever.dim, retriever.lengths) == (2, {"query": 8, "passage": 64})
    wanted = np.array([[len(text), 1.0] for text in TEXTS])
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(retriever.vectors(TEXTS, "query"), wanted, atol=1e-6)
    np.testing.assert_allclose(retriever.vectors(TEXTS, "passage"), -wanted, atol=1e-6)
    assert retriever.model.options["trust_remote_code"] is False  # type: ignore[attr-defined]
    trusted = load_retriever(pooled_by_max, device=CPU, trust_remote_code=True)
    assert trusted.model.options["trust_remote_code"] is True  # type: ignore[attr-defined]


def test_encode_writes_what_it_makes(
    pooled_by_max: Path, stand: types.ModuleType, tiny_data: Path, tmp_path: Path
) -> None:
    arguments = ["--model", str(pooled_by_max), "--data", str(tiny_data)]
    assert main(["encode", *arguments, "--out", str(tmp_path / "out")]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["dim"], manifest["rows"]) == (2, 60)


def test_what_fails_in_the_library_is_one_line(
    pooled_by_max: Path, stand: types.ModuleType, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(pooled_by_max, broken)
    with pytest.raises(UserError, match=r"does not load it: a module that fails$"):
        load_retriever(broken, device=CPU)
    stand.__dict__["SentenceTransformer"] = type("Far", (Stand,), {"similarity_fn_name": "l2"})
    with pytest.raises(UserError, match="its similarity is l2; an index compares by"):
        load_retriever(pooled_by_max, device=CPU)


def test_a_module_with_code_of_its_own_is_not_taken_for_ours(pooled_by_max: Path) -> None:
    modules = pooled_by_max / "modules.json"
    modules.write_text(modules.read_text().replace("sentence_transformers.models.T", "own.T"))
    found = read_folder(pooled_by_max)
    assert found.foreign is not None
    assert "own.Transformer is code of its own" in found.foreign


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of the hub that holds ``owner/tiny``; nothing else can be reached."""
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--owner--tiny"
    write_model(repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    from_hub.cache_clear()
    yield repository
    from_hub.cache_clear()


def test_a_name_on_the_hub_stands_for_its_snapshot(hub: Path) -> None:
    found = read_folder("owner/tiny", "mean")
    assert Path(found.settings.path) == hub / "snapshots" / ("a" * 40)
    pinned = read_folder(f"owner/tiny@{'a' * 40}", "mean")
    assert pinned == found
    assert load_retriever("owner/tiny", pooling="mean", device=CPU).dim == 32


@pytest.mark.parametrize(
    ("name", "told"),
    [("owner/absent", "model 'owner/absent'"), ("owner/tiny@v9", "model 'owner/tiny' at v9")],
)
def test_what_the_hub_cannot_give_is_one_line(
    hub: Path, name: str, told: str, tiny_data: Path, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    arguments = ["--model", name, "--data", str(tiny_data), "--out", str(tmp_path / "out")]
    assert main(["encode", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{told}: no such folder, and from the hub: " in line
    assert "hf download" in line
