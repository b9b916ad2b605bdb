"""Damaged input: every file and every configuration ends in success or in one line."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from support.mutations import mutate_config, mutate_file
from support.tiny import ConfigMaker

from erniesearch.cli import main
from erniesearch.config.keys import TRAINING_STAGES, RunConfig
from erniesearch.config.yaml_file import to_yaml
from erniesearch.data.collection import load_beir
from erniesearch.data.negatives import read_negatives, write_negatives
from erniesearch.data.trec import read_trec_run, write_trec_run
from erniesearch.errors import UserError
from erniesearch.models.backbone import load_tokenizer
from erniesearch.pipeline import run as pipeline
from erniesearch.stages import Stage
from erniesearch.training.build import build_batches

FILES = ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv", "qrels/test.tsv", "negatives.jsonl",
         "a.trec")  # fmt: skip
SECONDS = 20
"""A case that takes longer hangs."""


@contextmanager
def time_limit(case: str) -> Iterator[None]:
    def late(*_: object) -> None:
        raise AssertionError(f"{case}: still running after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def _process_state() -> Iterator[None]:
    variables, threads = dict(os.environ), torch.get_num_threads()
    yield
    os.environ.clear()
    os.environ.update(variables)
    torch.set_num_threads(threads)


@pytest.fixture
def first_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of training, a stage makes its first batch; other steps do nothing."""

    def step(config: RunConfig, name: str, *_: object) -> None:
        # A batch of millions of queries is no mistake in itself.
        if name in TRAINING_STAGES and getattr(config.stages, name).queries_per_rank < 1000:
            data = load_beir(config.data.path, config.data.train_split, config.data.use_titles)
            build_batches(Stage(config, name), data, load_tokenizer(config.student))[0]

    monkeypatch.setattr(pipeline, "_run_step", step)
    monkeypatch.setattr(pipeline.Report, "load", lambda folder: Mock())


def counts(some: int, every: int) -> pytest.MarkDecorator:
    """Cases of the normal suite, and of the slow one."""
    return pytest.mark.parametrize("number", [some, pytest.param(every, marks=pytest.mark.slow)])


@counts(100, 1000)
@pytest.mark.usefixtures("first_batches")
def test_damaged_files(
    number: int, make_config: ConfigMaker, tiny_data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("ERNIESEARCH_CACHE", str(tmp_path / "cache"))
    config = make_config(steps=1)
    data = tmp_path / "data"
    (data / "qrels").mkdir(parents=True)
    negatives = {f"q{i}": [f"p{(i + k) % 60}" for k in range(1, 6)] for i in range(40)}
    write_negatives(data / "negatives.jsonl", negatives, {qid: ["p0"] for qid in negatives})
    write_trec_run(
        data / "a.trec", {q: {p: 1 / (k + 1) for k, p in enumerate(found)}
                          for q, found in negatives.items()}, "a",
    )  # fmt: skip
    for name in FILES[:4]:
        (data / name).write_bytes((tiny_data / name).read_bytes())
    contents = {name: (data / name).read_bytes() for name in FILES}
    config = replace(config, data=replace(config.data, path=str(data)))

    ends = {"success": 0, "refused": 0}
    for case in range(number):
        rng = np.random.default_rng([7, case])
        name = FILES[case % len(FILES)]
        damage, content = mutate_file(contents[name], rng)
        (data / name).write_bytes(content)
        with time_limit(f"case {case}: {damage} in {name}"):
            ends[outcome(lambda: run(config, data), f"case {case}: {damage} in {name}")] += 1
        (data / name).write_bytes(contents[name])
    assert ends["success"] > 0.1 * sum(ends.values()), ends
    assert ends["refused"] > 0.4 * sum(ends.values()), ends


def run(config: RunConfig, root: Path) -> None:
    """What reads the files, up to the first batch."""
    pipeline.run_pipeline(config)
    data = load_beir(root, "test")
    read_negatives(root / "negatives.jsonl", data)
    read_trec_run(root / "a.trec", data.queries, data.index_of)


def outcome(action: Callable[[], None], case: str) -> str:
    """'success' or 'refused'; anything else is what the test is for."""
    try:
        action()
    except UserError:
        return "refused"
    except Exception as error:
        raise AssertionError(f"{case}: {type(error).__name__}: {error}"[:2000]) from error
    return "success"


@counts(25, 500)
@pytest.mark.usefixtures("first_batches")
def test_damaged_configs(
    number: int, make_config: ConfigMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    content = to_yaml(make_config(steps=1, num_negatives=2))
    file = tmp_path / "run.yaml"
    ends = {0: 0, 2: 0}
    for case in range(number):
        damage, damaged = mutate_config(content, np.random.default_rng([11, case]))
        file.write_bytes(damaged)
        told = f"case {case}: {damage}"
        capsys.readouterr()
        with time_limit(told):
            try:
                # A damaged run_dir must not write elsewhere.
                status = main(["run", "--config", str(file), "--run_dir", str(tmp_path / "run")])
            except Exception as error:
                raise AssertionError(f"{told}: {type(error).__name__}: {error}"[:3000]) from error
        error = capsys.readouterr().err
        assert status in (0, 2), (told, status)
        if status == 2:
            assert error.startswith("erniesearch: error: "), (told, error)
            assert error.count("\n") == 1, (told, error[:2000])
            assert len(error) < 1200, (told, len(error))
            assert error.rstrip("\n").isprintable(), (told, error)
        ends[status] += 1
    assert ends[0] > 0.1 * sum(ends.values()), ends
    assert ends[2] > 0.4 * sum(ends.values()), ends
