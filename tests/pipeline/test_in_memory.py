"""Data that a program holds reaches every step, those that read files too: BM25, mining, the
cascade on what was mined, export, evaluation."""

import json
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
from support.tiny import WORDS, ConfigMaker

from erniesearch.config.stage_keys import MineConfig, TeacherCheckConfig
from erniesearch.data.memory import Collection, with_data
from erniesearch.pipeline.run import planned
from erniesearch.pipeline.steps import run_step
from erniesearch.run_folder import RunFolder
from erniesearch.search.load_result import load
from erniesearch.search.system import SearchSystem
from erniesearch.training.trainer import Trainer


def test_every_step_of_a_run(make_config: ConfigMaker) -> None:
    rng = np.random.default_rng(0)
    passages = [" ".join(rng.choice(WORDS, size=8)) for _ in range(40)]
    rows = datasets.Dataset.from_dict({
        "query": [" ".join(passage.split()[:3]) for passage in passages[:20]],
        "positive": passages[:20], "negative": passages[20:],
    })  # fmt: skip
    data = Collection.from_rows(rows, test=rows.select(range(5)))
    config = make_config("cascade", negatives="mined", steps=2, queries_per_rank=4)
    interaction = make_config("interaction", negatives="bm25", steps=2, dropout=0.1)
    chosen = replace(
        config.stages, interaction=interaction.stages.interaction,
        mine=MineConfig(depth=10, num_negatives=4, denoise_margin=None),
        teacher_check=TeacherCheckConfig(enabled=False),
    )  # fmt: skip
    config = replace(config, stages=chosen, student=interaction.student)
    steps = planned(with_data(config, data))
    assert steps == ["bm25", "interaction", "mine", "cascade", "export", "evaluate"]
    for name in steps:
        if name in ("interaction", "cascade"):
            folder = Trainer(config, name, data).train()
        else:
            run_step(with_data(config, data), name, 1)
    assert (folder / "teacher" / "config.json").is_file()
    mined = RunFolder(config.run_dir).negatives("mined").read_text().splitlines()
    assert {json.loads(line)["query_id"] for line in mined} == set(data.queries)
    system = load(config.run_dir)
    assert isinstance(system, SearchSystem)
    hits = system.search(rows[0]["query"], depth=3).hits
    assert {hit.text for hit in hits} <= set(passages)
    summary = (Path(config.run_dir) / "summary.md").read_text()
    assert "in-memory, test: 5 queries, 40 passages" in summary
