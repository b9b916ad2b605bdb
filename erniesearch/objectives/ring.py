"""Scores against every rank's passages without holding them all: token blocks go round in a ring.

At hop h, rank r scores its queries against the passages of rank r - h, while it sends them on to
r + 1 and receives those of r - h - 1. In the backward pass the blocks go round once more, each with
the gradient that it has collected; after W hops that is back at its owner, summed over ranks as the
reduce-scatter of an all-gather would do. Similarities are computed again rather than kept, so that
a rank holds two blocks at a time however many ranks there are.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from erniesearch import distributed

ScoreFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``[B, Lq, dim]``, ``[P, Lp, dim]`` and its mask ``[P, Lp]`` to ``[B, P]``."""


def ring_scores(
    score: ScoreFunction, query_tokens: Tensor, passage_tokens: Tensor, passage_mask: Tensor
) -> Tensor:
    """Scores of this rank's queries against the passages of every rank, with gradient.

    Gradients of passages are summed in fp32 on their way; the sum over ranks is exact, as for
    :func:`erniesearch.distributed.gather_rows`.

    Args:
        score: each query-passage score must depend on nothing but the two.
        query_tokens: ``[B, Lq, dim]``.
        passage_tokens: ``[P_r, Lp_r, dim]``, padded to a length of each rank's own.
        passage_mask: ``[P_r, Lp_r]``, True = real token. Only real tokens travel.

    Returns:
        ``[B, sum of P_r]``, columns in rank order.
    """
    sizes = distributed.gather_lengths(
        passage_mask.shape[0], int(passage_mask.sum()), distributed.longest_row(passage_mask),
        device=passage_mask.device,
    ).tolist()  # fmt: skip
    width = max(sizes[distributed.rank()][2], 1)
    mask = passage_mask[:, :width].contiguous()
    scores: Tensor = _Ring.apply(score, sizes, query_tokens, passage_tokens[:, :width][mask], mask)
    return scores


class _Block(NamedTuple):
    """A rank's real tokens ``[T, dim]`` and the mask ``[P, Lp]`` that says where they stand."""

    tokens: Tensor
    mask: Tensor

    def padded(self) -> Tensor:
        """``[P, Lp, dim]``, zeros where masked; with gradient to ``tokens``."""
        empty = self.tokens.new_zeros((*self.mask.shape, self.tokens.shape[-1]))
        return empty.index_put((self.mask,), self.tokens)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any,
        score: ScoreFunction,
        sizes: list[list[int]],
        queries: Tensor,
        tokens: Tensor,
        mask: Tensor,
    ) -> Tensor:
        ctx.score, ctx.sizes = score, sizes
        ctx.save_for_backward(queries, tokens, mask)
        columns: list[Tensor] = [queries] * len(sizes)
        for owner, block in _rounds(_Block(tokens, mask), sizes):
            columns[owner] = score(queries, block.padded(), block.mask)
        return torch.cat(columns, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        queries, tokens, mask = ctx.saved_tensors
        columns = grad.split([size[0] for size in ctx.sizes], 1)
        query_grad = torch.zeros_like(queries, dtype=distributed.accumulation_dtype(queries.dtype))
        collected: _Transfer | None = None
        for owner, block in _rounds(_Block(tokens, mask), ctx.sizes):
            with torch.enable_grad():
                own_queries = queries.detach().requires_grad_()
                own_tokens = block.tokens.detach().requires_grad_()
                scores = ctx.score(own_queries, _Block(own_tokens, block.mask).padded(), block.mask)
            query_part, token_part = torch.autograd.grad(
                scores, (own_queries, own_tokens), columns[owner]
            )
            query_grad += query_part
            token_part = token_part.to(query_grad.dtype)
            if collected is not None:  # what the ranks before added to this block's gradient
                token_part += collected.wait()[0]
            before = ctx.sizes[(owner - 1) % len(ctx.sizes)]
            collected = _Transfer([token_part], [(before[1], token_part.shape[1])])
        assert collected is not None
        own_grad = collected.wait()[0].to(tokens.dtype)
        return None, None, query_grad.to(queries.dtype), own_grad, None


def _rounds(block: _Block, sizes: list[list[int]]):  # type: ignore[no-untyped-def]
    """Every rank's block once, with its owner, the own one first; the next is on its way while
    the caller works on one."""
    world_size, rank = len(sizes), distributed.rank()
    dim = block.tokens.shape[-1]
    for hop in range(world_size):
        owner = (rank - hop) % world_size
        transfer = None
        if hop + 1 < world_size:
            num_passages, num_tokens, longest = sizes[(owner - 1) % world_size]
            transfer = _Transfer(
                [block.tokens, block.mask.to(torch.uint8)],
                [(num_tokens, dim), (num_passages, max(longest, 1))],
            )
        yield owner, block
        if transfer:
            tokens, mask = transfer.wait()
            block = _Block(tokens, mask.bool())


class _Transfer:
    """Tensors on their way to the next rank, and others of known shapes from the one before."""

    def __init__(self, outgoing: list[Tensor], shapes: list[tuple[int, int]]) -> None:
        rank, world_size = distributed.rank(), distributed.world_size()
        self._outgoing = [tensor.contiguous() for tensor in outgoing]  # alive until they are sent
        self._incoming = [
            tensor.new_empty(shape) for tensor, shape in zip(outgoing, shapes, strict=True)
        ]
        operations = [
            dist.P2POp(dist.isend, tensor, (rank + 1) % world_size) for tensor in self._outgoing
        ]
        operations += [
            dist.P2POp(dist.irecv, tensor, (rank - 1) % world_size) for tensor in self._incoming
        ]
        # Empty messages are not sent by every backend.
        operations = [o for o in operations if o.tensor.numel()]
        self._requests = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> list[Tensor]:
        for request in self._requests:
            request.wait()
        return self._incoming
