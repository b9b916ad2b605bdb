"""Files of other formats, and damage to files."""

import gzip
import json
from pathlib import Path
from typing import Any

OLDER = {
    "query_id": 5, "query": "who?", "answers": ["me"],
    "positive_passages": [{"docid": "a", "title": "T", "text": "me", "score": 3.5}],
    "negative_passages": [{"docid": "b", "text": "you", "score": 1},
                          {"docid": "c", "text": "it", "score": -2.25}],
}  # fmt: skip


def lines(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def msmarco(root: Path) -> list[Path]:
    lines(root / "collection.tsv", ["7\tthe cat", "8\tthe dog", '9\ta "quoted" one', "10\tno é"])
    lines(root / "para.title.txt", ["7\tCat", "8\t-", "10\tTen"])
    lines(root / "queries.train.tsv", ["1\twho meows\r", "2\twho barks"])
    lines(root / "queries.dev.small.tsv.gz", ["3\twho quotes"])
    lines(root / "qrels.train.tsv", ["1\t0\t7\t1", "2 0 8 1"])
    lines(root / "qrels.dev.small.tsv", ["3\t0\t9\t1"])
    lines(root / "qidpidtriples.train.tsv", ["1\t7\t8", "1\t7\t10\r", "1\t7\t8", "2\t8\t9"])
    lines(root / "README.md", ["read me"])
    return [root]


def replace_line(path: Path, number: int, content: str | bytes) -> None:
    """Put ``content`` in place of a line, counted from 1."""
    lines = path.read_bytes().splitlines()
    lines[number - 1] = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(b"\n".join(lines) + b"\n")
