"""A callback that ends a training when validation no longer gets better.

python examples/stop_early.py MODEL OUT
"""

import sys

from standard_library import pairs

from erniesearch import Callback, Collection, Trainer, load_config


class EarlyStopping(Callback):
    """Stops after ``patience`` measurements in a row that were not the best so far."""

    def __init__(self, patience):
        self.patience, self.best, self.waited = patience, float("inf"), 0

    def on_evaluate(self, state):
        self.waited = 0 if state.evaluation["loss"] < self.best else self.waited + 1
        self.best = min(self.best, state.evaluation["loss"])
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
    training={"validation_split": "dev", "save_every": 1, "validation_queries": 20},
)
data = Collection.from_rows(rows[20:], dev=rows[:20])
Trainer(config, "contrastive", data, callbacks=[EarlyStopping(patience=2)]).train()
