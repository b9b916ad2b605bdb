"""Pictures of the search page for the documentation.

    python tests/support/page_pictures.py runs/quickstart "wait until a process has ended" pictures

The folder that the run was started in is the place to start it, and tests/ and the repository
belong on PYTHONPATH. Needs playwright and a Chromium (extra browser).
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from support.browser import chromium, served

from erniesearch.search.app import create_app
from erniesearch.search.system import SearchSystem


class Picture(NamedTuple):
    """A state of the page: what is looked at, and by whom."""

    view: str = "maxsim"
    language: str = "en"
    theme: str = "light"
    width: int = 1180
    height: int = 780


PICTURES = {
    "page-search": Picture(),
    "page-attention": Picture("attention", height=900),
    "page-dark": Picture("attention", theme="dark", height=900),
    "page-phone": Picture(width=390, height=844),
    "page-search.zh-CN": Picture(language="zh"),
    "page-attention.zh-CN": Picture("attention", language="zh", height=900),
}


def take(page: Any, url: str, query: str, picture: Picture, path: Path) -> None:
    """One picture, with a token pointed at."""
    page.set_viewport_size({"width": picture.width, "height": picture.height})
    page.goto(url)
    page.locator("#served:not(:empty)").wait_for()
    page.locator("#language").select_option(picture.language)
    page.locator("#theme").select_option(picture.theme)
    page.locator("#query").fill(query)
    page.locator("#ask").click()
    page.locator("#cross_encoder .hit").first.wait_for(timeout=120_000)
    page.locator("#cross_encoder .hit").first.click()
    page.locator(f"#tab-{picture.view}").click()
    tokens = page.locator(f"#{picture.view} .tokens button")
    tokens.first.wait_for()
    longest = max(tokens.all_inner_texts(), key=len)
    tokens.filter(has_text=longest).first.evaluate("e => e.focus({preventScroll: true})")
    # How long a machine took that also took the picture is nobody's concern.
    page.locator("#status").evaluate("e => { e.textContent = '\u00a0'; }")
    page.evaluate("window.scrollTo(0, 0); new Promise(requestAnimationFrame)")
    page.screenshot(path=path)


def take_all(system: SearchSystem, query: str, out: Path) -> list[Path]:
    """All pictures of a query, as PNG files in a folder."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{name}.png" for name in PICTURES]
    with served(create_app(system)) as url, chromium(locale="en-GB") as context:
        page = context.new_page()
        for picture, path in zip(PICTURES.values(), paths, strict=True):
            take(page, url, query, picture, path)
    return paths


def main() -> None:
    """Load the run and take them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished run with a cross-encoder")
    parser.add_argument("query")
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    take_all(SearchSystem.from_run(given.run), given.query, given.out)


if __name__ == "__main__":
    main()
