"""The page in a real browser: three rankings, the tokens that won, and texts that are only text."""

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from support.finished_run import write_run
from support.tiny import ALL_TERMS, write_beir

from erniesearch.search.app import create_app
from erniesearch.search.system import SearchSystem

playwright = pytest.importorskip(
    "playwright.sync_api", reason="no playwright: pip install playwright"
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in BROWSERS if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium: apt-get install chromium (about 300 MB), or any Chrome"
)
QUERY = "baran desel"
MODELS = ("dual_encoder", "late_interaction", "cross_encoder")
MARKUP = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
HOSTILE_PID = "<i>p&lt;</i>"
HOSTILE = f"𝔘𝔫𝔦 {MARKUP} baran desel"


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> SearchSystem:
    """Six passages, one of them markup in id and text with characters of two UTF-16 units."""
    data = write_beir(tmp_path_factory.mktemp("data"), num_passages=5, num_queries=5)
    with (data / "corpus.jsonl").open("a") as corpus:
        corpus.write(json.dumps({"_id": HOSTILE_PID, "text": HOSTILE}) + "\n")
    run_dir = tmp_path_factory.mktemp("run")
    write_run(run_dir, data, tiny_model, ALL_TERMS, max_passage_length=48)
    return SearchSystem.from_run(run_dir)


@pytest.fixture(scope="module")
def url(system: SearchSystem) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(create_app(system), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    """The page, opened; afterwards the browser must have had nothing to complain about."""
    page = browser.new_page()
    complaints: list[str] = []
    page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda r: r.url.startswith((url, "data:")) or complaints.append(r.url))
    page.goto(url)
    yield page
    page.close()
    # A status of 422 is reported by the browser itself.
    assert [text for text in complaints if "status of 422" not in text] == []


def ask(page: Any, query: str = QUERY) -> None:
    page.get_by_label("Query", exact=True).fill(query)
    page.keyboard.press("Enter")
    page.locator("#query-tokens button").first.wait_for()


def choose(page: Any, pid: str) -> None:
    button = page.locator("#late_interaction .hit").filter(has_text=pid)
    button.click()
    page.get_by_role("heading", name=f"{pid}, score").wait_for()


def test_three_rankings_side_by_side(page: Any, system: SearchSystem) -> None:
    ask(page)
    expected = system.search(QUERY)
    for model, name in zip(
        MODELS, ("Dual-encoder", "Late interaction", "Cross-encoder"), strict=True
    ):
        section = page.get_by_role("region", name=name, exact=True)
        hits = expected.rankings[model]
        assert section.locator(".pid").all_inner_texts() == [hit.pid for hit in hits]
        scores = [float(text) for text in section.locator(".score").all_inner_texts()]
        assert scores == pytest.approx([hit.scores[model] for hit in hits], abs=2e-3)
        ranks = section.locator(".rank").all_inner_texts()
        assert ranks == [f"{i}." for i in range(1, len(hits) + 1)]
    boxes = [page.locator(f"#{model}").bounding_box() for model in MODELS]
    assert len({box["y"] for box in boxes}) == 1
    assert len({box["x"] for box in boxes}) == 3
    assert "Answered in" in page.get_by_role("status").first.inner_text()


def test_pointing_at_a_query_token_shows_the_token_that_won_it(
    page: Any, system: SearchSystem
) -> None:
    ask(page)
    choose(page, HOSTILE_PID)
    matches = system.explain(QUERY, HOSTILE_PID)
    buttons = page.locator("#query-tokens button")
    assert buttons.all_inner_texts() == [match.query.text for match in matches]
    assert page.locator("mark.winner").count() == 0
    for i, match in enumerate(matches):
        buttons.nth(i).hover()
        winner = page.locator("mark.winner")
        assert winner.inner_text() == match.passage.text
        shown = winner.evaluate("e => Number(e.style.getPropertyValue('--similarity'))")
        assert shown == pytest.approx(max(0.0, match.similarity), abs=1e-3)
        if not match.passage.special:  # the right one of several equal words
            before = winner.evaluate(
                "e => { let text = ''; for (let n = e.previousSibling; n; n = n.previousSibling)"
                " text = n.textContent + text; return text; }"
            )
            assert before == HOSTILE[: match.passage.start]
        readout = page.locator("#readout").inner_text()
        assert readout.startswith(f"“{match.query.text}” is won by “{match.passage.text}”")
        assert float(readout.split()[-1]) == pytest.approx(match.similarity, abs=2e-3)
    assert any(not match.passage.special for match in matches)
    page.mouse.move(0, 0)
    assert page.locator("mark.winner").count() == 0


