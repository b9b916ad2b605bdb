"""Ranks, seeds and the gather with gradient.

Launchers differ in the variables they set; ``initialize`` reads torchrun's and DeepSpeed's
(RANK, LOCAL_RANK, WORLD_SIZE), Slurm's (one task per GPU: SLURM_PROCID, SLURM_LOCALID,
SLURM_NTASKS) and, with none of them, runs one process.
"""

import os
import secrets
import socket
from contextlib import suppress
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from erniesearch.errors import UserError

# Ports for rendezvous: below Linux's ephemeral range (32768 by default), above the well-known.
FIRST_PORT, EPHEMERAL = 20000, 32768


def rank() -> int:
    """Global rank of this process."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """Whether this is rank 0."""
    return rank() == 0


def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized():
        dist.barrier()


def gather_objects(value: object, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's (small) object in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value, group=group)
    return found


def free_port() -> int:
    """A TCP port that is free on this machine now and that no outgoing connection is given.

    The kernel hands ports of its ephemeral range to any connection at any moment, so one from
    there may be taken before the process that is to listen has started.
    """
    for _ in range(1000):
        port = secrets.randbelow(EPHEMERAL - FIRST_PORT) + FIRST_PORT
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise UserError(f"no TCP port between {FIRST_PORT} and {EPHEMERAL} is free on this machine")


def _read_slurm() -> None:
    """Fill in torch's variables from Slurm's when each task is one rank."""
    env = os.environ
    if "RANK" in env or "SLURM_PROCID" not in env or int(env.get("SLURM_NTASKS", 1)) < 2:
        return
    env["RANK"] = env["SLURM_PROCID"]
    env["LOCAL_RANK"] = env["SLURM_LOCALID"]
    env["WORLD_SIZE"] = env["SLURM_NTASKS"]
    if "MASTER_ADDR" not in env:
        raise UserError(
            "MASTER_ADDR is not set: in the batch script, export "
            "MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n1) before srun"
        )
    env.setdefault(
        "MASTER_PORT", str(FIRST_PORT + int(env["SLURM_JOB_ID"]) % (EPHEMERAL - FIRST_PORT))
    )


def read_launcher() -> torch.device:
    """Settle rank and number of processes from the launcher's variables; returns the device.

    Work without collectives needs no more than this.

    Raises:
        UserError: for more local ranks than GPUs, or a Slurm job without MASTER_ADDR.
    """
    _read_slurm()
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)
    if os.environ["WORLD_SIZE"] == "1":
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(free_port()))
    if torch.cuda.is_available():
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} on this machine;"
                " start at most that many processes"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def initialize(
    timeout: timedelta = timedelta(minutes=30), backend: str | None = None
) -> torch.device:
    """Join the process group and return this rank's device.

    The group is made here, before DeepSpeed looks, so that one time-out and one backend hold:
    NCCL on GPUs and gloo on CPUs, unless ``backend`` says otherwise.

    Raises:
        UserError: as :func:`read_launcher`, and where the ranks cannot meet.
    """
    device = read_launcher()
    if not dist.is_initialized():
        backend = backend or ("nccl" if device.type == "cuda" else "gloo")
        # NCCL connects now, on this device: a GPU given to two ranks, or a barrier that guesses
        # its device, would show in the middle of the first update otherwise.
        bound = device if backend == "nccl" else None
        try:
            dist.init_process_group(backend, timeout=timeout, device_id=bound)
        except dist.DistNetworkError as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise UserError(
                f"the ranks cannot meet at {where} (MASTER_ADDR:MASTER_PORT): {error};"
                " is the address rank 0's machine, and the port free? Set MASTER_PORT to another"
            ) from None
    return device


def derive_seed(*parts: int) -> int:
    """A 63-bit seed as a pure function of non-negative integers."""
    state = np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]
    return int(state >> np.uint64(1))


def seed_everything(*parts: int) -> None:
    """Seed torch's generators (CPU and GPU) from ``parts``."""
    torch.manual_seed(derive_seed(*parts))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which sums of many such numbers are kept: fp32 for bf16 and fp16, else the same."""
    return torch.promote_types(dtype, torch.float32)


def has_reduce_scatter() -> bool:
    """Whether the backend has one that can be relied on; gloo has not."""
    return dist.get_backend() == "nccl"


class _OwnRows(torch.autograd.Function):
    """All ranks' rows in place of this rank's; the backward is a reduce-scatter (sum).

    Every rank's loss depends on the gathered rows, so the gradient of the summed loss with respect
    to this rank's rows is the sum over ranks of their gradients. DeepSpeed then averages
    parameter gradients over ranks: together exactly the gradient of the mean loss. Gradients of
    bf16 rows are summed in fp32, as in the ring exchange.
    """

    @staticmethod
    def forward(ctx, rows: torch.Tensor, gather: "RowGather") -> torch.Tensor:  # type: ignore[no-untyped-def]
        ctx.num_rows = len(rows)
        return gather.wait()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[no-untyped-def]
        total = grad.to(accumulation_dtype(grad.dtype)).contiguous()
        if has_reduce_scatter():
            own = total.new_empty((total.shape[0] // world_size(), *total.shape[1:]))
            _reduce_scatter(own, total)
        else:
            total = total.clone() if total is grad else total
            dist.all_reduce(total)
            own = total.chunk(world_size())[rank()]
        return own[: ctx.num_rows].to(grad.dtype), None


# torch 2.13 renamed both collectives; the old names warn there, the new ones are missing before.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class RowGather:
    """Every rank's rows, on their way from when this is made until they are taken: what the rank
    does meanwhile hides it.

    Args:
        rows: ``[num_rows, ...]``, floating point or integer; must not change before :meth:`take`.
        counts: ``[world_size]`` rows per rank, on the CPU, when they differ between ranks.
    """

    def __init__(self, rows: torch.Tensor, counts: torch.Tensor | None = None) -> None:
        self._counts = counts
        if world_size() == 1:
            return
        sent = rows.detach()
        if counts is not None and len(rows) < int(counts.max()):
            missing = int(counts.max()) - len(rows)
            sent = torch.cat([sent, sent.new_zeros((missing, *rows.shape[1:]))])
        self._sent = sent.contiguous()
        self._whole = sent.new_empty((world_size() * len(sent), *sent.shape[1:]))
        self._work = _all_gather(self._whole, self._sent, async_op=True)

    def wait(self) -> torch.Tensor:
        """All ranks' rows without gradient, each rank's filled up to the longest's."""
        self._work.wait()
        return self._whole

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """``[sum of num_rows, ...]`` in rank order, the same on every rank, with gradient to
        ``rows``: those that were sent."""
        if world_size() == 1:
            return rows
        gathered: torch.Tensor = _OwnRows.apply(rows, self)
        if self._counts is None:
            return gathered
        parts = zip(gathered.chunk(world_size()), self._counts, strict=True)
        return torch.cat([part[: int(n)] for part, n in parts])


