"""Operators inside PyTorch: gradcheck, opcheck, torch.compile, autocast, second derivatives."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import erniesearch_kernels as kernels
import pytest
import torch
from erniesearch_kernels import ops
from support.kernel_cases import assert_close, differentiate, random_mask, random_tokens
from torch import Tensor


def operands(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Small inputs of every operation, with masks."""
    generator = torch.Generator().manual_seed(0)

    def tokens(*shape: int) -> Tensor:
        return random_tokens(generator, *shape, kind="normal", dtype=dtype)

    return {
        "queries": tokens(3, 4, 8).requires_grad_(),
        "passages": tokens(4, 9, 8).requires_grad_(),
        "group": tokens(3, 2, 9, 8).requires_grad_(),
        "query_mask": random_mask(generator, 3, 4),
        "passage_mask": random_mask(generator, 4, 9),
        "group_mask": random_mask(generator, 3, 2, 9),
        "teacher_map": tokens(3, 2, 4, 9).softmax(-1),
        "teacher_queries": tokens(3, 2, 2, 4, 5),
        "teacher_keys": tokens(3, 2, 2, 9, 5),
        "teacher_lse": tokens(3, 2, 2, 4) + 3,
        "packed_queries": tokens(7, 8).requires_grad_(),
        "packed_passages": tokens(11, 8).requires_grad_(),
        "query_bounds": torch.tensor([0, 3, 3, 7]),
        "passage_bounds": torch.tensor([0, 5, 6, 11, 11]),
    }


Function = Callable[..., Tensor | tuple[Tensor, ...]]


def functions(x: dict[str, Any], backend: str) -> dict[str, tuple[Function, tuple[Tensor, ...]]]:
    """Every public operation as a function of its differentiable inputs."""
    masks = x["query_mask"], x["passage_mask"]
    group_masks = x["query_mask"], x["group_mask"]
    pairs, group = (x["queries"], x["passages"]), (x["queries"], x["group"])
    heads = x["teacher_queries"], x["teacher_keys"]
    return {
        "maxsim": (lambda q, p: kernels.maxsim(q, p, *masks, backend=backend), pairs),
        "normalized": (
            lambda q, p: kernels.maxsim(
                q, p, *masks, normalize=True, save_winners=False, backend=backend
            ),
            pairs,
        ),
        "group": (lambda q, p: kernels.maxsim(q, p, *group_masks, backend=backend), group),
        "varlen": (
            lambda q, p: kernels.maxsim_varlen(
                q, p, x["query_bounds"], x["passage_bounds"], 4, 5, backend=backend
            ),
            (x["packed_queries"], x["packed_passages"]),
        ),
        "token_kl": (
            lambda q, p: kernels.maxsim_token_kl(
                q, p, x["teacher_map"], 0.7, *group_masks, backend=backend
            ),
            group,
        ),
        "attention_kl": (
            lambda q, p: kernels.maxsim_attention_kl(
                q, p, *heads, 0.7, *group_masks, backend=backend
            ),
            group,
        ),
        "attention_kl_lse": (
            lambda q, p: kernels.maxsim_attention_kl(
                q, p, *heads, 0.7, *group_masks, teacher_lse=x["teacher_lse"], backend=backend
            ),
            group,
        ),
    }


NAMES = list(functions(operands(), "torch"))


