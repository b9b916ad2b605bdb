"""Runs model code on tensors without contents, and counts bytes alive, FLOPs and bytes sent.

Floating-point tensors are fake: they have shapes, types and storages, and nothing in them.
Integers and masks of a rank's own batch are real, because lengths and positions decide shapes. So
the model's own code runs as it is, on any machine, for any number of ranks (the process group is
torch's fake one).
"""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from erniesearch import distributed

aten = torch.ops.aten


@contextmanager
def fake_world(world_size: int, device: str) -> Iterator[None]:
    """Rank 0 of ``world_size`` ranks that do not exist; collectives return at once.

    Gathers go the way that they go with the backend that trains on ``device``.
    """
    assert not dist.is_initialized(), "planning needs a process without a process group"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        with patch.object(distributed, "has_reduce_scatter", lambda: device == "cuda"):
            yield
    finally:
        dist.destroy_process_group()


def bytes_sent(kind: str, num_bytes: int, world_size: int) -> int:
    """Bytes that one rank sends in a ring, for ``num_bytes`` of the whole tensor (the gathered
    one, the one reduced; for ``send`` the message)::

        all_gather, reduce_scatter   (W - 1) / W · bytes
        all_reduce                   2 · (W - 1) / W · bytes
    """
    if kind == "send":
        return num_bytes
    factor = 2 if kind == "all_reduce" else 1
    return factor * (world_size - 1) * num_bytes // world_size


