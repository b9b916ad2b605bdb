"""What the pipeline does in its own process: BM25, mining, evaluation."""

from pathlib import Path
from typing import Any

from rich.console import Console

from erniesearch import stages
from erniesearch.config import TRAINING_STAGES, RunConfig
from erniesearch.data.bm25 import bm25_negatives
from erniesearch.data.corpora import rows_of
from erniesearch.data.formats import RetrievalData, Run, write_negatives, write_trec_run
from erniesearch.report import Report, Row, describe_machine, stage_facts
from erniesearch.retrieval import evaluate, search
from erniesearch.retrieval.encode import Retriever
from erniesearch.retrieval.index import VectorIndex
from erniesearch.retrieval.mine import asks_teacher, mine_negatives, statistics, told
from erniesearch.retrieval.trained import (
    make_retriever,
    make_scorer,
    trained_student,
    trained_teacher,
)
from erniesearch.training.stage import part_settings

BM25_NEGATIVES = 32
console = Console(stderr=True, highlight=False)


def make_bm25_negatives(config: RunConfig, data: RetrievalData) -> dict[str, Any]:
    """Hard negatives for every training query; returns facts for ``done.json``."""
    relevant = data.relevant()
    negatives = bm25_negatives(
        data.queries, relevant, data.pids, data.passages, BM25_NEGATIVES,
        config.evaluation.bm25_stemmer, config.evaluation.bm25_tokenizer,
    )  # fmt: skip
    write_negatives(stages.RunFolder(config.run_dir).negatives("bm25"), negatives, relevant)
    return {"queries": len(negatives)}


def make_mined_negatives(config: RunConfig, data: RetrievalData) -> dict[str, Any]:
    """Hard negatives by the current dual-encoder, denoised by the teacher where one is trained."""
    settings = config.stages.mine
    student, teacher = part_settings(config, "mine")
    scorer = None
    if asks_teacher(settings) and stages.teacher_source(config, "mine"):
        scorer = make_scorer(config, teacher)
    mined = mine_negatives(data, make_retriever(config, student), scorer, settings, config.seed)
    write_negatives(
        stages.RunFolder(config.run_dir).negatives("mined"), mined.negatives, data.relevant()
    )
    facts = statistics(mined.queries)
    console.print(told(facts))
    return facts


def evaluate_run(config: RunConfig, held_out: RetrievalData) -> dict[str, Any]:
    """Every row of the table; also indexes the whole corpus with the last dual-encoder."""
    data = evaluate.evaluation_subset(held_out, config.evaluation, config.seed)
    table = _TableMaker(config, held_out, data)
    table.add_bm25()
    students: dict[str | None, str] = {
        None: "dual-encoder, before training",
        "contrastive": "dual-encoder, contrastive alone",
        "post_train": "dual-encoder, after post-training",
        "interaction": "dual-encoder, after interaction",
        "cascade": "dual-encoder, after cascade",
    }
    for stage, label in students.items():
        if stage is None or stages.trains_student(config, stage):
            table.add_student(stage, label)
    table.add_rerankers()
    facts = {
        name: stage_facts(table.folder.stage(name))
        for name in TRAINING_STAGES
        if stages.is_enabled(config, name)
    }
    Report(
        Path(config.data.path).name, config.evaluation.split, len(data.queries), len(data.pids),
        config.evaluation.rerank_depth, describe_machine(), facts, table.rows,
    ).save(table.folder.root)  # fmt: skip
    return {"rows": len(table.rows)}


class _TableMaker:
    """Collects the table's rows; each writes its TREC run."""

    def __init__(self, config: RunConfig, held_out: RetrievalData, data: RetrievalData) -> None:
        self.config, self.held_out, self.data = config, held_out, data
        self.folder = stages.RunFolder(config.run_dir)
        self.depth = max(100, config.evaluation.rerank_depth)
        self.rows: list[Row] = []
        self.final_run: Run | None = None
        self.final_retriever: Retriever | None = None

    def add(self, name: str, file: str, run: Run) -> None:
        path = self.folder.runs / f"{file}.trec"
        write_trec_run(path, run, file)
        values = evaluate.per_query_metrics(run, self.data.qrels)
        metrics = {m: evaluate.estimate(v, self.config.seed) for m, v in values.items()}
        self.rows.append(Row(name, str(path.relative_to(self.folder.root)), metrics))
        console.print(f"{name}: MRR@10 {metrics['MRR@10'].mean:.3f}")

    def add_bm25(self) -> None:
        settings = self.config.evaluation
        run = evaluate.bm25_run(
            self.data, self.depth, settings.bm25_stemmer, settings.bm25_tokenizer
        )
        self.add("BM25", "bm25", run)

    def add_student(self, stage: str | None, label: str) -> None:
        final = stage is not None and stage == stages.final_student(self.config)
        retriever = make_retriever(self.config, trained_student(self.config, stage))
        if final:
            vectors = retriever.vectors(self.held_out.passages, "passage")
            VectorIndex.build(vectors, self.held_out.pids).save(self.folder.index)
            if self.data.pids is not self.held_out.pids:  # a part of the corpus
                vectors = vectors[rows_of(self.held_out.index_of, self.data.pids)]
        else:
            vectors = retriever.vectors(self.data.passages, "passage")
        index = VectorIndex.build(vectors, self.data.pids)
        run = search.dense_run(retriever, index, self.data.queries, self.depth)
        self.add(label, f"dual_encoder-{stage or 'untrained'}", run)
        if final:
            self.final_run, self.final_retriever = run, retriever

    def add_rerankers(self) -> None:
        if self.final_run is None or self.final_retriever is None:
            return
        data, depth = self.data, self.config.evaluation.rerank_depth
        if stages.trains_late_interaction(self.config):
            run = search.rerank_late_interaction(self.final_retriever, data, self.final_run, depth)
            self.add("late interaction, reranking", "late_interaction", run)
        if teacher := trained_teacher(self.config):
            scorer = make_scorer(self.config, teacher)
            run = search.rerank_cross_encoder(scorer, data, self.final_run, depth)
            self.add("cross-encoder, reranking", "cross_encoder", run)
