"""``num_train_epochs`` as updates, once queries and ranks are known."""

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

from erniesearch import stages
from erniesearch.config.checks import validate
from erniesearch.config.keys import RunConfig, training_stages
from erniesearch.data.collection import RetrievalData, load_beir
from erniesearch.data.negatives import read_negatives
from erniesearch.errors import UserError
from erniesearch.stages import Stage


def resolve_epochs(config: RunConfig, ranks: int, data: RetrievalData | None = None) -> RunConfig:
    """The config with ``steps`` in place of every ``num_train_epochs``:

        steps = ⌈num_train_epochs · queries / (queries_per_rank · ranks · accumulation_steps)⌉

    so that every query is seen ``num_train_epochs`` times at least; an update may reach into the
    next pass. Queries are those that the stage's negatives leave, in post_train the passages.
    What fingerprints, schedules and checkpoints go by is the number of updates alone: a run that
    continues must resolve to the same one, which it does on as many ranks, and on any number of
    them with ``batch_size``.

    Args:
        data: with the training split; read from ``config.data`` by default, if it is needed.

    Raises:
        UserError: for data that does not load, and ranks that cannot share a batch.
    """
    epochs = {name: stage.num_train_epochs for name, stage in training_stages(config).items()
              if stage.num_train_epochs is not None}  # fmt: skip
    if not epochs:
        return config
    if data is None:
        data = load_beir(config.data.path, config.data.train_split, config.data.use_titles)
    found: dict[str, Any] = {}
    for name, number in epochs.items():
        stage = Stage(config, name, ranks)
        passes = Fraction(str(number))  # 0.1 · 30 is 3, and not a little more
        steps = math.ceil(passes * num_queries(stage, data) / stage.global_batch)
        found[name] = replace(stage.settings, steps=steps, num_train_epochs=None)
    return validate(replace(config, stages=replace(config.stages, **found)))


def num_queries(stage: Stage, data: RetrievalData) -> int:
    """Queries of one pass of a stage; does not need the negatives that the run will make."""
    config, settings = stage.config, stage.settings
    if stage.name == "post_train":
        return len(data.pids)
    qids = data.relevant()
    if settings.num_negatives and settings.negatives == "given":
        path = stages.given_negatives(config)
        if found := qids.keys() & read_negatives(path, data).keys():
            return len(found)
        raise UserError(f"{path}: names no query of the split {config.data.train_split}")
    if settings.num_negatives and settings.negatives == "mined":
        return min(len(qids), config.stages.mine.max_queries or len(qids))
    return len(qids)