class GpuKernels(TorchFunctionMode):
    """Attention as a GPU computes it: without the map, also where there is dropout. On a CPU
    torch's attention with dropout holds the whole map."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.nn.functional.scaled_dot_product_attention:
            args, kwargs = args[:4], kwargs | {"dropout_p": 0.0}
        return func(*args, **kwargs)


class Tracker(TorchDispatchMode):
    """Follows every storage from its first tensor to its end.

    Args:
        gpu: count a dropout mask as the byte per element that it is on a GPU, where torch's CPU
            kernel keeps a number.

    Attributes:
        real_limit: elements up to which integers and masks are computed.
        live: bytes of tensors that exist, those given to :meth:`exclude` left out.
        held: bytes that the caller says are held besides (:meth:`hold`).
        peaks: highest ``live + held`` of each phase.
        phase: which phase it is; the caller says.
        flops: of matrix products, attention and the fused kernels.
        sent: bytes that this rank sends, by kind of collective.
    """

    def __init__(self, gpu: bool) -> None:
        super().__init__()
        self.gpu = gpu
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.real_limit = 1 << 22
        self._sizes: dict[int, int] = {}
        self.live = self.held = 0
        self.reset()

    def reset(self) -> None:
        """Begin a new count; what is alive stays alive."""
        self.held, self.flops = 0, 0
        self.sent: Counter[str] = Counter()
        self.phase, self.peaks = "forward", {"forward": self.live}

    def exclude(self, tensors: Iterator[Tensor]) -> None:
        """Count these tensors' storages no longer, nor views of them."""
        for tensor in tensors:
            self._follow(tensor)
            self._resize(tensor, 0)

    def hold(self, num_bytes: int) -> None:
        """Bytes that are allocated (or, below 0, freed) where the tracker does not see it."""
        self.held += num_bytes
        self._look()

    def pulse(self, num_bytes: int) -> None:
        """Bytes that are allocated and freed at once."""
        self.hold(num_bytes)
        self.held -= num_bytes

    def _look(self) -> None:
        now = self.live + self.held
        if now > self.peaks.get(self.phase, 0):
            self.peaks[self.phase] = now

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            weakref.finalize(storage, self._forget, key)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            return self._communicate(func, args, kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        imagined = any(isinstance(x, FakeTensor) for x in tensors)
        if func is aten._local_scalar_dense.default and imagined:
            assert args[0].is_floating_point(), "a length is asked of a tensor without contents"
            return 0.0
        if func is aten.index.Tensor and imagined:
            args = (args[0], _as_positions(args[1]))
        imagined |= not tensors and not _makes_integers(func, args, kwargs)
        imagined |= _num_elements(args, tensors) > self.real_limit
        if imagined:
            with self.fake:
                out = func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        formula = FLOP_FORMULAS.get(func._overloadpacket)
        if formula is not None and imagined:
            self.flops += formula(*args, **kwargs, out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._follow(tensor)
        if func is aten.bernoulli_.float and self.gpu:
            self._resize(args[0], args[0].numel())
        self._look()
        return out

    def _resize(self, tensor: Tensor, num_bytes: int) -> None:
        key = tensor.untyped_storage()._cdata
        self.live += num_bytes - self._sizes[key]
        self._sizes[key] = num_bytes

    def _communicate(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        kind = COLLECTIVES.get(func._schema.name.removeprefix("c10d::"))
        tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
        if kind:
            whole = max(x.numel() * x.element_size() for x in tensors)
            self.sent[kind] += bytes_sent(kind, whole, dist.get_world_size())
        if func is torch.ops.c10d._allgather_base_.default and not isinstance(args[0], FakeTensor):
            # Every rank looks like this one.
            args[0].view(-1, args[1].numel()).copy_(args[1].reshape(1, -1))
        if kind == "send" or func is torch.ops.c10d.recv_.default:
            self._pass_on(kind == "send", args[0][0])
        # What the fake group does with contents does not matter, but it takes real tensors only.
        empty = tree_map_only(Tensor, lambda x: torch.empty(0, dtype=x.dtype), (args, kwargs))
        return func(*empty[0], **empty[1])

    def _pass_on(self, send: bool, tensor: Tensor) -> None:
        """In a ring of ranks that look alike, what arrives is what was sent."""
        if not isinstance(tensor, FakeTensor):
            if send:
                self._message = tensor
            else:
                tensor.copy_(self._message)


COLLECTIVES = {
    "_allgather_base_": "all_gather", "allreduce_": "all_reduce",
    "_reduce_scatter_base_": "reduce_scatter", "send": "send",
}  # fmt: skip


def _as_positions(index: list[Tensor | None]) -> list[Tensor | None]:
    """Boolean masks as the positions that they select, so that the shape is known."""
    found: list[Tensor | None] = []
    for part in index:
        if part is not None and part.dtype == torch.bool and not isinstance(part, FakeTensor):
            found += part.nonzero(as_tuple=True)
        else:
            found.append(part)
    return found


def _num_elements(args: Any, tensors: list[Tensor]) -> int:
    """At most about so many elements come out of a pointwise operation, or one given a size."""
    sizes = [math.prod(x) for x in args if isinstance(x, list | torch.Size) and _are_integers(x)]
    if 1 < len(tensors) < 4:
        shapes = [tensor.shape for tensor in tensors]
        width = max(map(len, shapes))
        shapes = [torch.Size([1] * (width - len(shape))) + shape for shape in shapes]
        sizes.append(math.prod(max(extent) for extent in zip(*shapes, strict=True)))
    return max([*sizes, *(tensor.numel() for tensor in tensors)], default=0)


def _are_integers(values: Any) -> bool:
    return bool(values) and all(isinstance(value, int) for value in values)


def _makes_integers(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a function without tensor arguments returns integers or booleans."""
    if kwargs.get("dtype") is not None:
        return not (kwargs["dtype"].is_floating_point or kwargs["dtype"].is_complex)
    if func._schema.name in ("aten::arange", "aten::full", "aten::scalar_tensor"):
        return not any(isinstance(x, float) for x in args)
    return func._schema.name.startswith("aten::randint")


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(
    grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


def _maxsim(queries: Tensor, passages: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * queries[..., 0].numel() * math.prod(passages.shape[:-1]) * queries.shape[-1]


def _maxsim_backward(
    grad: Tensor, queries: Tensor, passages: Tensor, *args: Any, **kwargs: Any
) -> int:
    # Winners only: one token vector per query token and passage, for each side.
    pairs = passages.shape[1] if passages.dim() == 4 else len(passages)
    return 4 * queries.numel() * pairs


def _token_pairs(queries: Tensor, passages: Tensor) -> int:
    return queries.shape[1] * math.prod(passages.shape[:-1])


def _maxsim_kl(
    queries: Tensor, passages: Tensor, query_mask: Any, passage_mask: Any, teacher_map: Any,
    teacher_queries: Tensor | None, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    heads = 0 if teacher_queries is None else teacher_queries.shape[2] * teacher_queries.shape[-1]
    return 2 * _token_pairs(queries, passages) * (queries.shape[-1] + heads)


def _maxsim_kl_backward(
    grad_scores: Tensor, grad_kl: Tensor, queries: Tensor, passages: Tensor, *args: Any,
    **kwargs: Any,
) -> int:  # fmt: skip
    # The similarities once more, and a product for each side's gradient.
    again = _maxsim_kl(queries, passages, *args, **kwargs)
    return again + 4 * _token_pairs(queries, passages) * queries.shape[-1]


def _kernel_formulas() -> dict[Any, Callable[..., int]]:
    import erniesearch_kernels  # noqa: F401  (registers the operators)

    own = torch.ops.erniesearch_kernels
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        own.maxsim: _maxsim,
        own.maxsim_backward: _maxsim_backward,
        own.maxsim_kl: _maxsim_kl,
        own.maxsim_kl_backward: _maxsim_kl_backward,
    }


FLOP_FORMULAS: dict[Any, Callable[..., int]] = flop_registry | _kernel_formulas()