def test_more_similar_is_more_intense(page: Any, system: SearchSystem) -> None:
    ask(page)
    choose(page, HOSTILE_PID)
    matches = system.explain(QUERY, HOSTILE_PID)
    alpha = (
        "e => { const c = document.createElement('canvas').getContext('2d', {alpha: true});"
        " c.fillStyle = getComputedStyle(e).backgroundColor; c.fillRect(0, 0, 1, 1);"
        " return c.getImageData(0, 0, 1, 1).data[3] / 255; }"
    )
    buttons = page.locator("#query-tokens button")
    shown = [buttons.nth(i).evaluate(alpha) for i in range(len(matches))]
    assert shown == pytest.approx([max(0.0, m.similarity) for m in matches], abs=0.01)


def test_the_keyboard_is_enough(page: Any, system: SearchSystem) -> None:
    page.keyboard.press("Tab")
    page.keyboard.type(QUERY)
    page.keyboard.press("Enter")
    page.locator("#query-tokens button").first.wait_for()
    best = system.search(QUERY).rankings["late_interaction"][0].pid
    matches = system.explain(QUERY, best)
    page.keyboard.press("Tab")  # the search button
    for match in matches:
        page.keyboard.press("Tab")
        assert page.locator("mark.winner").inner_text() == match.passage.text
    page.keyboard.press("Tab")
    first = page.locator("#dual_encoder .hit").first
    assert first.evaluate("e => e === document.activeElement")
    pid = first.get_attribute("data-pid")
    page.keyboard.press("Enter")
    page.get_by_role("heading", name=f"{pid}, score").wait_for()
    pressed = page.locator(".hit[aria-pressed=true]")
    assert {pressed.nth(i).get_attribute("data-pid") for i in range(pressed.count())} == {pid}


def test_texts_are_never_markup(page: Any) -> None:
    ask(page, f"baran {MARKUP}")
    choose(page, HOSTILE_PID)
    assert page.title() == "ERNIE-Search"
    assert page.locator("main script, main img, main i").count() == 0
    assert HOSTILE in page.locator("#passage").inner_text()
    assert page.locator("#dual_encoder .snippet").filter(has_text=MARKUP).count() == 1


def test_a_long_query_says_that_it_is_cut(page: Any) -> None:
    ask(page, "baran desel " * 20)
    assert "the first 8 of its 42 tokens count" in page.get_by_role("status").first.inner_text()


def test_an_error_is_told_and_the_page_goes_on(page: Any) -> None:
    page.get_by_label("Query", exact=True).fill("\u200b")
    page.keyboard.press("Enter")
    page.locator("#status.error").wait_for()
    assert "no character that the tokenizer knows" in page.locator("#status").inner_text()
    ask(page)
    assert page.locator(".error").count() == 0


def test_an_address_can_be_shared(page: Any, url: str) -> None:
    ask(page)
    assert page.url == f"{url}/?q=baran%20desel"
    page.reload()
    page.locator("#query-tokens button").first.wait_for()
    assert page.get_by_label("Query", exact=True).input_value() == QUERY


CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d');
  const rgb = (...colours) => {
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (c) => {
    const [r, g, b] = c.map((v) => v / 255).map(
      (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = {};
  for (const element of document.querySelectorAll('main *')) {
    if (!element.checkVisibility() || ![...element.childNodes].some(
        (n) => n.nodeType === 3 && n.textContent.trim())) continue;
    const grounds = [];
    for (let e = element; e; e = e.parentElement) {
      grounds.unshift(getComputedStyle(e).backgroundColor);
    }
    const [a, b] = [light(rgb(...grounds)),
                    light(rgb(...grounds, getComputedStyle(element).color))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const name = element.tagName + '.' + element.className;
    found[name] = Math.min(found[name] ?? 99, ratio);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_is_readable(page: Any, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    ask(page)
    page.evaluate(  # the strongest highlight
        "document.querySelectorAll('#matches mark, #query-tokens button')"
        ".forEach((e) => e.style.setProperty('--similarity', 1))"
    )
    found = page.evaluate(CONTRAST)
    assert len(found) > 8
    assert {name: ratio for name, ratio in found.items() if ratio < 4.5} == {}


def test_it_fits_a_narrow_screen(page: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    ask(page)
    choose(page, HOSTILE_PID)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
