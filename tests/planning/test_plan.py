"""What a plan foretells: by hand where that is possible, and against real training.

The slow test writes planned and measured peaks to tests/golden/plan_memory.json.
"""

import json
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import ROOT, SUPPORT, run_python
from support.tiny import ALL_TERMS, ConfigMaker, write_model

from erniesearch import cli, distributed
from erniesearch.config.keys import RunConfig
from erniesearch.config.stage_keys import LossWeights
from erniesearch.config.yaml_file import to_yaml
from erniesearch.objectives.exchange import TokenGather
from erniesearch.planning.accounting import GpuKernels, Tracker, bytes_sent, fake_world
from erniesearch.planning.estimate import (
    MOST_QUERIES,
    Estimator,
    continued,
    largest_batch,
    largest_fitting,
)
from erniesearch.planning.plan import Machine, Planner
from erniesearch.planning.states import (
    Layout,
    Zero,
    engine_traffic,
    gathered_weights,
    resident,
)
from erniesearch.planning.trace import StageTracer, Trace
from erniesearch.planning.trial import Measured, measure
from erniesearch.stages import Stage

GOLDEN = ROOT / "tests" / "golden" / "plan_memory.json"
DE, TOKENS = LossWeights(de=1.0), LossWeights(li=1.0)


def test_the_peak_is_that_of_storages_alive_together() -> None:
    tracker = Tracker(gpu=False)
    with tracker:
        first = torch.empty(1000)
        view = first.view(10, 100)
        second = view * 2  # 8,000 bytes with the first
        del first, view
        third = second.sum(0, keepdim=True).expand(10, 100)  # 4,000 + 400
        assert tracker.live == 4400
        assert tracker.peaks["forward"] == 8000
        tracker.hold(5000)
        assert tracker.peaks["forward"] == 9400
        tracker.phase = "backward"
        del second
        third = third + 1  # 400 + 4,000 and what is held
    assert tracker.peaks == {"forward": 9400, "backward": 9400}
    del third
    assert tracker.live == 0


def test_excluded_tensors_do_not_come_back_through_views() -> None:
    tracker = Tracker(gpu=False)
    with tracker:
        weight = torch.nn.Parameter(torch.empty(8, 4))
        tracker.exclude(iter([weight]))
        out = torch.empty(2, 4) @ weight.t()
    assert tracker.live == 4 * (out.numel() + 2 * 4)  # and what the backward pass needs


def test_lengths_and_masks_are_computed_and_numbers_are_not() -> None:
    tracker = Tracker(gpu=False)
    with tracker:
        mask = torch.arange(6).view(2, 3) > 2
        tokens = torch.empty(2, 3, 5)
        assert int(mask.sum()) == 3
        assert tokens[mask].shape == (3, 5)
        back = tokens.new_zeros(2, 3, 5).index_put((mask,), tokens[mask])
        assert back.shape == (2, 3, 5)
        assert float(tokens.sum()) == 0.0
        tracker.real_limit = 3
        with pytest.raises(AssertionError, match="a length"):
            int((torch.arange(6) > torch.tensor([2])).sum())


def test_a_gpu_keeps_a_byte_per_element_of_a_dropout_mask_and_no_attention_map() -> None:
    live = {}
    for gpu in (False, True):
        tracker = Tracker(gpu)
        with tracker:
            x = torch.empty(4, 8, 64, 32, requires_grad=True)
            begin = tracker.live
            y = torch.nn.functional.dropout(x, 0.1, True)
            assert tracker.live - begin == x.numel() * (4 + (1 if gpu else 4))
            if gpu:
                with GpuKernels():
                    z = torch.nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.1)
            else:
                z = torch.nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.1)
            live[gpu] = tracker.live - begin
        del y, z
    assert live[True] < live[False] - 4 * 8 * 64 * 64 * 4


def test_flops_of_a_matrix_product_and_of_maxsim() -> None:
    from erniesearch.objectives.scores import late_interaction_scores

    tracker = Tracker(gpu=False)
    with tracker:
        x = torch.empty(7, 5, requires_grad=True)
        (x @ torch.empty(5, 3, requires_grad=True)).sum().backward()
        assert tracker.flops == 3 * 2 * 7 * 5 * 3
        tracker.reset()
        queries, passages = (torch.empty(n, 6, 4, requires_grad=True) for n in (2, 3))
        mask = torch.ones(3, 6, dtype=torch.bool)
        late_interaction_scores(queries, mask[:2], passages, mask, 1.0).sum().backward()
    # All similarities, then one winner per query token and passage for either side.
    assert tracker.flops == 2 * (2 * 6) * (3 * 6) * 4 + 2 * 2 * (2 * 6) * 3 * 4


