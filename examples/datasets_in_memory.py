"""A Dataset with query, positive and negative columns trains late interaction and dual-encoder.

python examples/datasets_in_memory.py MODEL OUT
"""

import sys

from datasets import Dataset
from standard_library import triplets

from erniesearch import Collection, Trainer, export_all, load, load_config

model, out = sys.argv[1:]
rows = Dataset.from_list(triplets()).train_test_split(test_size=20, seed=0)
data = Collection.from_rows(rows["train"], dev=rows["test"])
config = load_config(
    run_dir=out,
    student={"path": model, "pooling": "mean"},
    stages={"interaction": {
        "steps": 8, "queries_per_rank": 8, "num_negatives": 1, "negatives": "given",
    }},
    training={"validation_split": "dev", "save_every": 4},
)  # fmt: skip
folder = Trainer(config, "interaction", data).train()

encoder = load(folder)
print(encoder.vectors(["copy a file"], "query").shape)
for exported in export_all(config):  # for sentence-transformers and PyLate
    print(exported)
