"""``erniesearch run``: every stage in order, each skipped when its result is there and its inputs
are unchanged; then export, index, evaluate, report."""

import json
import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from erniesearch import __version__, stages
from erniesearch.config import (
    TRAINING_STAGES,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    to_yaml,
    training_stages,
)
from erniesearch.data.bm25 import bm25_negatives
from erniesearch.data.formats import RetrievalData, Run, load_beir, write_negatives, write_trec_run
from erniesearch.distributed import free_port
from erniesearch.errors import UserError
from erniesearch.export import export_all
from erniesearch.report import Report, Row, stage_facts, table_console
from erniesearch.retrieval import evaluate, search
from erniesearch.retrieval.encode import PairScorer, Retriever
from erniesearch.retrieval.index import VectorIndex
from erniesearch.retrieval.mine import mine_negatives
from erniesearch.training.process import pipeline_token
from erniesearch.training.stage import check_inputs, part_settings

ORDER = ("bm25", "post_train", "contrastive", "interaction", "teacher", "mine", "cascade",
         "export", "evaluate")  # fmt: skip
BM25_NEGATIVES = 32
console = Console(stderr=True)


class StageFailed(RuntimeError):
    """A training process ended with an error that it has already printed."""

    def __init__(self, stage: str, status: int) -> None:
        super().__init__(f"stage {stage} failed with exit status {status}")
        self.status = status


def run(config: RunConfig, only: list[str] | None = None) -> None:
    """Run the pipeline.

    Args:
        only: run just these steps of :data:`ORDER`; None runs all that the config enables.

    Raises:
        UserError: for bad input, before anything is trained.
        StageFailed: when a training process fails.
    """
    names = planned(config)
    if only:
        for name in only:
            if name not in names:
                raise UserError(f"--only {name}: this run has {', '.join(names)}")
        names = [name for name in names if name in only]
    folder = stages.RunFolder(config.run_dir)
    world_size = num_processes(config)
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    data = load_beir(config.data.path, config.data.train_split, config.data.use_titles)
    held_out = load_beir(config.data.path, config.evaluation.split, config.data.use_titles)
    evaluate.evaluation_subset(held_out, config.evaluation, config.seed)
    check_inputs(config)
    _write_record(config, folder.root)
    for name in names:
        expected = stages.fingerprint(config, name, world_size)
        if stages.is_done(folder.stage(name), expected):
            console.print(f"[bold]{name}[/]: done before", highlight=False)
            continue
        console.rule(f"[bold]{name}[/]", align="left")
        if name in TRAINING_STAGES:
            _launch(config, name, world_size)
            continue
        stages.claim(folder.stage(name), expected)
        if name == "bm25":
            facts = _bm25(config, data)
        elif name == "mine":
            facts = _mine(config, data)
        elif name == "export":
            facts = {"folders": [str(path) for path in export_all(config)]}
        else:
            facts = _evaluate(config, held_out)
        stages.mark_done(folder.stage(name), expected, **facts)
    if "evaluate" in names:
        Report.load(folder.root).show(table_console())
        console.print(f"summary: {folder.root / 'summary.md'}", highlight=False)


def planned(config: RunConfig) -> list[str]:
    """The steps this config runs, in order."""
    used = {s.negatives for s in training_stages(config).values() if s.steps and s.num_negatives}
    enabled = {name for name in STAGE_NAMES if stages.is_enabled(config, name)}
    if not (config.stages.cascade.steps and "mined" in used):
        enabled.discard("mine")
    if "bm25" in used:
        enabled.add("bm25")
    trained = [name for name in TRAINING_STAGES if name in enabled]
    if not trained:
        raise UserError("the config trains nothing: set stages.NAME.steps above 0")
    return [name for name in ORDER if name in enabled | {"export", "evaluate"}]


STAGE_NAMES = (*TRAINING_STAGES, "mine")


def num_processes(config: RunConfig) -> int:
    """Ranks per stage: as configured, else one per GPU, else 2."""
    return config.training.num_processes or torch.cuda.device_count() or 2


