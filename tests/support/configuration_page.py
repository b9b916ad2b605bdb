"""Both pages of configuration keys, from the code: ``python tests/support/configuration_page.py``.

The English page is what ``erniesearch run --help-all`` prints. The Chinese page has headings and
frame of its own; its tables and lists are the English page's, in their order.
"""

import re
from pathlib import Path

from erniesearch.commands import reference

DOCS = Path(__file__).resolve().parents[2] / "docs"
ENGLISH, CHINESE = DOCS / "configuration.md", DOCS / "configuration.zh-CN.md"
GENERATED = re.compile(r"(?:^[|-] ?.*\n)+", re.MULTILINE)
"""Lines of a table, or of a list."""
HEADS = {
    "| key | values | default | |": "| 键 | 取值 | 默认值 | |",
    "| theirs | here |": "| 其他库 | 这里 |",
}


def chinese(page: str) -> str:
    """The Chinese page with the tables and lists of today.

    Raises:
        ValueError: if it has more or fewer than the English page: add or remove a section.
    """
    blocks = GENERATED.findall(reference.full())
    found = GENERATED.findall(page)
    if len(found) != len(blocks):
        raise ValueError(f"{CHINESE.name}: {len(found)} tables and lists, not {len(blocks)}")
    for head, own in HEADS.items():
        blocks = [block.replace(head, own) for block in blocks]
    return GENERATED.sub(lambda _: blocks.pop(0), page)


if __name__ == "__main__":
    ENGLISH.write_text(reference.full(), encoding="utf-8")
    CHINESE.write_text(chinese(CHINESE.read_text(encoding="utf-8")), encoding="utf-8")