def test_bytes_of_gathers_among_1024_ranks() -> None:
    tracker = Tracker(gpu=True)
    with fake_world(1024, "cuda"), tracker:
        rows = torch.empty(3, 10, requires_grad=True)
        gathered = distributed.gather_rows(rows)
        assert gathered.shape == (3072, 10)
        gathered.sum().backward()
        assert tracker.sent == {"all_gather": 1023 * 120, "reduce_scatter": 1023 * 120}
        tracker.reset()
        rows = torch.empty(3, 10, dtype=torch.bfloat16, requires_grad=True)
        distributed.gather_rows(rows).sum().backward()  # summed in fp32
        assert tracker.sent == {"all_gather": 1023 * 60, "reduce_scatter": 1023 * 120}
        tracker.reset()
        mask = torch.ones(3, 4, dtype=torch.bool)
        mask[0, 3] = False
        tokens, all_mask = TokenGather(mask, mask.device).take(torch.empty(3, 4, 10), mask)
        assert tokens.shape == (3072, 4, 10)
        assert int(all_mask.sum()) == 1024 * 11
    # Three lengths, and the tokens that are real.
    assert tracker.sent["all_gather"] == 1023 * (3 * 8 + 11 * 10 * 4)
    assert not torch.distributed.is_initialized()


def test_gathers_on_gloo_come_back_by_all_reduce() -> None:
    tracker = Tracker(gpu=False)
    with fake_world(4, "cpu"), tracker:
        rows = torch.empty(3, 10, requires_grad=True)
        distributed.gather_rows(rows).sum().backward()
    assert tracker.sent == {"all_gather": 3 * 120, "all_reduce": 2 * 3 * 120}
    assert bytes_sent("send", 7, 4) == 7


LAYOUT = Layout(((10, 3), (4,)), (5,))


def zero(stage: int, **changes: Any) -> Zero:
    made = Zero(stage, 500, stage == 3, 4, 10**6, 10**6, ())
    return replace(made, **changes)


def test_partitions_are_padded_as_deepspeed_pads_them() -> None:
    # Groups of 13 and 4, flat, to a multiple of 2 W; parameters of ZeRO-3 one by one.
    assert LAYOUT.trainable == 17
    assert LAYOUT.partitions(2) == [8, 2]
    assert LAYOUT.partitions(4) == [4, 2]
    assert LAYOUT.shards(4) == [3 + 1, 1]
    # Rank 1 of 2 holds elements 8 to 15: the end of the first parameter and the second, whole.
    assert LAYOUT.own_gradients(2) == 10 + 3 + 4


@pytest.mark.parametrize(
    ("stage", "width", "expected"),
    [
        (0, 4, {"weights": 4 * 22, "master weights": 0, "Adam": 8 * 17}),
        (0, 2, {"weights": 2 * 22, "master weights": 4 * 17, "Adam": 8 * 17}),
        (1, 4, {"weights": 4 * (20 + 5), "master weights": 4 * 10, "Adam": 8 * 10}),
        (2, 2, {"weights": 2 * (20 + 5), "master weights": 4 * 10, "Adam": 8 * 10}),
        # Halves of 10, 3, 4 and 5; those of at most 4 elements are there whole as well.
        (3, 2, {"weights": 2 * (5 + 2 + 2 + 3 + 3 + 4), "master weights": 4 * 9, "Adam": 8 * 9,
                "gradients": 2 * 9, "reduction bucket": 2 * 17}),
    ],
)  # fmt: skip
def test_states_of_two_ranks(stage: int, width: int, expected: dict[str, int]) -> None:
    assert resident(LAYOUT, zero(stage), 2, width, gpu=False) == expected


def test_traffic_of_two_ranks() -> None:
    assert engine_traffic(LAYOUT, zero(0), 2, 4, 3) == {"gradients (all-reduce)": 4 * 17}
    assert engine_traffic(LAYOUT, zero(2), 2, 4, 3) == {
        "gradients (all-reduce)": 4 * 17, "updated weights (all-gather)": 4 * 20 // 2,
    }  # fmt: skip
    assert gathered_weights(LAYOUT, zero(3), 2) == 10 + 5
    assert engine_traffic(LAYOUT, zero(3), 2, 4, 1) == {
        "gradients (reduce-scatter)": 4 * 17 // 2, "weights (all-gather)": 4 * 15 // 2,
        "updated weights (all-gather)": 4 * 7 // 2,
    }  # fmt: skip
    twice = engine_traffic(LAYOUT, zero(3, reuse_distance=10), 2, 4, 1)
    assert twice["weights (all-gather)"] == 4 * 15