def _write_record(config: RunConfig, root: Path) -> None:
    """Resolved config, versions and commit into the run folder."""
    stages.write_atomically(root / "config.yaml", to_yaml(config))
    import deepspeed
    import transformers

    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parent,
    )  # fmt: skip
    versions = {
        "erniesearch": __version__, "commit": commit.stdout.strip() or None,
        "python": platform.python_version(), "torch": torch.__version__,
        "deepspeed": deepspeed.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    stages.write_atomically(root / "environment.json", json.dumps(versions, indent=2) + "\n")


def _launch(config: RunConfig, name: str, world_size: int) -> None:
    """Train a stage through the DeepSpeed launcher."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(config.training.threads_per_process),
        "TOKENIZERS_PARALLELISM": "false",
        "ERNIESEARCH_PIPELINE": pipeline_token(),
    }
    command = [
        sys.executable, "-m", "deepspeed.launcher.runner",
        "--num_gpus", str(world_size), "--master_port", str(free_port()),
        "--quiet", "--no_local_rank", "--module", "erniesearch.cli",
        "train", "--config", str(Path(config.run_dir) / "config.yaml"), "--stage", name,
    ]  # fmt: skip
    status = subprocess.run(command, env=environment, check=False).returncode
    if status:
        raise StageFailed(name, status)


def _bm25(config: RunConfig, data: RetrievalData) -> dict[str, object]:
    relevant = data.relevant()
    negatives = bm25_negatives(
        data.queries, relevant, data.pids, data.passages, BM25_NEGATIVES,
        config.evaluation.bm25_stemmer,
    )  # fmt: skip
    path = stages.RunFolder(config.run_dir).negatives("bm25")
    write_negatives(path, negatives, relevant)
    return {"queries": len(negatives)}


def _mine(config: RunConfig, data: RetrievalData) -> dict[str, object]:
    settings = config.stages.mine
    student, teacher = part_settings(config, "mine")
    scorer = None
    if settings.denoise_margin is not None and stages.teacher_source(config, "mine"):
        scorer = _scorer(config, teacher)
    mined = mine_negatives(data, _retriever(config, student), scorer, settings, config.seed)
    path = stages.RunFolder(config.run_dir).negatives("mined")
    write_negatives(path, mined.negatives, data.relevant())
    facts = {
        "queries": len(mined.negatives),
        "candidates": mined.num_candidates,
        "denoised": mined.num_denoised,
    }
    console.print(
        f"mined for {facts['queries']} queries: {facts['candidates']} candidates,"
        f" {facts['denoised']} dropped by the teacher", highlight=False,
    )  # fmt: skip
    return facts


def _evaluate(config: RunConfig, held_out: RetrievalData) -> dict[str, object]:
    """Every row of the table, and the index of the whole corpus by the last dual-encoder."""
    folder = stages.RunFolder(config.run_dir)
    settings = config.evaluation
    data = evaluate.evaluation_subset(held_out, settings, config.seed)
    depth = max(100, settings.rerank_depth)
    rows = []

    def add(name: str, file: str, run: Run) -> None:
        path = folder.runs / f"{file}.trec"
        write_trec_run(path, run, file)
        metrics = {
            metric: evaluate.estimate(values, config.seed)
            for metric, values in evaluate.per_query_metrics(run, data.qrels).items()
        }
        rows.append(Row(name, str(path.relative_to(folder.root)), metrics))
        console.print(f"{name}: MRR@10 {metrics['MRR@10'].mean:.3f}", highlight=False)

    add("BM25", "bm25", evaluate.bm25_run(data, depth, settings.bm25_stemmer))
    final = stages.final_student(config)
    for stage, label in (
        (None, "dual-encoder, before training"),
        ("contrastive", "dual-encoder, contrastive alone"),
        ("post_train", "dual-encoder, after post-training"),
        ("interaction", "dual-encoder, after interaction"),
        ("cascade", "dual-encoder, after cascade"),
    ):
        if stage and not (stages.is_enabled(config, stage)
                          and folder.model(stage, "student").is_dir()):  # fmt: skip
            continue
        settings_of = config.student
        if stage:
            path = str(folder.model(stage, "student"))
            settings_of = replace(config.student, path=path, revision=None)
        retriever = _retriever(config, settings_of)
        if stage is not None and stage == final:
            vectors = retriever.vectors(held_out.passages, "passage")
            VectorIndex.build(vectors, held_out.pids).save(folder.index)
            index_of = held_out.index_of
            vectors = vectors[[index_of[pid] for pid in data.pids]]
        else:
            vectors = retriever.vectors(data.passages, "passage")
        run = search.dense_run(
            retriever, VectorIndex.build(vectors, data.pids), data.queries, depth
        )
        add(label, f"dual_encoder-{stage or 'untrained'}", run)
        if stage is not None and stage == final:
            final_run = run
            reranked = search.rerank_late_interaction(retriever, data, run, settings.rerank_depth)
    if final:
        add("late interaction, reranking", "late_interaction", reranked)
        teacher_stage = stages.final_teacher(config)
        if teacher_stage:
            teacher = replace(config.teacher, path=str(folder.model(teacher_stage, "teacher")))
            scorer = _scorer(config, teacher)
            add("cross-encoder, reranking", "cross_encoder",
                search.rerank_cross_encoder(scorer, data, final_run, settings.rerank_depth))  # fmt: skip
    facts = {
        name: stage_facts(folder.stage(name))
        for name in TRAINING_STAGES
        if stages.is_enabled(config, name)
    }
    Report(
        Path(config.data.path).name, settings.split, len(data.queries), len(data.pids),
        settings.rerank_depth, facts, rows,
    ).save(folder.root)  # fmt: skip
    return {"rows": len(rows)}


def _retriever(config: RunConfig, settings: StudentConfig) -> Retriever:
    return Retriever(
        settings, config.data.max_query_length, config.data.max_passage_length,
        config.evaluation.batch_size, seed=config.seed,
    )  # fmt: skip


def _scorer(config: RunConfig, settings: TeacherConfig) -> PairScorer:
    return PairScorer(
        settings, config.data.max_query_length, config.data.max_passage_length,
        config.evaluation.batch_size,
    )  # fmt: skip


def interactive_search(
    config: RunConfig, query: str, depth: int, rerank: str, rerank_depth: int
) -> None:
    """Print the best passages of a query from a finished run's index.

    Raises:
        UserError: if the run has no index, or no model of the kind asked for.
    """
    folder = stages.RunFolder(config.run_dir)
    final = stages.final_student(config)
    if final is None or not folder.model(final, "student").is_dir():
        raise UserError(f"{config.run_dir}: the run has no trained student")
    index = VectorIndex.load(folder.index)
    data = load_beir(config.data.path, config.evaluation.split, config.data.use_titles)
    data = replace(data, queries={"query": query})
    student = replace(config.student, path=str(folder.model(final, "student")), revision=None)
    retriever = _retriever(config, student)
    run = search.dense_run(retriever, index, data.queries, max(depth, rerank_depth))
    if rerank == "late_interaction":
        run = search.rerank_late_interaction(retriever, data, run, rerank_depth)
    elif rerank == "cross_encoder":
        teacher_stage = stages.final_teacher(config)
        if teacher_stage is None:
            raise UserError(f"{config.run_dir}: the run trained no cross-encoder")
        teacher = replace(config.teacher, path=str(folder.model(teacher_stage, "teacher")))
        run = search.rerank_cross_encoder(_scorer(config, teacher), data, run, rerank_depth)
    index_of = data.index_of
    out = Console(highlight=False)
    for position, pid in enumerate(search.top(run["query"], depth), 1):
        text = data.passages[index_of[pid]]
        shown = text if len(text) <= 240 else text[:240].rsplit(" ", 1)[0] + " …"
        out.print(f"{position:2d}. [bold]{escape(pid)}[/]  {run['query'][pid]:.3f}")
        out.print(f"    {escape(shown)}")
