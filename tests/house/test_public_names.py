"""The Python API: which names it has, and that asking for none of them costs nothing."""

import inspect

from support.processes import ROOT, run_python

import erniesearch

NAMES = {"Callback", "Collection", "LossTerm", "Trainer", "UserError", "export_all", "load",
         "load_config", "run"}  # fmt: skip


def test_names_are_these() -> None:
    """A program that imports them must go on working: add names, take none away."""
    assert set(erniesearch.__all__) == NAMES
    assert set(dir(erniesearch)) == NAMES | {"__version__"}
    for name in NAMES:
        assert getattr(erniesearch, name).__name__ == name
        assert inspect.getdoc(getattr(erniesearch, name))


def test_each_is_documented() -> None:
    for page in ("docs/python.md", "docs/python.zh-CN.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert not {name for name in NAMES if f"`{name}" not in text}, page


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, erniesearch; print(sorted({m.split('.')[0] for m in sys.modules}))"
    status, output = run_python("-c", code)
    assert status == 0
    loaded = set(eval(output))
    assert not loaded & {"torch", "transformers", "datasets", "numpy", "yaml", "jsonargparse"}
    code = "import erniesearch; erniesearch.no_such_name"
    assert "has no attribute 'no_such_name'" in run_python("-c", code)[1]
