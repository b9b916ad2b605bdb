"""Every step of a run from data that this process holds; what the test looks at, as JSON.

python in_memory_worker.py CONFIG.json
"""

import json
import sys
from pathlib import Path

import datasets
import numpy as np
from support.tiny import WORDS

from erniesearch import exiting
from erniesearch.config.keys import RunConfig
from erniesearch.config.yaml_file import from_dict
from erniesearch.data.memory import Collection, with_data
from erniesearch.pipeline.run import planned
from erniesearch.pipeline.steps import run_step
from erniesearch.run_folder import RunFolder
from erniesearch.search.load_result import load
from erniesearch.search.system import SearchSystem
from erniesearch.training.trainer import Trainer


def main() -> None:
    config = from_dict(RunConfig, json.loads(Path(sys.argv[1]).read_text()))
    rng = np.random.default_rng(0)
    passages = [" ".join(rng.choice(WORDS, size=8)) for _ in range(40)]
    rows = datasets.Dataset.from_dict({
        "query": [" ".join(passage.split()[:3]) for passage in passages[:20]],
        "positive": passages[:20], "negative": passages[20:],
    })  # fmt: skip
    data = Collection.from_rows(rows, test=rows.select(range(5)))
    steps = planned(with_data(config, data))
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
    assert hits
    assert {hit.text for hit in hits} <= set(passages)
    Path(sys.argv[1]).with_name("steps.json").write_text(json.dumps(steps))


if __name__ == "__main__":
    exiting.run(main)
