"""The temperature of a cross-encoder's scores: what ``objective.tau_ce: auto`` stands for.

    T = argmin  mean over lists of  -log( exp(s⁺/T) / sum over the list of exp(s/T) )

The likelihood of the labels given the tempered scores, on lists that the stage has not trained on
(Guo et al. 2017, arXiv 1706.04599: one number cannot overfit, and changes no ranking). In 1/T the
objective is convex. At T the softmax over a list is as sure as it is right, on average.
"""

import math
from typing import NamedTuple

import torch
from deepspeed import DeepSpeedEngine
from scipy.optimize import minimize_scalar
from torch import Tensor

from erniesearch import distributed
from erniesearch.config.stage_keys import TrainingStageConfig
from erniesearch.data.batches import StepBatches
from erniesearch.models.joint import JointModel
from erniesearch.objectives.losses import contrastive_loss
from erniesearch.objectives.objective import group_mask
from erniesearch.progress import metered

NUM_LISTS = 256
LOWEST, HIGHEST = 0.05, 20.0
"""Bounds of the temperature. Scores that rank every list right have none: the lower, the likelier.
"""


class Calibration(NamedTuple):
    """A fitted temperature.

    Attributes:
        temperature: of the teacher's scores, within :data:`LOWEST` and :data:`HIGHEST`.
        num_lists: that it was fitted on.
        held_out: whether the stage had trained on none of their queries.
        loss_before, loss_after: mean negative log-likelihood at temperature 1 and at this one.
    """

    temperature: float
    num_lists: int
    held_out: bool
    loss_before: float
    loss_after: float

    def told(self) -> str:
        """One line."""
        text = (
            f"teacher's temperature {self.temperature:.3g} by likelihood on {self.num_lists}"
            f" {'held-out ' if self.held_out else ''}lists: loss {self.loss_before:.4g} at 1,"
            f" {self.loss_after:.4g} there"
        )
        if not self.held_out:
            text += "; the stage trained on their queries, so that it is likely too low"
        if not 1.25 * LOWEST < self.temperature < HIGHEST / 1.25:
            text += "; it lies at its bound: these lists are too easy, or the teacher knows nothing"
        return text


def fit_temperature(scores: Tensor, mask: Tensor) -> float:
    """The likelihood-best temperature of scores ``[num_lists, G]``, each list's positive first;
    ``mask`` is True on candidates."""
    scores = scores.double().cpu()
    mask = mask.cpu()
    labels = torch.zeros(len(scores), dtype=torch.long)

    def loss(log_temperature: float) -> float:
        return float(contrastive_loss(scores / math.exp(log_temperature), labels, mask))

    bounds = (math.log(LOWEST), math.log(HIGHEST))
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x)


@torch.no_grad()
def calibrate(
    engine: DeepSpeedEngine, stage: TrainingStageConfig, batches: StepBatches, device: torch.device
) -> Calibration:
    """Fit the temperature of an engine's teacher, the same on every rank; every rank must call it.

    The lists are those of the updates that would come next: the stage's own kind of negatives, and
    queries that it has not trained on as long as its pass over them is not over.
    """
    sampler = batches.sampler
    steps = math.ceil(min(NUM_LISTS, sampler.num_queries) / sampler.global_batch)
    more = StepBatches(
        sampler, batches.collator, stage.steps + steps, stage.accumulation_steps, *batches.slice
    )
    model: JointModel = engine.module
    scores, masks = [], []
    engine.eval()
    lists = range(len(batches), len(more))
    for item in metered(lists, "fitting the teacher's temperature", "batches", len(lists)):
        batch = more[item].to(device)
        size = stage.chunk_size or len(batch.passage_ids)
        parts = [engine(batch, c)[0] for c in model.chunks(batch, size) if c.kind == "pair"]
        scores.append(torch.cat(parts).view(-1, batch.group_size))
        masks.append(group_mask(batch))
    engine.train()
    every_score = distributed.gather_rows(torch.cat(scores)).cpu()
    every_mask = distributed.gather_rows(torch.cat(masks).to(torch.uint8)).bool().cpu()
    temperature = fit_temperature(every_score, every_mask)
    labels = torch.zeros(len(every_score), dtype=torch.long)
    losses = [
        float(contrastive_loss(every_score / t, labels, every_mask)) for t in (1, temperature)
    ]
    held_out = sampler.global_batch * (stage.steps + steps) <= sampler.num_queries
    return Calibration(temperature, len(every_score), held_out, *losses)
