"""The batch that is planned for: every text as long as the settings allow."""

import torch
from transformers import PreTrainedTokenizerBase

from erniesearch.data.batches import Batch
from erniesearch.stages import Stage


def full_batch(
    stage: Stage, num_queries: int, tokenizer: PreTrainedTokenizerBase,
    step: int = 0, micro_step: int = 0,
) -> Batch:  # fmt: skip
    """One rank's micro-batch of a stage with random words.

    All texts but one query and one passage have the most tokens that the settings allow; with no
    padding at all, a model would drop its masks.
    """
    settings, lengths = stage.settings, stage.config.data
    generator = torch.Generator().manual_seed(micro_step + 1000 * step)
    num_passages = num_queries * (1 + settings.num_negatives)
    query_ids, query_mask = _texts(num_queries, lengths.max_query_length, tokenizer, generator)
    passage_ids, passage_mask = _texts(
        num_passages, lengths.max_passage_length, tokenizer, generator
    )
    extra: dict[str, torch.Tensor] = {}
    if stage.weights.mlm:
        # By integers: how many words there are decides shapes, and a tracker imagines floats.
        chosen = passage_mask & (torch.randint(20, passage_ids.shape, generator=generator) < 3)
        chosen[:, 1] = True
        extra |= {
            "mlm_ids": passage_ids.masked_fill(chosen, tokenizer.mask_token_id),
            "mlm_labels": passage_ids.masked_fill(~chosen, -100),
        }
    if settings.teacher_scores != "live":
        extra["teacher_scores"] = torch.rand(num_passages, generator=generator)
    index = torch.arange(num_passages)
    relevant = index.view(num_queries, -1)[:, :1]
    return Batch(
        query_ids, query_mask, passage_ids, passage_mask, index, relevant, step, micro_step,
        **extra,
    )  # fmt: skip


def _texts(
    number: int, length: int, tokenizer: PreTrainedTokenizerBase, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(len(tokenizer), (number, length), generator=generator)
    mask = torch.ones(ids.shape, dtype=torch.bool)
    lengths = torch.full((number,), length)
    lengths[0] -= 1
    ids[:, 0] = int(tokenizer.cls_token_id)
    ids[torch.arange(number), lengths - 1] = int(tokenizer.sep_token_id)
    mask[0, -1] = False
    ids[0, -1] = int(tokenizer.pad_token_id)
    return ids, mask
