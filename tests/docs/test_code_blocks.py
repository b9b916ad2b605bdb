"""Every code block of the documentation: Python runs, command lines go through the real parser,
YAML is a valid configuration, JSON is read. A block that cannot be checked says why, in a comment
``<!-- not run: … -->`` right above it."""

import json
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support import doc_commands
from support.finished_run import write_run
from support.markdown import Block, blocks, pages, read
from support.processes import ROOT
from support.tiny import ALL_TERMS, write_model

import erniesearch
from erniesearch.ablation.grid import read_grid
from erniesearch.config.stage_keys import LossWeights, StageConfig
from erniesearch.config.yaml_file import to_yaml
from erniesearch.export import export_all

CHECKED = ("bash", "json", "jsonl", "python", "yaml")
QUOTED = ("bibtex", "text", "")
"""Not code."""
BLOCKS = [(page, block) for page in pages() for block in blocks(page)]
EXAMPLES = [path.read_text(encoding="utf-8") for path in (ROOT / "examples").rglob("*.py")]
ROWS = [{"query": f"copy file {i}", "positive": f"def copy_{i}", "negative": f"def move_{i}"}
        for i in range(24)]  # fmt: skip


def of(language: str) -> list[Any]:
    """Blocks to be checked, once each: README and a page may show the same."""
    found = {block.code: block for _, block in BLOCKS
             if block.language == language and not block.not_run}  # fmt: skip
    return [pytest.param(block, id=block.where) for block in found.values()]


def runs_elsewhere(block: Block) -> bool:
    """Part of a script that tests/examples runs."""
    return any(block.code.strip() in script for script in EXAMPLES)


PYTHON_PAGES = sorted({page for page, block in BLOCKS if block.language == "python"
                       and not block.not_run and not runs_elsewhere(block)})  # fmt: skip


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, tiny_model: Path
) -> Iterator[Path]:
    """A folder in which a reader tries things: a configuration, data, a model, finished runs."""
    folder = tmp_path_factory.mktemp("world")
    run = write_run(folder / "runs" / "my", tiny_data, tiny_model, ALL_TERMS)
    export_all(run)
    for name in ("mine", "quickstart"):
        (folder / "runs" / name).symlink_to("my")
    (folder / "data").mkdir()
    for name in ("my", "nq"):
        (folder / "data" / name).symlink_to(tiny_data)
    write_model(folder / "DIR", max_position_embeddings=192)
    stage = StageConfig(steps=2, negatives="random", weights=LossWeights(de=1.0))
    watched = replace(run.training, validation_split="dev", validation_metrics=["nDCG@10"])
    new = replace(run, run_dir="runs/new", training=replace(watched, evaluate_every=1),
                  stages=replace(run.stages, contrastive=stage))  # fmt: skip
    (folder / "my.yaml").write_text(to_yaml(new))
    for name in ("configs", "launch", "slurm"):
        (folder / name).symlink_to(ROOT / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def test_a_block_in_a_language_that_nothing_checks_says_why() -> None:
    unknown = [block.where for _, block in BLOCKS
               if block.language not in CHECKED + QUOTED and not block.not_run]  # fmt: skip
    assert unknown == []
    assert {language for language in CHECKED if of(language)} >= {"bash", "json", "python", "yaml"}


@pytest.mark.parametrize("block", of("bash"))
def test_command_lines(block: Block, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = doc_commands.commands(block.code)
    assert found
    for words in found:
        for name in doc_commands.needed_files(words):
            if not name.exists():
                name.write_text((world / "my.yaml").read_text())
        doc_commands.check(words, monkeypatch)


def test_what_a_command_does_not_know_is_found(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for line in ("erniesearch run my.yaml --stages.cascade.step 3", "erniesearch serch --run r",
                 "torchrun -m erniesearch evaluate --data d --modl m", "bash launch/no.sh",
                 "python benchmarks/serving.py r --nothing 1", 'pip install -e ".[nothing]"',
                 "unheard of"):  # fmt: skip
        (words,) = doc_commands.commands(line)
        with pytest.raises(AssertionError):
            doc_commands.check(words, monkeypatch)


@pytest.mark.parametrize("block", of("yaml"))
def test_configurations(block: Block, world: Path) -> None:
    content = yaml.safe_load(block.code)
    if "arms" in content:
        (world / "grid.yaml").write_text(block.code)
        read_grid(world / "grid.yaml", {})
    else:
        erniesearch.load_config("my.yaml", content)


@pytest.mark.parametrize("block", of("json") + of("jsonl"))
def test_json(block: Block) -> None:
    for line in block.code.splitlines() if block.language == "jsonl" else [block.code]:
        json.loads(line)


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=str)
def test_python(page: Path, world: Path) -> None:
    """In a process of its own, as a training leaves a process group; forked, with all imported."""
    said = world / f"{page.stem}.txt"
    process = multiprocessing.get_context("fork").Process(target=run_blocks, args=(page, said))
    process.start()
    process.join(300)
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode == 0, said.read_text()[-3000:]


def run_blocks(page: Path, said: Path) -> None:
    """The blocks of a page, from top to bottom in one namespace, with fewer updates."""
    for stream in (1, 2):
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.stdout = sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    sys.argv = ["script.py", "my.yaml", "contrastive"]
    rows = [row | {"_id": str(i), "text": row["positive"]} for i, row in enumerate(ROWS)]
    qrels = {row["_id"]: {row["_id"]: 1} for row in rows}
    queries = {row["_id"]: row["query"] for row in rows}
    names: dict[str, Any] = {"corpus": rows, "queries": queries, "qrels": qrels, "train": ROWS,
                             "test_qrels": qrels, "dev": ROWS[:4]}  # fmt: skip
    torch.manual_seed(0)
    for block in blocks(page):
        if block.language == "python" and not block.not_run and not runs_elsewhere(block):
            fewer = re.sub(r'(steps"?: )\d+', r"\g<1>2", block.code)
            exec(compile(fewer, block.where, "exec"), names)


def test_a_block_that_is_not_run_says_why() -> None:
    """The comment stands right above a block, and only there."""
    for page in pages():
        said = re.findall(r"^<!-- not run:", read(page), re.MULTILINE)
        assert len(said) == sum(block.not_run for block in blocks(page)), page
