"""Groups to tensors: masks, order, truncation, and the spans and masked words of post-training."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny import WORDS
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from erniesearch.config.keys import StudentConfig
from erniesearch.data.batches import Batch, GroupCollator, SpanCollator, StepBatches
from erniesearch.data.collection import RetrievalData
from erniesearch.data.sampler import Group, GroupSampler
from erniesearch.errors import UserError
from erniesearch.models.backbone import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(StudentConfig(str(tiny_model)))


def collection(num_passages: int = 20) -> RetrievalData:
    """Passage i has i + 2 words; query i has i % 4 + 1."""
    rng = np.random.default_rng(0)
    passages = [" ".join(rng.choice(WORDS, size=i + 2)) for i in range(num_passages)]
    queries = {f"q{i}": " ".join(rng.choice(WORDS, size=i % 4 + 1)) for i in range(8)}
    pids = [f"p{i}" for i in range(num_passages)]
    return RetrievalData(pids, passages, queries, {f"q{i}": {f"p{i}": 1} for i in range(8)})


def group(query: int, passages: list[int], relevant: list[int]) -> Group:
    return Group(query, np.array(passages), np.array(relevant))


def collator(
    tokenizer: PreTrainedTokenizerBase, query_length: int = 32, passage_length: int = 32
) -> GroupCollator:
    data = collection()
    return GroupCollator(data, list(data.queries), tokenizer, query_length, passage_length)


GROUPS = [group(2, [2, 9, 4], [2]), group(5, [5, 0, 7], [5, 11, 12]), group(0, [0, 1, 2], [0])]


def assert_well_formed(ids: Tensor, mask: Tensor, tokenizer: PreTrainedTokenizerBase) -> None:
    """[CLS] … [SEP] [PAD]…, the mask True up to [SEP], the width that of the longest row."""
    lengths = mask.sum(1)
    assert mask.dtype == torch.bool
    assert int(lengths.max()) == ids.shape[1]
    assert torch.equal(mask, torch.arange(ids.shape[1]) < lengths[:, None])
    assert torch.equal(mask, ids != tokenizer.pad_token_id)
    assert (ids[:, 0] == tokenizer.cls_token_id).all()
    assert (ids.gather(1, lengths[:, None] - 1) == tokenizer.sep_token_id).all()


def test_masks_are_true_on_real_tokens_only(tokenizer: PreTrainedTokenizerBase) -> None:
    batch = collator(tokenizer)(GROUPS)
    assert_well_formed(batch.query_ids, batch.query_mask, tokenizer)
    assert_well_formed(batch.passage_ids, batch.passage_mask, tokenizer)
    assert batch.query_mask.sum(1).tolist() == [3 + 2, 2 + 2, 1 + 2]
    assert batch.passage_mask.sum(1).tolist() == [i + 4 for g in GROUPS for i in g.passages]
    assert batch.num_tokens == int(batch.query_mask.sum() + batch.passage_mask.sum())


def test_groups_lie_one_after_the_other_positive_first(tokenizer: PreTrainedTokenizerBase) -> None:
    batch = collator(tokenizer)(GROUPS, step=4, micro_step=1)
    data = collection()
    assert (batch.group_size, batch.step, batch.micro_step) == (3, 4, 1)
    assert batch.passage_index.tolist() == [2, 9, 4, 5, 0, 7, 0, 1, 2]
    texts = tokenizer.batch_decode(batch.passage_ids, skip_special_tokens=True)
    assert texts == [data.passages[i] for i in batch.passage_index]
    texts = tokenizer.batch_decode(batch.query_ids, skip_special_tokens=True)
    assert texts == [data.queries[f"q{g.query}"] for g in GROUPS]


def test_relevant_index_is_filled_up_with_minus_one(tokenizer: PreTrainedTokenizerBase) -> None:
    batch = collator(tokenizer)(GROUPS)
    assert batch.relevant_index.tolist() == [[2, -1, -1], [5, 11, 12], [0, -1, -1]]


def test_long_texts_are_truncated_and_keep_their_separator(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    batch = collator(tokenizer, query_length=4, passage_length=7)(GROUPS)
    assert batch.query_ids.shape[1] == 4
    assert batch.passage_ids.shape[1] == 7
    assert_well_formed(batch.query_ids, batch.query_mask, tokenizer)
    assert_well_formed(batch.passage_ids, batch.passage_mask, tokenizer)
    whole = collator(tokenizer)(GROUPS)
    assert torch.equal(batch.passage_ids[:, :6].masked_fill(~batch.passage_mask[:, :6], 0)[1],
                       whole.passage_ids[1, :6])  # fmt: skip


def test_tokens_do_not_depend_on_the_rest_of_the_batch(tokenizer: PreTrainedTokenizerBase) -> None:
    together = collator(tokenizer)(GROUPS)
    for row, one in enumerate(GROUPS):
        alone = collator(tokenizer)([one])
        ids = together.passage_ids[3 * row : 3 * row + 3]
        mask = together.passage_mask[3 * row : 3 * row + 3]
        width = alone.passage_ids.shape[1]
        assert torch.equal(ids[:, :width], alone.passage_ids)
        assert torch.equal(mask[:, :width], alone.passage_mask)
        assert not mask[:, width:].any()


def test_batch_moves_with_every_tensor(tokenizer: PreTrainedTokenizerBase) -> None:
    moved = collator(tokenizer)(GROUPS, step=3).to(torch.device("meta"))
    assert moved.query_ids.device.type == moved.relevant_index.device.type == "meta"
    assert moved.step == 3
    assert moved.mlm_ids is None


def span_batch(
    tokenizer: PreTrainedTokenizerBase, passages: list[int], step: int = 0, mask_words: bool = True,
    seed: int = 0, lengths: tuple[int, int] = (8, 10),
) -> Batch:  # fmt: skip
    spans = SpanCollator(collection(), tokenizer, *lengths, seed, mask_words)
    return spans([group(i, [i], [i]) for i in passages], step)


def rows_of(batch: Batch, passage: int) -> list[list[int]]:
    """The real tokens of a passage's row: query span, passage span, masked words, labels."""
    assert batch.mlm_ids is not None
    assert batch.mlm_labels is not None
    row = batch.passage_index.tolist().index(passage)
    query = batch.query_ids[row][batch.query_mask[row]]
    mask = batch.passage_mask[row]
    tensors = (query, batch.passage_ids[row][mask], batch.mlm_ids[row][mask])
    return [t.tolist() for t in (*tensors, batch.mlm_labels[row][mask])]


