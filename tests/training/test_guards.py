"""Guards of a training: each fires when it must, and a normal run sets off none."""

import json
import random
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.processes import SUPPORT, TWO_RANKS, losses_of, run_python
from support.tiny import ConfigMaker

from erniesearch.config.keys import RunConfig
from erniesearch.config.stage_keys import LossWeights
from erniesearch.config.yaml_file import to_yaml
from erniesearch.errors import RankFailed
from erniesearch.run_folder import RunFolder
from erniesearch.training.faults.guards import CONSTANT_AFTER, TermWatch, spoil_nonfinite
from erniesearch.training.faults.process import failures_told
from erniesearch.training.faults.watchdog import describe

FAULTY_RANKS = (*TWO_RANKS, str(SUPPORT / "fault_worker.py"))


def train(config: RunConfig, root: Path, kind: str, rank: int, steps: list[int]) -> tuple[int, str]:
    """``erniesearch train`` on two ranks with a fault; exit status and output."""
    (root / "fault.json").write_text(json.dumps({"kind": kind, "rank": rank, "steps": steps}))
    (root / "run.yaml").write_text(to_yaml(config))
    return run_python(*FAULTY_RANKS, str(root / "fault.json"), "--config", str(root / "run.yaml"),
                      "--stage", "cascade")  # fmt: skip


def errors_in(output: str) -> list[str]:
    prefix = "erniesearch: error: "
    return [x.removeprefix(prefix) for x in output.splitlines() if x.startswith(prefix)]


# --- non-finite losses and gradients ------------------------------------------------------------


def test_a_loss_that_is_not_finite_spoils_its_gradient_and_no_other() -> None:
    for value, finite in ((2.0, True), (float("nan"), False), (float("inf"), False)):
        x = torch.tensor(1.0, requires_grad=True)
        loss = x * 3 + (value - 3)
        spoilt = spoil_nonfinite(loss)
        spoilt.backward()
        assert bool(x.grad.isfinite()) is finite
        if finite:
            assert spoilt.equal(loss)
            assert x.grad == 3


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "zero_stages"),
    [pytest.param("nan_loss", (0, 3), marks=pytest.mark.slow), ("nan_gradient", (0, 1, 2, 3)),
     ("infinite_loss_without_gradient", (0, 1))],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_update_is_skipped_on_all_ranks_and_told(
    make_config: ConfigMaker, tmp_path: Path, kind: str, zero_stages: tuple[int, ...]
) -> None:
    """Only rank 1 meets it, in the last update: the model is that of the update before."""
    runs = {
        zero: [
            make_config(run_dir=tmp_path / f"{zero}-{steps}", steps=steps, queries_per_rank=2,
                        zero_stage=zero, dropout=0.0)
            for steps in (1, 2)
        ]
        for zero in zero_stages
    }  # fmt: skip
    jobs = [("cascade", asdict(config)) for pair in runs.values() for config in pair]
    file = tmp_path / "fault.json"
    file.write_text(json.dumps({"kind": kind, "rank": 1, "steps": [2], "jobs": jobs}))
    status, output = run_python(*FAULTY_RANKS, str(file))
    assert status == 0, output[-3000:]
    cause = "gradient" if kind == "nan_gradient" else "loss"
    for without, config in runs.values():
        stage = RunFolder(config.run_dir).stage("cascade")
        first, second = losses_of(stage)
        assert "skipped_updates" not in first
        assert second["skipped_updates"] == 1
        assert second.get("grad_norm") is None
        assert (second["loss"] is None) == (cause == "loss")
        for part in ("student", "teacher"):
            weights, before = (
                load_file(RunFolder(c.run_dir).model("cascade", part) / "model.safetensors")
                for c in (config, without)
            )
            assert all(weights[name].equal(before[name]) for name in before)
        assert f"update 2 was skipped: its {cause} is not finite; {stage}/nonfinite.jsonl" in output
        (line,) = [json.loads(x) for x in (stage / "nonfinite.jsonl").read_text().splitlines()]
        assert line["step"] == 2
        assert line["cause"] == cause
        ranks = [1] if cause == "loss" else [0, 1]
        assert [batch["rank"] for batch in line["batches"]] == ranks
        for batch in line["batches"]:
            assert len(batch["queries"]) == len(batch["passages"]) == 2
            assert all(qid.startswith("q") for qid in batch["queries"])
            assert all(len(group) == 3 for group in batch["passages"])
            assert all(pid.startswith("p") for group in batch["passages"] for pid in group)


