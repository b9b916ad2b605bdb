"""The HTTP service: every route, every mistake, many clients, start and stop."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from fastapi.testclient import TestClient
from support.browser import served
from support.finished_run import write_run
from support.processes import ROOT, start
from support.tiny import ALL_TERMS

from erniesearch.cli import main
from erniesearch.errors import UserError
from erniesearch.search.app import create_app
from erniesearch.search.system import SearchSystem

QUERY = "baran desel fitor"
MODELS = ("dual_encoder", "late_interaction", "cross_encoder")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, tiny_data, tiny_model, ALL_TERMS)
    return folder


@pytest.fixture(scope="module")
def system(run_dir: Path) -> SearchSystem:
    return SearchSystem.from_run(run_dir)


@pytest.fixture(scope="module")
def client(system: SearchSystem) -> TestClient:
    app = create_app(system, late_interaction_depth=30, cross_encoder_depth=12)
    return TestClient(app, raise_server_exceptions=False)


# --- routes -------------------------------------------------------------------------------------


def test_search_answers_as_the_system_does(client: TestClient, system: SearchSystem) -> None:
    answer = client.post("/search", json={"query": QUERY, "depth": 7})
    assert answer.status_code == 200
    expected = system.search(QUERY, 7, 30, 12)
    found = answer.json()
    assert [hit["pid"] for hit in found["hits"]] == [hit.pid for hit in expected.hits]
    for model in MODELS:
        assert found["rankings"][model] == [
            {"pid": hit.pid, "text": hit.text, "scores": hit.scores, "ranks": hit.ranks}
            for hit in expected.rankings[model]
        ]
    assert (found["query"], found["query_truncated"]) == (QUERY, False)
    assert found["query_tokens"] == found["query_tokens_read"] == 5
    assert client.get("/search", params={"query": QUERY, "depth": 7}).json() == found


def test_a_request_may_ask_for_less(client: TestClient) -> None:
    body = {"query": QUERY, "late_interaction_depth": 4, "cross_encoder_depth": 0}
    found = client.post("/search", json=body).json()
    assert len(found["rankings"]["dual_encoder"]) == 10
    assert len(found["rankings"]["late_interaction"]) == 4
    assert found["rankings"]["cross_encoder"] == []
    assert found["hits"][0]["scores"]["cross_encoder"] is None


def test_a_long_query_is_cut_and_the_answer_says_so(client: TestClient) -> None:
    found = client.post("/search", json={"query": "baran desel " * 100}).json()
    assert found["query_truncated"] is True
    assert (found["query_tokens"], found["query_tokens_read"]) == (202, 8)


def test_a_stream_ends_with_what_search_answers(client: TestClient) -> None:
    body = {"query": QUERY, "depth": 4}
    expected = client.post("/search", json=body).json()
    answer = client.post("/search/stream", json=body)
    assert answer.headers["content-type"] == "application/x-ndjson"
    steps = [json.loads(line) for line in answer.text.splitlines()]
    assert [step["model"] for step in steps if step["result"]] == list(MODELS)
    assert close(steps[-1]["result"], expected)
    first = steps[0]["result"]["rankings"]
    assert first["dual_encoder"][0]["pid"] == expected["rankings"]["dual_encoder"][0]["pid"]
    assert first["late_interaction"] == first["cross_encoder"] == []


def test_an_error_in_a_stream_that_has_begun_is_its_last_line(
    client: TestClient, system: SearchSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert system.scorer is not None
    for error, told in (
        (UserError("the index is gone"), "the index is gone"),
        (RuntimeError("secret"), "internal error; the server's log says more"),
    ):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(system.scorer, "scores", fail)
        answer = client.post("/search/stream", json={"query": QUERY})
        assert answer.status_code == 200
        lines = [json.loads(line) for line in answer.text.splitlines()]
        assert lines[-1] == {"detail": told}
        assert [line["model"] for line in lines[:-1] if line["result"]] == list(MODELS[:2])


def test_a_search_ends_when_its_caller_has_gone(
    system: SearchSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert system.scorer is not None
    scores, calls = system.scorer.scores, []

    def slow(queries: list[str], passages: list[str]) -> Any:
        calls.append(len(queries))
        time.sleep(0.1)
        return scores(queries, passages)

    monkeypatch.setattr(system.scorer, "scores", slow)
    monkeypatch.setattr("erniesearch.search.system.MOMENT", 1e-9)  # a passage at a time
    body = {"query": QUERY, "late_interaction_depth": 0, "cross_encoder_depth": 20}
    with served(create_app(system)) as url, httpx.Client(timeout=60) as client:
        with client.stream("POST", f"{url}/search/stream", json=body) as answer:
            assert json.loads(next(answer.iter_lines()))["model"] == "dual_encoder"
        time.sleep(1)
        begun = len(calls)
        time.sleep(0.5)
    assert len(calls) == begun < 10


def test_attention_is_the_systems(client: TestClient, system: SearchSystem) -> None:
    answer = client.post("/attention", json={"query": QUERY, "pid": "p3", "layer": 0})
    assert answer.status_code == 200
    found, expected = answer.json(), system.attention(QUERY, "p3", 0)
    assert (found["layer"], found["tau"], found["text"]) == (0, 1.0, system.text("p3"))
    assert found["cross_encoder"] == expected.cross_encoder.tolist()
    assert found["late_interaction"] == expected.late_interaction.tolist()
    assert found["divergence"] == pytest.approx(sum(found["divergences"]) / 3)
    for side in ("query_tokens", "passage_tokens"):
        text = QUERY if side == "query_tokens" else found["text"]
        for token in found[side]:
            assert text[token["start"] : token["end"]] == token["text"]
    again = client.get("/attention", params={"query": QUERY, "pid": "p3", "layer": 0})
    assert again.json() == found


def test_every_route_is_in_the_schema(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    assert set(schema["paths"]) == {
        "/search", "/search/stream", "/explain", "/attention", "/health"
    }  # fmt: skip
    text = json.dumps(schema)
    for reference in set(re.findall(r'"#/components/schemas/(\w+)"', text)):
        assert reference in schema["components"]["schemas"]
    answers = schema["paths"]["/search/stream"]["post"]["responses"]
    (line,) = answers["200"]["content"].items()
    assert line[0] == "application/x-ndjson"
    assert set(line[1]["schema"]["properties"]) == {"model", "done", "total", "result"}
    assert list(answers["422"]["content"]) == ["application/json"]


def test_explain_adds_up(client: TestClient) -> None:
    found = client.post("/search", json={"query": QUERY}).json()
    hit = found["rankings"]["late_interaction"][0]
    answer = client.post("/explain", json={"query": QUERY, "pid": hit["pid"]})
    assert answer.status_code == 200
    explained = answer.json()
    assert explained["text"] == hit["text"]
    assert explained["score"] == pytest.approx(hit["scores"]["late_interaction"], abs=2e-3)
    assert sum(m["similarity"] for m in explained["matches"]) == pytest.approx(explained["score"])
    first = explained["matches"][1]
    assert first["query"] == {"text": "baran", "start": 0, "end": 5, "special": False}
    passage = first["passage"]
    if not passage["special"]:
        assert hit["text"][passage["start"] : passage["end"]] == passage["text"]
    again = client.get("/explain", params={"query": QUERY, "pid": hit["pid"]})
    assert again.json() == explained


def test_health_says_what_is_served(client: TestClient) -> None:
    assert client.get("/health").json() == {
        "status": "ok", "passages": 60, "models": list(MODELS), "first_stage": "dual_encoder",
        "max_depth": 100, "late_interaction_depth": 30, "cross_encoder_depth": 12,
        "attention_layers": [0, 1],
    }  # fmt: skip


def test_the_page_loads_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert "http://" not in page.text
    assert "https://" not in page.text
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert client.get("/docs").status_code == 404  # FastAPI's would load scripts from elsewhere


def test_the_pages_texts_are_in_step() -> None:
    """Both languages have the same texts with the same places to fill, and the page asks for no
    other."""
    folder = ROOT / "erniesearch" / "search" / "page"
    texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
    assert list(texts) == ["en", "zh"]
    assert list(texts["en"]) == list(texts["zh"])
    for key, english in texts["en"].items():
        chinese, places = texts["zh"][key], re.compile(r"\{\w+\}")
        assert sorted(places.findall(english)) == sorted(places.findall(chinese)), key
        assert english.strip(), key
        assert chinese.strip(), key
    markup, script = ((folder / name).read_text("utf-8") for name in ("page.html", "page.js"))
    named = set(re.findall(r'data-(?:text|label)="(\w+)"', markup))
    named |= set(re.findall(r'\b(?:t|say|Error)\((?:last \? )?"(\w+)"', script))
    assert named <= set(texts["en"])
    written = markup + script
    made = {f"map_{model}" for model in MODELS[1:]} | {f"{model}_depth" for model in MODELS[1:]}
    unused = [key for key in texts["en"] if f'"{key}"' not in written and key not in made]
    assert unused == []


# --- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "problem"),
    [
        ("/search", {}, "query: Field required"),
        ("/search", {"query": ""}, "query: String should have at least 1 character"),
        ("/search", {"query": " \n"}, "the query is empty"),
        ("/search", {"query": "\u200b"}, "the query '\\u200b' holds no character"),
        ("/search", {"query": "a" * 10_001}, "query: String should have at most 10000 characters"),
        ("/search", {"query": 7}, "query: Input should be a valid string"),
        ("/search", {"query": QUERY, "depth": 0}, "depth: Input should be greater than or equal"),
        ("/search", {"query": QUERY, "depth": 101}, "depth: Input should be less than or equal to"),
        ("/search", {"query": QUERY, "depth": "few"}, "depth: Input should be a valid integer"),
        ("/search", {"query": QUERY, "dept": 3}, "dept: Extra inputs are not permitted"),
        (
            "/search",
            {"query": QUERY, "late_interaction_depth": 31},
            "late_interaction_depth is 31: this server allows at most 30",
        ),
        ("/search", {"query": QUERY, "cross_encoder_depth": -1}, "cross_encoder_depth: Input"),
        ("/search", [QUERY], "Input should be a valid dictionary"),
        ("/explain", {"query": QUERY}, "pid: Field required"),
        ("/explain", {"query": " ", "pid": "p1"}, "the query is empty"),
        ("/search/stream", {"query": " "}, "the query is empty"),
        ("/search/stream", {"query": "\u200b"}, "the query '\\u200b' holds no character"),
        ("/search/stream", {"query": QUERY, "depth": 0}, "depth: Input should be greater than or"),
        (
            "/search/stream",
            {"query": QUERY, "cross_encoder_depth": 13},
            "is 13: this server",
        ),
        ("/attention", {"query": QUERY}, "pid: Field required"),
        ("/attention", {"query": "", "pid": "p1"}, "query: String should have at least 1"),
        ("/attention", {"query": QUERY, "pid": "p1", "layer": "last"}, "layer: Input should be a"),
        ("/attention", {"query": QUERY, "pid": "p1", "layer": 7}, "layer is 7: give one of 0, 1"),
        ("/attention", {"query": QUERY, "pid": "p1", "head": 1}, "head: Extra inputs are not"),
    ],
)
def test_odd_requests_get_422_and_a_reason(
    client: TestClient, path: str, body: Any, problem: str
) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == 422, answer.text
    assert list(answer.json()) == ["detail"]
    assert problem in answer.json()["detail"]
    assert "\n" not in answer.json()["detail"]


@pytest.mark.parametrize(
    "content", [b"{", b'{"query": "\xff"}', b'{"query": "\\ud800"}', b"\x00", b"[" * 100_000]
)
def test_bytes_that_are_no_json_get_422(client: TestClient, content: bytes) -> None:
    answer = client.post("/search", content=content, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422), answer.text
    assert isinstance(answer.json()["detail"], str)


def test_unknown_passage_route_and_method(client: TestClient) -> None:
    for path in ("/explain", "/attention"):
        answer = client.post(path, json={"query": QUERY, "pid": "<b>p</b>"})
        assert answer.status_code == 404
        assert answer.json() == {"detail": "no passage '<b>p</b>' in the collection"}
    assert client.get("/serach").status_code == 404
    assert client.get("/serach").json() == {"detail": "Not Found"}
    wrong = client.delete("/search")
    assert wrong.status_code == 405
    assert wrong.json() == {"detail": "Method Not Allowed"}
    assert "allow" in wrong.headers


def test_an_internal_error_shows_no_traceback(
    client: TestClient, system: SearchSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(system, "_search", fail)
    answer = client.post("/search", json={"query": QUERY})
    assert answer.status_code == 500
    assert answer.json() == {"detail": "internal error; the server's log says more"}


# --- a server of its own ------------------------------------------------------------------------


def serve(*arguments: str) -> tuple[subprocess.Popen[str], str]:
    """Start a process that serves; returns it and its address."""
    process = start("-u", *arguments)
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if " passages on http://" in line:
            return process, line.split()[-1]
    raise AssertionError("".join(lines))


@pytest.fixture
def server(run_dir: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = ("-m", "erniesearch.cli", "serve", "--run", str(run_dir), "--port", "0")
    process, url = serve(*command, "--late_interaction_depth", "30", "--cross_encoder_depth", "12")
    yield process, url
    if process.poll() is None:
        process.kill()
    process.communicate(timeout=60)


def close(found: Any, expected: Any) -> bool:
    """Equal, but for scores that a batch of another size rounds another way."""
    if isinstance(expected, float) and isinstance(found, float):
        return abs(found - expected) < 2e-3
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(close(found[k], expected[k]) for k in found)
    return bool(found == expected)


def test_fifty_clients_at_once_then_the_end(
    server: tuple[subprocess.Popen[str], str], system: SearchSystem
) -> None:
    process, url = server
    queries = list(system.data.queries.values())
    requests = [queries[i % len(queries)] for i in range(200)]
    with httpx.Client(base_url=url, timeout=120) as client:
        alone = {query: client.post("/search", json={"query": query}).json() for query in queries}
        expected = {query: system.search(query, 10, 30, 12) for query in queries}
        for query, answer in alone.items():
            assert [hit["pid"] for hit in answer["hits"]] == [h.pid for h in expected[query].hits]

    def ask(share: list[str]) -> list[Any]:
        with httpx.Client(base_url=url, timeout=120) as client:
            return [client.post("/search", json={"query": query}) for query in share]

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(ask, [requests[i::50] for i in range(50)]))
    found = [answer for share in answers for answer in share]
    assert [answer.status_code for answer in found] == [200] * 200
    for i, share in enumerate(answers):
        for query, answer in zip(requests[i::50], share, strict=True):
            body = answer.json()
            assert body["query"] == query
            for model in MODELS:
                ours, theirs = body["rankings"][model], alone[query]["rankings"][model]
                for one, other in zip(ours, theirs, strict=True):
                    assert close(one["scores"][model], other["scores"][model])

    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, "")
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


SLOW = """
import sys, time
from erniesearch.search.system import SearchSystem
from erniesearch.search.server import serve

