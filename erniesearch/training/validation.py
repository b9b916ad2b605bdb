"""How good a stage is on queries that it does not train on: what makes a checkpoint the best.

    validation loss = sum over trained models of  weight · cross-entropy     (terms ce, li, de)

over fixed groups of another split, without dropout. Distillation terms are left out: their target
moves with the training, so that their value at two updates does not compare.
"""

import math

import torch
from deepspeed import DeepSpeedEngine

from erniesearch import distributed
from erniesearch.data.batches import GroupCollator, StepBatches
from erniesearch.data.collection import RetrievalData, with_split
from erniesearch.data.sampler import GroupSampler
from erniesearch.stages import Stage
from erniesearch.training.gradient_cache import chunked_outputs

TERMS = ("ce", "li", "de")


def is_validated(stage: Stage) -> bool:
    """Whether checkpoints of a stage are measured: a split is named, and the stage has labels for
    it and a cross-entropy."""
    measured = any(getattr(stage.weights, term) for term in TERMS)
    split = stage.config.training.validation_split
    return split is not None and measured and stage.name != "post_train"


class Validation:
    """The validation loss of a stage, the same on every rank.

    Args:
        stage: its config names the split and the number of its queries.
        data: the collection; the split's qrels are read.
        batches: the stage's, for vocabulary, lengths and ranks.

    Raises:
        UserError: if the split cannot be read or its groups do not fit the corpus.
    """

    def __init__(self, stage: Stage, data: RetrievalData, batches: StepBatches) -> None:
        self.stage, config = stage.settings, stage.config
        split = config.training.validation_split
        assert split is not None
        held_out = with_split(data, config.data.path, split)
        rank, queries_per_rank, world_size = batches.slice
        together = queries_per_rank * world_size
        sampler = GroupSampler(held_out, None, self.stage.num_negatives, together, stage.seed)
        wanted = min(config.training.validation_queries, len(sampler.qids))
        steps = math.ceil(wanted / together)
        collator = GroupCollator(
            held_out, sampler.qids, batches.collator.tokenizer,
            config.data.max_query_length, config.data.max_passage_length,
            batches.collator.text_format,
        )  # fmt: skip
        self.batches = StepBatches(sampler, collator, steps, 1, rank, queries_per_rank, world_size)

    @torch.no_grad()
    def measure(self, engine: DeepSpeedEngine, device: torch.device) -> dict[str, float]:
        """``loss`` and its terms, means over all ranks' queries. Every rank must call it."""
        sums: dict[str, torch.Tensor] = {}
        engine.eval()
        for number in range(len(self.batches)):
            batch = self.batches[number].to(device)
            model = engine.module
            if self.stage.chunk_size:
                outputs = chunked_outputs(model, engine, batch, self.stage.chunk_size)
                terms = model.objective.terms(batch, outputs, training=False)
            else:
                terms = engine(batch)
            for term in TERMS:
                for key in (term, f"accuracy_{term}"):
                    if key in terms:
                        sums[key] = sums.get(key, 0) + terms[key] / len(self.batches)
        engine.train()
        means = distributed.mean_over_ranks(sums)
        weights = {term: getattr(self.stage.weights, term) for term in TERMS}
        loss = sum(weight * means[term] for term, weight in weights.items() if weight)
        return {"loss": loss, **means}
