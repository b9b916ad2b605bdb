"""Seeded damage to files and configurations, for the fuzz tests."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import yaml

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1.5, 10**30, -(10**30), float("inf"), float("nan"), "", " ", "x",
    "ten", "1e400", "\x00", "a\tb", "\u202e\u0645\u0631", "x" * 20_000, [], [1, [2]], {}, {"a": {}},
)  # fmt: skip


def mutate_file(content: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """Name of the damage and the damaged file."""
    damage = FILE_DAMAGES[int(rng.integers(len(FILE_DAMAGES)))]
    return damage.__name__, damage(content, rng)


def flip_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    damaged = bytearray(content)
    for position in rng.integers(len(damaged), size=rng.integers(1, 9)):
        damaged[position] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def random_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    start = int(rng.integers(len(content)))
    return content[:start] + rng.bytes(int(rng.integers(1, 40))) + content[start:]


def truncate(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: int(rng.integers(len(content)))]


def invalid_utf8(content: bytes, rng: np.random.Generator) -> bytes:
    odd = (b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\x80")
    start = int(rng.integers(len(content)))
    return content[:start] + odd[int(rng.integers(len(odd)))] + content[start:]


def byte_order_mark(content: bytes, rng: np.random.Generator) -> bytes:
    return b"\xef\xbb\xbf" + content


def utf16(content: bytes, rng: np.random.Generator) -> bytes:
    return content.decode().encode("utf-16")


def carriage_returns(content: bytes, rng: np.random.Generator) -> bytes:
    return content.replace(b"\n", (b"\r\n", b"\r")[int(rng.integers(2))])


def _lines(content: bytes) -> list[bytes]:
    return content.splitlines(keepends=True)


def _gap(line: bytes) -> bytes:
    """What separates a table's columns."""
    return b"\t" if b"\t" in line else b" "


def repeat_line(content: bytes, rng: np.random.Generator) -> bytes:
    lines = _lines(content)
    lines.append(lines[int(rng.integers(len(lines)))])
    return b"".join(lines)


def drop_line(content: bytes, rng: np.random.Generator) -> bytes:
    lines = _lines(content)
    del lines[int(rng.integers(len(lines)))]
    return b"".join(lines)


def shuffle_columns(content: bytes, rng: np.random.Generator) -> bytes:
    """Columns of a table, or the values of an object's keys, in another order on some lines."""
    lines = _lines(content)
    for row in rng.integers(len(lines), size=3):
        line = lines[row].rstrip(b"\n")
        if not line.startswith(b"{"):
            gap = _gap(line)
            columns = line.split(gap)
            lines[row] = gap.join([columns[i] for i in rng.permutation(len(columns))]) + b"\n"
        else:
            record = json.loads(line)
            values = list(record.values())
            order = rng.permutation(len(values))
            swapped = {key: values[i] for key, i in zip(record, order, strict=True)}
            lines[row] = json.dumps(swapped).encode() + b"\n"
    return b"".join(lines)


def wrong_value(content: bytes, rng: np.random.Generator) -> bytes:
    """One field becomes a value of another type or size, or its key gets another name."""
    lines = _lines(content)
    row = int(rng.integers(len(lines)))
    line = lines[row].rstrip(b"\n")
    value = ODD_VALUES[int(rng.integers(len(ODD_VALUES)))]
    if line.startswith(b"{"):
        record = json.loads(line)
        key = list(record)[int(rng.integers(len(record)))]
        if rng.random() < 0.3:
            record[key + "x"] = record.pop(key)
        else:
            record[key] = value
        line = json.dumps(record).encode()
    else:
        columns = line.split(_gap(line))
        columns[int(rng.integers(len(columns)))] = str(value).encode()
        line = _gap(line).join(columns)
    lines[row] = line + b"\n"
    return b"".join(lines)


def huge_number(content: bytes, rng: np.random.Generator) -> bytes:
    """More digits than Python turns into a number, and a number beyond any float."""
    digits = (b"9" * 5000, b"1e999", b"-" + b"9" * 40)[int(rng.integers(3))]
    lines = _lines(content)
    row = int(rng.integers(len(lines)))
    if lines[row].startswith(b"{"):
        lines[row] = b'{"_id": ' + digits + b', "text": "a"}\n'
    else:
        gap = _gap(lines[row])
        columns = lines[row].rstrip(b"\n").split(gap)
        columns[-1 if len(columns) == 3 else -2] = digits  # the score
        lines[row] = gap.join(columns) + b"\n"
    return b"".join(lines)


