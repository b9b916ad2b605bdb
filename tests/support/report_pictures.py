"""Pictures of a report for the documentation.

    python tests/support/report_pictures.py runs/quickstart/report.html docs/images

tests/ belongs on PYTHONPATH. Needs playwright and a Chromium (extra browser).
"""

import argparse
from pathlib import Path
from typing import Any

from support.browser import chromium

PICTURES = {
    "report-light": ("light", "results"), "report-dark": ("dark", "is-there-anything-to-distil"),
    "report-training": ("light", "training"), "report-queries": ("light", "queries-won-and-lost"),
}  # fmt: skip
"""By name: the colours, and the section that stands on top (the first with the page's head)."""
SIZE = {"width": 1180, "height": 900}


def take(page: Any, report: Path, scheme: str, section: str, path: Path) -> None:
    """One picture."""
    page.set_viewport_size(SIZE)
    page.emulate_media(color_scheme=scheme)
    page.goto(report.resolve().as_uri())
    if section != "results":
        page.locator(f"#{section}").evaluate("e => e.scrollIntoView()")
    page.evaluate("new Promise(requestAnimationFrame)")
    page.screenshot(path=path)


def take_all(browser: Any, report: Path, out: Path) -> list[Path]:
    """All pictures of a report, as PNG files in a folder."""
    out.mkdir(parents=True, exist_ok=True)
    page, paths = browser.new_page(), []
    for name, (scheme, section) in PICTURES.items():
        paths.append(out / f"{name}.png")
        take(page, report, scheme, section, paths[-1])
    page.close()
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path, help="report.html of a finished run")
    parser.add_argument("out", type=Path, help="folder for the pictures")
    given = parser.parse_args()
    with chromium() as browser:
        take_all(browser, given.report, given.out)
