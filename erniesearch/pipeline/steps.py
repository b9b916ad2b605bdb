"""What the pipeline does beside training: BM25, measuring teachers, mining, export, evaluation.

Each step runs in a process of its own, or in several, which a pipeline starts (``launcher``): one
that has worked on a GPU keeps its context and cache there until it ends, and the next stage's ranks
need the room.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import torch

from erniesearch import stages
from erniesearch.config.keys import TRAINING_STAGES, RunConfig
from erniesearch.data.bm25 import bm25_negatives
from erniesearch.data.collection import RetrievalData, Run, load_beir, with_split
from erniesearch.data.corpus.texts import rows_of
from erniesearch.data.negatives import write_negatives
from erniesearch.data.trec import write_trec_run
from erniesearch.evaluation import measures
from erniesearch.evaluation.fusion import reciprocal_rank_fusion
from erniesearch.evaluation.query_metrics import Values, write_query_metrics
from erniesearch.evaluation.table import Report, Row, describe_machine, stage_facts
from erniesearch.evaluation.teacher_check import TeacherCheck, check_teachers
from erniesearch.export import export_all, write_cards
from erniesearch.files import write_atomically
from erniesearch.progress import say, set_stage
from erniesearch.retrieval import crew, ranking
from erniesearch.retrieval.miner import (
    mine_negatives,
    mined_line,
    statistics,
    told,
)
from erniesearch.retrieval.retriever import Retriever
from erniesearch.retrieval.token_vectors import (
    TokenVectors,
    store_token_index,
    store_token_vectors,
)
from erniesearch.retrieval.trained import (
    make_retriever,
    make_scorer,
    trained_student,
    trained_teacher,
)
from erniesearch.retrieval.vector_index import VectorIndex
from erniesearch.run_folder import RunFolder, claimed, is_done, mark_done
from erniesearch.training.build import part_settings
from erniesearch.training.faults.process import exit_with_pipeline, failures_told

BM25_NEGATIVES = 32


def run_step(config: RunConfig, name: str, world_size: int) -> None:
    """Run one step of :data:`STEPS` and mark it done, unless it is: in this process, or on the
    ranks that it belongs to (:mod:`erniesearch.retrieval.crew`).

    Args:
        world_size: ranks of the run's training stages.

    Raises:
        UserError: for anything wrong with the input.
        RankFailed: for a full disk.
    """
    exit_with_pipeline()
    # Every core, or this rank's share of them, unless the user says how many.
    cores = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_SIZE", 1)))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or cores))
    with crew.assembled() as leads:
        # Ranking needs no more than TF32, and a GPU does it several times faster than fp32.
        torch.backends.cuda.matmul.allow_tf32 = True
        if leads:
            _run_alone(config, name, world_size)


def _run_alone(config: RunConfig, name: str, world_size: int) -> None:
    set_stage(name)
    folder = RunFolder(config.run_dir).stage(name)
    expected = stages.fingerprint(config, name, world_size)
    if is_done(folder, expected):
        return
    with failures_told(folder), claimed(folder, expected):
        mark_done(folder, expected, **STEPS[name](config))


def make_bm25_negatives(config: RunConfig) -> dict[str, Any]:
    """Hard negatives for every training query; returns facts for ``done.json``."""
    data = _training_data(config)
    relevant = data.relevant()
    negatives = bm25_negatives(
        data.queries, relevant, data.pids, data.passages, BM25_NEGATIVES,
        config.evaluation.bm25_stemmer, config.evaluation.bm25_tokenizer,
    )  # fmt: skip
    write_negatives(RunFolder(config.run_dir).negatives("bm25"), negatives, relevant)
    return {"queries": len(negatives)}


def make_mined_negatives(config: RunConfig) -> dict[str, Any]:
    """Hard negatives by the current dual-encoder, denoised by the teacher where one is trained."""
    data = _training_data(config)
    settings = config.stages.mine
    student, teacher = part_settings(config, "mine")
    scorer = None
    if settings.asks_teacher and stages.teacher_source(config, "mine"):
        scorer = make_scorer(config, teacher, told=True)
    mined = mine_negatives(
        data, make_retriever(config, student, told=True), scorer, settings, config.seed,
        config.training.vector_search,
    )  # fmt: skip
    write_atomically(
        RunFolder(config.run_dir).negatives("mined"),
        "".join(mined_line(query, with_scores=scorer is not None) for query in mined.queries),
    )
    facts = statistics(mined.queries)
    say(told(facts))
    return facts


def make_teacher_check(config: RunConfig) -> dict[str, Any]:
    """What the cascade's teachers gain over the student that it starts from."""
    settings, split = config.stages.teacher_check, stages.check_split(config)
    data = with_split(_training_data(config), config.data.path, split)
    data = measures.draw_subset(data, settings.queries, settings.num_distractors, config.seed)
    teachers = stages.checked_teachers(config)
    student, teacher = part_settings(config, "teacher_check")
    facts = check_teachers(
        data, make_retriever(config, student, told=True),
        make_scorer(config, teacher, told=True) if "cross_encoder" in teachers else None,
        "late_interaction" in teachers, settings.depth, config.seed,
        config.training.vector_search,
    )  # fmt: skip
    check = TeacherCheck(split=split, trained_on=split == config.data.train_split, **facts)
    for line in (check.caption, *check.lines()):
        say(line)
    for warning in check.warnings():
        say(warning, "warning")
    return asdict(check)


