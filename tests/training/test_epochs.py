"""num_train_epochs: the updates it stands for, and that a run with it continues like any other."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.processes import train_cascade
from support.tiny import ConfigMaker, write_beir

from erniesearch.commands.parsing import config_parser, parse_config
from erniesearch.config.checks import validate
from erniesearch.config.keys import RunConfig
from erniesearch.config.yaml_file import to_yaml
from erniesearch.errors import UserError
from erniesearch.stages import fingerprint
from erniesearch.training.epochs import resolve_epochs


def with_stage(config: RunConfig, name: str, **changes: object) -> RunConfig:
    stage = replace(getattr(config.stages, name), **changes)
    return replace(config, stages=replace(config.stages, **{name: stage}))


@pytest.mark.parametrize(
    ("epochs", "ranks", "changes", "steps"),
    [
        (1, 1, {}, 10),  # 40 queries, 4 an update
        (1, 2, {}, 5),
        (1.5, 1, {}, 15),
        (0.1, 1, {}, 1),
        (0.7, 1, {"queries_per_rank": 1}, 28),  # 0.7 · 40 is 27.999… in floats
        (1, 1, {"queries_per_rank": 7}, 6),  # rounded up
        (2, 1, {"queries_per_rank": 7}, 12),  # once, and not for every pass
        (1, 2, {"accumulation_steps": 3}, 2),
        (3, 2, {"batch_size": 8}, 15),
    ],
)
def test_updates_by_hand(
    epochs: float, ranks: int, changes: dict, steps: int, make_config: ConfigMaker
) -> None:
    config = make_config(steps=0, num_train_epochs=epochs, **changes)
    found = resolve_epochs(config, ranks).stages.cascade
    assert (found.steps, found.num_train_epochs) == (steps, None)


def test_passes_go_over_what_the_stage_trains_on(make_config: ConfigMaker, tmp_path: Path) -> None:
    config = make_config(steps=0, num_train_epochs=1, negatives="mined", queries_per_rank=1)
    mine = replace(config.stages.mine, max_queries=11)
    config = replace(config, stages=replace(config.stages, mine=mine))
    assert resolve_epochs(config, 1).stages.cascade.steps == 11
    root = write_beir(tmp_path / "given")
    lines = [{"query_id": f"q{i}", "negative_document_ids": ["p1"]} for i in range(9)]
    (root / "negatives.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = replace(config, data=replace(config.data, path=str(root)))
    given = with_stage(config, "cascade", negatives="given")
    assert resolve_epochs(given, 1).stages.cascade.steps == 9
    passages = with_stage(with_stage(config, "cascade", num_train_epochs=None), "post_train",
                          num_train_epochs=2, queries_per_rank=8)  # fmt: skip
    assert resolve_epochs(passages, 1).stages.post_train.steps == 15  # 2 · 60 passages / 8
    (root / "negatives.jsonl").write_text("")
    with pytest.raises(UserError, match=r"negatives\.jsonl: names no query of the split train"):
        resolve_epochs(given, 1)


def test_the_same_run_as_with_steps(make_config: ConfigMaker) -> None:
    steps = make_config(steps=10)
    epochs = resolve_epochs(with_stage(steps, "cascade", steps=0, num_train_epochs=1), 1)
    assert epochs == steps
    assert fingerprint(epochs, "cascade", 1) == fingerprint(steps, "cascade", 1)


def test_both_lengths_or_none_are_refused(make_config: ConfigMaker, tmp_path: Path) -> None:
    config = make_config(steps=3)
    with pytest.raises(UserError, match=r"num_train_epochs' is 1: must be null while .*steps is 3"):
        validate(with_stage(config, "cascade", num_train_epochs=1))
    for odd in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="num_train_epochs"):
            validate(with_stage(config, "cascade", steps=0, num_train_epochs=odd))
    # What is checked of a stage that trains is checked of one measured in passes.
    with pytest.raises(UserError, match="num_negatives' is 0"):
        validate(with_stage(config, "cascade", steps=0, num_train_epochs=1, num_negatives=0))
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config))

    def parse(*argv: str) -> tuple[int, float | None]:
        parsed, _ = parse_config(config_parser("train", ""), ["--config", str(file), *argv])
        return parsed.stages.cascade.steps, parsed.stages.cascade.num_train_epochs

    assert parse("--stages.cascade.num_train_epochs", "2") == (0, 2)  # instead of the file's steps
    file.write_text(to_yaml(with_stage(config, "cascade", steps=0, num_train_epochs=2)))
    assert parse("--stages.cascade.max_steps", "5") == (5, None)


@pytest.mark.distributed
def test_a_stage_trains_its_passes_and_continues(make_config: ConfigMaker, tmp_path: Path) -> None:
    config = make_config(steps=0, num_train_epochs=0.5, save_every=1)  # 20 queries: 5 updates of 4
    stage = train_cascade(config, tmp_path, 1)
    done = json.loads((stage / "done.json").read_text())
    assert done["steps"] == 5
    before = (stage / "metrics.jsonl").read_bytes()
    (stage / "done.json").unlink()
    again = train_cascade(
        with_stage(config, "cascade", steps=5, num_train_epochs=None), tmp_path, 1
    )
    assert (again / "metrics.jsonl").read_bytes() == before  # nothing is trained anew
