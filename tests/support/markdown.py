"""Markdown files of the project, and what they are made of."""

import re
from pathlib import Path
from typing import NamedTuple

from support.processes import ROOT

FENCE = re.compile(
    r"(?P<not_run><!-- not run: [^\n]+ -->\n+)?"
    r"^(?P<indent> *)(?P<ticks>`{3,})(?P<language>\w*)[^\n]*\n"
    r"(?P<code>.*?)^(?P=indent)(?P=ticks)$", re.MULTILINE | re.DOTALL,
)  # fmt: skip
CHINESE = ".zh-CN"
NOT_OURS = {".venv", "site", "runs", "data"}


class Block(NamedTuple):
    """A fenced block: where it stands, its language, its text, and whether it says that it is not
    run, in a comment right above it."""

    where: str
    language: str
    code: str
    not_run: bool


def pages() -> list[Path]:
    """Markdown files of the repository, from its root; Chinese twins are left out."""
    found = (path.relative_to(ROOT) for path in ROOT.rglob("*.md"))
    kept = (path for path in found if not NOT_OURS & {*path.parts})
    return sorted(path for path in kept if not path.stem.endswith(CHINESE))


def twin(page: Path) -> Path:
    return page.with_name(f"{page.stem}{CHINESE}.md")


def read(page: Path) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: Path) -> list[Block]:
    text = read(page)
    return [
        Block(f"{page}:{text.count(chr(10), 0, found.start('ticks')) + 1}", found["language"],
              found["code"], bool(found["not_run"]))
        for found in FENCE.finditer(text)
    ]  # fmt: skip


def without_code(text: str) -> str:
    """The text alone: no blocks, no code in a line, no comments."""
    return re.sub(r"`[^`\n]+`|<!--.*?-->", "", FENCE.sub("", text), flags=re.DOTALL)