def gather_rows(rows: torch.Tensor, counts: torch.Tensor | None = None) -> torch.Tensor:
    """Every rank's rows at once (:class:`RowGather`)."""
    return RowGather(rows, counts).take(rows)


class LengthGather:
    """Every rank's equally many integers ``[n]`` of the CPU, on their way to the others' CPUs."""

    def __init__(self, lengths: torch.Tensor, device: torch.device) -> None:
        self._taken = lengths[None] if world_size() == 1 else None
        if self._taken is None:
            self._gather = RowGather(lengths.to(device, non_blocking=True)[None])
            # In line behind what the GPU has to do now, and not behind what it is given later.
            self._copy = HostCopy(self._gather.wait()) if device.type == "cuda" else None

    def take(self) -> torch.Tensor:
        """``[world_size, n]`` on the CPU. The host waits for them alone."""
        if self._taken is None:
            self._taken = (self._copy or self._gather).wait().cpu()
        return self._taken


def row_lengths(mask: torch.Tensor) -> torch.Tensor:
    """The highest real position + 1 of each row of ``[num_sequences, num_tokens]``, 0 if it has
    none; masks may have gaps."""
    return (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1)


def pack(tokens: torch.Tensor, mask_on_cpu: torch.Tensor) -> torch.Tensor:
    """The real ones of tokens ``[num_sequences, num_tokens, dim]`` one after the other, with
    gradient; the host knows which they are and waits for no GPU."""
    real = mask_on_cpu.flatten().nonzero().squeeze(1)
    return tokens.flatten(0, 1).index_select(0, real.to(tokens.device, non_blocking=True))


class Ragged:
    """Packed sequences of lengths ``[num_sequences]`` that the host knows."""

    def __init__(self, lengths: torch.Tensor) -> None:
        self.lengths = lengths
        self.total, self.longest = int(lengths.sum()), max(int(lengths.max()), 1)

    def mask(self, device: torch.device) -> torch.Tensor:
        """``[num_sequences, longest]``, True = real token."""
        lengths = self.lengths.to(device, non_blocking=True)
        return torch.arange(self.longest, device=device) < lengths[:, None]

    def pad(self, packed: torch.Tensor) -> torch.Tensor:
        """``[total, dim]`` to ``[num_sequences, longest, dim]``, zeros behind, with gradient."""
        real = self.mask(self.lengths.device).flatten().nonzero().squeeze(1)
        empty = packed.new_zeros((len(self.lengths) * self.longest, packed.shape[-1]))
        padded = empty.index_copy(0, real.to(packed.device, non_blocking=True), packed)
        return padded.unflatten(0, (-1, self.longest))


def any_rank(condition: bool, device: torch.device) -> bool:
    """Whether the condition holds on any rank; the same answer on all."""
    if world_size() == 1:
        return condition
    return bool(_highest(int(condition), device))


def _highest(level: int, device: torch.device) -> torch.Tensor:
    highest = torch.tensor(level).to(device, non_blocking=True)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    return highest


class HostCopy:
    """A tensor on its way from a GPU to the host, which goes on meanwhile; any other is itself."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self._event = tensor, None
        if tensor.device.type == "cuda":
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> torch.Tensor:
        """The copy, once it is there."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensor


class Poll:
    """Asks every update for the highest of the ranks' levels, without waiting for a GPU.

    There the answer is the one to the question before: that update's work is done by then, while
    the next one's is waiting in line.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._asked: HostCopy | None = None

    def highest(self, level: int) -> int:
        """The same answer on all ranks, each of which must ask; levels are 0 or more."""
        if world_size() == 1:
            return level
        asked = HostCopy(_highest(level, self.device))
        if self.device.type == "cpu":
            return int(asked.wait())
        before, self._asked = self._asked, asked
        return 0 if before is None else int(before.wait())


def mean_of(number: int, device: torch.device) -> float | torch.Tensor:
    """A number averaged over ranks; of several ranks it stays on the device, where nobody waits."""
    if world_size() == 1:
        return float(number)
    mean = torch.tensor(float(number)).to(device, non_blocking=True)
    dist.all_reduce(mean)
    return mean / world_size()


def mean_over_ranks(values: dict[str, torch.Tensor]) -> dict[str, float]:
    """Average scalars over ranks in one collective; for logging only."""
    if not values:
        return {}
    stacked = torch.stack([value.detach().double() for value in values.values()])
    if world_size() > 1:
        dist.all_reduce(stacked)
        stacked /= world_size()
    return dict(zip(values, stacked.tolist(), strict=True))
