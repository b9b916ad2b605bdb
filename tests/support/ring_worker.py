"""Started by test_ring.py on every rank: ring and all-gather against one process with everything.

Every rank knows every rank's tensors, so each can compute what one process would."""

import sys

import torch
import torch.distributed as dist
from torch import Tensor

from erniesearch import distributed, exiting
from erniesearch.objectives import scores
from erniesearch.objectives.exchange import TokenGather

NUM_QUERIES, QUERY_LENGTH, DIM = 3, 5, 8


def inputs_of(rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Passages differ between ranks in length; masks have gaps, and rank 1 has a passage without a
    real token and padding on all of its last columns."""
    generator = torch.Generator().manual_seed(100 + rank)
    num_passages, length = 3, 9 - 2 * rank
    mask = torch.rand((num_passages, length), generator=generator) < 0.7
    if rank == 1:
        mask[0] = False
        mask[:, -2:] = False
    return {
        "queries": torch.randn((NUM_QUERIES, QUERY_LENGTH, DIM), generator=generator).to(dtype),
        "query_mask": torch.rand((NUM_QUERIES, QUERY_LENGTH), generator=generator) < 0.8,
        "passages": torch.randn((num_passages, length, DIM), generator=generator).to(dtype),
        "passage_mask": mask,
    }


def loss_of(similarities: Tensor, rank: int) -> Tensor:
    """Of another shape on each rank, so that a sum of the wrong ranks' gradients shows."""
    generator = torch.Generator().manual_seed(rank)
    weights = torch.randn(similarities.shape, generator=generator, dtype=torch.float64)
    return (similarities.double() * weights).sum() + (rank + 1) * similarities.double().pow(2).sum()


def assert_near(made: Tensor | None, wanted: Tensor | None, tolerance: float, what: str) -> None:
    assert made is not None
    assert wanted is not None
    error = float((made - wanted).norm() / wanted.norm())
    assert error <= tolerance, f"{what}: relative error {error:.2e}"


def check(kernels: scores.Kernels, dtype: torch.dtype, tolerance: float) -> None:
    world_size, rank = distributed.world_size(), distributed.rank()
    every = [inputs_of(r, dtype) for r in range(world_size)]
    for own in every:
        for name in ("queries", "passages"):
            own[name].requires_grad_()
    # One process: each rank's queries against each rank's passages, all losses added up.
    whole = [
        torch.cat(
            [
                scores.late_interaction_scores(
                    q["queries"], q["query_mask"], p["passages"], p["passage_mask"], 0.5, kernels
                )
                for p in every
            ],
            1,
        )
        for q in every
    ]
    torch.stack([loss_of(block, r) for r, block in enumerate(whole)]).sum().backward()
    wanted = {name: every[rank][name].grad for name in ("queries", "passages")}
    exchanges: tuple[scores.Exchange, ...] = ("all_gather", "ring")
    for exchange in exchanges:
        own = inputs_of(rank, dtype)
        queries, passages = own["queries"].requires_grad_(), own["passages"].requires_grad_()
        made = scores.cross_batch_late_interaction_scores(
            queries, own["query_mask"], passages, own["passage_mask"],
            TokenGather(own["passage_mask"], passages.device), 0.5, kernels, exchange,
        )  # fmt: skip
        assert_near(made, whole[rank], tolerance, f"{exchange}, scores")
        loss_of(made, rank).backward()
        for name, tensor in (("queries", queries), ("passages", passages)):
            assert_near(tensor.grad, wanted[name], tolerance, f"{exchange}, {name}")


def check_sum_of_bf16() -> None:
    """The gather's gradient is the sum over ranks, rounded to bf16 once."""
    world_size, rank = distributed.world_size(), distributed.rank()
    generator = torch.Generator().manual_seed(7)
    shape = (world_size, 3 * world_size, 50)
    # Between 1/8 and 8: four of them add up exactly in fp32.
    every = (torch.rand(shape, generator=generator) * 6 - 3).exp2().bfloat16()
    rows = torch.zeros((3, 50), dtype=torch.bfloat16, requires_grad=True)
    distributed.gather_rows(rows).backward(every[rank])
    wanted = every.double().sum(0)[3 * rank :][:3].bfloat16()
    assert rows.grad is not None
    assert rows.grad.equal(wanted), f"{int((rows.grad != wanted).sum())} of 150 are rounded twice"


def main() -> None:
    distributed.initialize()
    check_sum_of_bf16()
    check("torch", torch.float64, 1e-12)
    check("torch", torch.float32, 1e-6)
    check("eager", torch.float32, 1e-6)
    check("torch", torch.bfloat16, 1e-2)
    sys.stdout.write("as one process\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    exiting.run(main)
