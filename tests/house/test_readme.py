"""The figures in both READMEs are those of the committed evaluations."""

import json
import re
from pathlib import Path

import pytest
from support.processes import ROOT

from erniesearch.evaluation.table import Report

RESULTS = ROOT / "tests" / "golden"


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
@pytest.mark.parametrize("name", ["quickstart", "squad", "cmrc"])
def test_tables_come_from_the_json(readme: str, name: str) -> None:
    report = Report.load(RESULTS / name)
    text = (ROOT / readme).read_text(encoding="utf-8")
    assert report.table() in text
    for number in (report.num_queries, report.num_passages):
        assert f"{number:,}" in text or str(number) in text


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_memory_tables_come_from_the_json(readme: str) -> None:
    facts = json.loads((RESULTS / "memory.json").read_text())
    text = (ROOT / readme).read_text(encoding="utf-8")
    for key in ("global_batch", "ranks"):
        for number, pair in facts[key].items():
            one, other = (f"{figures['mib']:,.0f}" for figures in pair.values())
            assert f"| {number} | {one} | {other} |" in text
    assert f"{facts['pretrained']['mib']:,.0f} MiB" in text


def test_every_linked_file_exists() -> None:
    for readme in ("README.md", "README.zh-CN.md", "DESIGN.md"):
        text = (ROOT / readme).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!http|#)([^)#]+)", text):
            assert (ROOT / Path(target)).exists(), f"{readme}: {target}"
