"""The attention view against eager attention maps and against the loss term that it shows."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.finished_run import write_run
from support.tiny import ALL_TERMS
from transformers import AutoModelForSequenceClassification, DebertaV2Config

from erniesearch.config.keys import RunConfig
from erniesearch.data.text_format import SideFormat, TextReader
from erniesearch.errors import UserError
from erniesearch.retrieval.trained import trained_student, trained_teacher
from erniesearch.search.attention_maps import attention_maps, layers_shown
from erniesearch.search.system import SearchSystem, UnknownPassageError
from erniesearch.stages import Stage
from erniesearch.training.build import assemble_model, build_batches

QUERY = "baran desel fitor"
TAU = 0.5


@pytest.fixture(scope="module")
def config(
    tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, tiny_model: Path
) -> RunConfig:
    return write_run(tmp_path_factory.mktemp("run"), tiny_data, tiny_model, ALL_TERMS)


@pytest.fixture(scope="module")
def system(config: RunConfig) -> SearchSystem:
    found = SearchSystem.from_run(config.run_dir)
    found.tau_att = TAU
    return found


@pytest.mark.parametrize("layer", [0, 1])
def test_the_target_is_the_head_mean_of_eager_attention(
    system: SearchSystem, config: RunConfig, layer: int
) -> None:
    teacher = trained_teacher(config)
    assert teacher is not None
    eager = AutoModelForSequenceClassification.from_pretrained(
        teacher.path, attn_implementation="eager"
    ).eval()
    passage = system.text("p7")
    pair = system.retriever.tokenizer(QUERY, passage, return_tensors="pt", max_length=20,
                                      truncation="only_second")  # fmt: skip
    with torch.inference_mode():
        heads = eager(**pair, output_attentions=True).attentions[layer][0].mean(0)
    maps = system.attention(QUERY, "p7", layer)
    assert [token.text for token in maps.query] == QUERY.split()
    assert [token.text for token in maps.passage] == passage.split()[: len(maps.passage)]
    rows = heads[1:4, 5 : 5 + len(maps.passage)]  # [CLS] q q q [SEP] p …
    assert torch.allclose(maps.shares, rows.sum(1), atol=1e-5)
    assert torch.allclose(maps.cross_encoder, rows / rows.sum(1, keepdim=True), atol=1e-5)
    assert maps.layer == layer
    if layer == 1:  # the last
        assert torch.equal(system.attention(QUERY, "p7").cross_encoder, maps.cross_encoder)
    else:
        assert not torch.allclose(system.attention(QUERY, "p7").shares, maps.shares, atol=1e-4)


def test_late_interactions_side_is_the_softmax_of_its_similarities(system: SearchSystem) -> None:
    maps = system.attention(QUERY, "p7")
    query, passage = (
        system.retriever.tokens([text], side)[0].float()[1:-1]
        for text, side in ((QUERY, "query"), (system.text("p7"), "passage"))
    )
    expected = (query @ passage.T / TAU).softmax(1)
    assert torch.allclose(maps.late_interaction, expected, atol=2e-3)
    target = maps.cross_encoder
    divergences = (target * (target / maps.late_interaction).log()).sum(1)
    assert torch.allclose(maps.divergences, divergences, atol=1e-5)
    assert maps.divergence == pytest.approx(float(divergences.mean()), abs=1e-5)


def test_what_is_shown_is_what_is_trained(system: SearchSystem, config: RunConfig) -> None:
    """The mean over a batch's pairs of the values shown is the loss term of that batch."""
    config = replace(config, objective=replace(config.objective, tau_att=TAU))
    stage, student, teacher = Stage(config, "cascade"), *(trained_student(config, "cascade"),
                                                          trained_teacher(config))  # fmt: skip
    assert teacher is not None
    model, tokenizer = assemble_model(stage, student, teacher)
    model.eval()
    batch = build_batches(stage, system.data, tokenizer)[0]
    every = slice(0, len(batch.passage_ids))
    pairs = model.pairs(batch, every)
    assert model.student is not None
    assert model.teacher is not None
    with torch.no_grad():
        model.teacher(pairs)
        sides = [
            model.student(batch.query_ids, batch.query_mask, "query"),
            model.student(batch.passage_ids, batch.passage_mask, "passage"),
        ]
        term = model.pair_terms(batch, every, pairs, *sides)["attention"]
    shown = []
    for n, row in enumerate(batch.passage_index.tolist()):
        query = tokenizer.decode(batch.query_ids[n // batch.group_size], skip_special_tokens=True)
        shown.append(system.attention(query, system.data.pids[row]).divergence)
    assert len(shown) >= 4
    assert sum(shown) / len(shown) == pytest.approx(float(term), rel=1e-4)


def test_only_the_texts_own_tokens_are_compared(system: SearchSystem) -> None:
    """Prefix, prompt, expansion and skip list of a published model take no part."""
    retriever, scorer = system.retriever, system.scorer
    assert scorer is not None
    plain, passage = retriever.readers, "baran desel gowen"
    maps = attention_maps(retriever, scorer, QUERY, passage, TAU)
    form = SideFormat(prompt="nozul ", prefix="kuhod", expand=True, at_least=12)
    try:
        retriever.readers = {
            "query": TextReader(retriever.tokenizer, form, 16),
            "passage": TextReader(retriever.tokenizer, SideFormat(skip=("desel",)), 16),
        }
        formed = attention_maps(retriever, scorer, QUERY, passage, TAU)
        with pytest.raises(UserError, match="no token of the passage takes part"):
            attention_maps(retriever, scorer, QUERY, "desel desel", TAU)
    finally:
        retriever.readers = plain
    assert formed.query == maps.query
    assert [token.text for token in formed.passage] == ["baran", "gowen"]
    kept = maps.cross_encoder[:, [0, 2]]
    expected = kept / kept.sum(1, keepdim=True)
    assert torch.allclose(formed.cross_encoder, expected, atol=1e-5)
    assert torch.allclose(formed.late_interaction.sum(1), torch.ones(3))


def test_scores_are_the_same_after_a_look_at_attention(system: SearchSystem) -> None:
    before = system.search(QUERY)
    system.attention(QUERY, "p3", 0)
    assert system.search(QUERY) == before


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((" ", "p7"), "the query is empty"),
        (("\u200b", "p7"), "holds no character that the tokenizer knows"),
        ((QUERY, "p7", 2), "layer is 2: give one of 0, 1"),
        ((QUERY, "p7", -3), "layer is -3: give one of 0, 1"),
    ],
)
def test_odd_wishes_are_refused(
    system: SearchSystem, arguments: tuple[str, str, int], problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        system.attention(*arguments)


def test_what_is_not_there_is_told(
    system: SearchSystem, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnknownPassageError, match="no passage 'p60'"):
        system.attention(QUERY, "p60")
    alone = SearchSystem.from_run(config.run_dir, cross_encoder=False)
    assert alone.attention_layers == []
    with pytest.raises(UserError, match="this system does not have both"):
        alone.attention(QUERY, "p7")
    late, scorer = system.retriever, system.scorer
    assert scorer is not None
    monkeypatch.setattr(late, "names_tokens", False)
    with pytest.raises(UserError, match="a late-interaction model that is built here"):
        layers_shown(late, scorer)
    monkeypatch.undo()
    monkeypatch.setattr(scorer.model.model, "config", DebertaV2Config())
    with pytest.raises(UserError, match="type deberta-v2 cannot show its attention"):
        layers_shown(late, scorer)
    monkeypatch.undo()
    monkeypatch.setattr(scorer.tokenizer, "get_vocab", lambda: {"[CLS]": 0})
    with pytest.raises(UserError, match="different vocabularies"):
        layers_shown(late, scorer)
