"""report.html: figures and texts of the files, whatever state they are in, and nothing else."""

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markupsafe import Markup
from support.logged_run import SYSTEMS, write_logged_run
from support.processes import ROOT
from support.tiny import write_beir

from erniesearch.cli import main
from erniesearch.data.collection import load_beir
from erniesearch.data.trec import ranked_passages, read_trec_run, write_trec_run
from erniesearch.errors import UserError
from erniesearch.evaluation import measures
from erniesearch.evaluation.query_metrics import read_query_metrics, write_query_metrics
from erniesearch.evaluation.significance import Comparison, compare
from erniesearch.evaluation.table import Report
from erniesearch.report import query_wins, watch
from erniesearch.report.benchmark_report import figures_document, tell_figures
from erniesearch.report.charts import Line, lines, thinned
from erniesearch.report.document import Chart
from erniesearch.report.run_files import Notes, read_log
from erniesearch.report.run_report import run_document
from erniesearch.run_folder import COSTS, RunFolder, claimed, mark_done

MARKUP = "<script>alert(1)</script><img src=x onerror=alert(2)> $\\frac{1}{2}$ &amp; ]]>"


class Page(HTMLParser):
    """Elements with their attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag in tags]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts and an id that are markup."""
    root = write_beir(tmp_path_factory.mktemp("data"), num_passages=30, num_queries=24)
    for name in ("corpus.jsonl", "queries.jsonl"):
        records = [json.loads(line) for line in (root / name).read_text().splitlines()]
        for record in records:
            record["text"] += f" {record['_id']} {MARKUP}"
        (root / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return root


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return write_logged_run(tmp_path_factory.mktemp("runs") / "tiny", data)


@pytest.fixture(scope="module")
def html(finished: Path) -> str:
    document = run_document(finished, None, None)
    assert document.notes == []
    return document.html()


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what takes long and is tried by other tests: drawings and resampling."""
    chart = Chart("drawn elsewhere", Markup(), "")
    for module in ("training_section", "teaching_section", "ablation_report"):
        monkeypatch.setattr(f"erniesearch.report.{module}.lines", lambda *_, **__: chart)
    for module in ("benchmark_report", "costs_section", "ablation_report"):
        monkeypatch.setattr(f"erniesearch.report.{module}.bars", lambda *_, **__: chart)
    monkeypatch.setattr(query_wins, "compare", lambda *_: Comparison(2, 0.0, 1.0, 1.0))


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "tiny"))


def test_figures_are_those_of_the_files(finished: Path, html: str) -> None:
    page = Page(html)
    report = Report.load(finished)
    for row in report.rows:
        for e in row.metrics.values():
            assert f"{e.mean:.3f} [{e.low:.3f}, {e.high:.3f}]" in page.text
    for warning in report.teacher_check.warnings():
        assert warning[1:] in page.text
    assert "there is something to distil" in page.text
    log = read_log(finished / "stages" / "cascade" / "metrics.jsonl", Notes())
    for name in ("ce_to_li", "li_to_de", "grad_norm", "learning_rate/student"):
        assert name in page.text
    means = [log.figures[name][-15:].mean() for name in ("accuracy_ce", "accuracy_group_de")]
    ahead = means[0] - means[1]
    assert f"a difference of {100 * ahead:+.1f} points" in page.text
    for told in ("dropped by the teacher as likely answers", "The teacher dropped 33.3%",
                 "validation: nDCG@10", "tokens a second", "700", "61 s"):  # fmt: skip
        assert told in page.text


def test_paired_tests_and_cards_are_those_of_the_runs(
    finished: Path, html: str, data: Path
) -> None:
    """Recomputed from the runs; every card's ranks too."""
    collection = load_beir(data, "test")
    runs = {name: read_trec_run(finished / "runs" / f"{file}.trec")
            for name, file in SYSTEMS.items()}  # fmt: skip
    values = {name: measures.per_query_metrics(run, collection.qrels)["MRR@10"]
              for name, run in runs.items()}  # fmt: skip
    control, system = "dual-encoder, contrastive alone", "dual-encoder, after cascade"
    text = re.sub(r"\s+", " ", Page(html).text)
    for name in SYSTEMS:
        apart = values[name] - values[control]
        if name == control:
            continue
        p = compare(values[name], values[control], 42).p_randomisation
        assert f"{apart.mean():+.3f} [" in text
        counts = [int(x) for x in ((apart > 0).sum(), (apart == 0).sum(), (apart < 0).sum())]
        cells = rf"{re.escape(name)}\s*[+-]\d\.\d+ \[.*?\]\s*{p:.3f}\s*".replace("0.000", "<.001")
        assert re.search(cells + r"\s*".join(map(str, counts)), text), name
    apart = values[system] - values[control]
    qids = list(collection.qrels)
    for i in np.argsort(-apart, kind="stable")[: query_wins.EACH_WAY]:
        place = [sorted(runs[name][qids[i]], key=lambda p, n=name: -runs[n][qids[i]][p]).index(
            next(iter(collection.qrels[qids[i]]))) + 1 for name in (system, control)]  # fmt: skip
        assert f"{qids[i]} · {apart[i]:+.3f}" in text
        card = text[text.index(f"{qids[i]} · ") :]
        assert [int(x) for x in re.findall(r"at rank (\d+)", card)[:2]] == place


def test_hostile_texts_are_only_text(html: str) -> None:
    page = Page(html)
    assert page.of("script", "img", "iframe", "object", "link") == [
        {"rel": "icon", "href": "data:,"}
    ]
    assert not any(name.startswith("on") for _, a in page.elements for name in a)
    assert "<script>alert(1)</script><img" in page.text
    policy = next(a["content"] for a in page.of("meta") if a.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_nothing_comes_from_outside(html: str) -> None:
    page = Page(html)
    for _, attributes in page.elements:
        for name, value in attributes.items():
            if name in ("href", "src", "xlink:href", "srcset", "action", "data"):
                assert value is not None
                assert value.startswith("#") or value == "data:,"
    assert not re.search(r"url\((?!#)|@import", html)
    anchors = {a["href"] for a in page.of("a")}
    assert anchors <= {f"#{a['id']}" for _, a in page.elements if a.get("id")}


def test_tables_and_charts_can_be_heard(html: str) -> None:
    page = Page(html)
    assert len(page.of("svg")) == len(page.of("figcaption")) > 15
    assert all(a["role"] == "img" and a["aria-label"] for a in page.of("svg"))
    assert {a.get("scope") for a in page.of("th")} == {"col", "row"}
    assert len(page.of("caption")) == len(page.of("table"))
    ids = [a["id"] for _, a in page.elements if a.get("id")]
    assert len(ids) == len(set(ids))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


@pytest.mark.usefixtures("cheap")
def test_a_run_that_goes_on(tmp_path: Path, data: Path) -> None:
    root = write_logged_run(tmp_path / "run", data, finished=False)
    with (root / "stages" / "cascade" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 31, "lo')  # being written: no odd line
    document = run_document(root, None, 5)
    assert document.notes == []
    assert document.subtitle.startswith("cascade, update 30 of 60, about 15 s left")
    html = document.html()
    page = Page(html)
    assert "The table comes when the run has been evaluated" in page.text
    assert len(page.of("script")) == 1
    script = re.search(r"<script>(.*)</script>", html, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(a["content"] for a in page.of("meta") if a.get("http-equiv"))
    assert policy.endswith(f"script-src 'sha256-{digest}'")
    assert "location.reload()" in script
    assert run_document(root, None, None).html().count("<script") == 0


@pytest.mark.usefixtures("cheap")
def test_a_run_that_has_just_begun_or_has_no_teacher(tmp_path: Path, data: Path) -> None:
    root = write_logged_run(tmp_path / "run", data, finished=False)
    for name in ("cascade", "mine", "teacher_check"):
        shutil.rmtree(root / "stages" / name)
    document = run_document(root, None, None)
    assert document.notes == []
    titles = [section.title for section in document.sections if section.blocks]
    assert titles == ["Results", "Training", "Time and memory", "Settings"]
    shutil.rmtree(root / "stages")
    document = run_document(root, None, None)
    assert document.subtitle == "nothing has begun"
    assert document.html()


ODD = {
    "no JSON": ("stages/cascade/metrics.jsonl", "{oops}\n", r"metrics\.jsonl:61: not valid JSON"),
    "bytes": ("stages/cascade/metrics.jsonl", b"\xff\xfe\n", r"metrics\.jsonl:61: not UTF-8"),
    "no step": ("stages/cascade/metrics.jsonl", '{"loss": 1}\n', r"metrics\.jsonl:61: no update"),
    "step back": ("stages/cascade/metrics.jsonl", '{"step": 3, "loss": 1}\n', r":61: no update"),
    "a text": ("stages/cascade/metrics.jsonl", '{"step": 99, "loss": "x"}\n', r":61: 'loss' is no"),
    "a list": ("stages/cascade/validation.jsonl", "[1]\n", r"validation\.jsonl:7: expected a JSON"),
    "several": ("stages/cascade/metrics.jsonl", "{oops}\n" * 3, r":61: .*\(3 such lines in all\)"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_line_is_one_sentence(kind: str, copy: Path) -> None:
    file, content, told = ODD[kind]
    with (copy / file).open("ab") as handle:
        handle.write(content if isinstance(content, bytes) else content.encode())
    log = read_log(copy / file, notes := Notes())
    assert len(notes.said) == 1
    assert re.search(told, notes.said[0])
    assert len(log) == (60 if "metrics" in file else 6)


@pytest.mark.parametrize("file", [
    "evaluation.json", "config.yaml", "environment.json", "stages/mine/done.json",
    "stages/teacher_check/done.json", "stages/cascade/costs.json", "runs/per_query.parquet",
    "runs/dual_encoder-cascade.trec",
])  # fmt: skip
@pytest.mark.parametrize("content", ["", "[]", '{"rows": 3}'])
@pytest.mark.usefixtures("cheap")
def test_a_damaged_file_costs_its_part_alone(file: str, content: str, copy: Path) -> None:
    (copy / file).write_text(content)
    document = run_document(copy, None, None)
    titles = [section.title for section in document.sections if section.blocks]
    assert {"Training", "Time and memory", "Settings"} <= {*titles}
    assert len(document.notes) <= 2, document.notes
    harmless = (content in ("{", "") and file.endswith("trec")) or content == '{"rows": 3}'
    assert document.notes or harmless or file == "config.yaml", document.notes
    assert all("\n" not in note for note in document.notes)


def test_values_that_are_no_numbers_leave_gaps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1.5}\n{"step": 2, "a": null, "b": NaN}\n'
                    '{"step": 3, "a": 2, "speed": {"seconds": 1e999}}\n')  # fmt: skip
    log = read_log(path, notes := Notes())
    assert notes.said == []
    assert log.steps.tolist() == [1, 2, 3]
    np.testing.assert_equal(log.figures["a"], [1.5, np.nan, 2])
    assert np.isnan(log.figures["b"]).all()
    assert np.isnan(log.figures["speed/seconds"]).all()
    assert lines("b", [Line("b", log.steps, log.figures["b"])]) is None


def test_thinning_keeps_every_peak() -> None:
    rng = np.random.default_rng(0)
    x, y = np.arange(10_000), rng.normal(size=10_000)
    for place in (0, 4321, 9999):
        y[place] = 50 + place
    few_x, few_y = thinned(x, y)
    assert len(few_x) <= 300
    assert (np.diff(few_x) > 0).all()
    assert set(few_y) <= set(y)
    assert {50, 50 + 4321, 50 + 9999, y.min()} <= set(few_y)
    assert len(thinned(x[:300], y[:300])[1]) == 300


def test_a_runs_queries_are_looked_up_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "run.trec"
    run = {f"q{i}": {f"p{j}": float(-j) for j in range(i % 7 + 1)} for i in range(300)}
    write_trec_run(path, run, "x")
    whole = read_trec_run(path)
    wanted = {f"q{i}": place for i, place in ((0, 0.9), (1, 0.0), (12, 0.04), (120, 1.0), (299, 0))}
    found = ranked_passages(path, wanted, 4)
    assert found == {qid: list(whole[qid])[:4] for qid in wanted}
    assert ranked_passages(path, {"q": 0.5, "q30": 0.1, "q300": 0.1}, 4)["q"] == []
    (tmp_path / "empty.trec").touch()
    for name in ("empty.trec", "gone.trec"):
        with pytest.raises(UserError, match=rf"{name}: cannot be read"):
            ranked_passages(tmp_path / name, wanted, 4)


def test_metrics_by_query_come_back(tmp_path: Path) -> None:
    values = {name: {"MRR@10": np.array([0.5, 1.0, 0.0]), "R@10": np.array([1.0, 1.0, 0.0])}
              for name in ("one", "two, with 'marks'")}  # fmt: skip
    path = tmp_path / "runs" / "per_query.parquet"
    write_query_metrics(path, ["a", "b", "c"], values)
    qids, found = read_query_metrics(path)
    assert qids == ["a", "b", "c"]
    for name, metrics in values.items():
        for metric, column in metrics.items():
            np.testing.assert_array_equal(found[name][metric], column)


def test_runs_are_read_where_no_metrics_were_kept(copy: Path, html: str) -> None:
    RunFolder(copy).query_metrics.unlink()
    document = run_document(copy, None, None)
    assert document.notes == []
    cards = re.compile(r'<section aria-labelledby="queries-won-and-lost">.*?</section>', re.DOTALL)
    assert cards.search(document.html())[0] == cards.search(html)[0]


def test_intervals_take_no_memory_by_the_query(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn in blocks, and the same numbers as drawn at once."""
    values = np.random.default_rng(2).random(333)
    picks = np.random.default_rng([42, 5]).integers(333, size=(1000, 333))
    low, high = np.percentile(values[picks].mean(1), [2.5, 97.5])
    for block in (10, 333 * 7, 10**9):
        monkeypatch.setattr(measures, "_BLOCK", block)
        found = measures.estimate(values, 42)
        assert (found.low, found.high) == (low, high)


def test_many_queries_are_compared_by_the_t_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    values, baseline = np.random.default_rng(5).random((2, 800)).round(2)
    resampled = query_wins.paired(values, baseline, 42)
    monkeypatch.setattr(query_wins, "MOST_RESAMPLED", 799)
    found = query_wins.paired(values, baseline, 42)
    assert found.difference == pytest.approx(resampled.difference)
    assert (found.low, found.high) == pytest.approx((resampled.low, resampled.high), abs=4e-3)
    assert found.p == pytest.approx(resampled.p, abs=0.02)
    assert (found.wins, found.ties, found.losses) == (
        (values > baseline).sum(), (values == baseline).sum(), (values < baseline).sum()
    )  # fmt: skip


@pytest.mark.usefixtures("cheap")
def test_baseline_is_chosen_or_named(finished: Path) -> None:
    html = run_document(finished, "BM25", None).html()
    assert "Difference in MRR@10 to “BM25”" in Page(html).text
    with pytest.raises(UserError, match=r"--baseline BM24: no row .*did you mean 'BM25'"):
        run_document(finished, "BM24", None)


@pytest.mark.usefixtures("cheap")
def test_missing_texts_leave_the_tests(copy: Path) -> None:
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(re.sub(r"path: .*data.*", "path: gone/data", text, count=1))
    document = run_document(copy, None, None)
    assert len(document.notes) == 1
    assert "gone/data: no collection there" in document.notes[0]
    assert "queries won" in document.html()


# Watching.


@pytest.mark.usefixtures("cheap")
def test_watch_writes_what_changes_and_ends_with_the_run(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_logged_run(tmp_path / "run", data, finished=False)
    done = write_logged_run(tmp_path / "done", data)
    out, looks = tmp_path / "report.html", []

    def pause(seconds: float) -> None:
        looks.append(out.stat().st_mtime_ns)
        assert seconds == 3
        assert len(looks) < 6
        if len(looks) == 3:  # after two looks at nothing new
            with (root / "stages/cascade/metrics.jsonl").open("a") as log:
                log.write('{"step": 31, "loss": 1.0}\n')
        if len(looks) == 4:
            shutil.rmtree(root)
            shutil.copytree(done, root)
            (root / "stages/evaluate/done.json").touch()

    watch.watch(root, out, 3, pause=pause)
    assert looks[0] == looks[1] == looks[2] < looks[3]
    told = capsys.readouterr().err.splitlines()
    assert [line[9:] for line in told[1:]] == [
        f"{out}: cascade, update 31 of 60, about 14 s left in it", f"{out}: finished",
        f"{root} is finished",
    ]  # fmt: skip
    assert "<script" not in out.read_text()


@pytest.mark.usefixtures("cheap")
def test_watch_ends_cleanly_and_tries_again(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_logged_run(tmp_path / "run", data, finished=False)
    folder = tmp_path / "full"
    folder.write_text("")  # in the way of the report's folder
    pauses: Iterator[Any] = iter([folder.unlink, None])

    def pause(seconds: float) -> None:
        step = next(pauses)
        if step is None:
            raise KeyboardInterrupt
        step()

    watch.watch(root, folder / "report.html", 1, pause=pause)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3
    assert "not written" in told[0]
    assert "cascade, update 30" in told[1]
    assert told[2].endswith(f"stopped; {folder / 'report.html'} stays as it is")
    assert [path.name for path in folder.iterdir()] == ["report.html"]


def test_a_report_never_fails_what_it_reports(
    copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert watch.write_report(copy / "nowhere") is None
    assert "no run and no ablation" in capsys.readouterr().err

    def broken(*_: object) -> None:
        raise RuntimeError("a\nbug")

    monkeypatch.setattr(watch, "run_document", broken)
    assert watch.write_report(copy) is None
    assert capsys.readouterr().err.strip().endswith("could not be written (RuntimeError: a bug)")


# Ablations and benchmarks.


@pytest.fixture(scope="module")
def ablation(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    root = tmp_path_factory.mktemp("ablation")
    for arm in ("plain", "distilled"):
        write_logged_run(root / "arms" / arm / "seed-1", data, updates=12)
    shutil.copy(ROOT / "docs" / "results" / "controls-pycode.json", root / "results-test.json")
    return root


def test_an_ablation_is_reported(ablation: Path) -> None:
    document = watch.folder_document(ablation, None, 5)
    assert document.notes == []
    assert document.reload_seconds is None  # every arm is done
    page = Page(document.html())
    found = json.loads((ablation / "results-test.json").read_text())
    for c in found["comparisons"]:
        assert f"{c['difference']:+.4f} [{c['low']:+.4f}, {c['high']:+.4f}]" in page.text
    assert {"ce_to_li", "de"} <= set(re.findall(r"\w+", page.text))
    (ablation / "arms" / "plain" / "seed-1" / "stages" / "cascade" / "done.json").unlink()
    document = watch.folder_document(ablation, None, 5)
    assert "not done yet: plain seed 1" in document.subtitle
    assert document.reload_seconds == 5
    with pytest.raises(UserError, match="--baseline"):
        watch.folder_document(ablation, "plain")


@pytest.mark.usefixtures("cheap")
def test_every_benchmark_is_reported() -> None:
    files = sorted((ROOT / "docs" / "results").glob("*.json"))
    page = Page(figures_document(files).html())
    assert {path.stem for path in files} <= set(re.findall(r"[\w-]+", page.text))
    serving = json.loads((ROOT / "docs" / "results" / "serving.json").read_text())
    for row in serving["milliseconds"].values():
        assert f"{row['p95']:.4g}" in page.text


def test_a_benchmark_ends_in_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "speed.json"
    tell_figures({"median": {"ours": {"seconds": 1.25}, "<b>": {"seconds": 2.5}}}, out, "python x")
    assert json.loads(capsys.readouterr().out) == json.loads(out.read_text())
    page = Page((tmp_path / "speed.html").read_text())
    assert "1.25" in page.text
    assert "<b>" in page.text
    assert len(page.of("svg")) == 1


# The command, and what steps leave for it.


@pytest.mark.parametrize(("arguments", "told"), [
    ([], "give --run DIR, or --figures FILE"), (["--run", "gone"], "gone: no such folder"),
    (["--figures", "gone.json"], "gone.json: no such file"),
    (["--figures", "x.json", "--watch"], "go with --run"),
    (["--run", ".", "--every", "0"], "--every 0: must be 1 or more"),
    (["--run", "."], "no run and no ablation"), (["--run", ".", "--out", "."], "a folder"),
])  # fmt: skip
def test_mistakes_are_one_line(
    arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


@pytest.mark.usefixtures("cheap")
def test_the_command_writes_and_prints(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--run", str(copy)]) == 0
    out, err = capsys.readouterr()
    assert "dual-encoder, after cascade" in out
    assert f"report: {copy / 'report.html'}" in err
    assert "dual-encoder, after cascade" in (copy / "report.html").read_text()


def test_a_step_leaves_its_costs(tmp_path: Path) -> None:
    folder = tmp_path / "stages" / "mine"
    with claimed(folder, "x"):
        mark_done(folder, "x")
    costs = json.loads((folder / COSTS).read_text())
    assert 0 <= costs["seconds"] < 60
    assert 50 << 20 < costs["peak_memory_bytes"] < 64 << 30
    with pytest.raises(RuntimeError), claimed(tmp_path / "stages" / "other", "x"):
        raise RuntimeError
    assert not (tmp_path / "stages" / "other" / COSTS).exists()
