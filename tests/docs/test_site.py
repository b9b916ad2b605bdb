"""The site: built strictly, whole in both languages, and without a resource from outside."""

import importlib.util
import json
import os
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import erniesearch_kernels
import pytest
from support import configuration_page
from support.markdown import pages, read, without_code
from support.processes import ROOT, run_python

import erniesearch
from erniesearch.commands import reference

NEEDED = ("mkdocs", "material", "mkdocs_static_i18n", "mkdocstrings", "latex2mathml", "rjieba")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
LANGUAGES = ("", "zh-CN/")
LOADED = {("script", "src"), ("img", "src"), ("source", "srcset"), ("iframe", "src"),
          ("link", "href"), ("video", "src"), ("object", "data")}  # fmt: skip
"""What a browser fetches by itself."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if MISSING:
        pytest.skip(f"{', '.join(MISSING)} not installed (extra docs)")
    folder = tmp_path_factory.mktemp("site")
    status, said = run_python(  # not --quiet: what is not said is not counted by --strict either
        "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder),
        PYTHONPATH=os.environ.get("PYTHONPATH", ""), NO_MKDOCS_2_WARNING="1",
    )  # fmt: skip
    assert status == 0, said
    assert "WARNING" not in said
    return folder


class Links(HTMLParser):
    """Identifiers, links and fetched resources of a page, and its language."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.fetched: set[str] = set()
        self.language = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.ids.add(value)
            elif (tag, name) in LOADED and value:
                self.fetched |= {part.split()[0] for part in value.split(", ")}
            elif name == "href" and value is not None:
                self.links.add(value)
        if tag == "html":
            self.language = dict(attrs).get("lang") or ""


@cache
def links(page: Path) -> Links:
    return Links(page.read_text(encoding="utf-8"))


def html_of(site: Path, page: str, language: str = "") -> Path:
    return site / language / ("" if page == "index" else page) / "index.html"


def test_every_page_is_there_in_both_languages(site: Path) -> None:
    for page in (page.stem for page in pages() if page.parent == Path("docs")):
        assert links(html_of(site, page)).language == "en"
        assert links(html_of(site, page, "zh-CN/")).language.startswith("zh")
    assert "阶段" in html_of(site, "configuration", "zh-CN/").read_text()


def test_nothing_comes_from_outside(site: Path) -> None:
    for page in site.rglob("*.html"):
        outside = {url for url in links(page).fetched if re.match(r"(\w+:)?//", url)}
        assert outside == set(), page
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", style.read_text()), style


def test_every_link_leads_somewhere(site: Path) -> None:
    """mkdocs checks those it has made; these are all, those of our own hooks too."""
    checked = 0
    for page in site.rglob("*.html"):
        if page.name == "404.html":  # served for any address
            continue
        for link in links(page).links | links(page).fetched:
            if re.match(r"\w+:", link):
                continue
            path, anchor = urldefrag(unquote(link))
            target = (page.parent / path).resolve() if path else page
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{page}: {link}"
            if anchor and target.suffix == ".html":
                assert anchor in links(target).ids, f"{page}: {link}"
            checked += 1
    assert checked > 1000


def test_formulas_are_drawn(site: Path) -> None:
    for page in pages():
        name = page.stem if page.parent == Path("docs") else page.as_posix().removesuffix(".md")
        built = html_of(site, name)
        if built.is_file() and page.name != "README.md":
            formulas = re.findall(r"\$\$.+?\$\$|\$[^$\n ][^$\n]*\$", without_code(read(page)))
            text = built.read_text(encoding="utf-8")
            assert text.count("<math") == len(formulas), page
            assert "arithmatex" not in text


def test_search_finds_words_of_both_languages(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    assert {"en", "zh"} <= {*index["config"]["lang"]}
    words: dict[str, set[str]] = {language: set() for language in LANGUAGES}
    for entry in index["docs"]:
        language = LANGUAGES[entry["location"].startswith("zh-CN/")]
        words[language] |= {*re.split(index["config"]["separator"], entry["text"])}
    assert {"checkpoint", "temperature"} <= words[""]
    assert {"检查点", "温度", "配置"} <= words["zh-CN/"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_key_and_every_public_name_has_an_anchor(site: Path, language: str) -> None:
    keys = {key.name for _, found in reference.sections() for key in found}
    assert keys <= links(html_of(site, "configuration", language)).ids
    names = {f"erniesearch.{name}" for name in erniesearch.__all__}
    names |= {f"erniesearch_kernels.{name}" for name in erniesearch_kernels.__all__}
    assert names <= links(html_of(site, "api", language)).ids


def test_the_chinese_page_of_keys_is_what_the_code_says() -> None:
    page = configuration_page.CHINESE.read_text(encoding="utf-8")
    said = "python tests/support/configuration_page.py"
    assert page == configuration_page.chinese(page), said


def test_the_index_lists_every_page_and_no_other() -> None:
    listed = re.findall(r"^- \[[^]]+\]\(([^)]+)\)", read(Path("docs/index.md")), re.MULTILINE)
    assert [target for target in listed if not (ROOT / "docs" / target).is_file()] == []
    docs = {page.name for page in pages() if page.parent == Path("docs")} - {"index.md"}
    assert docs == {target for target in listed if "/" not in target}
