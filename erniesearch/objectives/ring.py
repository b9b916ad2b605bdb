"""Scores against every rank's passages without holding them all: token blocks go round in a ring.

At hop h, rank r scores its queries against the passages of rank r - h, while it sends them on to
r + 1 and receives those of r - h - 1. In the backward pass the blocks go round once more, each with
the gradient that it has collected; after W hops that is back at its owner, summed over ranks as the
reduce-scatter of an all-gather would do. Similarities are computed again rather than kept, so that
a rank holds two blocks at a time however many ranks there are.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from erniesearch import distributed
from erniesearch.distributed import Ragged
from erniesearch.objectives.exchange import TokenGather

ScoreFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``[B, Lq, dim]``, ``[P, Lp, dim]`` and its mask ``[P, Lp]`` to ``[B, P]``."""


def ring_scores(
    score: ScoreFunction, query_tokens: Tensor, passage_tokens: Tensor, gather: TokenGather
) -> Tensor:
    """Scores of this rank's queries against the passages of every rank, with gradient.

    Gradients of passages are summed in fp32 on their way; the sum over ranks is exact, as for
    :func:`erniesearch.distributed.gather_rows`.

    Args:
        score: each query-passage score must depend on nothing but the two.
        query_tokens: ``[B, Lq, dim]``.
        passage_tokens: ``[P, Lp_r, dim]``, padded to a length of each rank's own; as many passages
            on every rank.
        gather: of the passages' real tokens; only these travel.

    Returns:
        ``[B, world_size · P]``, columns in rank order.
    """
    owners = [Ragged(own) for own in gather.lengths.take()]
    own = distributed.pack(passage_tokens, gather.mask_on_cpu)
    scores: Tensor = _Ring.apply(score, owners, query_tokens, own)
    return scores


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any,
        score: ScoreFunction,
        owners: list[Ragged],
        queries: Tensor,
        tokens: Tensor,
    ) -> Tensor:
        ctx.score, ctx.owners = score, owners
        ctx.save_for_backward(queries, tokens)
        columns: list[Tensor] = [queries] * len(owners)
        for owner, block in _rounds(tokens, owners):
            ragged = owners[owner]
            columns[owner] = score(queries, ragged.pad(block), ragged.mask(block.device))
        return torch.cat(columns, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        queries, tokens = ctx.saved_tensors
        columns = grad.chunk(len(ctx.owners), 1)
        query_grad = torch.zeros_like(queries, dtype=distributed.accumulation_dtype(queries.dtype))
        collected: _Transfer | None = None
        for owner, block in _rounds(tokens, ctx.owners):
            ragged = ctx.owners[owner]
            with torch.enable_grad():
                own_queries = queries.detach().requires_grad_()
                own_tokens = block.detach().requires_grad_()
                scores = ctx.score(own_queries, ragged.pad(own_tokens), ragged.mask(block.device))
            query_part, token_part = torch.autograd.grad(
                scores, (own_queries, own_tokens), columns[owner]
            )
            query_grad += query_part
            token_part = token_part.to(query_grad.dtype)
            if collected is not None:  # what the ranks before added to this block's gradient
                token_part += collected.wait()
            before = ctx.owners[(owner - 1) % len(ctx.owners)]
            collected = _Transfer(token_part, before.total)
        assert collected is not None
        return None, None, query_grad.to(queries.dtype), collected.wait().to(tokens.dtype)


def _rounds(block: Tensor, owners: list[Ragged]) -> Iterator[tuple[int, Tensor]]:
    """Every rank's real tokens once, with their owner, the own ones first; the next are on their
    way while the caller works on some."""
    world_size, rank = len(owners), distributed.rank()
    for hop in range(world_size):
        owner = (rank - hop) % world_size
        transfer = None
        if hop + 1 < world_size:
            transfer = _Transfer(block, owners[(owner - 1) % world_size].total)
        yield owner, block
        if transfer:
            block = transfer.wait()


class _Transfer:
    """Rows on their way to the next rank, and as many as are said from the one before."""

    def __init__(self, outgoing: Tensor, num_incoming: int) -> None:
        rank, world_size = distributed.rank(), distributed.world_size()
        self._outgoing = outgoing.contiguous()  # alive until it is sent
        self._incoming = outgoing.new_empty((num_incoming, outgoing.shape[1]))
        operations = [
            dist.P2POp(dist.isend, self._outgoing, (rank + 1) % world_size),
            dist.P2POp(dist.irecv, self._incoming, (rank - 1) % world_size),
        ]
        # Empty messages are not sent by every backend.
        operations = [o for o in operations if o.tensor.numel()]
        self._requests = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> Tensor:
        for request in self._requests:
            request.wait()
        return self._incoming
