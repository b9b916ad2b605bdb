"""W ranks x B queries train like one rank with W·B, for every ZeRO stage, with gradient caching
and with the ring exchange too."""

import json
import socket
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.processes import SUPPORT, losses_of, run_python
from support.tiny import EVERY_TERM, ConfigMaker

from erniesearch import distributed
from erniesearch.config.stage_keys import LossWeights
from erniesearch.errors import UserError
from erniesearch.run_folder import RunFolder

STEPS, GLOBAL_BATCH = 5, 8
pytestmark = pytest.mark.distributed


def train(
    make_config: ConfigMaker, root: Path, world_size: int, zero_stages: tuple[int, ...], **changes
) -> dict[int, RunFolder]:
    """Train the cascade once per ZeRO stage, all in one start of ``world_size`` processes."""
    jobs, folders = [], {}
    for zero in zero_stages:
        run_dir = root / f"world{world_size}-zero{zero}"
        settings = {"queries_per_rank": GLOBAL_BATCH // world_size, **changes}
        config = make_config(
            run_dir=run_dir, steps=STEPS, num_negatives=2, dropout=0.0, zero_stage=zero, **settings
        )
        jobs.append(("cascade", asdict(config)))
        folders[zero] = RunFolder(run_dir)
    root.mkdir(exist_ok=True)
    job_file = root / f"jobs-{world_size}.json"
    job_file.write_text(json.dumps(jobs))
    worker = str(SUPPORT / "distributed_worker.py")
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={world_size}", "--master_port=0"]
    launcher += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    status, output = run_python(*(launcher if world_size > 1 else []), worker, str(job_file))
    assert status == 0, output[-4000:]
    return folders


def compare(ours: RunFolder, reference: RunFolder, atol: float = 2e-5) -> None:
    rows = list(zip(losses_of(ours.stage("cascade")), losses_of(reference.stage("cascade")),
                    strict=True))  # fmt: skip
    assert len(rows) == STEPS
    for own, expected in rows:
        expected.pop("learning_rate")
        for name, value in expected.items():
            if name.startswith("accuracy"):
                continue  # a step function: rounding decides near ties
            # dual_reg is 0 up to rounding without dropout; margins are differences of scores.
            close = pytest.approx(value, rel=1e-4, abs=1e-5 if name.endswith("margin") else 1e-6)
            assert own[name] == close, (name, own["step"])
    for part in ("student", "teacher"):
        weights, wanted = (load_file(f.model("cascade", part) / "model.safetensors")
                           for f in (ours, reference))  # fmt: skip
        assert weights.keys() == wanted.keys()
        for name, tensor in wanted.items():
            # These biases shift all logits of a softmax alike: their gradient is rounding noise,
            # which Adam scales to a full step.
            if not name.endswith(("key.bias", "classifier.bias")):
                torch.testing.assert_close(
                    weights[name], tensor, rtol=1e-4, atol=atol,
                    msg=lambda m, name=name: f"{name}: {m}",
                )  # fmt: skip


@pytest.mark.parametrize("backend", [None, "gloo"])
def test_nccl_is_bound_to_the_ranks_gpu(
    monkeypatch: pytest.MonkeyPatch, backend: str | None
) -> None:
    calls: list[Any] = []
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(device))
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, **own: calls.append((backend, own))
    )
    gpu = torch.device("cuda", 1)
    assert distributed.initialize(backend=backend) == gpu
    device, (used, options) = calls
    assert device == gpu
    assert used == backend or used == "nccl"
    assert options["device_id"] == (gpu if used == "nccl" else None)


@pytest.fixture(scope="module")
def reference_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture
def reference(make_config: ConfigMaker, reference_root: Path) -> dict[int, RunFolder]:
    """One rank, every ZeRO stage; trained by the first test that asks."""
    done = reference_root / "world1-zero3" / "stages" / "cascade" / "done.json"
    if not done.exists():
        return train(make_config, reference_root, 1, (0, 1, 2, 3))
    return {z: RunFolder(reference_root / f"world1-zero{z}") for z in range(4)}


def test_a_taken_port_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2"),
                            ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):  # fmt: skip
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"127.0.0.1:{port}.*in use.*MASTER_PORT"):
            distributed.initialize(backend="gloo")


def test_zero_stages_agree_on_one_rank(reference: dict[int, RunFolder]) -> None:
    first = losses_of(reference[0].stage("cascade"))
    assert first[-1]["loss"] < first[0]["loss"]
    for zero in (1, 2, 3):
        compare(reference[zero], reference[0])


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_train_like_one(
    make_config: ConfigMaker, reference: dict[int, RunFolder], reference_root: Path,
    world_size: int,
) -> None:  # fmt: skip
    folders = train(make_config, reference_root, world_size, (0, 1, 2, 3))
    for folder in folders.values():
        compare(folder, reference[0])


