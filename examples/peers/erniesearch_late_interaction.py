"""The same here.

python examples/peers/erniesearch_late_interaction.py MODEL TRIPLETS.jsonl OUT
"""

import sys

from datasets import load_dataset

from erniesearch import Collection, Trainer, export_all, load, load_config

source, triplets, out = sys.argv[1:]
train_dataset = load_dataset("json", data_files=triplets, split="train")
stage = {"steps": 20, "queries_per_rank": 8, "student_lr": 1e-4, "num_negatives": 1}
stage |= {"negatives": "given", "weights": {"li": 1, "de": 0}}
config = load_config(run_dir=out, student={"path": source}, stages={"contrastive": stage})
model = Trainer(config, "contrastive", Collection.from_rows(train_dataset)).train()
export_all(config)  # folders for PyLate and sentence-transformers

row = train_dataset[0]
encoder = load(model)
(query,) = encoder.tokens([row["query"]], "query")
passages = encoder.tokens([row["positive"], row["negative"]], "passage")
print([float((query @ passage.T).max(dim=1).values.sum()) for passage in passages])
