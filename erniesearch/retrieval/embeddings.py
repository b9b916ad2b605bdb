"""A folder of embeddings: ``manifest.json`` and one safetensors file per shard of rows.

    embeddings-00012.safetensors   rows [12 S, 13 S) of the collection, S the shard size
        embeddings   [n, dim]; for token vectors the texts one after the other, [total, dim]
        offsets      [n + 1] int64, token vectors only: text i has rows offsets[i] to offsets[i+1]
        ids          the ids' UTF-8 bytes, one after the other; id_offsets [n + 1] int64

A shard is written aside, synced and renamed: one that is there is whole.
"""

import itertools
import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from erniesearch.errors import UserError
from erniesearch.files import write_atomically, written_aside
from erniesearch.models.encoder import Side

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
What = Literal["vectors", "tokens"]
Dtype = Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True)
class Manifest:
    """What a folder of embeddings holds; two runs may share a folder only if all of it agrees.

    ``model`` and ``data`` are hashes of the files read; ``source`` says where they lay and is not
    compared.
    """

    what: What
    side: Side
    dtype: Dtype
    dim: int
    rows: int
    shard_size: int
    max_length: int
    precision: Literal["fp32", "bf16"]
    model: str
    data: str
    source: dict[str, str] = field(default_factory=dict)
    version: int = 1

    @property
    def num_shards(self) -> int:
        """Files that make the folder whole."""
        return -(-self.rows // self.shard_size)

    def bounds(self, shard: int) -> tuple[int, int]:
        """First row of a shard, and the row after its last."""
        return shard * self.shard_size, min((shard + 1) * self.shard_size, self.rows)


class Shard(NamedTuple):
    """Rows from ``start`` on; ``embeddings`` is mapped from the file, not read."""

    start: int
    ids: list[str]
    embeddings: Tensor
    offsets: Tensor | None


def claim(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, or find the same one there.

    Raises:
        UserError: if the folder holds embeddings made otherwise, or cannot be written.
    """
    if (folder / "manifest.json").is_file():
        ours, theirs = asdict(manifest), asdict(read_manifest(folder))
        for key in ours:
            if key != "source" and ours[key] != theirs[key]:
                raise UserError(
                    f"{folder / 'manifest.json'}: '{key}' is {theirs[key]!r} there and"
                    f" {ours[key]!r} here: name another --out, or delete the folder"
                )
        return
    if list(folder.glob("embeddings-*.safetensors")):
        raise UserError(f"{folder}: embeddings without manifest.json: name another --out")
    try:
        write_atomically(folder / "manifest.json", json.dumps(asdict(manifest), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}; change --out") from None


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder.

    Raises:
        UserError: if it is missing or damaged.
    """
    path = folder / "manifest.json"
    try:
        manifest = Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `erniesearch encode` makes the folder") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); delete the folder and encode again") from None
    if manifest.version != Manifest.version:
        raise UserError(f"{path}: version {manifest.version}, this program reads 1: encode again")
    return manifest


def shard_path(folder: Path, shard: int) -> Path:
    """File of a shard."""
    return folder / f"embeddings-{shard:05d}.safetensors"


def is_whole(folder: Path, manifest: Manifest, shard: int) -> bool:
    """Whether a shard is there with all its rows."""
    start, end = manifest.bounds(shard)
    try:
        with safe_open(shard_path(folder, shard), framework="pt") as file:
            rows = file.get_slice("id_offsets").get_shape()[0] - 1
            dim = file.get_slice("embeddings").get_shape()[1]
    except (OSError, SafetensorError):
        return False
    return bool(rows == end - start and dim == manifest.dim)


def write_shard(
    folder: Path,
    manifest: Manifest,
    shard: int,
    ids: Sequence[str],
    embeddings: Tensor,
    offsets: Tensor | None = None,
) -> None:
    """Write one shard aside, sync and rename; ``embeddings`` in the manifest's dtype."""
    encoded = [name.encode() for name in ids]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    tensors = {
        "embeddings": embeddings.contiguous(),
        "ids": torch.from_numpy(np.frombuffer(b"".join(encoded), dtype=np.uint8).copy()),
        "id_offsets": torch.from_numpy(ends),
    }
    if offsets is not None:
        tensors["offsets"] = offsets
    path = shard_path(folder, shard)
    try:
        with written_aside(path, uuid.uuid4().hex[:8]) as aside:
            save_file(tensors, aside)
    except (OSError, SafetensorError) as error:
        # Another run of the same work may have finished this shard and swept ours away.
        if not (isinstance(error, FileNotFoundError) and is_whole(folder, manifest, shard)):
            raise UserError(f"{path}: cannot be written: {error}") from None
    for left in folder.glob(f".{path.name}.*.tmp"):  # by runs that were killed, or ours
        left.unlink(missing_ok=True)


class Embeddings:
    """A finished folder, read shard by shard.

    Raises:
        UserError: if shards are missing or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        numbers = range(self.manifest.num_shards)
        missing = [k for k in numbers if not is_whole(self.folder, self.manifest, k)]
        if missing:
            raise UserError(
                f"{self.folder}: {len(missing)} of {len(numbers)} shards are missing or damaged,"
                f" the first is {shard_path(self.folder, missing[0]).name}: run the same"
                " `erniesearch encode` again to finish"
            )

    def __len__(self) -> int:
        return self.manifest.rows

    def shard(self, number: int) -> Shard:
        """One shard, memory-mapped."""
        with safe_open(shard_path(self.folder, number), framework="pt") as file:
            joined = bytes(file.get_tensor("ids").numpy())
            ends = file.get_tensor("id_offsets").tolist()
            ids = [joined[a:b].decode() for a, b in itertools.pairwise(ends)]
            tokens = self.manifest.what == "tokens"
            return Shard(
                self.manifest.bounds(number)[0], ids, file.get_tensor("embeddings"),
                file.get_tensor("offsets") if tokens else None,
            )  # fmt: skip

    def __iter__(self) -> Iterator[Shard]:
        return (self.shard(number) for number in range(self.manifest.num_shards))

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """Vectors of some rows, ascending, as fp32 ``[len(rows), dim]``."""
        assert self.manifest.what == "vectors"
        out = np.empty((len(rows), self.manifest.dim), dtype=np.float32)
        numbers = rows // self.manifest.shard_size
        for number in np.unique(numbers).tolist():
            shard = self.shard(number)
            own = numbers == number
            picked = torch.from_numpy(rows[own] - shard.start)
            out[own] = shard.embeddings[picked].float().numpy()
        return out