def export_models(config: RunConfig) -> dict[str, Any]:
    """The last models as folders for other libraries."""
    return {"folders": [str(path) for path in export_all(config)]}


def evaluate_run(config: RunConfig) -> dict[str, Any]:
    """Every row of the table, which the exports' cards get too; also indexes the whole corpus with
    the last dual-encoder."""
    held_out = load_beir(config.data.path, config.evaluation.split, config.data.use_titles)
    data = measures.evaluation_subset(held_out, config.evaluation, config.seed)
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
    table.add_fusion()
    table.add_rerankers()
    write_query_metrics(table.folder.query_metrics, list(data.qrels), table.values)
    facts = {
        name: stage_facts(table.folder.stage(name))
        for name in TRAINING_STAGES
        if stages.is_enabled(config, name)
    }
    report = Report(
        Path(config.data.path).name, config.evaluation.split, len(data.queries), len(data.pids),
        config.evaluation.rerank_depth, describe_machine(), facts, table.rows,
        _teacher_check(config, table.folder),
    )  # fmt: skip
    report.save(table.folder.root)
    write_cards(config, report.for_card())
    return {"rows": len(table.rows)}


def _teacher_check(config: RunConfig, folder: RunFolder) -> TeacherCheck | None:
    if not stages.is_enabled(config, "teacher_check"):
        return None
    marker = folder.stage("teacher_check") / "done.json"
    return TeacherCheck.from_facts(json.loads(marker.read_text(encoding="utf-8")))


STEPS: dict[str, Callable[[RunConfig], dict[str, Any]]] = {
    "bm25": make_bm25_negatives,
    "teacher_check": make_teacher_check,
    "mine": make_mined_negatives,
    "export": export_models,
    "evaluate": evaluate_run,
}


def _training_data(config: RunConfig) -> RetrievalData:
    return load_beir(config.data.path, config.data.train_split, config.data.use_titles)


