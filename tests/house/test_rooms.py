"""What lies where, and how much: one name a file, files and functions of a size to be read."""

import ast
from collections import Counter
from pathlib import Path

import pytest
from support.processes import ROOT

OURS = sorted((ROOT / "erniesearch").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels" / "erniesearch_kernels").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]  # fmt: skip


def is_gpu_kernel(function: ast.FunctionDef) -> bool:
    """Triton compiles one function; parts of it would be no clearer and could not share tiles."""
    return any(ast.unparse(decorator) == "kernel" for decorator in function.decorator_list)


def test_no_two_files_have_one_name() -> None:
    """But ``commands/X.py``, which holds X's arguments."""
    named = [path.stem for path in OURS + KERNELS
             if path.parent.name != "commands" and not path.stem.startswith("__")]  # fmt: skip
    assert [stem for stem, number in Counter(named).items() if number > 1] == []


@pytest.mark.parametrize("path", OURS + KERNELS, ids=name)
def test_sizes(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= (500 if path in KERNELS else 400), f"{lines} lines"
    for function in functions(path):
        assert function.end_lineno is not None
        length = function.end_lineno - function.lineno + 1
        assert length <= 60 or is_gpu_kernel(function), f"{function.name}: {length} lines"
        arguments = function.args
        given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        number = sum(argument.arg not in ("self", "cls", "ctx") for argument in given)
        assert number <= 8 or path in KERNELS, f"{function.name}: {number} parameters"


def test_the_root_holds_ground_files_only() -> None:
    found = {path.stem for path in OURS if path.parent == ROOT / "erniesearch"}
    assert found == {"__init__", "__main__", "cli", "distributed", "errors", "exiting", "files",
                     "installation", "progress", "run_folder", "stages"}  # fmt: skip


@pytest.mark.parametrize("path", TESTS, ids=name)
def test_no_test_imports_a_test(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        imported = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        for module in imported:
            last = module.rsplit(".", 1)[-1]
            assert not last.startswith(("test_", "conftest")), module


def test_shared_parts_of_tests_lie_in_support() -> None:
    loose = {path.name for path in TESTS if path.parent == ROOT / "tests"}
    assert loose == {"conftest.py"}
