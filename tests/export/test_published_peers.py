"""Models that other libraries wrote go on training here, and score there as they do here."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.finished_run import LONG, TEXTS
from support.peers import PYLATE, ST_6, Peer
from support.processes import train_cascade
from support.published import WITH_MARKS, max_sims
from support.tiny import ALL_TERMS, ConfigMaker, write_model

from erniesearch.config.keys import RunConfig
from erniesearch.data.collection import load_beir
from erniesearch.export import export_all
from erniesearch.retrieval.load import load_retriever
from erniesearch.retrieval.model_folder import read_folder
from erniesearch.retrieval.trained import make_retriever, trained_student
from erniesearch.run_folder import RunFolder
from erniesearch.training.build import check_inputs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
QUERIES = ["baran desel", "fitor . gozul, kupat", "noran!", LONG]
PASSAGES = [*(f"{text}, desel!" for text in TEXTS), LONG, "fitor - gozul . baran"]
CPU = torch.device("cpu")

WRITE_PYLATE = """
from pylate import models
torch.manual_seed(3)
model = models.ColBERT(values["model"], device="cpu", embedding_size=16, query_length=10,
                       document_length=14, **values["options"])
model.save(values["out"])
print(json.dumps(None))
"""

WRITE_MULTI_VECTOR = """
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
torch.manual_seed(3)
transformer = Transformer(values["model"], document_length=14, **values["options"])
dense = Dense(32, 16, bias=True, activation_function=torch.nn.Identity(),
              module_input_name="token_embeddings")
torch.nn.init.normal_(dense.linear.bias, std=0.5)
mask = MultiVectorMask(skiplist_words=[",", ".", "!"])
model = MultiVectorEncoder(
    modules=[transformer, dense, mask, Normalize(module_input_name="token_embeddings")],
    prompts={"query": "query: ", "document": "passage: "}, device="cpu",
)
model.save(values["out"])
print(json.dumps(None))
"""

PYLATE_SCORES = """
from pylate import models
model = models.ColBERT(values["folder"], device="cpu")
queries = model.encode(values["queries"], is_query=True, convert_to_tensor=True)
passages = model.encode(values["passages"], is_query=False, convert_to_tensor=True)
found = [[float((q @ p.T).max(1).values.sum()) for p in passages] for q in queries]
print(json.dumps(found))
"""

MULTI_VECTOR_SCORES = """
from sentence_transformers import MultiVectorEncoder
model = MultiVectorEncoder(values["folder"], device="cpu")
queries, passages = model.encode_query(values["queries"]), model.encode_document(values["passages"])
print(json.dumps(model.similarity(queries, passages).tolist()))
"""

DUAL_SCORES = """
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(values["folder"], device="cpu")
queries, passages = model.encode_query(values["queries"]), model.encode_document(values["passages"])
print(json.dumps(model.similarity(queries, passages).tolist()))
"""

SAYS = ("config_sentence_transformers.json", "modules.json", "1_Dense/config.json",
        "2_MultiVectorMask/config.json", "sentence_bert_config.json")  # fmt: skip
LOOSE = ("__version__", "max_seq_length", "prompts", "similarity_fn_name")
"""What an export may say in another way."""
FIXED = {"query_expansion": {"strategy": "fixed", "length": 10}}
LEAST = {"query_expansion": {"strategy": "min", "length": 6, "attend": True}, "query_length": 10}


def go_on(make_config: ConfigMaker, folder: Path, **changes: Any) -> RunConfig:
    """Train every term from a published folder, and export."""
    config = make_config(
        weights=changes.pop("weights", ALL_TERMS), steps=3, path=str(folder), pooling="mean",
        max_query_length=10, max_passage_length=14, **changes,
    )  # fmt: skip
    check_inputs(config, load_beir(config.data.path, "train"))
    train_cascade(config, Path(config.run_dir).parent)
    export_all(config)
    return config


def scores(retriever: Any) -> np.ndarray:
    return max_sims(retriever, QUERIES, PASSAGES)


def assert_same(theirs: list[list[float]], ours: np.ndarray) -> None:
    np.testing.assert_allclose(np.array(theirs), ours, rtol=0, atol=1e-5)
    assert np.ptp(ours) > 1e-2


@pytest.mark.parametrize(
    ("library", "options"),
    [("pylate", {}), ("pylate", {"attend_to_expansion_tokens": True}),
     ("sentence-transformers", FIXED), ("sentence-transformers", LEAST)],
    ids=["pylate", "pylate-attended", "st-fixed", "st-min"],
)  # fmt: skip
def test_a_late_interaction_model_goes_on(
    library: str, options: dict[str, Any], peer: Peer, make_config: ConfigMaker, tmp_path: Path
) -> None:
    plain = write_model(tmp_path / "plain", words=WITH_MARKS)
    folder = tmp_path / "published"
    name, write, score = (
        (PYLATE, WRITE_PYLATE, PYLATE_SCORES) if library == "pylate"
        else (ST_6, WRITE_MULTI_VECTOR, MULTI_VECTOR_SCORES)
    )  # fmt: skip
    peer(name, write, model=str(plain), out=str(folder), options=options)
    texts = {"queries": QUERIES, "passages": PASSAGES}
    before = scores(load_retriever(folder, device=CPU))
    assert_same(peer(name, score, folder=str(folder), **texts), before)

    attends = "attend_to_expansion_tokens" in options or options is LEAST
    weights = replace(ALL_TERMS, de=0.0, ce_to_de=0.0, li_to_de=0.0, dual_reg=0.0)
    config = go_on(make_config, folder, weights=weights if attends else ALL_TERMS)
    run = RunFolder(config.run_dir)
    start = read_folder(folder)
    assert start.head is not None
    was = load_file(start.head)
    now = load_file(run.model("cascade", "student") / "late_interaction.safetensors")
    assert was.keys() == now.keys()
    moved = (now["linear.weight"] - was["linear.weight"]).abs().max()
    assert 1e-4 < moved < 0.1  # it went on from there

    ours = scores(make_retriever(config, trained_student(config, "cascade")))
    assert np.abs(ours - before).max() > 1e-3
    export = run.export("late_interaction")
    assert_same(peer(name, score, folder=str(export), **texts), ours)
    np.testing.assert_allclose(scores(load_retriever(export, device=CPU)), ours, atol=1e-5)
    for file in filter(lambda file: (folder / file).is_file(), SAYS):
        theirs, own = (json.loads((x / file).read_text()) for x in (folder, export))
        if isinstance(theirs, list):
            assert own == theirs
        else:
            assert {key: own.get(key) for key in theirs if key not in LOOSE} == {
                key: value for key, value in theirs.items() if key not in LOOSE
            }
    assert run.export("dual_encoder").is_dir() != attends
    if not attends:
        retriever = make_retriever(config, trained_student(config, "cascade"))
        vectors = [retriever.vectors(list(part), side)  # type: ignore[arg-type]
                   for part, side in ((QUERIES, "query"), (TEXTS, "passage"))]  # fmt: skip
        dual = peer(ST_6, DUAL_SCORES, folder=str(run.export("dual_encoder")), queries=QUERIES[:3],
                    passages=TEXTS)  # fmt: skip
        assert_same(dual, (vectors[0] @ vectors[1].T)[:3])