@pytest.mark.parametrize("overlap", [False, True])
def test_a_gpus_reduction_bucket_is_there_as_a_whole(
    overlap: bool, make_config: ConfigMaker
) -> None:
    """Twice where reducing one overlaps with filling the other."""
    peaks = {}
    for size in (10**6, 5 * 10**6):
        config = make_config(weights=DE)
        own = replace(Zero.of(config.training), reduce_bucket=size, overlap=overlap)
        peaks[size] = StageTracer(Stage(config, "cascade"), "cuda", False, own).run(2, 4).peak
    assert peaks[5 * 10**6] - peaks[10**6] == (1 + overlap) * 4 * 4 * 10**6


def test_flops_and_traffic_of_a_stage_by_hand(make_config: ConfigMaker) -> None:
    queries, group, lengths = 4, 3, (8, 16)
    config = make_config(weights=DE, num_negatives=group - 1, dropout=0.0)
    trace = StageTracer(Stage(config, "cascade"), "cuda", False).run(8, queries)
    hidden, ffn, layers = 32, 64, 2
    forward = backward = 0
    for number, length in ((queries, lengths[0]), (queries * group, lengths[1])):
        linear = 2 * number * length * (4 * hidden * hidden + 2 * hidden * ffn)
        attention = 2 * number * length * length * hidden  # one of the products with the map
        forward += layers * (linear + 2 * attention)
        backward += layers * (2 * linear + 5 * attention)
    scores = 2 * queries * (8 * queries * group) * hidden
    assert trace.flops == forward + backward + 3 * scores
    own = queries * group * hidden * 4
    assert trace.sent["reduce_scatter"] == 7 * own
    assert trace.sent["all_gather"] == 7 * (own + queries * group * 8)  # and corpus positions


def test_more_micro_steps_cost_more_time_and_no_more_memory(make_config: ConfigMaker) -> None:
    two, six = (
        StageTracer(Stage(make_config(accumulation_steps=n), "cascade"), "cuda", True).run(2, 4)
        for n in (2, 6)
    )
    assert six.peak == two.peak
    assert six.flops == 3 * two.flops
    assert six.sent == {kind: 3 * sent for kind, sent in two.sent.items()}


def test_the_ring_holds_two_blocks_however_many_ranks(make_config: ConfigMaker) -> None:
    moving: dict[str, list[int]] = {}
    for exchange in ("all_gather", "ring"):
        config = make_config(weights=TOKENS, late_interaction_exchange=exchange)
        tracer = StageTracer(Stage(config, "cascade"), "cpu", False)
        moving[exchange] = [tracer.run(ranks, 8).phases["forward"] for ranks in (8, 24)]
    tokens = 8 * 3 * 16 * 16 * 4
    assert moving["all_gather"][1] - moving["all_gather"][0] >= 16 * tokens
    assert moving["ring"][1] - moving["ring"][0] < 2 * tokens


def test_gradient_caching_bounds_activations(make_config: ConfigMaker) -> None:
    plain, cached = (
        StageTracer(Stage(make_config(chunk_size=size), "cascade"), "cpu", False).run(2, 16)
        for size in (None, 8)
    )
    assert cached.moving < 0.6 * plain.moving
    assert 1.25 * plain.flops < cached.flops < 1.5 * plain.flops


def test_figures_are_continued_by_their_polynomial() -> None:
    def trace(x: int) -> Trace:
        return Trace({}, {"forward": 5 + x, "loss": x * x}, 7 * x, {"send": 3 * x + x * x})

    points = [2, 5, 9]
    found = continued(points, [trace(x) for x in points], 40)
    assert found == replace(trace(40), continued=True)
    assert found.peak == 1600


