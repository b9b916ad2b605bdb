"""Published models as a start: what their folders say is kept, or refused, and never left out."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.published import WITH_MARKS, max_sims, token_vectors
from support.tiny import ALL_TERMS, ConfigMaker, write_model
from torch.nn.functional import normalize
from transformers import AddedToken, AutoModel, AutoTokenizer

from erniesearch.config.keys import StudentConfig, TeacherConfig
from erniesearch.config.stage_keys import LossWeights
from erniesearch.data.collection import load_beir
from erniesearch.data.corpus.tokens import open_tokens
from erniesearch.data.text_format import (
    ATTENDED,
    POOLED,
    SCORED,
    TEXT,
    SideFormat,
    TextFormat,
    TextReader,
    stored_format,
)
from erniesearch.errors import UserError
from erniesearch.export import export_all
from erniesearch.models.backbone import load_tokenizer
from erniesearch.models.cross_encoder import PairLayout, assemble_pairs, of_the_text
from erniesearch.models.encoder import StudentEncoder
from erniesearch.models.published import read_published
from erniesearch.models.start import check_lengths, read_start
from erniesearch.retrieval.load import load_retriever
from erniesearch.retrieval.retriever import PairScorer, Retriever
from erniesearch.run_folder import RunFolder
from erniesearch.stages import Stage
from erniesearch.training.build import build_batches, build_model, check_inputs

CPU = torch.device("cpu")
TEXTS = ["baran, desel!", "fitor"]
COLBERT = {
    "model_type": "ColBERT", "prompts": {}, "default_prompt_name": None,
    "similarity_fn_name": "MaxSim", "query_prefix": "[Q] ", "document_prefix": "[D] ",
    "query_length": 9, "document_length": 12, "attend_to_expansion_tokens": False,
    "skiplist_words": [",", "!"], "do_query_expansion": True,
}  # fmt: skip


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT that knows punctuation."""
    return write_model(tmp_path_factory.mktemp("plain") / "model", words=WITH_MARKS)


@pytest.fixture
def colbert(plain: Path, tmp_path: Path) -> Path:
    """As PyLate writes it, prefixes added to the vocabulary and padding by [MASK]."""
    folder = tmp_path / "colbert"
    tokenizer, model = AutoTokenizer.from_pretrained(plain), AutoModel.from_pretrained(plain)
    tokenizer.add_tokens(["[Q] ", "[D] "])
    tokenizer.pad_token = tokenizer.mask_token
    torch.manual_seed(5)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    types = ("sentence_transformers.models.Transformer", "pylate.models.Dense.Dense")
    write_json(folder / "modules.json", [
        {"idx": i, "name": str(i), "path": path, "type": kind}
        for i, (path, kind) in enumerate(zip(("", "1_Dense"), types, strict=True))
    ])  # fmt: skip
    write_json(folder / "1_Dense" / "config.json", {
        "in_features": 32, "out_features": 16, "bias": True, "use_residual": False,
        "activation_function": "torch.nn.modules.linear.Identity",
    })  # fmt: skip
    save_file({"linear.weight": torch.randn(16, 32), "linear.bias": torch.randn(16)},
              folder / "1_Dense" / "model.safetensors")  # fmt: skip
    write_json(folder / "config_sentence_transformers.json", COLBERT)
    return folder


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def settings(folder: Path, **changes: Any) -> StudentConfig:
    return StudentConfig(str(folder), late_interaction_dim=16, **changes)


def by_hand(folder: Path, ids: list[int], attended: list[int]) -> torch.Tensor:
    """Token vectors of one text, by transformers and the matrix alone."""
    model, head = (
        AutoModel.from_pretrained(folder).eval(),
        load_file(folder / "1_Dense" / "model.safetensors"),
    )
    with torch.inference_mode():
        states = model(torch.tensor([ids]), torch.tensor([attended])).last_hidden_state[0]
        return normalize(states @ head["linear.weight"].T + head["linear.bias"], dim=-1)