@pytest.mark.parametrize("backend", ["torch", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name: str, backend: str) -> None:
    function, inputs = functions(operands(), backend)[name]
    assert torch.autograd.gradcheck(function, inputs)


def test_opcheck() -> None:
    x = operands(torch.float32)
    masks = x["query_mask"], x["passage_mask"]
    samples = [
        (ops.maxsim_op, (x["queries"], x["passages"], *masks, True, True, "torch")),
        (ops.maxsim_op, (x["queries"], x["passages"], None, None, False, False, "torch")),
        (ops.maxsim_op, (x["queries"], x["group"], None, x["group_mask"], False, True, "torch")),
        (
            ops.maxsim_varlen_op,
            (x["packed_queries"], x["packed_passages"], x["query_bounds"], x["passage_bounds"],
             4, 5, "torch"),
        ),
        (
            ops.maxsim_kl_op,
            (x["queries"], x["group"], x["query_mask"], x["group_mask"], x["teacher_map"],
             None, None, None, 0.7, 1.0, "torch"),
        ),
        (
            ops.maxsim_kl_op,
            (x["queries"], x["group"], None, None, None, x["teacher_queries"], x["teacher_keys"],
             x["teacher_lse"], 0.7, 0.5, "torch"),
        ),
    ]  # fmt: skip
    for op, arguments in samples:
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("name", NAMES)
def test_compiles_without_graph_breaks(name: str) -> None:
    function, inputs = functions(operands(torch.float32), "auto")[name]

    def loss(*leaves: Tensor) -> Tensor:
        outputs = function(*leaves)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        return sum((x * x).sum() for x in outputs)

    # aot_eager traces forward and backward through the operators, and needs no C++ compiler.
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*inputs), inputs)
    got = torch.autograd.grad(compiled(*inputs), inputs)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_are_refused(name: str) -> None:
    function, inputs = functions(operands(), "torch")[name]
    outputs = function(*inputs)
    first = outputs if isinstance(outputs, Tensor) else outputs[0]
    (grad,) = torch.autograd.grad(first.square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once only"):
        grad.sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_autocast_does_not_reach_inside(name: str) -> None:
    function, inputs = functions(operands(torch.float32), "torch")[name]
    expected = function(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = function(*inputs)
    expected, got = ((x,) if isinstance(x, Tensor) else x for x in (expected, got))
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", NAMES)
def test_only_the_asked_gradient(name: str) -> None:
    function, inputs = functions(operands(), "torch")[name]

    def total(*leaves: Tensor) -> Tensor:
        outputs = function(*leaves)
        return outputs.sum() if isinstance(outputs, Tensor) else sum(x.sum() for x in outputs)

    both = torch.autograd.grad(total(*inputs), inputs)
    for index in (0, 1):
        leaves = [x.detach().requires_grad_(i == index) for i, x in enumerate(inputs)]
        (one,) = torch.autograd.grad(total(*leaves), leaves[index])
        torch.testing.assert_close(one, both[index])


def test_scores_alone_can_be_differentiated() -> None:
    x = operands()
    scores, _ = kernels.maxsim_token_kl(x["queries"], x["group"], x["teacher_map"], 0.7)
    expected = kernels.maxsim(x["queries"], x["group"])
    got = torch.autograd.grad(scores.square().sum(), (x["queries"], x["group"]))
    want = torch.autograd.grad(expected.square().sum(), (x["queries"], x["group"]))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


class Launched(Exception):
    """In place of a launch."""


def test_kernels_are_launched_on_the_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operator makes it the current one, forward and backward."""
    current: list[Tensor] = []

    @contextmanager
    def device_of(x: Tensor) -> Iterator[None]:
        current.append(x)
        try:
            yield
        finally:
            current.pop()

    def launch(queries: Tensor) -> Callable[..., None]:
        def launcher(*arguments: Any) -> None:
            assert [y.data_ptr() for y in current] == [queries.data_ptr()], "on any device"
            raise Launched

        return launcher

    x = operands(torch.float32)
    q, p, group, packed = x["queries"], x["passages"], x["group"], x["packed_queries"]
    varlen = packed, x["packed_passages"], x["query_bounds"], x["passage_bounds"]
    teacher = x["teacher_map"], None, None, None
    winners = torch.zeros(4, 3, 4, dtype=torch.uint8)
    grad, lse = torch.zeros(3, 4), torch.zeros(3, 2, 4)
    calls: list[tuple[Any, Tensor, tuple[Any, ...]]] = [
        (ops.maxsim_op, q, (q, p, None, None, False, True)),
        (ops.maxsim_backward_op, q, (grad, q, p, None, None, winners, False, True, True)),
        (ops.maxsim_varlen_op, packed, (*varlen, 4, 5)),
        (ops.maxsim_varlen_backward_op, packed, (grad, *varlen, winners, 4, 5, True, True)),
        (ops.maxsim_kl_op, q, (q, group, None, None, *teacher, 0.7, 1.0)),
        (
            ops.maxsim_kl_backward_op, q,
            (lse[..., 0], lse[..., 0], q, group, None, None, *teacher, winners, lse, lse,
             0.7, 1.0, True, True),
        ),
    ]  # fmt: skip
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for op, queries, arguments in calls:
        names = [f"{kind}_{step}" for kind in ("maxsim", "varlen", "kl")
                 for step in ("forward", "backward")]  # fmt: skip
        module = SimpleNamespace(**dict.fromkeys(names, launch(queries)))
        monkeypatch.setattr(ops, "_triton_maxsim", lambda module=module: module)
        monkeypatch.setattr(ops, "_triton_token_kl", lambda module=module: module)
        detached = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
        with pytest.raises(Launched):
            op(*detached, "triton")
        assert not current


@pytest.mark.cuda
def test_a_gpu_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = {k: v.detach() for k, v in operands(torch.float32).items()}
    other = {k: v.to("cuda:1") for k, v in x.items()}
    for name in NAMES:
        outputs = []
        for tensors, backend in ((x, "torch"), (other, "triton")):
            function, inputs = functions(tensors, backend)[name]
            outputs.append(differentiate(function, inputs, 0))
        assert_close(outputs[1][0] + outputs[1][1], outputs[0][0] + outputs[0][1], 1e-5)
    assert torch.cuda.current_device() == 0
