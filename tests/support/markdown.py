"""Markdown files of the project, and what they are made of."""

import os
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from support.processes import ROOT

FENCE = re.compile(
    r"(?P<not_run><!-- not run: [^\n]+ -->\n+)?"
    r"^(?P<indent> *)(?P<ticks>`{3,})(?P<language>\w*)[^\n]*\n"
    r"(?P<code>.*?)^(?P=indent)(?P=ticks)$", re.MULTILINE | re.DOTALL,
)  # fmt: skip
CHINESE = ".zh-CN"
NOT_OURS = {"site", "runs", "node_modules"}


class Block(NamedTuple):
    """A fenced block: where it stands, its language, its text, and whether it says that it is not
    run, in a comment right above it."""

    where: str
    language: str
    code: str
    not_run: bool


@cache
def pages() -> list[Path]:
    """Markdown files of the repository, from its root; Chinese twins are left out."""
    found = []
    for folder, inner, names in os.walk(ROOT):
        inner[:] = [name for name in inner if name not in NOT_OURS and not name.startswith(".")]
        found += [Path(folder, name).relative_to(ROOT) for name in names if name.endswith(".md")]
    return sorted(path for path in found if not path.stem.endswith(CHINESE))


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