def deep_nesting(content: bytes, rng: np.random.Generator) -> bytes:
    depth = int(rng.integers(100, 200_000))
    lines = _lines(content)
    lines[int(rng.integers(len(lines)))] = b'{"_id":' + b"[" * depth + b"]" * depth + b"}\n"
    return b"".join(lines)


def nothing_left(content: bytes, rng: np.random.Generator) -> bytes:
    return (b"", b"\n", b"\x00" * 100, b"null\n", b"[]\n", b"{}\n")[int(rng.integers(6))]


FILE_DAMAGES: tuple[Callable[[bytes, np.random.Generator], bytes], ...] = (
    flip_bytes, random_bytes, truncate, invalid_utf8, byte_order_mark, utf16, carriage_returns,
    repeat_line, drop_line, shuffle_columns, wrong_value, huge_number, deep_nesting, nothing_left,
)  # fmt: skip


def mutate_config(content: str, rng: np.random.Generator) -> tuple[str, bytes]:
    """Name of the damage and the damaged YAML file."""
    if rng.random() < 0.25:
        damages = (flip_bytes, truncate, invalid_utf8, byte_order_mark, utf16, carriage_returns,
                   repeat_line, drop_line, nothing_left, yaml_oddity)  # fmt: skip
        damage = damages[int(rng.integers(len(damages)))]
        return damage.__name__, damage(content.encode(), rng)
    tree = yaml.safe_load(content)
    names = []
    for _ in range(int(rng.integers(1, 3))):
        places = list(_places(tree))
        parent, key = places[int(rng.integers(len(places)))]
        change = CONFIG_DAMAGES[int(rng.integers(len(CONFIG_DAMAGES)))]
        names.append(f"{change.__name__} {key}")
        change(tree, parent, key, rng)
    return ", ".join(names), yaml.safe_dump(tree, allow_unicode=True).encode("utf-8")


def _places(tree: Any) -> Any:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield tree, key
            yield from _places(value)


def drop_key(tree: dict, parent: dict, key: Any, rng: np.random.Generator) -> None:
    del parent[key]


def rename_key(tree: dict, parent: dict, key: Any, rng: np.random.Generator) -> None:
    names: tuple[Any, ...] = (f"{key}s", str(key)[1:], 3, None, True, "", "a.b", f" {key}")
    parent[names[int(rng.integers(len(names)))]] = parent.pop(key)


def retype(tree: dict, parent: dict, key: Any, rng: np.random.Generator) -> None:
    parent[key] = ODD_VALUES[int(rng.integers(len(ODD_VALUES)))]


def out_of_range(tree: dict, parent: dict, key: Any, rng: np.random.Generator) -> None:
    numbers = (-1, 0, 1e-30, -0.5, 1e30, 2**31, 2**63, 10**30, float("inf"), float("nan"))
    parent[key] = numbers[int(rng.integers(len(numbers)))]


def nest_wrongly(tree: dict, parent: dict, key: Any, rng: np.random.Generator) -> None:
    """A value one level deeper, or moved to the top."""
    value = parent.pop(key)
    if rng.random() < 0.5:
        parent[key] = {key: value}
    else:
        tree[key] = value


CONFIG_DAMAGES = (drop_key, rename_key, retype, out_of_range, nest_wrongly)


def yaml_oddity(content: bytes, rng: np.random.Generator) -> bytes:
    oddities = (
        b"seed: !!python/object/apply:os.getcwd []\n", b"seed: *nothing\n",
        b"a: &a [x]\nb: &b [*a,*a,*a,*a,*a,*a]\nseed: [*b,*b,*b,*b]\n",
        b"seed: " + b"[" * 3000 + b"]" * 3000 + b"\n", b"\tseed: 1\n", b"--- 1\n--- 2\n",
        b"seed: 2026-02-30\n", b"seed: 0o9\n", b"seed: |\n  1\n", b"? [a, b]\n: 1\n",
        b"<<: {seed: 1}\n", b"seed: " + b"9" * 5000 + b"\n", b"&a seed: *a\n", b"%YAML 9.9\n---\n",
    )  # fmt: skip
    odd = oddities[int(rng.integers(len(oddities)))]
    return odd + content if rng.random() < 0.5 else content + odd
