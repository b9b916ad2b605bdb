"""The folder of a run as its steps leave it, with made-up figures and without models."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from erniesearch.config.keys import DataConfig, RunConfig, StudentConfig
from erniesearch.config.stage_keys import StageConfig, StagesConfig
from erniesearch.data.collection import Run, load_beir
from erniesearch.data.trec import write_trec_run
from erniesearch.evaluation.measures import Estimate, estimate, per_query_metrics
from erniesearch.evaluation.query_metrics import write_query_metrics
from erniesearch.evaluation.table import Report, Row
from erniesearch.evaluation.teacher_check import Teacher, TeacherCheck
from erniesearch.retrieval.miner import MinedQuery, statistics
from erniesearch.run_folder import COSTS, RunFolder, mark_done

SYSTEMS = {"BM25": "bm25", "dual-encoder, contrastive alone": "dual_encoder-contrastive",
           "dual-encoder, after cascade": "dual_encoder-cascade",
           "cross-encoder, reranking": "cross_encoder"}  # fmt: skip
TERMS = ("ce", "li", "de", "ce_to_li", "ce_to_de", "li_to_de")


def write_logged_run(root: Path, data: Path, updates: int = 30, finished: bool = True) -> Path:
    """What `erniesearch run` leaves: with ``finished`` to its table, else in mid-cascade."""
    config = RunConfig(
        run_dir=str(root), data=DataConfig(str(data)), student=StudentConfig("a/student"),
        stages=StagesConfig(contrastive=StageConfig(steps=updates),
                            cascade=StageConfig(steps=2 * updates)),
    )  # fmt: skip
    folder = RunFolder(root)
    folder.record(config)
    write_stage(folder.stage("contrastive"), ("de",), updates, done=True, of=updates)
    for name, facts in (("teacher_check", asdict(check())), ("mine", mined())):
        finish(folder.stage(name), facts)
    now = 2 * updates if finished else updates
    write_stage(folder.stage("cascade"), TERMS, now, done=finished, of=2 * updates)
    if finished:
        finish(folder.stage("evaluate"), {"rows": len(SYSTEMS)})
        write_table(folder, data)
    return root


def check() -> TeacherCheck:
    half = Estimate(0.5, 0.45, 0.55)
    late = Teacher(Estimate(0.5, 0.45, 0.55), Estimate(0.01, -0.02, 0.04))
    cross = Teacher(Estimate(0.6, 0.55, 0.65), Estimate(0.1, 0.06, 0.14))
    return TeacherCheck(20, 60, 10, "dev", False, half, Estimate(0.9, 0.85, 0.95), late, cross)


def mined() -> dict[str, Any]:
    rng = np.random.default_rng(3)
    return statistics([
        MinedQuery(f"q{i}", ["p"], ["n", "m"], rng.normal(0.4, 0.1, 2).tolist(),
                   [float(rng.normal(0.7, 0.1))], 3, 0, 1, rng.normal(-2, 1, 2).tolist(),
                   [float(rng.normal(2, 1))], [float(rng.normal(3, 1))])
        for i in range(40)
    ])  # fmt: skip


def write_stage(folder: Path, terms: tuple[str, ...], updates: int, done: bool, of: int) -> None:
    """Logs of ``updates`` of ``of`` updates, as the Monitor writes them."""
    folder.mkdir(parents=True)
    (folder / "started.json").write_text('{"fingerprint": "x"}\n')
    rng = np.random.default_rng(len(terms))
    models = [name for name in ("ce", "li", "de") if name in terms]
    own = [f"group_{name}" for name in models if name != "ce" and "ce" in terms]
    with (folder / "metrics.jsonl").open("w") as log:
        for step in range(1, updates + 1):
            falling = 1 / (1 + 4 * step / of)
            values = {name: falling + 0.1 * float(rng.random()) for name in terms}
            values |= {f"accuracy_{name}": 1 - 0.5 * falling for name in models + own}
            for name in (term for term in terms if "_to_" in term):
                for side in ("target", "student"):
                    values |= {
                        f"{name}_{side}_{what}": rng.random() for what in ("top1", "entropy")
                    }
            rates = dict.fromkeys(("student", "student_no_decay"), 1e-4 * falling)
            line = {"step": step, **values, "loss": sum(values[name] for name in terms),
                    "grad_norm": 2 * falling, "learning_rate": rates,
                    "speed": {"seconds": 0.5, "queries_per_second": 32 + float(rng.random()),
                              "tokens_per_second": 900.0}}  # fmt: skip
            log.write(json.dumps(line) + "\n")
    measured = [{"step": step, "loss": 1 / step, "nDCG@10_de": 0.4 + step / of / 10, "seconds": 1.5}
                for step in range(10, updates + 1, 10)]  # fmt: skip
    (folder / "validation.jsonl").write_text("".join(json.dumps(x) + "\n" for x in measured))
    if done:
        finish(folder, {"steps": updates, "world_size": 2})


def finish(folder: Path, facts: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "started.json").write_text('{"fingerprint": "x"}\n')
    mark_done(folder, "x", **{k: v for k, v in facts.items() if k != "fingerprint"})
    costs = {"seconds": 61.0, "peak_memory_bytes": 700 << 20}
    (folder / COSTS).write_text(json.dumps(costs) + "\n")


def write_table(folder: RunFolder, data: Path) -> None:
    """Random rankings of the test queries, their metrics and the table."""
    collection = load_beir(data, "test")
    rng = np.random.default_rng(1)
    rows, values = [], {}
    for name, file in SYSTEMS.items():
        run: Run = {}
        for qid, grades in collection.qrels.items():
            scores = dict(zip(collection.pids, rng.normal(0, 1, len(collection.pids)), strict=True))
            for pid in grades:
                scores[pid] += 2.0
            best = sorted(scores, key=lambda pid: -scores[pid])[:20]
            run[qid] = {pid: float(scores[pid]) for pid in best}
        path = folder.runs / f"{file}.trec"
        write_trec_run(path, run, file)
        values[name] = per_query_metrics(run, collection.qrels)
        metrics = {metric: estimate(v, 42) for metric, v in values[name].items()}
        rows.append(Row(name, f"runs/{file}.trec", metrics))
    write_query_metrics(folder.query_metrics, list(collection.qrels), values)
    stages = {"contrastive": {"steps": 30, "seconds": 15.0, "loss": 0.3}}
    report = Report("tiny", "test", len(collection.qrels), len(collection.pids), 10,
                    {"CPU": "one", "cores": 1}, stages, rows, check())  # fmt: skip
    report.save(folder.root)
    assert replace(report, dataset="tiny") == Report.load(folder.root)
