"""A page and its Chinese twin in step: headings, code, tables with their figures, links."""

import re
from collections import Counter
from pathlib import Path

import pytest
from support.markdown import CHINESE, blocks, pages, read, twin, without_code
from support.processes import ROOT

DOCS = [page for page in pages() if page.parts[0] == "docs"]
IN_TWO_LANGUAGES = [*DOCS, Path("README.md")]
each_page = pytest.mark.parametrize("page", IN_TWO_LANGUAGES, ids=str)
COMMENT = re.compile(r"\s*#.*|\s*//.*")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def headings(page: Path) -> list[int]:
    return [len(marks) for marks in re.findall(r"^(#+) ", without_code(read(page)), re.MULTILINE)]


def code(page: Path) -> list[tuple[str, list[str]]]:
    """Every block without its comments, which are translated. Blocks without a language are
    drawings and what commands print: their length counts."""
    return [
        (block.language, [COMMENT.sub("", line if block.language else "") for line in
                          block.code.splitlines()])
        for block in blocks(page)
    ]  # fmt: skip


def tables(page: Path) -> list[list[tuple[int, Counter[str]]]]:
    """Of every table's rows, the number of columns and the numbers in them of two digits or more;
    a single one may be a word in the other language."""
    text = LINK.sub("]", read(page))
    found = re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)
    return [[(len(re.findall(r"(?<!\\)\|", line)), Counter(re.findall(r"\d[\d.,]*\d", line)))
             for line in table.splitlines()] for table in found]  # fmt: skip


def links(page: Path) -> Counter[str]:
    """Targets without anchors, which are headings' and translated; without that of the twin."""
    own = {page.name, twin(page).name, page.name.replace(CHINESE, "")}
    targets = (target.split("#")[0] for target in LINK.findall(without_code(read(page))))
    return Counter(target.replace(CHINESE, "") for target in targets if target not in own)


def test_every_page_has_a_twin_and_every_twin_a_page() -> None:
    assert len(DOCS) > 10
    assert [page for page in IN_TWO_LANGUAGES if not (ROOT / twin(page)).is_file()] == []
    twins = sorted(path.relative_to(ROOT) for path in (ROOT / "docs").glob(f"*{CHINESE}.md"))
    assert twins == sorted(map(twin, DOCS))


@each_page
def test_headings(page: Path) -> None:
    assert headings(page) == headings(twin(page))


@each_page
def test_code(page: Path) -> None:
    assert code(page) == code(twin(page))


@each_page
def test_tables(page: Path) -> None:
    assert tables(page) == tables(twin(page))


@each_page
def test_links(page: Path) -> None:
    assert links(page) == links(twin(page))


@each_page
def test_each_leads_to_the_other(page: Path) -> None:
    """Near the top; the site has a switch in its place."""
    assert f"[简体中文]({twin(page).name})" in read(page)[:2000]
    assert f"[English]({page.name})" in read(twin(page))[:2000]
