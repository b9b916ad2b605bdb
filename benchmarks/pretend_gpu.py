"""Tensors that say they are on a GPU and compute on the CPU, so that code which mixes devices
fails here as it would there.

The pretended device is called ``lazy``: torch without CUDA has no gradients for ``cuda``, and
nothing else uses that name.
Mixing is what torch's operators on CUDA refuse: a tensor of the CPU that is more than one number,
except as an index or the other side of a copy. NCCL takes tensors of the GPU only.

:attr:`PretendGpu.waits` counts, by line, where the host would wait for the GPU: a number or a
tensor is read from it, values decide a shape, or something is copied to it without
``non_blocking``. :attr:`PretendGpu.launches` counts operators that compute there.
"""

import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
GPU = torch.device("lazy", 0)
COPIES = (aten.copy_.default, aten._to_copy.default)
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default,
           aten._index_put_impl_.default)  # fmt: skip
JOINS = (aten.cat.default, aten.stack.default)
READING = (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default,
           aten.repeat_interleave.Tensor, aten._unique2.default)  # fmt: skip
ROOT = str(Path(__file__).parents[1])


class Mixed(Exception):
    """An operator was given tensors of two devices."""


class GpuTensor(Tensor):
    """``inner`` on the pretended device."""

    inner: Tensor  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> "GpuTensor":
        made: GpuTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=GPU,
        )  # fmt: skip
        made.inner = inner
        return made

    def tolist(self) -> list[Any]:  # refused to subclasses by torch
        PretendGpu.waits[_place()] += 1
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace == "c10d":
            return _communicate(func, args, kwargs)
        _check(func, args, kwargs)
        if _waits(func, args, kwargs):
            PretendGpu.waits[_place()] += 1
        on_gpu = any(isinstance(x, GpuTensor) for x in tree_leaves((args, kwargs)))
        device = kwargs.get("device")
        if device is not None:
            on_gpu, kwargs["device"] = device == GPU, torch.device("cpu")
        args, kwargs = tree_map_only(GpuTensor, lambda x: x.inner, (args, kwargs))
        out = func(*args, **kwargs)
        if on_gpu and _launches(func):
            PretendGpu.launches[str(func)] += 1
        return tree_map_only(Tensor, GpuTensor, out) if on_gpu else out


class PretendGpu(TorchDispatchMode):
    """While it is entered, ``device=GPU`` and ``.to(GPU)`` make such tensors; rank 0 of the fake
    process group finds every rank to be like itself.

    Attributes:
        waits: since it was entered last, by file and line.
        launches: likewise, by operator; views and allocations are none.
    """

    waits: ClassVar[Counter[str]] = Counter()
    launches: ClassVar[Counter[str]] = Counter()

    def __enter__(self) -> "PretendGpu":
        PretendGpu.waits, PretendGpu.launches = Counter(), Counter()
        # As torch's fake tensors do, so that `torch.tensor(…, device=GPU)` comes by.
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return GpuTensor.__torch_dispatch__(func, types, args, kwargs)


class Engine:
    """What an update needs of DeepSpeed's engine, whose step is left out."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module, self.optimizer = module, SimpleNamespace()
        self.no_sync, self.train, self.eval = nullcontext, module.train, module.eval

    def __call__(self, *arguments: Any) -> Any:
        return self.module(*arguments)

    def zero_optimization_stage(self) -> int:
        return 0

    def backward(self, loss: torch.Tensor, **options: bool) -> None:
        loss.backward()

    def allreduce_gradients(self) -> None:
        pass

    def step(self) -> None:
        pass

    def was_step_applied(self) -> bool:
        return True


def move(module: torch.nn.Module) -> None:
    """All parameters and buffers to the pretended device; tied ones stay tied."""
    made: dict[int, torch.nn.Parameter] = {}
    for own in module.modules():
        for name, parameter in own._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = torch.nn.Parameter(
                        GpuTensor(parameter.detach()), parameter.requires_grad
                    )
                own._parameters[name] = made[id(parameter)]
        for name, buffer in own._buffers.items():
            if buffer is not None:
                own._buffers[name] = GpuTensor(buffer)


def _check(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    if func in COPIES:
        return
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if func in INDEXED and isinstance(args[0], GpuTensor):  # indices may be the CPU's
        tensors = [x for x in (args[0], *args[2:]) if isinstance(x, Tensor)]
    elsewhere = [x for x in tensors if not isinstance(x, GpuTensor) and (x.dim() or func in JOINS)]
    if elsewhere and any(isinstance(x, GpuTensor) for x in tensors):
        raise Mixed(f"{func}: {[tuple(x.shape) for x in elsewhere]} on the CPU, others on the GPU")


def _waits(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether CUDA would make the host wait."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    here = [x for x in tensors if not isinstance(x, GpuTensor)]
    if func in COPIES:
        target = kwargs.get("device", args[0].device)
        source = args[1] if func is aten.copy_.default else args[0]
        blocking = not kwargs.get("non_blocking", len(args) > 2 and args[2])
        return (source.device == GPU) != (target == GPU) and blocking
    if len(here) == len(tensors):
        return False
    if func in INDEXED:  # a mask decides a shape, indices of the CPU are copied first
        return any(x is not None and (x.dtype == torch.bool or x in here) for x in args[1])
    # Of operators on scalars, `where` alone copies them to the GPU.
    return func in READING or (func is aten.where.self and bool(here))


def _launches(func: Any) -> bool:
    """Whether something is computed: not for a view of an argument, or for memory alone."""
    views = any(
        x.alias_info is not None and not x.alias_info.is_write for x in func._schema.returns
    )
    return not views and "empty" not in func._schema.name


def _place() -> str:
    """The innermost line of this repository that is running, else of any library but torch."""
    frame, inner = sys._getframe(1), "autograd"
    torch_folder = str(Path(torch.__file__).parent)
    while frame is not None:
        file = frame.f_code.co_filename
        if file != __file__ and not file.startswith((torch_folder, "<")):
            place = f"{'/'.join(Path(file).parts[-2:])}:{frame.f_code.co_name}:{frame.f_lineno}"
            if file.startswith(ROOT) and "site-packages" not in file:
                return place if inner == "autograd" else f"{place} ({inner})"
            inner = place if inner == "autograd" else inner
        frame = frame.f_back  # type: ignore[assignment]
    return inner


def pass_on(operations: list[dist.P2POp]) -> list[dist.Work]:
    """Stands for ``batch_isend_irecv``: what arrives is what a rank like this one sends."""
    sent, received = (
        [o.tensor for o in operations if o.op is kind] for kind in (dist.isend, dist.irecv)
    )
    for own, other in zip(sent, received, strict=True):
        if not (isinstance(own, GpuTensor) and isinstance(other, GpuTensor)):
            raise Mixed("NCCL is given a tensor of the CPU")
        other.inner.copy_(own.inner)
    return []


def _communicate(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
    if not all(isinstance(x, GpuTensor) for x in tensors):
        raise Mixed(f"{func}: NCCL is given a tensor of the CPU")
    name, ranks = func._schema.name.removeprefix("c10d::"), dist.get_world_size()
    inner = tree_map_only(GpuTensor, lambda x: x.inner, args)
    if name == "_allgather_base_":
        inner[0].view(ranks, -1).copy_(inner[1].reshape(1, -1))
    elif name == "_reduce_scatter_base_":
        inner[0].copy_(ranks * inner[1].chunk(ranks)[0])
    empty = tree_map_only(Tensor, lambda x: torch.empty(0, dtype=x.dtype), (args, kwargs))
    return func(*empty[0], **empty[1])
