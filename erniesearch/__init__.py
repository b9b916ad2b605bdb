"""ERNIE-Search: cross-encoder, late interaction and dual-encoder trained in one step.

What a program needs can be imported from here; docs/python.md shows it. Each name is loaded when it
is asked for: ``import erniesearch`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from erniesearch.config.build_config import load_config as load_config
    from erniesearch.config.terms import LossTerm as LossTerm
    from erniesearch.data.memory import Collection as Collection
    from erniesearch.errors import UserError as UserError
    from erniesearch.export import export_all as export_all
    from erniesearch.pipeline.run import run as run
    from erniesearch.search.load_result import load as load
    from erniesearch.training.callbacks import Callback as Callback
    from erniesearch.training.trainer import Trainer as Trainer

__version__ = "0.1.0"

_HOME = {
    "Callback": "training.callbacks",
    "Collection": "data.memory",
    "LossTerm": "config.terms",
    "Trainer": "training.trainer",
    "UserError": "errors",
    "export_all": "export",
    "load": "search.load_result",
    "load_config": "config.build_config",
    "run": "pipeline.run",
}
_COMPUTES = ("Trainer", "export_all", "load", "run")
"""What loads DeepSpeed, which on a CPU must be told that one is meant."""
__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        if name in _COMPUTES:
            import_module("erniesearch.commands.parsing").name_accelerator()
        return getattr(import_module(f"erniesearch.{_HOME[name]}"), name)
    raise AttributeError(f"module 'erniesearch' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