@pytest.mark.slow
@pytest.mark.distributed
def test_losses_that_stay_non_finite_stop_the_stage(
    make_config: ConfigMaker, tmp_path: Path
) -> None:
    config = make_config(steps=20, queries_per_rank=2, max_nonfinite=3, save_every=4)
    status, output = train(config, tmp_path, "nan_loss", 0, [3, 5, 6, 7, 8])
    assert status != 0
    (error,) = errors_in(output)
    stage = RunFolder(config.run_dir).stage("cascade")
    assert error.startswith(
        "3 updates in a row had a loss or gradient that is not finite, the last was update 7;"
        f" {stage}/nonfinite.jsonl names"
    )
    lines = [json.loads(x) for x in (stage / "nonfinite.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 5, 6, 7]
    # With a higher limit the run goes on where it was, and knows what it has skipped.
    config = replace(config, training=replace(config.training, max_nonfinite=9))
    status, output = train(config, tmp_path, "nan_loss", 0, [3, 5, 6, 7, 8])
    assert status == 0, output[-3000:]
    assert [line["step"] for line in losses_of(stage)] == list(range(1, 21))
    assert losses_of(stage)[-1]["skipped_updates"] == 5
    lines = [json.loads(x) for x in (stage / "nonfinite.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 5, 6, 7, 8]


# --- terms and the loss -------------------------------------------------------------------------


def warnings(watch: TermWatch, updates: list[dict[str, float]]) -> list[str]:
    return [w for step, terms in enumerate(updates, 1) for w in watch.look(step, terms)]


def test_a_constant_term_is_told_once() -> None:
    updates = [{"loss": 2.0 - 0.01 * i, "de": 2.0 - 0.01 * i, "dual_reg": 1e-9 * (i % 3),
                "accuracy_de": 0.5} for i in range(3 * CONSTANT_AFTER)]  # fmt: skip
    (warning,) = warnings(TermWatch(["de", "dual_reg"], gated=False), updates)
    assert warning.startswith("the term dual_reg has been ")
    # Behind a closed gate a term is 0 by design; another constant is not.
    assert warnings(TermWatch(["de", "li"], gated=True), [u | {"li": 0.0} for u in updates]) == []
    assert len(warnings(TermWatch(["li"], gated=True), [u | {"li": 0.7} for u in updates])) == 1


def test_a_loss_spike_is_told_and_a_noisy_loss_is_not() -> None:
    rng = random.Random(0)
    normal = [3.0 / (1 + i / 50) + rng.gauss(0, 0.1) for i in range(500)]
    assert warnings(TermWatch([], False), [{"loss": x} for x in normal]) == []
    spiked = [*normal[:300], 30.0, float("nan"), *normal[300:]]
    (warning,) = warnings(TermWatch([], False), [{"loss": x} for x in spiked])
    assert warning.startswith("loss spike at update 301: 30 after a median of ")


@pytest.mark.slow
@pytest.mark.distributed
def test_a_normal_run_sets_off_no_guard_and_a_term_without_dropout_does(
    make_config: ConfigMaker, tmp_path: Path
) -> None:
    """dual_reg compares two dropout passes: without dropout it is 0 for ever."""
    outputs = {}
    for dropout in (0.1, 0.0):
        config = make_config(
            run_dir=tmp_path / str(dropout), steps=60, queries_per_rank=1, dropout=dropout,
            num_workers=1, timeout_minutes=1.0, weights=LossWeights(de=1.0, dual_reg=1.0),
        )  # fmt: skip
        status, outputs[dropout] = train(config, tmp_path, "nan_loss", 0, [])
        assert status == 0, outputs[dropout][-3000:]
        assert not (RunFolder(config.run_dir).stage("cascade") / "nonfinite.jsonl").exists()
    for word in ("term", "spike", "skipped", "progress", "damaged", "error"):
        assert word not in outputs[0.1].replace(str(tmp_path), ""), outputs[0.1]
    told = [x for x in outputs[0.0].splitlines() if "the term" in x]
    assert len(told) == 1
    assert told[0].startswith("cascade: the term dual_reg has been ")


# --- ranks that hang or die ---------------------------------------------------------------------


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "rank"), [("hang", 1), pytest.param("stop", 0, marks=pytest.mark.slow)]
)
def test_a_rank_that_hangs_ends_the_stage_with_every_ranks_position(
    make_config: ConfigMaker, tmp_path: Path, kind: str, rank: int
) -> None:
    """``stop`` freezes rank 0 itself, its watchdog included."""
    config = make_config(steps=50, queries_per_rank=2, timeout_minutes=4 / 60,
                         weights=LossWeights(de=1.0))  # fmt: skip
    began = time.monotonic()
    status, output = train(config, tmp_path, kind, rank, [3])
    assert status != 0
    assert time.monotonic() - began < 150
    (error,) = errors_in(output)
    assert error.startswith("no progress for 0.0666667 minutes (training.timeout_minutes): ")
    # The other waits in the same pass or in a later one of the same update.
    assert f"rank {rank}: update 3, forward pass since" in error or (
        "ranks 0-1: update 3, forward pass since" in error
    )
    assert f"rank {1 - rank}: update 3, " in error or "ranks 0-1: update 3, " in error


def test_positions_of_many_ranks_are_told_together(tmp_path: Path) -> None:
    for rank in range(6):
        position = "update 7, reading data" if rank == 3 else "update 8, forward pass"
        if rank != 5:
            (tmp_path / f"rank-{rank:05d}.json").write_text(
                json.dumps({"position": position, "since": "10:00:00"})
            )
    assert describe(tmp_path, 6) == (
        "ranks 0-2, 4: update 8, forward pass since 10:00:00;"
        " rank 3: update 7, reading data since 10:00:00; rank 5: nowhere yet"
    )


@pytest.mark.distributed
def test_a_dead_data_worker_is_one_line(make_config: ConfigMaker, tmp_path: Path) -> None:
    config = make_config(steps=50, queries_per_rank=2, num_workers=1,
                         weights=LossWeights(de=1.0))  # fmt: skip
    status, output = train(config, tmp_path, "kill_data_worker", 1, [3])
    assert status != 0
    told = [x for x in errors_in(output) if x.startswith("rank 1: DataLoader worker")]
    assert len(told) == 1
    assert "lower training.num_workers, and run the same command again to continue" in told[0]
    assert "Traceback" not in output.split("erniesearch: error: rank 1")[0]


@pytest.mark.distributed
def test_a_killed_rank_is_told_by_the_others(make_config: ConfigMaker, tmp_path: Path) -> None:
    config = make_config(steps=50, queries_per_rank=2, weights=LossWeights(de=1.0))
    status, output = train(config, tmp_path, "kill_self", 1, [3])
    assert status != 0
    assert errors_in(output) in (
        # The launcher may end rank 0 before it notices.
        [],
        ["rank 0 lost its connection to another rank, which ended or was killed; run the same"
         " command again to continue"],
    )  # fmt: skip
    # torchrun itself ends with a traceback of its own.
    assert "Traceback" not in output.split("torch/distributed/elastic/multiprocessing")[0]


def test_other_failures_stay_what_they_are(tmp_path: Path) -> None:
    for error in (RuntimeError("shape mismatch"), FileNotFoundError(2, "No such file")):
        with pytest.raises(type(error)), failures_told(tmp_path):
            raise error
    with pytest.raises(RankFailed, match=r"metrics.jsonl: No space left on device; make room"), \
            failures_told(tmp_path):  # fmt: skip
        raise OSError(28, "No space left on device", "metrics.jsonl")