@pytest.mark.parametrize("exchange", ["all_gather", "ring"])
def test_caching_and_ring_train_like_the_plain_path(
    make_config: ConfigMaker, reference: dict[int, RunFolder], tmp_path: Path, exchange: str
) -> None:
    # 4 queries and 12 passages on a rank: chunks of 5 cut through groups.
    folders = train(
        make_config, tmp_path, 2, (0, 1, 2, 3), chunk_size=5, late_interaction_exchange=exchange
    )
    for folder in folders.values():
        # Sums in another order: where a gradient is next to 0, Adam makes steps of the difference.
        compare(folder, reference[0], atol=1e-4)


OTHER_SETTINGS = {
    "tau_ce": 2.0, "tau_de_kl": 3.0, "tau_li_kl": 0.5, "tau_li_target": 0.25, "layers": [1],
    "tau_de_margin": 2.5, "tau_li_margin": 1.5,
    "freeze_embeddings": True, "teacher_head_lr": 5e-3, "weights": EVERY_TERM,
}  # fmt: skip


@pytest.mark.slow
def test_own_groups_train_alike_on_any_number_of_ranks(
    make_config: ConfigMaker, tmp_path: Path
) -> None:
    """With the virtual interaction, temperatures of the KL terms, a cut student, frozen embeddings
    and a rate of the teacher's head too."""
    changes = {"candidates": "group", **OTHER_SETTINGS}
    one = train(make_config, tmp_path, 1, (1,), **changes)[1]
    assert losses_of(one.stage("cascade"))[0]["learning_rate"]["teacher_head"] == 5e-3
    for folder in train(make_config, tmp_path, 2, (1, 3), **changes).values():
        compare(folder, one)
    for folder in train(
        make_config, tmp_path / "cached", 2, (1, 3), chunk_size=5, **changes
    ).values():
        compare(folder, one, atol=1e-4)


@pytest.mark.slow
def test_prefixes_of_vectors_train_alike_on_any_number_of_ranks(
    make_config: ConfigMaker, tmp_path: Path
) -> None:
    weights = LossWeights(de=1.0, ce_to_de=1.0, li_to_de=1.0)
    changes = {"matryoshka_dims": [16, 5], "pooling": "mean", "weights": weights}
    one = train(make_config, tmp_path, 1, (1,), **changes)[1]
    for folder in train(make_config, tmp_path, 2, (1, 3), **changes).values():
        compare(folder, one)
    for folder in train(
        make_config, tmp_path / "cached", 2, (3,), chunk_size=5, **changes
    ).values():
        compare(folder, one, atol=1e-4)


def test_in_batch_negatives_are_those_of_separate_batches(
    make_config: ConfigMaker, tmp_path: Path
) -> None:
    """Two ranks that exchange nothing train like one that takes their batches one by one."""
    one = train(make_config, tmp_path, 1, (1,), queries_per_rank=GLOBAL_BATCH // 2,
                accumulation_steps=2, **OTHER_SETTINGS)[1]  # fmt: skip
    changes = {"candidates": "in_batch", **OTHER_SETTINGS}
    for folder in train(make_config, tmp_path, 2, (1, 3), **changes).values():
        compare(folder, one)


def test_projections_have_their_parameters_in_the_backward_pass(
    make_config: ConfigMaker, tmp_path: Path
) -> None:
    """Alone, the virtual interaction reaches the last layer through its projections only: under
    ZeRO-3 nothing else brings their parameters back."""
    alone = train(make_config, tmp_path, 1, (0, 1, 3), weights=LossWeights(virt=1.0))
    first, *_, last = (row["virt"] for row in losses_of(alone[0].stage("cascade")))
    assert last < first
    for zero in (1, 3):
        compare(alone[zero], alone[0])


@pytest.mark.parametrize("chunk_size", [pytest.param(None, marks=pytest.mark.slow), 3])
def test_masked_words_weigh_the_same_on_every_rank(
    make_config: ConfigMaker, tmp_path: Path, chunk_size: int | None
) -> None:
    """Ranks have different numbers of them: the term is the mean over all ranks' words."""
    configs = {}
    for ranks in (1, 2):
        configs[ranks] = make_config(
            stage="post_train", run_dir=tmp_path / f"on-{ranks}", steps=STEPS, dropout=0.0,
            queries_per_rank=GLOBAL_BATCH // ranks, chunk_size=chunk_size,
            weights=LossWeights(mlm=1.0, de=1.0),
        )  # fmt: skip
        file = tmp_path / f"{ranks}.json"
        file.write_text(json.dumps([("post_train", asdict(configs[ranks]))]))
        status, output = run_python(
            "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--rdzv_backend=c10d",
            "--rdzv_endpoint=localhost:0", str(SUPPORT / "distributed_worker.py"), str(file),
        )  # fmt: skip
        assert status == 0, output[-3000:]
    one, two = (
        losses_of(RunFolder(configs[ranks].run_dir).stage("post_train")) for ranks in (1, 2)
    )
    for own, expected in zip(two, one, strict=True):
        for name in ("mlm", "de", "loss"):
            assert own[name] == pytest.approx(expected[name], rel=1e-4), (name, own["step"])