@pytest.mark.parametrize("attend", [False, True])
def test_a_query_is_prefixed_and_filled_up(colbert: Path, attend: bool) -> None:
    edit(colbert / "config_sentence_transformers.json", attend_to_expansion_tokens=attend)
    tokenizer = AutoTokenizer.from_pretrained(colbert)
    words = tokenizer.convert_tokens_to_ids(["[CLS]", "[Q] ", "baran", "desel", "[SEP]"])
    ids = words + [tokenizer.mask_token_id] * 4
    wanted = by_hand(colbert, ids, [1] * 5 + [int(attend)] * 4)
    for student in (load_retriever(colbert, device=CPU), Retriever(settings(colbert), 9, 12)):
        (found,) = token_vectors(student, ["baran desel"], "query")
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_a_passage_is_scored_without_its_punctuation(colbert: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(colbert)
    words = ["[CLS]", "[D] ", "baran", ",", "desel", "!", "[SEP]"]
    wanted = by_hand(colbert, tokenizer.convert_tokens_to_ids(words), [1] * 7)
    (found, _) = token_vectors(load_retriever(colbert, device=CPU), TEXTS, "passage")
    torch.testing.assert_close(found, wanted[[0, 1, 2, 4, 6]], atol=1e-5, rtol=0)


def test_an_attention_that_leaves_tokens_out_is_refused(colbert: Path) -> None:
    unpadded = settings(colbert, attn_implementation="unpadded", dropout=0.0)
    with pytest.raises(UserError, match=r"is unpadded, which leaves out the tokens"):
        StudentEncoder(unpadded)
    edit(colbert / "config_sentence_transformers.json", attend_to_expansion_tokens=True)
    StudentEncoder(unpadded)


def test_a_saved_student_keeps_projection_and_format(colbert: Path, tmp_path: Path) -> None:
    student = StudentEncoder(settings(colbert))
    head = load_file(colbert / "1_Dense" / "model.safetensors")
    assert torch.equal(student.projection.weight, head["linear.weight"])
    assert torch.equal(student.projection.bias, head["linear.bias"])
    student.save(tmp_path / "saved", student.state_dict())
    again = StudentEncoder(settings(tmp_path / "saved"))
    assert again.text_format == student.text_format == read_start(settings(colbert)).text_format
    assert torch.equal(again.projection.bias, head["linear.bias"])
    prompted = StudentEncoder(settings(tmp_path / "saved", query_prompt="query: "))
    assert prompted.text_format.query == replace(student.text_format.query, prompt="query: ")


def test_a_head_that_came_leaves_though_no_stage_trains_it(
    colbert: Path, make_config: ConfigMaker
) -> None:
    config = make_config(path=str(colbert), weights=LossWeights(de=1.0), max_query_length=9,
                         max_passage_length=12, pooling="mean")  # fmt: skip
    folder = RunFolder(config.run_dir)
    student = StudentEncoder(config.student)
    student.save(folder.model("cascade", "student"), student.state_dict())
    load_tokenizer(config.student).save_pretrained(folder.model("cascade", "student"))
    assert [path.name for path in export_all(config)] == ["dual_encoder", "late_interaction"]
    export = folder.export("late_interaction")
    for side in ("query", "passage"):
        theirs, ours = (token_vectors(load_retriever(x, device=CPU), TEXTS, side)
                        for x in (colbert, export))  # fmt: skip
        for one, other in zip(theirs, ours, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    # The prefix is the prompt's first token there.
    trained = Retriever(config.student, 9, 12, device=CPU).vectors(TEXTS, "query")
    dual = load_retriever(folder.export("dual_encoder"), device=CPU, max_query_length=9)
    np.testing.assert_allclose(dual.vectors(TEXTS, "query"), trained, atol=1e-5)


def test_stanfords_colbert_is_read(plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stanford"
    shutil.copytree(plain, folder)
    edit(folder / "config.json", architectures=["HF_ColBERT"])
    weights = {f"bert.{name}": x for name, x in load_file(plain / "model.safetensors").items()}
    head = torch.randn(16, 32)
    save_file(weights | {"linear.weight": head}, folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "artifact.metadata", {"query_maxlen": 9, "doc_maxlen": 12, "dim": 16,
               "query_token_id": "[unused0]", "doc_token_id": "[unused1]"})  # fmt: skip
    found = read_published(folder)
    assert found is not None
    assert (found.lengths, found.dim) == ({"query": 9, "passage": 12}, 16)
    assert found.text_format.query == SideFormat(prefix="[unused0]", expand=True)
    assert found.text_format.passage.prefix == "[unused1]"
    assert "." in found.text_format.passage.skip
    student = StudentEncoder(settings(folder))
    assert torch.equal(student.projection.weight, head)
    name = "encoder.layer.1.output.dense.weight"
    assert torch.equal(student.query_tower.state_dict()[name], weights[f"bert.{name}"])


def test_roles_say_what_a_token_is_for(plain: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(plain)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("[unused0]")]})
    form = SideFormat(prompt="query: ", prefix="[unused0]", pool_prompt=False, skip=("!",),
                      expand=True)  # fmt: skip
    found = TextReader(tokenizer, form, 11).texts(["baran !", " ".join(["desel"] * 20)])
    names = [tokenizer.convert_ids_to_tokens(row) for row in found.ids.tolist()]
    assert names[0] == ["[CLS]", "[unused0]", "query", ":", "baran", "!", "[SEP]", *["[MASK]"] * 4]
    assert names[1] == ["[CLS]", "[unused0]", "query", ":", *["desel"] * 6, "[SEP]"]
    assert found.mask.all()
    kept = {role: "".join("01"[int(x)] for x in found.having(role)[0]) for role in
            (ATTENDED, SCORED, POOLED, TEXT)}  # fmt: skip
    assert kept == {ATTENDED: "11111110000", SCORED: "11111011111", POOLED: "00001110000",
                    TEXT: "10001110000"}  # fmt: skip
    least = TextReader(tokenizer, replace(form, at_least=9), 11).texts(["baran !"])
    assert least.ids.shape == (1, 9)
    with pytest.raises(UserError, match=r"prompt and special tokens take 5; allow more"):
        TextReader(tokenizer, form, 5)
    with pytest.raises(UserError, match=r"the prefix '\[Q\]' is no token"):
        TextReader(tokenizer, SideFormat(prefix="[Q]"), 9)


def test_stored_tokens_are_read_as_texts_are(plain: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(plain)
    form = SideFormat(prompt="passage: ", prefix="[unused1]", skip=(",",))
    reader, texts = TextReader(tokenizer, form, 9), [*TEXTS, " ".join(["desel"] * 20)]
    stored = reader.stored(open_tokens(texts, tokenizer, form.prompt), [2, 0, 1])
    for one, other in zip(stored, reader.texts([texts[2], *TEXTS]), strict=True):
        assert one is not None
        assert torch.equal(one, other)


def test_the_cross_encoder_reads_the_text_alone(plain: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(plain)
    layout, pad = PairLayout.of(tokenizer), int(tokenizer.pad_token_id)
    form = SideFormat(prompt="query: ", prefix="[unused0]", expand=True)
    marked = [TextReader(tokenizer, own, 12).texts(TEXTS) for own in
              (form, SideFormat(prompt="passage: "))]  # fmt: skip
    bare = [TextReader(tokenizer, SideFormat(), 12).texts(TEXTS) for _ in range(2)]
    moved = [of_the_text(side.ids, side.having(TEXT)) for side in marked]
    pairs = assemble_pairs(*moved[0][:2], *moved[1][:2], layout, pad)
    wanted = assemble_pairs(*bare[0][:2], *bare[1][:2], layout, pad)
    assert torch.equal(pairs.input_ids, wanted.input_ids)
    places = pairs.query_columns.gather(1, moved[0][2])
    text = marked[0].having(TEXT)
    assert torch.equal(pairs.input_ids.gather(1, places)[text], marked[0].ids[text])


def test_a_prompt_stands_before_texts_and_stored_tokens(plain: Path) -> None:
    student = settings(plain, passage_prompt="passage: ", pooling="mean")
    prompted, bare = Retriever(student, 12, 12), Retriever(settings(plain, pooling="mean"), 12, 12)
    np.testing.assert_allclose(
        prompted.vectors(TEXTS, "passage"),
        bare.vectors([f"passage: {text}" for text in TEXTS], "passage"), atol=1e-6,
    )  # fmt: skip
    np.testing.assert_array_equal(prompted.vectors(TEXTS, "query"), bare.vectors(TEXTS, "query"))


def test_training_compares_what_late_interaction_compares(
    colbert: Path, make_config: ConfigMaker
) -> None:
    """Scores of a micro-step are the retriever's and the scorer's own, whole and in chunks."""
    prompts = {"query_prompt": "query: ", "passage_prompt": "passage: "}
    config = make_config(
        path=str(colbert), max_query_length=9, max_passage_length=12, pooling="mean", dropout=0.0,
        weights=ALL_TERMS, **prompts,
    )  # fmt: skip
    data, stage = load_beir(config.data.path, "train"), Stage(config, "cascade")
    model, tokenizer = build_model(stage)
    assert model.student is not None
    assert model.teacher is not None
    batches = build_batches(stage, data, tokenizer)
    batch = batches[0]
    assert batch.query_roles is not None
    model.eval()
    with torch.no_grad():
        outputs = model.outputs(batch)
        chunks = [chunk for chunk in model.chunks(batch, 3) if chunk.number == 1]
        parts = {side: [model(batch, chunk)[1] for chunk in chunks if chunk.kind == side]
                 for side in ("query", "passage")}  # fmt: skip
        late = model.objective.score(batch, outputs).late
    assert late is not None
    groups = batches.sampler.micro_batch(0, 0, 0, 4, 1)
    queries = [data.queries[batches.sampler.qids[group.query]] for group in groups]  # type: ignore[attr-defined]
    passages = [data.passages[i] for i in batch.passage_index.tolist()]
    retriever = Retriever(config.student, 9, 12, device=CPU)
    retriever.student.load_state_dict(model.student.state_dict())
    np.testing.assert_allclose(late, max_sims(retriever, queries, passages), atol=1e-5)
    dual = model.objective.score(batch, outputs).dual
    assert dual is not None
    vectors = retriever.vectors(queries, "query"), retriever.vectors(passages, "passage")
    np.testing.assert_allclose(dual, vectors[0] @ vectors[1].T, atol=1e-4)

    scorer = PairScorer(TeacherConfig(str(colbert)), 9, 12, device=CPU)
    scorer.model.load_state_dict(model.teacher.state_dict())
    each = [query for query in queries for _ in range(batch.group_size)]
    scores = scorer.scores([cut(tokenizer, text, 3) for text in each],
                           [cut(tokenizer, text, 7) for text in passages])  # fmt: skip
    assert outputs.teacher_scores is not None
    np.testing.assert_allclose(outputs.teacher_scores, scores, atol=1e-5)

    assert outputs.queries is not None
    assert outputs.passages is not None
    whole = {"query": (outputs.queries.tokens, batch.queries(SCORED)),
             "passage": (outputs.passages.tokens, batch.passages(SCORED))}  # fmt: skip
    for side, (tokens, real) in whole.items():
        torch.testing.assert_close(torch.cat(parts[side])[real], tokens[real], atol=1e-5, rtol=0)


def cut(tokenizer: Any, text: str, words: int) -> str:
    """What is left of a text behind [CLS], prefix and prompt, and before [SEP]."""
    return " ".join(tokenizer.tokenize(text)[:words])


def test_a_format_survives_its_file_and_a_damaged_one_is_told(tmp_path: Path) -> None:
    made = TextFormat(SideFormat(prefix="[Q] ", expand=True), SideFormat(skip=("a", "ü")))
    made.save(tmp_path)
    assert stored_format(tmp_path) == made
    (tmp_path / "text_format.json").write_text("{")
    with pytest.raises(UserError, match=r"text_format.json: damaged"):
        stored_format(tmp_path)
    TextFormat().save(tmp_path / "plain")  # writes nothing
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize(
    ("file", "changes", "problem"),
    [
        ("1_Dense/config.json", {"activation_function": "torch.nn.Tanh"}, "is linear here"),
        ("1_Dense/config.json", {"use_residual": True}, "is linear here"),
        ("1_Dense/config.json", {"out_features": 8}, "token vectors of 8 dimensions"),
        ("config_sentence_transformers.json", {"query_prefix": "[X] "}, "is no token"),
    ],
)
def test_what_cannot_be_kept_is_refused(
    colbert: Path, file: str, changes: dict[str, Any], problem: str
) -> None:
    edit(colbert / file, **changes)
    with pytest.raises(UserError, match=problem):
        Retriever(settings(colbert), 9, 12)
    alone = read_start(settings(colbert, keep="weights_only"))
    assert alone.text_format.is_plain


def test_lengths_are_the_folders_unless_told_otherwise(colbert: Path) -> None:
    check_lengths(settings(colbert), 9, 12)
    check_lengths(settings(colbert, keep="all_but_lengths"), 9, 16)
    with pytest.raises(UserError, match=r"data.max_passage_length is 16, but .* as 12 tokens"):
        check_lengths(settings(colbert), 9, 16)


def test_a_pipeline_is_refused_before_anything_is_trained(
    colbert: Path, make_config: ConfigMaker
) -> None:
    config = make_config(path=str(colbert), max_query_length=9, max_passage_length=16)
    data = load_beir(config.data.path, "train")
    with pytest.raises(UserError, match=r"data.max_passage_length is 16, but .* 12 tokens"):
        check_inputs(config, data)
    with pytest.raises(UserError, match=r"data.max_passage_length is 16, but .* 12 tokens"):
        build_model(Stage(config, "cascade"))
    config = replace(config, data=replace(config.data, max_passage_length=12))
    check_inputs(config, data)
    edit(colbert / "config_sentence_transformers.json", attend_to_expansion_tokens=True)
    with pytest.raises(UserError, match=r"stages.cascade: its terms train the dual-encoder, but"):
        check_inputs(config, data)


@pytest.mark.parametrize(
    ("changes", "modules", "problem"),
    [
        ({"pooling": "cls"}, 2, "pools by mean, student.pooling is cls: set it to mean"),
        ({"pooling": "mean"}, 3, "student.normalize is false: set it to true"),
        ({"pooling": "mean", "normalize": True}, 4, "has a layer after pooling"),
    ],
)
def test_a_sentence_transformer_keeps_pooling_and_normalisation(
    plain: Path, tmp_path: Path, changes: dict[str, Any], modules: int, problem: str
) -> None:
    folder = tmp_path / "sentence"
    shutil.copytree(plain, folder)
    kinds = ["Transformer", "Pooling", "Normalize" if modules == 3 else "Dense"][:modules]
    write_json(folder / "modules.json", [
        {"path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ])  # fmt: skip
    write_json(folder / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True})
    write_json(folder / "2_Dense" / "config.json", {})
    save_file({"linear.weight": torch.eye(32)}, folder / "2_Dense" / "model.safetensors")
    with pytest.raises(UserError, match=problem):
        read_start(settings(folder, **changes))
    read_start(settings(folder, **changes, keep="weights_only"))
    if modules < 4:
        read_start(settings(folder, pooling="mean", normalize=True))
