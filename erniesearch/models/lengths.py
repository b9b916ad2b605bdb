"""Texts of similar length together, so that little padding is computed."""

import torch
from torch import Tensor

ROWS = 16
"""Texts of a block at least; on a CPU, fewer would keep the cores waiting."""
GPU_WORK = 25_000_000
"""On a GPU, texts of a block times the hidden size squared: about 80 tokens a text, it is then as
busy with a layer as the host is with starting it twice. Computed, not measured."""


def blocks_by_length(
    lengths: Tensor, device: torch.device, hidden_size: int
) -> list[tuple[Tensor, int]]:
    """The rows of texts of ``lengths`` ``[N]`` (on the CPU), shortest first, in blocks that are
    worth a pass of their own; and each block's longest.

    How many depends on N and the model alone: ranks whose texts differ must call their models
    equally often, because ZeRO-3 gathers at each call.
    """
    number = max(1, len(lengths) // least_rows(device.type, hidden_size))
    blocks = lengths.argsort(stable=True).chunk(number)
    return [(rows.to(device, non_blocking=True), int(lengths[rows].max())) for rows in blocks]


def least_rows(device_type: str, hidden_size: int) -> int:
    """Texts of a block at least."""
    return ROWS if device_type == "cpu" else max(ROWS, GPU_WORK // hidden_size**2)


def put_back(parts: list[Tensor], blocks: list[tuple[Tensor, int]]) -> Tensor:
    """Rows of blocks in the order that they had before :func:`blocks_by_length`; something empty
    stays so."""
    whole = torch.cat(parts)
    order = torch.cat([rows for rows, _ in blocks]).argsort()
    return whole[order] if whole.numel() else whole
