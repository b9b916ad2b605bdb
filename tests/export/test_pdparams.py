"""Paddle's weight files are pickles: arrays come out of them, and nothing in them runs."""

import os
import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from erniesearch.errors import UserError
from erniesearch.export.pdparams import NAME_TABLE, read_pdparams

ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)


def write(path: Path, content: object, protocol: int = 2) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


class Call:
    """Pickled as a call of ``function(*arguments)`` on reading."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_come_back_in_every_protocol(tmp_path: Path, protocol: int) -> None:
    content = OrderedDict(a=ARRAY, b=np.asfortranarray(ARRAY), c=ARRAY[:0], d=np.float32([7]))
    read = read_pdparams(write(tmp_path / "w.pdparams", content, protocol))
    assert list(read) == ["a", "b", "c", "d"]
    for name, value in content.items():
        assert read[name].dtype == torch.float32
        np.testing.assert_array_equal(read[name].numpy(), value)


def test_older_numpy_is_read(tmp_path: Path) -> None:
    """NumPy 1 names its module numpy.core, NumPy 2 numpy._core."""
    for name in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        raw = pickle.dumps({"a": ARRAY}, protocol=0)
        assert b"numpy._core.multiarray" in raw
        path = tmp_path / "w.pdparams"
        path.write_bytes(raw.replace(b"numpy._core.multiarray", name))
        np.testing.assert_array_equal(read_pdparams(path)["a"].numpy(), ARRAY)


def test_paddles_wrapping_is_taken_off(tmp_path: Path) -> None:
    content = {
        "plain": ARRAY,
        "named": ("linear_0.w_0", ARRAY),
        "reduced": Call(tuple, ("linear_1.w_0", ARRAY)),
        NAME_TABLE: {"plain": "linear_2.w_0"},
    }
    read = read_pdparams(write(tmp_path / "w.pdparams", content))
    assert list(read) == ["plain", "named", "reduced"]
    for tensor in read.values():
        np.testing.assert_array_equal(tensor.numpy(), ARRAY)


def test_half_precision_is_widened(tmp_path: Path) -> None:
    values = torch.tensor([1.5, -2.25, 3e38])
    content = {
        "fp16": np.float16([1.5, -2.25]),
        "bf16": values.bfloat16().view(torch.int16).numpy().view(np.uint16),
    }
    read = read_pdparams(write(tmp_path / "w.pdparams", content))
    assert read["fp16"].tolist() == [1.5, -2.25]
    assert torch.equal(read["bf16"], values.bfloat16().float())


def malicious() -> dict[str, object]:
    return {
        "os.system": Call(os.system, "touch RAN"),
        "builtins.eval": Call(eval, "open('RAN', 'w')"),
        "builtins.exec": Call(exec, "open('RAN', 'w')"),
        "builtins.getattr": Call(getattr, ARRAY, "tofile"),
        "numpy.load": Call(np.load, "RAN"),
    }


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", malicious())
def test_nothing_in_the_file_runs(
    tmp_path: Path, name: str, protocol: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "w.pdparams", {"a": ARRAY, "b": malicious()[name]}, protocol)
    with pytest.raises(UserError, match=r"w\.pdparams: refused: asks for '\S+'") as caught:
        read_pdparams(path)
    assert name.split(".")[-1] in str(caught.value)
    assert not (tmp_path / "RAN").exists()


def test_a_dotted_name_does_not_reach_through_an_admitted_one(tmp_path: Path) -> None:
    """Protocol 4 may name attributes, as in numpy ndarray.tofile."""
    path = tmp_path / "w.pdparams"
    path.write_bytes(b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.")
    with pytest.raises(UserError, match=r"refused: asks for 'numpy\.ndarray\.tofile'"):
        read_pdparams(path)


def test_bytes_in_another_encoding_are_refused(tmp_path: Path) -> None:
    """codecs.encode would import a module by the encoding's name."""
    path = tmp_path / "w.pdparams"
    path.write_bytes(b"c_codecs\nencode\n(Vtext\nVsome_module\ntR.")
    with pytest.raises(UserError, match="refused: bytes in encoding 'some_module'"):
        read_pdparams(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([ARRAY], "holds a list, expected a dict of arrays"),
        ({}, "holds no tensors"),
        ({NAME_TABLE: {}}, "holds no tensors"),
        ({"a": "text"}, "'a' is a str, expected an array"),
        ({"a": np.int64([1])}, "'a' has dtype int64, expected floating point"),
        ({"a": np.array([None])}, "'a' has dtype object, expected floating point"),
    ],
)
def test_other_contents_are_named(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_pdparams(write(tmp_path / "w.pdparams", content))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "w.pdparams", {"a": ARRAY})
    whole = path.read_bytes()
    for raw in (whole[: len(whole) // 2], b"", b"PK\x03\x04", b"\x80\x02" + struct.pack("<I", 7)):
        path.write_bytes(raw)
        with pytest.raises(UserError, match=r"w\.pdparams: (refused|not a readable)"):
            read_pdparams(path)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_pdparams(tmp_path / "other.pdparams")
