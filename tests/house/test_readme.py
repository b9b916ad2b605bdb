"""What the READMEs and the pages say is what is there: figures, badges, code, pictures, links."""

import importlib.util
import json
import re
import tomllib
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pytest
from support.processes import ROOT

from erniesearch.evaluation.table import Report

GOLDEN, DOCS = ROOT / "tests" / "golden", ROOT / "docs"
READMES = ("README.md", "README.zh-CN.md")
LANGUAGES = ("", ".zh-CN")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    """benchmarks/readme_figures.py"""
    path = ROOT / "benchmarks" / "readme_figures.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", ["quickstart", "squad", "cmrc"])
def test_tables_come_from_the_json(language: str, name: str) -> None:
    report = Report.load(GOLDEN / name)
    text = read(f"docs/results{language}.md")
    assert report.table() in text
    for number in (report.num_queries, report.num_passages):
        assert f"{number:,}" in text or str(number) in text


@pytest.mark.parametrize("language", LANGUAGES)
def test_memory_tables_come_from_the_json(language: str) -> None:
    facts = json.loads((GOLDEN / "memory.json").read_text())
    text = read(f"docs/large-batches{language}.md")
    for key in ("global_batch", "ranks"):
        for number, pair in facts[key].items():
            one, other = (f"{figures['mib']:,.0f}" for figures in pair.values())
            assert f"| {number} | {one} | {other} |" in text
    assert f"{facts['pretrained']['mib']:,.0f} MiB" in text


@pytest.mark.parametrize("readme", READMES)
def test_the_readmes_figures_come_from_the_json(readme: str, figures: ModuleType) -> None:
    text = read(readme)
    assert figures.with_rows(text, readme) == text, "python benchmarks/readme_figures.py"
    rows = {row.name: row.metrics["MRR@10"] for row in Report.load(GOLDEN / "quickstart").rows}
    for name in ("BM25", "dual-encoder, before training", "dual-encoder, contrastive alone"):
        of = rows[name]
        assert f"{of.mean:.3f} [{of.low:.3f}, {of.high:.3f}]" in text, name
    few = json.loads((DOCS / "results" / "few-lists-squad-chunk.json").read_text())
    arms = ("contrastive-short", "contrastive-mined", "distillation")
    shown = [f"{few['arms'][arm]['MRR@10']['mean']:.3f}" for arm in arms]
    (found,) = (each for each in few["comparisons"] if each["arm"] == "distillation")
    shown.append("{difference:+.3f} [{low:.3f}, {high:.3f}]".format(**found))
    assert re.search(".*".join(map(re.escape, shown)), text), shown


@pytest.mark.parametrize("style", ["light", "dark"])
def test_the_plot_shows_the_figures(style: str, figures: ModuleType) -> None:
    plot = read(f"docs/images/cascade-gain-{style}.svg").replace("\N{MINUS SIGN}", "-")
    for results in figures.load().values():
        shown = [*figures.gains_of(results), figures.cascade_of(results)["difference"]]
        for value in shown:
            assert f">{value:+.3f}<" in plot, "python benchmarks/readme_figures.py"


def test_the_drawings_differ_in_colours_and_words_alone() -> None:
    files = [read(f"docs/images/cascade-{style}{language}.svg")
             for style in ("light", "dark") for language in LANGUAGES]  # fmt: skip
    assert len(set(files)) == 4
    assert len({re.sub(r"#[0-9a-f]{6}|>[^<>]+<", "", file) for file in files}) == 1
    for term in ("ce_to_li", "ce_to_de", "li_to_de", "attention"):
        assert all(f">{term}</text>" in file for file in files)


@pytest.mark.parametrize("readme", READMES)
def test_badges_say_what_the_project_says(readme: str) -> None:
    project = tomllib.loads(read("pyproject.toml"))["project"]
    badges = [
        unquote(badge) for badge in re.findall(r"img\.shields\.io/badge/([^)]+)\)", read(readme))
    ]
    lowest = project["requires-python"].removeprefix(">=")
    assert [badge.rsplit("-", 1)[0] for badge in badges] == [
        f"python-≥{lowest}", f"licence-{project['license'].replace('-', '--')}", "arXiv-2205.09153",
    ]  # fmt: skip


@pytest.mark.parametrize("readme", READMES)
def test_the_python_is_an_example(readme: str) -> None:
    """tests/examples runs it."""
    code, _ = blocks(read(readme), "python")
    assert code == read("examples/run_pipeline.py").split('"""\n\n', 1)[1]


def test_both_are_of_a_length_to_be_read() -> None:
    """That they say the same is held by tests/docs/test_twins.py."""
    one, other = (read(readme).splitlines() for readme in READMES)
    assert len(one) == len(other) <= 160


PAGES = sorted(str(page.relative_to(ROOT)) for page in [*ROOT.glob("*.md"), *DOCS.glob("*.md")])


@pytest.mark.parametrize("page", PAGES)
def test_every_linked_file_exists(page: str) -> None:
    text = read(page)
    for code in (r"^```.*?^```", r"`[^`\n]*`"):
        text = re.sub(code, "", text, flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\((?!http|#)([^)#\s]+)", text)
    targets += re.findall(r'(?:src|srcset)="(?!http)([^"]+)"', text)
    for target in targets:
        assert ((ROOT / page).parent / Path(target)).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_every_linked_heading_exists(page: str) -> None:
    """By GitHub's rule: lower case, without punctuation, hyphens for spaces."""
    for target, heading in re.findall(r"\]\((?!http)([^)#\s]*)#([^)\s]+)\)", read(page)):
        file = (ROOT / page).parent / target if target else ROOT / page
        lines = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}
        assert heading in anchors, f"{target}#{heading}"
