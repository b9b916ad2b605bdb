"""The figures in both READMEs are those of the committed evaluations."""

import re
from pathlib import Path

import pytest
from conftest import ROOT

from erniesearch.report import Report

RESULTS = ROOT / "tests" / "golden"


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
@pytest.mark.parametrize("name", ["quickstart", "squad", "cmrc"])
def test_tables_come_from_the_json(readme: str, name: str) -> None:
    report = Report.load(RESULTS / name)
    text = (ROOT / readme).read_text(encoding="utf-8")
    assert report.table() in text
    for number in (report.num_queries, report.num_passages):
        assert f"{number:,}" in text or str(number) in text


def test_every_linked_file_exists() -> None:
    for readme in ("README.md", "README.zh-CN.md", "DESIGN.md"):
        text = (ROOT / readme).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!http|#)([^)#]+)", text):
            assert (ROOT / Path(target)).exists(), f"{readme}: {target}"
