"""A stand-in of the hub's HTTP interface, as far as a push asks it: repositories, branches, large
files, commits. Everything stays in memory."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


@dataclass
class Repository:
    """What lies on each branch, by path; and the messages of its commits."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    messages: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """Its state, and what was asked of it."""

    token: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    endpoint: str = ""
    refuses: dict[str, int] = field(default_factory=dict)  # part of a path: status


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"POST {self.path}")
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._answer(401, {"error": "Invalid username or password."})
        for part, status in self.hub.refuses.items():
            if part in self.path:
                return self._answer(status, {"error": "You don't have the rights"})
        for pattern, method in _ROUTES.items():
            if found := re.fullmatch(pattern, self.path.split("?")[0]):
                return method(self, body, *found.groups())
        return self._answer(404, {"error": "no such route"})

    def do_PUT(self) -> None:
        self.hub.requests.append("PUT large file")
        content = self.rfile.read(int(self.headers["Content-Length"]))
        digest = self.path.rsplit("/", 1)[1]
        assert hashlib.sha256(content).hexdigest() == digest
        self.hub.large[digest] = content
        self._answer(200, {})

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.hub.endpoint}/{name}"}
        if name in self.hub.repositories:
            return self._answer(409, url | {"error": "You already created this model repo"})
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repositories[name] = Repository(private)
        return self._answer(200, url)

    def _branch(self, body: bytes, name: str, branch: str) -> None:
        branches = self.hub.repositories[name].branches
        if branch in branches:
            return self._answer(409, {"error": "Reference already exists"})
        branches[branch] = dict(branches["main"])
        return self._answer(200, {})

    def _validate(self, body: bytes) -> None:
        assert json.loads(body)["content"].startswith("---\n")
        self._answer(200, {"errors": [], "warnings": []})

    def _preupload(self, body: bytes, name: str, branch: str) -> None:
        if branch not in self.hub.repositories[name].branches:
            return self._answer(404, {"error": f"Invalid rev id: {branch}"})
        files = [
            {"path": file["path"], "shouldIgnore": False,
             "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
            for file in json.loads(body)["files"]
        ]  # fmt: skip
        return self._answer(200, {"files": files})

    def _batch(self, body: bytes, name: str) -> None:
        objects = [
            {"oid": wanted["oid"], "size": wanted["size"],
             "actions": {"upload": {"href": f"{self.hub.endpoint}/large/{wanted['oid']}"}}}
            for wanted in json.loads(body)["objects"]
        ]  # fmt: skip
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _commit(self, body: bytes, name: str, branch: str) -> None:
        repository = self.hub.repositories[name]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repository.messages.append(value["summary"])
            elif line["key"] == "file":
                content = base64.b64decode(value["content"])
                repository.branches[branch][value["path"]] = content
            else:
                assert line["key"] == "lfsFile"
                repository.branches[branch][value["path"]] = self.hub.large[value["oid"]]
        oid = hashlib.sha1(body).hexdigest()
        url = f"{self.hub.endpoint}/{name}/commit/{oid}"
        self._answer(200, {"success": True, "commitOid": oid, "commitUrl": url})

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/vnd.git-lfs+json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES: dict[str, Any] = {
    "/api/repos/create": _Handler._create,
    "/api/validate-yaml": _Handler._validate,
    rf"/api/models/{_NAME}/branch/([\w.-]+)": _Handler._branch,
    rf"/api/models/{_NAME}/preupload/([\w.-]+)": _Handler._preupload,
    rf"/{_NAME}\.git/info/lfs/objects/batch": _Handler._batch,
    rf"/api/models/{_NAME}/commit/([\w.-]+)": _Handler._commit,
}


@contextmanager
def running_hub(token: str) -> Iterator[Hub]:
    """A hub on this machine; ``endpoint`` is its address."""
    hub = Hub(token)
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield hub
        server.shutdown()
        thread.join()
