"""A callback that ends a training when nDCG@10 no longer gets better. The configuration can do so
by itself (``training.early_stopping_patience``); this one can be changed.

python examples/stop_early.py MODEL OUT
"""

import sys

from standard_library import pairs

from erniesearch import Callback, Collection, Trainer, load_config


class EarlyStopping(Callback):
    """Stops after ``patience`` measurements in a row that were not the best so far."""

    def __init__(self, patience):
        self.patience, self.best, self.waited = patience, -1.0, 0

    def on_evaluate(self, state):
        found = state.evaluation["nDCG@10_de"]  # of the dual-encoder
        self.waited = 0 if found > self.best else self.waited + 1
        self.best = max(self.best, found)
        state.should_stop = self.waited >= self.patience

    def on_train_end(self, state):
        print(f"{state.stage} ended after update {state.step} of {state.steps}")

    def state_dict(self):  # so that a killed training goes on as it was
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state):
        self.best, self.waited = state["best"], state["waited"]


model, out = sys.argv[1:]
rows = pairs()
config = load_config(
    run_dir=out,
    student={"path": model},
    stages={"contrastive": {"steps": 40, "negatives": "random", "student_lr": 0}},  # learns nothing
    training={"validation_split": "dev", "validation_metrics": ["nDCG@10"], "evaluate_every": 1},
)
data = Collection.from_rows(rows[20:], dev=rows[:20])
Trainer(config, "contrastive", data, callbacks=[EarlyStopping(patience=2)]).train()
