"""A Chromium without a window, and a server for it to look at."""

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

CHROMIUM = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)
needs_browser = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("playwright") is None, reason="no playwright: pip install -e .[browser]"
    ),
    pytest.mark.skipif(
        CHROMIUM is None, reason="no Chromium: apt-get install chromium (about 300 MB), or a Chrome"
    ),
]


@contextmanager
def served(app: Any) -> Iterator[str]:
    """The address of a server that has started."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@contextmanager
def chromium(**options: Any) -> Iterator[Any]:
    """A browser's context with an empty profile; ``options`` are playwright's of a context."""
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as driver, TemporaryDirectory() as profile:
        context = driver.chromium.launch_persistent_context(
            profile, executable_path=CHROMIUM, args=arguments, headless=True, **options
        )
        yield context
        context.close()


def axe_source() -> str | None:
    """axe-core, the accessibility checker: of ``ERNIESEARCH_AXE``, a file, or of the package
    axe-playwright-python; None if there is none."""
    named = os.environ.get("ERNIESEARCH_AXE")
    if named:
        return Path(named).read_text(encoding="utf-8")
    found = find_spec("axe_playwright_python")
    if found is None or found.origin is None:
        return None
    return Path(found.origin).with_name("axe.min.js").read_text(encoding="utf-8")
