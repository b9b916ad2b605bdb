"""A loss term of one's own beside a built-in one: the positive's score at least ``MARGIN`` above
that of every other passage.

python examples/own_loss_term.py MODEL OUT
"""

import sys

import torch
from standard_library import triplets

from erniesearch import Collection, LossTerm, Trainer, load_config

MARGIN = 0.2


def hinge(scores, batch):
    """The mean over queries; what is made of these tensors has the right gradient on any number of
    ranks."""
    positive = scores.dual_encoder.gather(1, scores.labels[:, None])
    others = scores.mask.scatter(1, scores.labels[:, None], False)  # without false negatives
    short = torch.relu(MARGIN + scores.dual_encoder - positive) * others
    return short.sum(dim=1).mean()


model, out = sys.argv[1:]
config = load_config(
    run_dir=out,
    student={"path": model, "normalize": True},
    stages={"contrastive": {"steps": 6, "negatives": "given", "num_negatives": 1}},
)
term = LossTerm("hinge", hinge, weight=0.5, models=("dual_encoder",))
data = Collection.from_rows(triplets())
print(Trainer(config, "contrastive", data, terms=[term]).train())
