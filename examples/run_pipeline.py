"""A configuration, all of its stages, its table, and a search in what came out.

python examples/run_pipeline.py MODEL DATA OUT        # DATA: a folder in BEIR layout
"""

import sys

from erniesearch import load, load_config, run

model, data, out = sys.argv[1:]
config = load_config(
    "quickstart",  # a shipped configuration; a YAML file or a dictionary would do
    {"student.path": model, "student.layers": None, "data.path": data, "stages.mine.depth": 20},
    run_dir=out,
    stages={name: {"steps": 2, "queries_per_rank": 4, "chunk_size": None}
            for name in ("contrastive", "interaction", "teacher", "cascade")},
    training={"num_processes": 1},
    evaluation={"max_queries": None, "num_distractors": None},  # all of them
)  # fmt: skip
report = run(config)
print(report.table())

system = load(out)
for hit in system.search("copy a file", depth=3).hits:
    print(hit.pid, hit.scores)
