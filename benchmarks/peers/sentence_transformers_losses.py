"""sentence-transformers' recipes from an ablation's warm student, its mined lists and its teacher.

    pip install sentence-transformers      # beside erniesearch, in an environment of its own
    erniesearch ablate controls --jobs 6
    python benchmarks/peers/sentence_transformers_losses.py controls --out results.json

``mnrl``: MultipleNegativesRankingLoss with the mined negatives. ``distil``: DistillKLDivLoss from
the teacher's scores of the same groups, at the teacher's fitted temperature. ``both``: one batch of
each in turn. Updates, batch, group, learning rate, schedule, warm-up, weight decay and the scale of
cosines are those of the grid's control, and so is the precision. Compared with the grid's control
and its primary arm on the same queries.
"""

import argparse
import functools
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from erniesearch import installation
from erniesearch.ablation.arms import evaluate_command, final_result, result_folder, run_file
from erniesearch.ablation.grid import Grid, read_grid
from erniesearch.ablation.statistics import clusters_of, difference
from erniesearch.config.keys import RunConfig
from erniesearch.data.collection import load_beir
from erniesearch.data.negatives import read_scored_negatives
from erniesearch.data.ranking_metrics import parse_metrics, per_query
from erniesearch.data.trec import read_trec_run
from erniesearch.models.cross_encoder import stored_temperature
from erniesearch.models.precision import use_bf16
from erniesearch.pipeline import launcher
from erniesearch.report.benchmark_report import tell_figures
from erniesearch.retrieval.retriever import default_device
from erniesearch.retrieval.trained import trained_teacher
from erniesearch.run_folder import RunFolder

LOSSES = ("mnrl", "distil", "both")


def groups(grid: Grid, config: RunConfig, seed: int) -> list[tuple[str, list[str], list[float]]]:
    """For every list that training will see: query, passages (the relevant one first), and the
    teacher's scores; negatives are drawn anew in every pass."""
    stage = config.stages.cascade
    data = load_beir(config.data.path, config.data.train_split, config.data.use_titles)
    folder = RunFolder(result_folder(grid, config, "mine"))
    negatives, scores = read_scored_negatives(folder.negatives("mined"))
    relevant, texts = data.relevant(), dict(zip(data.pids, data.passages, strict=True))
    rng = np.random.default_rng(seed)
    out: list[tuple[str, list[str], list[float]]] = []
    while len(out) < stage.steps * stage.queries_per_rank:
        for qid in map(str, rng.permutation(sorted(negatives))):
            own = [str(pid) for pid in rng.permutation(negatives[qid])[: stage.num_negatives]]
            if len(own) < stage.num_negatives:
                continue  # ours fills the list up with random passages
            pids = [str(rng.choice(relevant[qid])), *own]
            values = [scores[qid][pid] for pid in pids]
            out.append((data.queries[qid], [texts[pid] for pid in pids], values))
    return out[: stage.steps * stage.queries_per_rank]


