"""Texts of similar length together, so that little padding is computed."""

import torch
from torch import Tensor

ROWS = 16
"""Texts of a block at least; fewer would keep the cores waiting."""


def blocks_by_length(mask: Tensor) -> list[Tensor]:
    """The rows of ``[N, L]``, shortest first, in blocks that are worth a pass of their own.

    How many depends on N alone: ranks whose texts differ must call their models equally often,
    because ZeRO-3 gathers at each call. On a GPU all rows are one block: it does the padding
    faster than it starts further kernels.
    """
    number = len(mask) // ROWS
    if mask.device.type != "cpu" or number < 2:
        return [torch.arange(len(mask), device=mask.device)]
    return list(mask.sum(1).argsort(stable=True).chunk(number))


def put_back(parts: list[Tensor], blocks: list[Tensor]) -> Tensor:
    """Rows of blocks in the order that they had before :func:`blocks_by_length`; something empty
    stays so."""
    whole = torch.cat(parts)
    return whole[torch.cat(blocks).argsort()] if whole.numel() else whole
