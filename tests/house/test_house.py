"""The rules of the house: layers, names, sizes, and no clash with the package `kernels`."""

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support.markers import asks_for_gpu
from support.processes import ROOT, run_python

FOLDERS = ("erniesearch", "kernels", "benchmarks")
SOURCES = sorted(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*.py"))
LAUNCHERS = sorted(ROOT.glob("launch/*.py"))


def test_kernels_is_a_source_root_and_no_package() -> None:
    assert (ROOT / "kernels" / "erniesearch_kernels" / "__init__.py").is_file()
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()


CLASH = """
import transformers, kernels, erniesearch.cli, erniesearch.training.trainer
from transformers import BertModel
print(kernels.__file__, kernels.__version__)
"""


def test_only_tests_asked_for_by_their_marker_see_a_gpu(pytestconfig: pytest.Config) -> None:
    asked = {"": False, "not slow": False, "slow": False, "not cuda": False, "cuda": True,
             "cuda and not slow": True, "not cuda and not slow": False}  # fmt: skip
    assert {markers: asks_for_gpu(markers) for markers in asked} == asked
    if not asks_for_gpu(pytestconfig.option.markexpr):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
        told = run_python("-c", "import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))")
        assert told == (0, "''\n")


def write_stand_in(folder: Path) -> Path:
    """A package named like Hugging Face's, as installed: files and metadata."""
    package = folder / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('__version__ = "0.0.1"\n')
    metadata = folder / "kernels-0.0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.0.1\n")
    return package / "__init__.py"


def installed_kernels() -> Path | None:
    """``__init__.py`` of a `kernels` package that is installed here, if any."""
    found = [Path(entry) / "kernels" / "__init__.py" for entry in sys.path]
    return next((path for path in found if path.is_file()), None)


def test_hugging_faces_kernels_wins_over_our_folder(tmp_path: Path) -> None:
    """DeepSpeed's multi-node runner puts the repository's root first on PYTHONPATH."""
    path = [str(ROOT), str(ROOT / "kernels")]
    real = installed_kernels()
    if real is None:
        real = write_stand_in(tmp_path / "site")
        path.append(str(tmp_path / "site"))
    status, output = run_python("-c", CLASH, PYTHONPATH=os.pathsep.join(path))
    assert status == 0, output[-3000:]
    assert output.splitlines()[-1].split()[0] == str(real)


def test_transformers_starts_where_only_our_folder_is_named_kernels() -> None:
    status, output = run_python(
        "-c", "from transformers import BertModel; print('started')", PYTHONPATH=str(ROOT)
    )
    assert status == 0, output[-3000:]
    assert output.splitlines()[-1] == "started"


def test_imports_point_down() -> None:
    command = Path(sys.executable).with_name("lint-imports")
    if not command.is_file():
        pytest.skip("import-linter is not installed (extra dev)")
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    result = subprocess.run(
        [command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "imports point down KEPT" in result.stdout


def test_design_lists_the_layers_that_are_checked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = project["tool"]["importlinter"]["contracts"]
    checked = [layer.replace("erniesearch.", "") for layer in contract["layers"]]
    design = (ROOT / "DESIGN.md").read_text(encoding="utf-8")
    listed = design.split("**Imports point down**", 1)[1].split("```")[1]
    assert listed.split("\n")[1:-1] == checked


def imported(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda p: p.name)
def test_launcher_imports_only_the_command_line(path: Path) -> None:
    own = {name for name in imported(path) if name.startswith("erniesearch")}
    assert own == {"erniesearch.cli"}
    assert imported(path) - own <= set(sys.stdlib_module_names)


def test_objectives_know_tensors_and_no_models() -> None:
    for path in ROOT.glob("erniesearch/objectives/*.py"):
        assert not {name for name in imported(path) if name.startswith("transformers")}, path.name


def test_nothing_outside_is_unpickled() -> None:
    """Paddle's weight files are pickles; their reader resolves the names of arrays only, which
    tests/export/test_pdparams.py checks."""
    for path in SOURCES:
        if path.name != "pdparams.py":
            assert not imported(path) & {"pickle", "dill", "cloudpickle", "joblib"}, path.name
        assert "torch.load(" not in path.read_text(), path.name


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_file_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_file_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))
