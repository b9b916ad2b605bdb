"""The page in a real browser: three rankings, the tokens that won, and texts that are only text."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.browser import axe_source, chromium, needs_browser, served
from support.finished_run import write_run
from support.tiny import ALL_TERMS, write_beir

from erniesearch.search.app import create_app
from erniesearch.search.system import SearchSystem

pytestmark = needs_browser
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
    with served(create_app(system)) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium(locale="en-GB", viewport={"width": 1280, "height": 900}) as context:
        yield context


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    """The page, opened; afterwards the browser must have had nothing to complain about."""
    page = browser.new_page()
    complaints: list[str] = []
    page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda r: r.url.startswith((url, "data:")) or complaints.append(r.url))
    page.goto(url)
    page.locator("#served").filter(has_text="6 passages").wait_for()
    yield page
    page.evaluate("localStorage.clear()")
    page.close()
    # The browser itself reports a status of 404 or 422, and an answer that did not come.
    assert [text for text in complaints if "Failed to load resource" not in text] == []


def ask(page: Any, query: str = QUERY) -> None:
    page.get_by_label("Query", exact=True).fill(query)
    page.keyboard.press("Enter")
    page.locator("#query-tokens button").first.wait_for()
    page.locator("#status").filter(has_text="all models after").wait_for()


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
        shown = winner.evaluate("e => Number(e.style.getPropertyValue('--weight'))")
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


def focused(page: Any, name: str) -> str | None:
    return page.evaluate("name => document.activeElement.dataset[name]", name)


def test_the_keyboard_is_enough(page: Any, system: SearchSystem) -> None:
    page.keyboard.press("/")
    page.keyboard.type(QUERY)
    page.keyboard.press("Enter")
    page.locator("#status").filter(has_text="all models after").wait_for()
    result = system.search(QUERY)
    dense, late, cross = ([hit.pid for hit in result.rankings[model]] for model in MODELS)
    page.keyboard.press("ArrowDown")
    assert (focused(page, "model"), focused(page, "pid")) == ("dual_encoder", dense[0])
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert (focused(page, "model"), focused(page, "pid")) == ("late_interaction", late[1])
    page.keyboard.press("End")
    page.keyboard.press("ArrowRight")
    assert (focused(page, "model"), focused(page, "pid")) == ("cross_encoder", cross[-1])
    page.keyboard.press("Enter")
    page.get_by_role("heading", name=f"{cross[-1]}, score").wait_for()
    pressed = page.locator(".hit[aria-pressed=true]")
    assert {pressed.nth(i).get_attribute("data-pid") for i in range(pressed.count())} == {cross[-1]}
    page.keyboard.press("Home")
    page.keyboard.press("ArrowUp")
    assert page.get_by_label("Query", exact=True).evaluate("e => e === document.activeElement")
    for _ in range(4):  # the button, models and depth, the view's tab, the tokens
        page.keyboard.press("Tab")
    for match in system.explain(QUERY, cross[-1]):
        assert page.locator("mark.winner").inner_text() == match.passage.text
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("ArrowRight")
    page.get_by_role("heading", name=f"{cross[-1]}, KL").wait_for()


def test_help_opens_and_escape_closes_it(page: Any) -> None:
    page.keyboard.press("Escape")  # to the query
    page.keyboard.type("?")  # which may hold a question mark
    assert page.locator("#help").is_hidden()
    page.get_by_role("button", name="Keys").click()
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    assert page.locator("#help").is_hidden()
    page.keyboard.press("?")
    page.get_by_role("heading", name="Keys").wait_for()


def test_what_is_ready_is_shown_while_the_cross_encoder_scores(
    page: Any, system: SearchSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = system.search(QUERY, cross_encoder_depth=0)
    scorer, go = system.scorer, threading.Event()
    assert scorer is not None
    scores, calls = scorer.scores, []

    def slow(queries: list[str], passages: list[str]) -> Any:
        calls.append(len(queries))
        if len(calls) > 1:
            assert go.wait(60)
        return scores(queries, passages)

    monkeypatch.setattr(scorer, "scores", slow)
    monkeypatch.setattr(system, "_pace", {"cross_encoder": 4.0})  # two in half a second
    real = system._score

    def paced(model: Any, wanted: Any) -> Any:
        found = real(model, wanted)
        system._pace["cross_encoder"] = 4.0
        return found

    monkeypatch.setattr(system, "_score", paced)
    page.get_by_label("Query", exact=True).fill(QUERY)
    page.keyboard.press("Enter")
    bar = page.locator("#cross_encoder progress[value='2']")
    bar.wait_for()
    assert "2 of 6 passages scored" in page.locator("#cross_encoder").inner_text()
    for model in MODELS[:2]:
        pids = page.locator(f"#{model} .pid").all_inner_texts()
        assert pids == [hit.pid for hit in expected.rankings[model]]
    page.locator("#dual_encoder .hit").nth(1).focus()
    kept = focused(page, "pid")
    go.set()
    page.locator("#cross_encoder .hit").nth(5).wait_for()
    assert calls == [2, 2, 2]
    assert (focused(page, "model"), focused(page, "pid")) == ("dual_encoder", kept)


def test_escape_stops_a_search(
    page: Any, system: SearchSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert system.scorer is not None
    scores, go = system.scorer.scores, threading.Event()
    monkeypatch.setattr(system.scorer, "scores", lambda *both: (go.wait(60), scores(*both))[1])
    page.get_by_label("Query", exact=True).fill(QUERY)
    page.keyboard.press("Enter")
    page.locator("#late_interaction .hit").first.wait_for()
    page.keyboard.press("Escape")
    assert page.locator("#status").inner_text() == "Stopped."
    assert "Stopped." in page.locator("#cross_encoder").inner_text()
    go.set()
    monkeypatch.undo()
    ask(page)


# --- attention ----------------------------------------------------------------------------------


def attend(page: Any, pid: str) -> None:
    page.get_by_role("tab", name="Attention").click()
    page.get_by_role("heading", name=f"{pid}, KL").wait_for()


def test_the_attention_view_shows_both_maps(page: Any, system: SearchSystem) -> None:
    ask(page)
    choose(page, HOSTILE_PID)
    attend(page, HOSTILE_PID)
    maps = system.attention(QUERY, HOSTILE_PID)
    title = page.locator("#pair-title").inner_text()
    assert float(title.split()[-1]) == pytest.approx(maps.divergence, abs=2e-3)
    assert f"{maps.divergence:.3f} nats" in page.locator("#attention-readout").inner_text()
    buttons = page.locator("#attention-tokens button")
    assert buttons.all_inner_texts() == [token.text for token in maps.query]
    figures = page.locator("#maps figure")
    assert figures.count() == 2
    for i in range(len(maps.query)):
        buttons.nth(i).hover()
        for figure, rows in zip((0, 1), (maps.cross_encoder, maps.late_interaction), strict=True):
            marks = figures.nth(figure).locator("mark")
            assert marks.all_inner_texts() == [token.text for token in maps.passage]
            shown = marks.evaluate_all(
                "all => all.map(e => Number(e.style.getPropertyValue('--weight')))"
            )
            assert shown == pytest.approx((rows[i] / rows[i].max()).tolist(), abs=1e-3)
        told = page.locator("#attention-readout").inner_text()
        assert f"KL {maps.divergences[i]:.3f}" in told
        assert f"“{maps.passage[int(maps.cross_encoder[i].argmax())].text}”" in told
    page.get_by_label("one colour scale for both").check()
    buttons.nth(0).hover()
    top = max(float(maps.cross_encoder[0].max()), float(maps.late_interaction[0].max()))
    shown = (
        page.locator("#maps figure")
        .nth(1)
        .locator("mark")
        .first.evaluate("e => Number(e.style.getPropertyValue('--weight'))")
    )
    assert shown == pytest.approx(float(maps.late_interaction[0, 0]) / top, abs=1e-3)
    inked = page.locator("canvas").first.evaluate(
        "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((v) => v)"
    )
    assert inked


def test_another_layer_can_be_looked_at(page: Any, system: SearchSystem) -> None:
    ask(page)
    choose(page, HOSTILE_PID)
    attend(page, HOSTILE_PID)
    page.get_by_label("Layer of the cross-encoder").select_option("0")
    first = system.attention(QUERY, HOSTILE_PID, 0).divergence
    page.locator("figcaption").filter(has_text="layer 1:").wait_for()
    assert page.locator("#pair-title").inner_text() == f"{HOSTILE_PID}, KL {first:.3f}"
    assert "layer=0" in page.url


# --- texts, links, languages --------------------------------------------------------------------


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
    assert page.locator("#status.error").count() == 0


def test_an_address_can_be_shared(page: Any, url: str) -> None:
    ask(page)
    choose(page, "p3")
    attend(page, "p3")
    assert page.url == f"{url}/?q=baran+desel&pid=p3&view=attention"
    page.reload()
    page.get_by_role("heading", name="p3, KL").wait_for()
    assert page.get_by_label("Query", exact=True).input_value() == QUERY


def test_models_and_depths_stand_in_the_address(page: Any, url: str) -> None:
    page.get_by_text("Models and depth").click()
    page.get_by_label("Passages shown").fill("3")
    page.get_by_role("checkbox", name="Cross-encoder").uncheck()
    page.get_by_label("Late interaction scores the best").fill("4")
    page.get_by_label("Query", exact=True).fill(QUERY)
    page.keyboard.press("Enter")
    page.locator("#query-tokens button").first.wait_for()
    asked = "q=baran+desel&models=dual_encoder%2Clate_interaction&depth=3&late_interaction_depth=4"
    assert page.url.startswith(f"{url}/?{asked}&pid=")
    assert "Not part of this search." in page.locator("#cross_encoder").inner_text()
    assert page.locator("#dual_encoder .hit").count() == 3
    page.reload()
    page.locator("#query-tokens button").first.wait_for()
    assert not page.locator("#use-cross_encoder").is_checked()  # in the closed box
    assert page.locator("#late_interaction_depth").input_value() == "4"


def test_back_and_forward_bring_a_query_back(page: Any) -> None:
    ask(page)
    ask(page, "fitor gowen")
    page.go_back()
    page.locator("#status").filter(has_text="all models after").wait_for()
    assert page.get_by_label("Query", exact=True).input_value() == QUERY
    page.locator("#query-tokens button").filter(has_text="desel").wait_for()
    page.go_forward()
    page.locator("#query-tokens button").filter(has_text="gowen").wait_for()
    page.go_back()
    page.go_back()
    page.locator("#models").wait_for(state="hidden")
    assert page.get_by_label("Query", exact=True).input_value() == ""


@pytest.mark.parametrize(
    ("address", "line"),
    [
        ("q=baran&depth=few", "depth: Input should be a valid integer, unable to parse string"),
        ("q=baran&depth=101", "depth: Input should be less than or equal to 100"),
        ("q=baran&cross_encoder_depth=21", "cross_encoder_depth is 21: this server allows at most"),
        ("q=baran&models=dual_encoder,bm25", "The address names a model “bm25” that this server"),
        ("q=baran&view=heads", "The address names a view “heads”: there are maxsim and attention."),
        ("q=baran&pid=%3Cb%3E", "no passage '<b>' in the collection"),
        ("q=baran&pid=p3&view=attention&layer=9", "layer is 9: give one of 0, 1"),
        ("q=baran&pid=p3&view=attention&layer=x", "layer: Input should be a valid integer"),
        ("q=%E2%80%8B", "holds no character that the tokenizer knows"),
    ],
)
def test_an_odd_address_gets_one_line(page: Any, url: str, address: str, line: str) -> None:
    page.goto(f"{url}/?{address}")
    told = page.locator(".error").filter(has_text=line)
    told.wait_for()
    time.sleep(0.1)
    assert "\n" not in told.inner_text().strip()


def test_a_server_that_is_gone_is_told(page: Any) -> None:
    page.route("**/search/stream", lambda route: route.abort())
    page.get_by_label("Query", exact=True).fill(QUERY)
    page.keyboard.press("Enter")
    page.locator("#status.error").wait_for()
    assert page.locator("#status").inner_text() == "The server cannot be reached."
    page.unroute("**/search/stream")
    page.reload()


def test_the_language_is_the_browsers_and_can_be_changed(page: Any, url: str) -> None:
    page.add_init_script(
        "Object.defineProperty(navigator, 'languages', {get: () => ['zh-Hans-CN', 'en']})"
    )
    page.goto(url)
    page.get_by_label("查询", exact=True).fill(QUERY)
    page.get_by_role("button", name="搜索").click()
    page.locator("#status").filter(has_text="全部模型").wait_for()
    assert page.get_by_role("heading", name="后期交互", exact=True).is_visible()
    assert page.locator("html").get_attribute("lang") == "zh-CN"
    page.locator("#language").select_option("en")
    assert page.get_by_role("heading", name="Late interaction", exact=True).is_visible()
    assert "all models after" in page.locator("#status").inner_text()
    page.goto(url)  # which keeps it
    page.get_by_label("Query", exact=True).wait_for()


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
    page.locator("#theme").select_option(scheme)
    ask(page)
    for view in ("MaxSim", "Attention"):
        page.get_by_role("tab", name=view).click()
        page.locator("#pair mark:visible").first.wait_for()
        page.evaluate(  # the strongest highlight
            "document.querySelectorAll('mark, .tokens button')"
            ".forEach((e) => e.style.setProperty('--weight', 1))"
        )
        found = page.evaluate(CONTRAST)
        assert len(found) > 8
        assert {name: ratio for name, ratio in found.items() if ratio < 4.5} == {}


def test_dark_is_dark(page: Any) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(ground)
    assert light != dark
    page.locator("#theme").select_option("light")
    assert page.evaluate(ground) == light
    page.reload()
    assert page.evaluate(ground) == light
    page.locator("#theme").select_option("auto")
    assert page.evaluate(ground) == dark


def test_it_fits_a_narrow_screen(page: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    ask(page)
    choose(page, HOSTILE_PID)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    attend(page, HOSTILE_PID)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 360)])
def test_axe_finds_nothing_serious(page: Any, language: str, scheme: str, width: int) -> None:
    axe = axe_source()
    if axe is None:
        pytest.skip("no axe-core: pip install axe-playwright-python, or ERNIESEARCH_AXE=axe.min.js")
    page.set_viewport_size({"width": width, "height": 740})
    ask(page)
    choose(page, HOSTILE_PID)
    page.locator("#theme").select_option(scheme)
    page.locator("#language").select_option(language)
    page.evaluate(axe)  # the page's policy allows no other way in

    def serious() -> list[str]:
        found = page.evaluate("axe.run()")
        assert len(found["passes"]) > 15
        return [
            f"{violation['id']}: {node['html']}"
            for violation in found["violations"]
            if violation["impact"] in ("serious", "critical")
            for node in violation["nodes"]
        ]

    assert serious() == []
    page.locator("#tab-attention").click()
    page.locator("#maps mark").first.wait_for()
    assert serious() == []
    page.locator("#help-button").click()
    assert serious() == []
