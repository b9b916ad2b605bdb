"""Paddle's weight files (``*.pdparams``): a pickle of arrays, read without running what is in it.

``paddle.save`` pickles a dict of NumPy arrays. The reader below resolves the handful of names
that arrays are made of and refuses every other one, so a file cannot call anything else.
"""

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import _reconstruct  # type: ignore[attr-defined]
from torch import Tensor

from erniesearch.errors import UserError

NAME_TABLE = "StructuredToParameterName@@"
"""Paddle's own entry beside the tensors: its internal names for them."""


def _encode(text: str, encoding: str) -> bytes:
    """``_codecs.encode`` as protocol 2 uses it for bytes; another codec would be looked up."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in encoding {encoding!r}")
    return text.encode("latin1")


def _from_buffer(
    buffer: bytes, dtype: np.dtype[Any], shape: tuple[int, ...], order: str
) -> np.ndarray:
    """``numpy.core.numeric._frombuffer``, protocol 5's form of an array."""
    return np.frombuffer(buffer, dtype=dtype).reshape(shape, order=order)  # type: ignore[call-overload]


_ARRAY_NAMES: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode,
    ("builtins", "tuple"): tuple,  # newer versions wrap a tensor as tuple((name, array))
    ("__builtin__", "tuple"): tuple,
    ("builtins", "bytes"): lambda: b"",  # an empty array before protocol 3; never with a length
    ("__builtin__", "bytes"): lambda: b"",
} | {
    (f"numpy.{core}.{module}", name): function
    for core in ("core", "_core")
    for module, name, function in (
        ("multiarray", "_reconstruct", _reconstruct),
        ("numeric", "_frombuffer", _from_buffer),
    )
}


class _ArrayUnpickler(pickle.Unpickler):
    """Admits what NumPy arrays need; any other global ends the reading before it is resolved."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ARRAY_NAMES[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"asks for '{module}.{name}', which an array does not need"
            ) from None


def read_pdparams(path: Path) -> dict[str, Tensor]:
    """Tensors by Paddle's structured names, in fp32.

    Half precision is widened; Paddle stores bfloat16 as uint16.

    Raises:
        UserError: for a file that is missing, damaged or holds anything but arrays; a name that
            arrays do not need is reported and never resolved.
    """
    try:
        with path.open("rb") as handle:
            content = _ArrayUnpickler(handle, encoding="latin1").load()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: refused: {error}; only arrays are read") from None
    except Exception as error:  # a damaged pickle raises whatever its opcodes run into
        raise UserError(
            f"{path}: not a readable .pdparams file: {type(error).__name__}: {error}"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a dict of arrays")
    tensors = {str(k): _tensor(path, str(k), v) for k, v in content.items() if k != NAME_TABLE}
    if not tensors:
        raise UserError(f"{path}: holds no tensors")
    return tensors


def _tensor(path: Path, name: str, value: object) -> Tensor:
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
        value = value[1]
    if not isinstance(value, np.ndarray):
        raise UserError(f"{path}: '{name}' is a {type(value).__name__}, expected an array")
    array = np.ascontiguousarray(value)
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16).float()
    if array.dtype.kind != "f":
        raise UserError(f"{path}: '{name}' has dtype {array.dtype}, expected floating point")
    return torch.from_numpy(array.astype(np.float32))
