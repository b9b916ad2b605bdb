"""The collectives of training in a group of one rank: NCCL on a GPU, gloo on a CPU.

A group of one takes shortcuts in :mod:`erniesearch.distributed`; they are closed here.
"""

from contextlib import ExitStack
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from acceptance.check import Context, require
from erniesearch import distributed
from erniesearch.objectives.exchange import TokenGather


class _One(int):
    """1 that does not say so when it is compared."""

    def __eq__(self, other: object) -> bool:
        return False

    def __gt__(self, other: object) -> bool:
        return True

    __hash__ = int.__hash__


def check(context: Context) -> None:
    """Gathers forward and backward, barriers, objects; each against what one rank must give."""
    device = distributed.initialize()
    context.tell(backend=dist.get_backend(), device=str(device))
    done: list[str] = []
    try:
        with ExitStack() as stack:
            stack.enter_context(patch.object(distributed, "world_size", lambda: _One(1)))
            for dtype in (torch.float32, torch.bfloat16):
                _gather_rows(device, dtype)
                _gather_tokens(device, dtype)
                done.append(str(dtype).removeprefix("torch."))
            _small(device)
        distributed.barrier()
    finally:
        dist.destroy_process_group()
    context.tell(gathered=done)


def _gather_rows(device: torch.device, dtype: torch.dtype) -> None:
    rows = torch.randn(6, 5, 4, device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn_like(rows)
    for gathered in (
        distributed.RowGather(rows).take(rows),
        distributed.gather_rows(rows),
        distributed.gather_rows(rows, torch.tensor([6])),
    ):
        rows.grad = None
        gathered.backward(gradient.transpose(0, 1).contiguous().transpose(0, 1))
        _equal("gathered rows", gathered, rows)
        _equal("gradient of gathered rows", rows.grad, gradient)
    numbers = torch.arange(7, device=device)
    _equal("gathered integers", distributed.gather_rows(numbers), numbers)


def _gather_tokens(device: torch.device, dtype: torch.dtype) -> None:
    tokens = torch.randn(4, 9, 8, device=device, dtype=dtype, requires_grad=True)
    lengths = torch.tensor([8, 0, 3, 5])  # none is as long as the padding
    on_cpu = torch.arange(9) < lengths[:, None]
    mask = on_cpu.to(device)
    gathered, gathered_mask = TokenGather(on_cpu, device).take(tokens, mask)
    gradient = torch.randn_like(gathered)
    gathered.backward(gradient)
    real = mask[:, :8, None]
    _equal("gathered mask", gathered_mask, mask[:, :8])
    _equal("gathered tokens", gathered, tokens[:, :8] * real)
    wanted = torch.zeros_like(tokens)
    wanted[:, :8] = gradient * real
    _equal("gradient of gathered tokens", tokens.grad, wanted)


def _small(device: torch.device) -> None:
    lengths = distributed.LengthGather(torch.tensor([3, 1 << 40]), device).take()
    _equal("gathered lengths", lengths, torch.tensor([[3, 1 << 40]]))
    for asked in (True, False):
        require(distributed.any_rank(asked, device) == asked, f"any_rank({asked})")
    means = distributed.mean_over_ranks({"a": torch.tensor(2.5, device=device)})
    require(means == {"a": 2.5}, f"mean over ranks: {means}")
    objects = distributed.gather_objects({"step": 3, "names": ["x"]})
    require(objects == [{"step": 3, "names": ["x"]}], f"gathered objects: {objects}")


def _equal(what: str, own: Tensor | None, wanted: Tensor) -> None:
    require(own is not None and torch.equal(own.detach(), wanted.detach()), f"{what} differ")
