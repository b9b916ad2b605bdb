"""The report in a real browser: opened at once, nothing asked of anybody, read by everyone."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.browser import axe_source, chromium, needs_browser
from support.logged_run import write_logged_run
from support.processes import ROOT
from support.report_pictures import PICTURES, take_all
from support.tiny import write_beir

from erniesearch.report.benchmark_report import figures_document
from erniesearch.report.run_report import run_document

pytestmark = needs_browser
UPDATES, QUERIES = 10_000, 100_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as context:
        yield context


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The reports of a run of 10,000 updates, of one that goes on, and of benchmarks."""
    folder = tmp_path_factory.mktemp("pages")
    data = write_beir(folder / "data", num_passages=30, num_queries=20)
    long = write_logged_run(folder / "long", data, updates=UPDATES // 2)
    going_on = write_logged_run(folder / "run", data, finished=False)
    documents = {
        "long": run_document(long, None, None), "live": run_document(going_on, None, 3600),
        "benchmarks": figures_document(sorted((ROOT / "docs" / "results").glob("*speed*.json"))),
    }  # fmt: skip
    for name, document in documents.items():
        document.save(folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in documents}


def test_ten_thousand_updates_open_in_two_seconds(
    browser: Any, pages: dict[str, Path], record_property: Any
) -> None:
    """In seconds of all of the browser's processes: no other work on the machine counts."""
    took, waited = [], []
    for _ in range(3):
        page = browser.new_page()
        began, before = time.monotonic(), used()
        page.goto(pages["long"].as_uri(), wait_until="load")
        page.evaluate("new Promise(f => requestAnimationFrame(() => requestAnimationFrame(f)))")
        waited.append(time.monotonic() - began)
        took.append(used() - before)
        page.close()
    record_property("seconds", {"of the processor": took, "waited": waited})
    assert sorted(took)[1] < 2.0


def used() -> float:
    """Processor seconds of this process's children so far."""
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return sum(t.user + t.system for t in times)


@pytest.mark.parametrize("name", ["long", "live", "benchmarks"])
def test_no_request_but_the_file(name: str, browser: Any, pages: dict[str, Path]) -> None:
    page = browser.new_page()
    asked, complaints = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(pages[name].as_uri(), wait_until="networkidle")
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    page.wait_for_timeout(200)
    assert [url for url in asked if not url.startswith("data:")] == [pages[name].as_uri()]
    assert complaints == []
    page.close()


@pytest.mark.skipif(axe_source() is None, reason="no axe: pip install axe-playwright-python")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["long", "live", "benchmarks"])
def test_axe_finds_nothing_serious(
    name: str, scheme: str, browser: Any, pages: dict[str, Path], record_property: Any
) -> None:
    page = browser.new_page()
    page.emulate_media(color_scheme=scheme)
    page.goto(pages[name].as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    page.evaluate(axe_source())
    found = page.evaluate("axe.run()")
    page.close()
    told = {f["id"]: (f["impact"], len(f["nodes"]), f["nodes"][0]["html"][:200])
            for f in found["violations"]}  # fmt: skip
    record_property("axe", (len(found["passes"]), told))
    assert not [rule for rule, (impact, *_) in told.items() if impact in ("serious", "critical")]


def test_a_live_page_loads_itself_again_until_it_is_told_not_to(
    browser: Any, tmp_path: Path
) -> None:
    data = write_beir(tmp_path / "data", num_passages=30, num_queries=20)
    root = write_logged_run(tmp_path / "run", data, finished=False)
    out = tmp_path / "report.html"
    run_document(root, None, 0.5).save(out)
    page = browser.new_page()
    page.goto(out.as_uri())
    with (root / "stages/cascade/metrics.jsonl").open("a") as log:
        log.write(json.dumps({"step": 31, "loss": 1.0}) + "\n")
    run_document(root, None, 0.5).save(out)
    page.get_by_text("update 31 of 60").first.wait_for(timeout=10_000)
    page.get_by_label("load this page again").uncheck()
    run_document(root, None, None).save(out)
    page.wait_for_timeout(1500)
    assert page.get_by_label("load this page again").count() == 1
    page.close()


def test_wide_tables_scroll_and_phones_are_wide_enough(
    browser: Any, pages: dict[str, Path]
) -> None:
    page = browser.new_page()
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(pages["long"].as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()


def test_pictures_of_the_documentation_are_taken(
    browser: Any, pages: dict[str, Path], tmp_path: Path
) -> None:
    paths = take_all(browser, pages["long"], tmp_path)
    assert [path.stem for path in paths] == list(PICTURES)
    assert len({path.read_bytes() for path in paths}) == len(paths)


def test_many_queries_take_seconds_and_little_memory(tmp_path: Path, record_property: Any) -> None:
    data = write_beir(tmp_path / "data", num_passages=40, num_queries=QUERIES)
    root = write_logged_run(tmp_path / "run", data, updates=UPDATES // 2)
    process = psutil.Process()
    began, before = time.process_time(), process.memory_info().rss
    document = run_document(root, None, None)
    document.save(tmp_path / "report.html")
    seconds, grown = time.process_time() - began, process.memory_info().rss - before
    size = (tmp_path / "report.html").stat().st_size
    record_property("processor seconds, MiB more, KiB", (seconds, grown >> 20, size >> 10))
    assert document.notes == []
    assert seconds < 30
    assert grown < 500 << 20
    assert size < 3 << 20