class _TableMaker:
    """Collects the table's rows; each writes its TREC run."""

    def __init__(self, config: RunConfig, held_out: RetrievalData, data: RetrievalData) -> None:
        self.config, self.held_out, self.data = config, held_out, data
        self.folder = RunFolder(config.run_dir)
        self.depth = max(100, config.evaluation.rerank_depth)
        self.rows: list[Row] = []
        self.values: Values = {}
        self.bm25_run: Run = {}
        self.final_run: Run | None = None
        self.final_retriever: Retriever | None = None

    def add(self, name: str, file: str, run: Run) -> None:
        path = self.folder.runs / f"{file}.trec"
        write_trec_run(path, run, file)
        values = measures.per_query_metrics(run, self.data.qrels)
        metrics = {m: measures.estimate(v, self.config.seed) for m, v in values.items()}
        self.rows.append(Row(name, str(path.relative_to(self.folder.root)), metrics))
        self.values[name] = values
        say(f"{name}: MRR@10 {metrics['MRR@10'].mean:.3f}")

    def add_bm25(self) -> None:
        settings = self.config.evaluation
        self.bm25_run = measures.bm25_run(
            self.data, self.depth, settings.bm25_stemmer, settings.bm25_tokenizer
        )
        self.add("BM25", "bm25", self.bm25_run)

    def add_student(self, stage: str | None, label: str) -> None:
        final = stage is not None and stage == stages.final_student(self.config)
        retriever = make_retriever(self.config, trained_student(self.config, stage), told=True)
        if final:
            vectors = retriever.vectors(retriever.passages(self.held_out.passages), "passage")
            VectorIndex.build(vectors, self.held_out.pids).save(self.folder.index)
            if self.data.pids is not self.held_out.pids:  # a part of the corpus
                vectors = vectors[rows_of(self.held_out.index_of, self.data.pids)]
        else:
            vectors = retriever.vectors(retriever.passages(self.data.passages), "passage")
        index = VectorIndex.build(vectors, self.data.pids).on(
            self.config.training.vector_search, self.depth
        )
        run = ranking.dense_run(retriever, index, self.data.queries, self.depth)
        self.add(label, f"dual_encoder-{stage or 'untrained'}", run)
        if final:
            self.final_run, self.final_retriever = run, retriever

    def add_fusion(self) -> None:
        if self.final_run is not None:
            run = reciprocal_rank_fusion([self.bm25_run, self.final_run], self.depth)
            self.add("BM25 + dual-encoder, fused", "fused", run)

    def add_rerankers(self) -> None:
        if self.final_run is None or self.final_retriever is None:
            return
        data, depth = self.data, self.config.evaluation.rerank_depth
        if stages.trains_late_interaction(self.config):
            run = ranking.rerank_late_interaction(
                self.final_retriever, data, self.final_run, depth, self._token_vectors()
            )
            self.add("late interaction, reranking", "late_interaction", run)
            if self.config.evaluation.late_interaction_index:
                self._add_end_to_end(self.final_retriever)
            else:  # one of other models would be searched
                shutil.rmtree(self.folder.token_index, ignore_errors=True)
        if teacher := trained_teacher(self.config):
            scorer = make_scorer(self.config, teacher, told=True)
            run = ranking.rerank_cross_encoder(scorer, data, self.final_run, depth)
            self.add("cross-encoder, reranking", "cross_encoder", run)

    def _add_end_to_end(self, retriever: Retriever) -> None:
        """Late interaction as the first stage; its index holds the whole corpus."""
        index = store_token_index(self.folder.token_vectors, self.folder.token_index)
        allowed = None
        if self.data.pids is not self.held_out.pids:  # a part of the corpus
            allowed = np.zeros(len(self.held_out.pids), dtype=bool)
            allowed[rows_of(self.held_out.index_of, self.data.pids)] = True
        run = ranking.dense_run(retriever, index, self.data.queries, self.depth, allowed)
        self.add("late interaction, end to end", "late_interaction-end_to_end", run)
        vectors = self.folder.token_vectors
        if sum(file.stat().st_size for file in vectors.iterdir()) > self._most_token_vectors:
            shutil.rmtree(vectors)

    @property
    def _most_token_vectors(self) -> float:
        """Bytes that the token vectors left in the run's folder may take."""
        return self.config.evaluation.token_vectors_gib * (1 << 30)

    def _token_vectors(self) -> TokenVectors | None:
        """Late interaction's vectors of the corpus, stored for searches and the index, if they are
        to be."""
        assert self.final_retriever is not None
        most = self._most_token_vectors
        if self.config.evaluation.late_interaction_index:
            most = inf  # it is made from them
        reason = store_token_vectors(
            self.final_retriever, Path(self.config.data.path), self.config.data.use_titles,
            self.folder.token_vectors, most,
        )  # fmt: skip
        if reason:
            say(f"late interaction's token vectors are not stored: {reason}")
            return None
        return TokenVectors(self.folder.token_vectors, self.held_out.index_of)
