"""Training on configs that ``validate`` refuses: ``dual_reg`` without dropout, so that ranks and
chunks compare."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

from erniesearch.config.keys import RunConfig
from erniesearch.training.trainer import Trainer


def train(config: RunConfig, stage: str, **own: Any) -> Path:
    with patch("erniesearch.training.trainer.validate"):
        return Trainer(config, stage, **own).train()