def test_spans_repeat_and_do_not_depend_on_how_ranks_share_the_batch(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    whole = span_batch(tokenizer, [3, 9, 14, 19], step=2)
    again = span_batch(tokenizer, [3, 9, 14, 19], step=2)
    for name in ("query_ids", "passage_ids", "mlm_ids", "mlm_labels"):
        assert torch.equal(getattr(whole, name), getattr(again, name))
    for part in ([3, 9], [14, 19], [19], [14, 3]):
        split = span_batch(tokenizer, part, step=2)
        for passage in part:
            assert rows_of(split, passage) == rows_of(whole, passage)


def test_spans_change_with_step_and_seed(tokenizer: PreTrainedTokenizerBase) -> None:
    first = rows_of(span_batch(tokenizer, [19]), 19)
    assert rows_of(span_batch(tokenizer, [19], step=1), 19) != first
    assert rows_of(span_batch(tokenizer, [19], seed=1), 19) != first


def test_spans_are_windows_of_their_passage(tokenizer: PreTrainedTokenizerBase) -> None:
    data = collection()
    for step in range(10):
        batch = span_batch(tokenizer, list(range(20)), step)
        assert_well_formed(batch.query_ids, batch.query_mask, tokenizer)
        assert_well_formed(batch.passage_ids, batch.passage_mask, tokenizer)
        assert batch.relevant_index.tolist() == [[i] for i in range(20)]
        assert batch.passage_index.tolist() == list(range(20))
        for ids, longest in ((batch.query_ids, 8 - 2), (batch.passage_ids, 10 - 2)):
            spans = tokenizer.batch_decode(ids, skip_special_tokens=True)
            for span, passage in zip(spans, data.passages, strict=True):
                assert f" {span} " in f" {passage} "
                size = len(passage.split())
                assert len(span.split()) == max(1, min(longest, 2 * size // 3))


def test_an_empty_passage_still_makes_a_row(tokenizer: PreTrainedTokenizerBase) -> None:
    data = RetrievalData(["a", "b"], ["", WORDS[0]], {}, {})
    spans = SpanCollator(data, tokenizer, 8, 8, 0, mask_words=True)
    batch = spans([group(0, [0], [0]), group(1, [1], [1])])
    assert batch.passage_mask.sum(1).tolist() == [2, 3]
    assert batch.mlm_labels is not None
    assert (batch.mlm_labels != -100).sum(1).tolist() == [0, 1]


def test_words_are_predicted_at_masked_places_only(tokenizer: PreTrainedTokenizerBase) -> None:
    chosen = masked = kept = words = 0
    special = torch.tensor(tokenizer.all_special_ids)
    for step in range(40):
        batch = span_batch(tokenizer, list(range(20)), step, lengths=(8, 32))
        assert batch.mlm_ids is not None
        assert batch.mlm_labels is not None
        predicted = batch.mlm_labels != -100
        # Elsewhere the input is untouched, and the label is the word that stood there.
        assert torch.equal(batch.mlm_ids[~predicted], batch.passage_ids[~predicted])
        assert torch.equal(batch.mlm_labels[predicted], batch.passage_ids[predicted])
        assert not torch.isin(batch.passage_ids[predicted], special).any()
        assert not (predicted & ~batch.passage_mask).any()
        assert predicted.any(1).all()  # one word at least in every passage
        long = batch.passage_mask.sum(1) > 10
        chosen += int(predicted[long].sum())
        words += int(batch.passage_mask[long].sum()) - 2 * int(long.sum())
        masked += int((batch.mlm_ids[predicted & long[:, None]] == tokenizer.mask_token_id).sum())
        kept += int((batch.mlm_ids == batch.passage_ids)[predicted & long[:, None]].sum())
    assert words > 3000
    assert 0.13 < chosen / words < 0.21  # 15 %, and one word in the rows that drew none
    assert 0.74 < masked / chosen < 0.86  # 80 %
    assert 0.06 < kept / chosen < 0.15  # 10 %, and a random word that is the same


def test_no_masked_words_without_their_weight(tokenizer: PreTrainedTokenizerBase) -> None:
    plain = span_batch(tokenizer, [3, 9], mask_words=False)
    assert plain.mlm_ids is None
    assert plain.mlm_labels is None
    assert torch.equal(plain.passage_ids, span_batch(tokenizer, [3, 9]).passage_ids)


def test_masking_without_a_mask_token_is_refused(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(StudentConfig(str(tiny_model)))
    tokenizer.mask_token = None
    with pytest.raises(UserError, match="no mask token"):
        SpanCollator(collection(), tokenizer, 8, 8, 0, mask_words=True)
    SpanCollator(collection(), tokenizer, 8, 8, 0, mask_words=False)


def test_step_batches_walk_micro_steps_of_every_update(tokenizer: PreTrainedTokenizerBase) -> None:
    data = collection()
    sampler = GroupSampler(data, None, 1, 8, seed=0)
    collate = GroupCollator(data, sampler.qids, tokenizer, 16, 16)
    ranks = [StepBatches(sampler, collate, 3, 2, rank, 2, world_size=2) for rank in (0, 1)]
    assert len(ranks[0]) == 6
    seen = [(b.step, b.micro_step) for b in (ranks[1][i] for i in range(6))]
    assert seen == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    update = torch.cat([ranks[r][2 + m].passage_index[::2] for m in (0, 1) for r in (0, 1)])
    assert sorted(update.tolist()) == list(range(8))  # 8 queries of 8: each positive once
    with pytest.raises(IndexError):
        ranks[0][6]
