"""Corpus, queries and judgements with ids of their own, as BEIR and MTEB have them, in memory.

python examples/corpus_in_memory.py MODEL OUT
"""

import sys

from datasets import Dataset
from standard_library import pairs

from erniesearch import Collection, Trainer, load_config

model, out = sys.argv[1:]
rows = pairs()
corpus = Dataset.from_list([{"_id": f"f{i}", "text": row["positive"]}
                            for i, row in enumerate(rows)])  # fmt: skip
queries = {f"q{i}": row["query"] for i, row in enumerate(rows)}  # a mapping does as well
judged = [{"query-id": f"q{i}", "corpus-id": f"f{i}", "score": 1} for i in range(len(rows))]
data = Collection.from_corpus(corpus, queries, judged[20:], dev=judged[:20])
data.save(f"{out}/data")  # a folder in BEIR layout, for the commands

config = load_config(
    run_dir=out, student={"path": model},
    stages={"contrastive": {"steps": 4, "negatives": "random", "student_lr": 1e-4}},
)  # fmt: skip
print(Trainer(config, "contrastive", data).train())
