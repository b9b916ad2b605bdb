"""What a report consists of, whatever it reports: sections of paragraphs, tables and charts; and
its HTML, in which every text is escaped."""

import base64
import hashlib
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from erniesearch.files import write_atomically

REPORT = "report.html"
RELOAD = """
const box = document.getElementById("reload");
box.checked = sessionStorage.getItem("reload") !== "off";
box.addEventListener("change", () => sessionStorage.setItem("reload", box.checked ? "on" : "off"));
setInterval(() => { if (box.checked) location.reload(); }, SECONDS * 1000);
"""
"""The only script, in pages of what is going on: who reads can stop the reloading."""


@dataclass(frozen=True)
class Text:
    """A paragraph; ``warns`` sets it off."""

    text: str
    warns: bool = False
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Table:
    """Rows of cells under named columns; the first cell of a row names it."""

    caption: str
    columns: list[str]
    rows: list[list[str]]
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Chart:
    """A drawing with its title, and what it shows in words."""

    title: str
    svg: Markup
    told: str
    kind: ClassVar[str] = "chart"


@dataclass(frozen=True)
class Charts:
    """Small charts side by side."""

    charts: list[Chart]
    kind: ClassVar[str] = "charts"


@dataclass(frozen=True)
class Preformatted:
    """The text of a file."""

    name: str
    text: str
    kind: ClassVar[str] = "preformatted"


@dataclass(frozen=True)
class Ranking:
    """One system's best passages for a query: (rank, pid, text, is relevant), and where the first
    relevant passage stands."""

    system: str
    found_at: str
    passages: list[tuple[int, str, str, bool]]


@dataclass(frozen=True)
class Card:
    """A query, its relevant passages (pid, text), and how systems rank."""

    query_id: str
    query: str
    change: str
    relevant: list[tuple[str, str]]
    rankings: list[Ranking]
    kind: ClassVar[str] = "card"


@dataclass(frozen=True)
class Fold:
    """Blocks that are shown when they are asked for."""

    summary: str
    blocks: list[Any]
    is_open: bool = False
    kind: ClassVar[str] = "fold"


@dataclass(frozen=True)
class Section:
    """A heading with what stands under it."""

    title: str
    blocks: list[Any]

    @property
    def anchor(self) -> str:
        """For links within the page."""
        return "".join(c if c.isalnum() else "-" for c in self.title.lower()).strip("-")


@dataclass(frozen=True)
class Document:
    """A report.

    Attributes:
        facts: what it is of: name and value.
        notes: what could not be read, a sentence each.
        reload_seconds: how often a reader's page loads itself again; None for a finished one.
    """

    title: str
    subtitle: str
    facts: dict[str, str]
    sections: list[Section]
    notes: list[str] = field(default_factory=list)
    reload_seconds: float | None = None

    def html(self) -> str:
        """The page."""
        script = policy = ""
        if self.reload_seconds is not None:
            script = RELOAD.replace("SECONDS", f"{self.reload_seconds:g}")
            digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
            policy = f"; script-src 'sha256-{digest}'"
        environment = Environment(
            loader=PackageLoader("erniesearch.report", ""), autoescape=True,
            undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        )  # fmt: skip
        return environment.get_template("report.html.j2").render(
            page=self, sections=[s for s in self.sections if s.blocks], script=Markup(script),
            policy=policy, written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %z"),
        )  # fmt: skip

    def save(self, path: Path) -> None:
        """Write the page; readers see the old one or the whole new one."""
        write_atomically(path, self.html())


def plain(text: str) -> str:
    """A text on one line, without control characters and halves of surrogate pairs."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def clipped(text: str, most: int) -> str:
    """On one line, at most so many characters."""
    text = plain(text[: 4 * most])
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"
