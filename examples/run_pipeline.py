"""Pairs in a file, every stage, the table, and a search in what came out.

In a folder with pairs.jsonl, an object with "query" and "positive" a line, and with my.yaml, from
`erniesearch init config beir-cpu --out my.yaml`:

python run_pipeline.py
"""

from datasets import load_dataset

from erniesearch import Collection, load, load_config, run

rows = load_dataset("json", data_files="pairs.jsonl", split="train")
rows = rows.train_test_split(test_size=0.1, seed=0)
data = Collection.from_rows(rows["train"], test=rows["test"])
config = load_config("my.yaml", run_dir="runs/my")
report = run(config, data)  # trains every stage, exports, indexes, evaluates
print(report.table())

system = load("runs/my")
for hit in system.search("copy a file", depth=3).hits:
    print(hit.pid, hit.scores, hit.text)