class Slow(SearchSystem):
    def _search(self, *arguments):
        print("begun", flush=True)
        time.sleep(2)
        return super()._search(*arguments)

serve(lambda: Slow.from_run(sys.argv[1]), "127.0.0.1", 0)
print("end")
"""


def test_sigterm_lets_what_has_begun_be_answered(run_dir: Path) -> None:
    process, url = serve("-c", SLOW, str(run_dir))
    assert process.stdout is not None
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.get, f"{url}/search", params={"query": QUERY}, timeout=60)
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGTERM)
        assert answer.result().status_code == 200
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, "end\n")


def test_ctrl_c_ends_with_130(server: tuple[subprocess.Popen[str], str]) -> None:
    process, url = server
    assert httpx.get(f"{url}/health", timeout=60).status_code == 200
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in output


# --- mistakes at the start ----------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert main(["serve", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("erniesearch: error: ")
    assert error.count("\n") == 1
    return error


def test_a_port_in_use_is_refused_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        error = refused(capsys, "--run", "nowhere", "--port", port)
    assert f"port {port} of 127.0.0.1 is in use: give another --port" in error


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--run", "nowhere", "--port", "0"], "nowhere/config.yaml: no such file"),
        (["--run", "nowhere", "--port", "65536"], "--port 65536: must be 0 to 65535"),
        (["--run", "nowhere", "--host", "no.such.host.invalid"], "cannot listen on --host no.such"),
        (["--run", "x", "--cross_encoder_depth", "-2"], "--cross_encoder_depth -2: must be 0 or"),
        (["--port", "0"], "nothing to search: give --run DIR"),
    ],
)
def test_odd_options_are_refused(
    argv: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert problem in refused(capsys, *argv)


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["serve", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for option in ("run", "host", "port", "late_interaction_depth", "cross_encoder_depth"):
        assert f"--{option} " in shown


def test_a_package_that_is_missing_is_named(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "uvicorn.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'uvicorn'\", name='uvicorn')\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "kernels")])
    result = subprocess.run(
        [sys.executable, "-m", "erniesearch.cli", "serve", "--run", str(run_dir)],
        capture_output=True, text=True, check=False, timeout=120,
        env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr == (
        "erniesearch: error: the package uvicorn is not installed: pip install fastapi uvicorn\n"
    )