def train(grid: Grid, config: RunConfig, loss: str, seed: int, out: Path) -> None:
    """One recipe with one seed; leaves a SentenceTransformer folder."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        losses,
        util,
    )

    stage, scale = config.stages.cascade, 1 / config.objective.tau_de
    warm = RunFolder(result_folder(grid, config, "interaction")).model("interaction", "student")
    model = SentenceTransformer(str(warm), model_kwargs={"dtype": torch.float32})
    model.max_seq_length = config.data.max_passage_length
    columns: dict[str, list[Any]] = {"anchor": [], "positive": []}
    columns |= {f"negative_{i}": [] for i in range(stage.num_negatives)} | {"label": []}
    for query, passages, scores in groups(grid, config, seed):
        for key, value in zip(columns, (query, *passages, scores), strict=True):
            columns[key].append(value)

    def similarity(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return scale * util.pairwise_cos_sim(a, b)

    whole = Dataset.from_dict(columns)
    plain = whole.remove_columns("label")
    mnrl = losses.MultipleNegativesRankingLoss(model, scale=scale)
    # The loss divides both sides by its temperature: the teacher's goes into the labels.
    distil = losses.DistillKLDivLoss(model, similarity_fct=similarity, temperature=1.0)
    if loss != "mnrl":
        teacher = trained_teacher(config)
        assert teacher is not None
        temperature = stored_temperature(Path(teacher.path)) or 1.0
        whole = whole.map(lambda row: {"label": [x / temperature for x in row["label"]]})
    half = len(plain) // 2
    data, used = {
        "mnrl": (plain, mnrl),
        "distil": (whole, distil),
        "both": ({"mnrl": plain.select(range(half)), "distil": whole.select(range(half, 2 * half))},
                 {"mnrl": mnrl, "distil": distil}),
    }[loss]  # fmt: skip
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(out / "trainer"), max_steps=stage.steps, seed=seed,
        per_device_train_batch_size=stage.queries_per_rank, learning_rate=stage.student_lr,
        warmup_steps=round(stage.steps * stage.warmup_ratio), lr_scheduler_type=stage.schedule,
        weight_decay=config.training.weight_decay, max_grad_norm=config.training.max_grad_norm,
        bf16=use_bf16(config.training.precision, default_device()),
        use_cpu=not torch.cuda.is_available(), save_strategy="no", report_to="none",
        logging_steps=50,
        disable_tqdm=True, dataloader_num_workers=2,
    )  # fmt: skip
    SentenceTransformerTrainer(model, args=arguments, train_dataset=data, loss=used).train()
    model.save_pretrained(str(out / "model"))


def measure(grid: Grid, config: RunConfig, out: Path) -> Path:
    """The TREC run of a trained recipe."""
    run = out / f"{grid.split}.trec"
    if not run.is_file():
        arguments = evaluate_command(grid, config, out / "model", run)
        arguments += ["--max_query_length", str(config.data.max_query_length)]
        arguments += ["--max_passage_length", str(config.data.max_passage_length)]
        command = [sys.executable, "-m", "erniesearch.cli", *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return run


def compare(grid: Grid, config: RunConfig, runs: dict[str, dict[int, Path]]) -> dict[str, Any]:
    """Every recipe's figures, and its difference to the grid's control and primary arm."""
    data = load_beir(config.data.path, grid.split, config.data.use_titles)
    metrics, clusters = parse_metrics(grid.metric), clusters_of(data.qrels)

    @functools.cache
    def values(path: Path) -> np.ndarray:
        run = read_trec_run(path)
        return per_query(run, data.qrels, list(data.qrels), metrics)[grid.metric]

    def mean(paths: list[Path]) -> np.ndarray:
        return np.mean([values(path) for path in paths], axis=0)

    out: dict[str, Any] = {}
    for name, by_seed in runs.items():
        own = mean(list(by_seed.values()))
        out[name] = {
            "mean": float(own.mean()),
            "per_seed": {seed: float(values(path).mean()) for seed, path in by_seed.items()},
            "against": {},
        }
        for arm in filter(None, dict.fromkeys([grid.control, grid.primary])):
            theirs = mean([
                run_file(final_result(grid, grid.config(grid.arms[arm], seed))[1], grid.split)
                for seed in by_seed
            ])  # fmt: skip
            found = difference(theirs, own, clusters)
            out[name]["against"][arm] = {"mean": float(theirs.mean())} | asdict(found)
    return out


def main() -> None:
    """Train, measure and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("grid")
    parser.add_argument("--config")
    parser.add_argument("--run_dir")
    parser.add_argument("--split")
    parser.add_argument("--losses", default=",".join(LOSSES))
    parser.add_argument("--seeds", type=int, nargs="*")
    parser.add_argument("--train-only", action="store_true", help="compare later")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    overrides = {key: getattr(given, key) for key in ("config", "run_dir", "split")}
    grid = read_grid(installation.grid_file(given.grid), overrides)
    control = grid.arms[grid.control]
    runs: dict[str, dict[int, Path]] = {}
    for loss in given.losses.split(","):
        for seed in given.seeds or control.seeds:
            config = grid.config(control, seed)
            out = final_result(grid, config)[1] / "sentence-transformers" / loss
            if not (out / "model").is_dir():
                train(grid, config, loss, seed, out)
            runs.setdefault(loss, {})[seed] = measure(grid, config, out)
    if given.train_only:
        return
    import sentence_transformers

    results = {
        "dataset": Path(config.data.path).resolve().name, "split": grid.split,
        "metric": grid.metric, "sentence_transformers": sentence_transformers.__version__,
        "recipes": compare(grid, config, runs), "ranks": launcher.num_processes(config),
    }  # fmt: skip
    tell_figures(results, given.out, " ".join(["python", *sys.argv]))


if __name__ == "__main__":
    main()
