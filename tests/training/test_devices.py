"""A whole update on a pretended GPU mixes no devices."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.accelerator import cuda_accelerator
from pretend_gpu import GPU, Engine, GpuTensor, Mixed, PretendGpu, move, pass_on
from support.tiny import EVERY_TERM, ConfigMaker

from erniesearch import distributed
from erniesearch.config.stage_keys import LossWeights
from erniesearch.data.collection import load_beir
from erniesearch.models.lengths import GPU_WORK
from erniesearch.models.precision import tune_for_device
from erniesearch.planning.accounting import fake_world
from erniesearch.stages import Stage
from erniesearch.training.build import build_batches, build_model
from erniesearch.training.engine import _keep_deepspeed_from_nvml
from erniesearch.training.quality_watch import QualityWatch, is_watched
from erniesearch.training.update import update


def one_update(make_config: ConfigMaker, stage: str, ranks: int, gpu: bool, **changes: Any) -> Any:
    """Terms of rank 0's update and its gradients, without and with a pretended GPU."""
    config = make_config(stage=stage, queries_per_rank=2, **changes)
    model, tokenizer = build_model(Stage(config, stage))
    if config.training.precision == "bf16":
        model.bfloat16()
    tune_for_device(model, config, GPU if gpu else torch.device("cpu"), False)
    data = load_beir(config.data.path, "train")
    device = GPU if gpu else torch.device("cpu")
    if gpu:
        move(model)
    mode = PretendGpu() if gpu else nullcontext()
    with fake_world(ranks, "cuda") if ranks > 1 else nullcontext():
        batches = build_batches(Stage(config, stage), data, tokenizer)
        loader = iter([batches[number] for number in range(2)])
        with mode:
            settings = getattr(config.stages, stage)
            engine: Any = Engine(model.train())
            made = update(engine, loader, settings, device, lambda what: None)
            assert not made.skipped
            micro_steps = settings.accumulation_steps
            gates = 2 * config.objective.competence_gate
            # The lengths of other ranks' passages, the gate's accuracies; without ZeRO the norm.
            assert not gpu or PretendGpu.waits.total() <= micro_steps * ((ranks > 1) + gates) + 1
            means = distributed.mean_over_ranks(made.terms)
            assert not distributed.any_rank(False, device)
            if is_watched(Stage(config, stage)):
                watch = QualityWatch(Stage(config, stage), data, batches, {})
                figures, _ = watch.measure(engine, device, 1, lambda what: None)
                means |= {f"validation {name}": value for name, value in figures.items()}
    return means, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


SPANS = {"weights": LossWeights(mlm=1.0, de=1.0, li=1.0)}


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("cascade", {"competence_gate": True, "validation_split": "dev",
                     "validation_queries": 8, "validation_metrics": ["MRR@10"]}),
        ("cascade", {"late_interaction_exchange": "ring", "precision": "bf16",
                     "weights": EVERY_TERM}),
        ("post_train", SPANS),
    ],
    ids=["all_gather", "ring", "spans"],
)  # fmt: skip
def test_an_update_mixes_no_devices(
    make_config: ConfigMaker, stage: str, changes: dict[str, Any], chunk_size: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.distributed, "batch_isend_irecv", pass_on)
    monkeypatch.setattr(distributed, "gather_objects", lambda value, group=None: [value] * 3)
    means, gradients = one_update(
        make_config, stage, 3, True, accumulation_steps=2, chunk_size=chunk_size, **changes
    )
    assert all(torch.tensor(value).isfinite() for value in means.values())
    assert gradients
    assert all(isinstance(gradient, GpuTensor) for gradient in gradients.values())


@pytest.mark.parametrize("work", [GPU_WORK, 1])
def test_the_pretended_gpu_computes_what_the_cpu_does(
    make_config: ConfigMaker, work: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one pass over all texts, and in blocks of similar length."""
    monkeypatch.setattr("erniesearch.models.lengths.GPU_WORK", work)
    monkeypatch.setattr("erniesearch.models.lengths.ROWS", 2 if work == 1 else 16)
    (wanted, expected), (made, gradients) = (
        one_update(make_config, "cascade", 1, gpu, accumulation_steps=2) for gpu in (False, True)
    )
    assert made == pytest.approx(wanted, rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name].inner, gradient, msg=lambda m, n=name: n + m)


def test_a_poll_answers_the_question_before() -> None:
    with PretendGpu(), fake_world(2, "cuda"):
        poll = distributed.Poll(GPU)
        answers = [poll.highest(asked) for asked in (0, 1, 2, 0, 0)]
    assert answers == [0, 0, 1, 2, 0]


def test_mixed_devices_are_told() -> None:
    with PretendGpu(), fake_world(2, "cuda"):
        here, there = torch.ones(3), torch.ones(3, device=GPU)
        assert float((there * here.sum()).sum()) == 9  # one number may be anywhere
        assert there[torch.tensor([0, 2])].shape == (2,)
        for mix in (
            lambda: here + there,
            lambda: here[torch.tensor([0], device=GPU)],
            lambda: torch.stack([there.sum(), here.sum()]),
            lambda: torch.distributed.all_reduce(here),
        ):
            with pytest.raises(Mixed):
                mix()


@pytest.mark.parametrize(
    ("visible", "free"), [("3", 3), ("5,3", 5), ("GPU-abaa900a", 70), ("MIG-90be,MIG-6fa1", 70)]
)
def test_deepspeed_is_not_asked_for_a_gpu_by_its_uuid(
    monkeypatch: pytest.MonkeyPatch, visible: str, free: int
) -> None:
    """ZeRO asks for the free memory when it is built; by NVML's number, or PyTorch's figures."""
    accelerator = cuda_accelerator.CUDA_Accelerator()
    nvml = SimpleNamespace(
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(free=handle),
    )
    monkeypatch.setattr(cuda_accelerator, "pynvml", nvml)
    monkeypatch.setattr(accelerator, "total_memory", lambda device: 80)
    monkeypatch.setattr(accelerator, "memory_allocated", lambda device: 10)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    _keep_deepspeed_from_nvml()
    assert accelerator.available_memory(0) == free
