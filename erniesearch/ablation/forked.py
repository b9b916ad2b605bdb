"""Commands of ours in processes that begin with everything imported.

An ablation starts hundreds of short commands, and importing PyTorch, transformers and SciPy takes
each of them seconds of a core. They are forked from a server (multiprocessing's forkserver) that
has imported those, and nothing that looks for a GPU: CUDA does not survive a fork.
"""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([
    "torch", "torch._dynamo", "torch.distributed.tensor", "transformers",
    "transformers.modeling_utils", "transformers.models.bert.modeling_bert", "scipy.optimize",
    "scipy.stats", "pyarrow",
    "jsonargparse", "rich.console", "erniesearch.config.keys", "erniesearch.data.collection",
    "erniesearch.data.bm25",
])  # fmt: skip


class Forked:
    """A running command; its standard output goes nowhere, its errors to ours.

    Args:
        arguments: as for ``erniesearch``.
        environment: variables beside this process's.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        # PyTorch then counts GPUs without CUDA.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        everything = os.environ | environment
        self._process = _context.Process(target=_run, args=(list(arguments), everything))
        self._process.start()

    def wait(self) -> int:
        """The exit status; negative for a signal."""
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Raises ProcessLookupError if it has ended."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)


def _run(arguments: list[str], environment: dict[str, str]) -> None:
    import torch

    os.environ.clear()
    os.environ.update(environment)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    if torch.cuda._is_in_bad_fork():  # an import has touched CUDA after all
        os.execv(sys.executable, [sys.executable, "-m", "erniesearch.cli", *arguments])
    sys.argv[1:] = arguments
    runpy.run_module("erniesearch.cli", run_name="__main__")