@pytest.mark.parametrize("limit", [99, 100, 101, 500, 12345, 10**9])
@pytest.mark.parametrize(
    "peak", [lambda b: 93 + 7 * b, lambda b: 99 + b + b * b // 90, lambda b: max(100, 3 * b)]
)
def test_the_largest_batch_fits_and_one_more_does_not(
    peak: Callable[[int], int], limit: int
) -> None:
    found = largest_batch(peak, limit, 8)
    assert found == 0 or peak(found) <= limit
    assert peak(found + 1) > limit or found == MOST_QUERIES


def test_the_largest_batch_of_a_stage(make_config: ConfigMaker) -> None:
    estimate = Estimator(StageTracer(Stage(make_config(zero_stage=2), "cascade"), "cpu", False))
    limit = 40 << 20
    found = largest_fitting(estimate, 64, limit, 4)
    assert 4 < found < 1000
    assert estimate(64, found).peak <= limit < estimate(64, found + 1).peak


@pytest.mark.slow
def test_what_helps_is_named_and_helps(make_config: ConfigMaker) -> None:
    config = make_config(queries_per_rank=16, dropout=0.0, zero_stage=0)
    planner = Planner(config, Machine(gpu_memory=1.008, headroom=1.0))
    plan = planner.stage("cascade", 64)
    assert not plan.fits
    settings = {change.setting: change for change in plan.changes}
    for key in ("activation_checkpointing", "chunk_size", "ring", "all of"):
        assert any(key in setting for setting in settings), key
    assert all(change.peak < plan.peak for change in plan.changes)
    assert all(change.fits == (change.peak <= planner.machine.limit()) for change in plan.changes)
    assert any(change.fits for change in plan.changes)
    alone = make_config(queries_per_rank=16, dropout=0.0, zero_stage=0, candidates="group")
    planner = Planner(alone, Machine(gpu_memory=1.008, headroom=1.0))
    assert not any("ring" in c.setting for c in planner.stage("cascade", 64).changes)


def run(config: RunConfig, folder: Path, *options: str) -> int:
    file = folder / "run.yaml"
    file.write_text(to_yaml(config))
    return cli.main(["plan", str(file), *options])


def test_neither_data_nor_weights_are_needed(
    make_config: ConfigMaker, tiny_model: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    bare = shutil.copytree(tiny_model, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    config = make_config(path=str(bare), weights=DE, zero_stage=0)
    config = replace(config, data=replace(config.data, path=str(tmp_path / "nowhere")))
    out = tmp_path / "plan.json"
    status = run(config, tmp_path, "--gpus", "1,1024", "--gpu-memory", "3.02", "--json", str(out))
    assert status == 0
    assert "1024" in capsys.readouterr().out
    content = json.loads(out.read_text())
    few, many = content["stages"]
    assert [few["ranks"], many["ranks"]] == [1, 1024]
    assert few["sent"] == {"gradients (all-reduce)": 0}
    assert many["sent"]["gradients (all-reduce)"] > 0
    assert many["largest"] < few["largest"]
    assert many["seconds_sending"] > 0
    assert few["peak"] == sum(few["resident"].values()) + max(few["phases"].values())


def test_ranks_that_cannot_share_a_batch_are_named(
    make_config: ConfigMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--gpus", "1,2,16", "--stages.cascade.batch_size", "8", "--gpu-memory", "3.02"]
    assert run(make_config(weights=DE, zero_stage=0), tmp_path, *options) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "cascade: 16 ranks cannot share stages.cascade.batch_size equally." in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "0"], "--gpus 0"),
        (["--gpus", "many"], "--gpus many"),
        (["--stage", "cascad"], "did you mean"),
        (["--stage", "teacher"], "stages.teacher.steps is 0"),
        (["--gpu-memory", "-1"], "--gpu_memory"),
        (["--headroom", "90"], "--headroom 90"),
        (["--gpus", "3", "--stages.cascade.batch_size", "8"], "which 3 ranks cannot share"),
        (["--measure", "--gpus", "1,2"], "--measure takes one"),
        (["--data.max_passage_length", "2000"], "reads at most 64 tokens"),
    ],
)
def test_mistakes_are_told(
    make_config: ConfigMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    options: list[str], message: str,
) -> None:  # fmt: skip
    assert run(make_config(), tmp_path, *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def compare(config: RunConfig, name: str, ranks: int, queries: int) -> tuple[Trace, Measured]:
    planned = StageTracer(Stage(config, name), "cpu", bf16=False).run(ranks, queries)
    return planned, measure(Stage(config, name, ranks), queries)


@pytest.fixture
def larger(tmp_path: Path, make_config: ConfigMaker) -> Callable[..., RunConfig]:
    """A config whose tensors weigh more than what libraries keep for themselves."""

    def make(stage: str, length: int = 128, **changes: Any) -> RunConfig:
        model = write_model(
            tmp_path / "larger", hidden_size=256, num_hidden_layers=4, num_attention_heads=8,
            intermediate_size=1024, max_position_embeddings=256,
        )  # fmt: skip
        sizes = {"max_query_length": 32, "max_passage_length": length}
        sizes |= {} if stage == "post_train" else {"num_negatives": 3}
        return make_config(
            stage=stage, path=str(model), late_interaction_dim=128, **(sizes | changes)
        )

    return make


def test_the_planned_peak_is_the_measured_one(larger: Callable[..., RunConfig]) -> None:
    config = larger("post_train", weights=LossWeights(mlm=1.0, de=1.0),
                    dropout=0.0, zero_stage=1)  # fmt: skip
    planned, measured = compare(config, "post_train", 1, 48)
    assert planned.peak > 200 << 20
    assert planned.peak == pytest.approx(measured.own, rel=0.15)


@pytest.mark.slow
@pytest.mark.distributed
def test_planned_bytes_are_those_that_two_ranks_send(
    make_config: ConfigMaker, tmp_path: Path
) -> None:
    configs = [make_config(zero_stage=number, accumulation_steps=2) for number in range(4)]
    configs.append(make_config(zero_stage=1, late_interaction_exchange="ring"))
    other = {"candidates": "group", "layers": 1, "freeze_embeddings": True, "teacher_head_lr": 1e-3}
    configs += [make_config(zero_stage=number, **other) for number in (1, 3)]
    job, out = tmp_path / "job.json", tmp_path / "sent.json"
    job.write_text(json.dumps([asdict(config) for config in configs]))
    status, output = run_python(
        "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d",
        "--rdzv_endpoint=localhost:0", str(SUPPORT / "wire_worker.py"), str(job),
        str(out),
    )  # fmt: skip
    assert status == 0, output[-3000:]
    for config, sent in zip(configs, json.loads(out.read_text()), strict=True):
        tracer = StageTracer(Stage(config, "cascade"), "cpu", False)
        steps = tracer.stage.settings.accumulation_steps
        planned = dict(tracer.run(2, config.stages.cascade.queries_per_rank).sent)
        for name, number in engine_traffic(tracer.layout, tracer.zero, 2, 4, steps).items():
            kind = next(k for k in ("all_reduce", "reduce_scatter", "all_gather")
                        if k.replace("_", "-") in name)  # fmt: skip
            planned[kind] = planned.get(kind, 0) + number
        for kind in planned.keys() | sent.keys():
            # Padding of shards, norms and flags are a few bytes besides.
            wanted = pytest.approx(sent.get(kind, 0), rel=0.02, abs=200)
            assert planned.get(kind, 0) == wanted, (config.training, kind)


SIX = {
    "contrastive, ZeRO 0": ("contrastive", 1, 16, {"weights": DE, "zero_stage": 0}),
    "interaction, ZeRO 1, dropout": (
        "interaction", 2, 8,
        {"weights": LossWeights(li=1.0, de=1.0, li_to_de=1.0, dual_reg=1.0), "zero_stage": 1},
    ),
    "cascade, ZeRO 2": (
        "cascade", 2, 8, {"weights": ALL_TERMS, "zero_stage": 2, "dropout": 0.0}
    ),
    "cascade, ZeRO 3": (
        "cascade", 2, 8, {"weights": ALL_TERMS, "zero_stage": 3, "dropout": 0.0}
    ),
    "teacher, recomputed activations": (
        "teacher", 1, 48, {"weights": LossWeights(ce=1.0), "activation_checkpointing": True}
    ),
    "cascade, gradient caching, ring": (
        "cascade", 2, 32,
        {"weights": ALL_TERMS, "chunk_size": 32, "dropout": 0.0, "zero_stage": 1,
         "late_interaction_exchange": "ring"},
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1800)
def test_six_planned_peaks_are_the_measured_ones(larger: Callable[..., RunConfig]) -> None:
    rows = {}
    for name, (stage, ranks, queries, changes) in SIX.items():
        planned, measured = compare(larger(stage, **changes), stage, ranks, queries)
        rows[name] = {
            "stage": stage, "ranks": ranks, "queries_per_rank": queries, "planned": planned.peak,
            "measured": measured.own, "ratio": round(planned.peak / measured.own, 3),
            "resident": planned.resident, "phases": planned.phases,
            "measured_total": measured.peak, "base": measured.base,
        }  # fmt: skip
    if os.environ.get("ERNIESEARCH_WRITE_GOLDEN"):
        machine = {"processor": platform.machine(), "cores": os.cpu_count(),
                   "system": platform.system(), "torch": torch.__version__}  # fmt: skip
        GOLDEN.write_text(json.dumps({"machine": machine, "configs": rows}, indent=2) + "\n")
    for name, row in rows.items():
        assert row["planned"] == pytest.approx(row["measured"], rel=0.15), (name, row)
