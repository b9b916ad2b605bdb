"""One DeepSpeed engine around the joint module."""

import json
import logging
import os
import warnings
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import cuda_accelerator
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

from erniesearch.config.keys import TrainingConfig
from erniesearch.config.stage_keys import TrainingStageConfig
from erniesearch.errors import UserError
from erniesearch.installation import configs, zero_file
from erniesearch.models.joint import JointModel

# On a CPU DeepSpeed would compile a shared-memory collective at the first start (half a minute, and
# a compiler); gloo does without.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# DeepSpeed 0.19 still calls collectives by the names that torch 2.13 deprecates.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)


def zero_section(training: TrainingConfig) -> dict[str, Any]:
    """The ``zero_optimization`` section of DeepSpeed's configuration: the shipped one of
    ``zero_stage``, or that of ``zero_json``.

    Raises:
        UserError: if zero_json is missing, broken, or holds more than that section.
    """
    if training.zero_json is None:
        stage = 1 if training.zero_stage is None else training.zero_stage
        path = configs() / "deepspeed" / f"zero{stage}.json"
    else:
        path = zero_file(training.zero_json)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"training.zero_json: {path}: no such file") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(content, dict) or set(content) != {"zero_optimization"}:
        extra = sorted(set(content) - {"zero_optimization"}) if isinstance(content, dict) else []
        raise UserError(
            f"{path}: holds {extra or 'no zero_optimization'}; it must hold the zero_optimization"
            " section only: batch size, precision and clipping have one place, the run's config"
        )
    return dict(content["zero_optimization"])


def _keep_deepspeed_from_nvml() -> None:
    """Where CUDA_VISIBLE_DEVICES holds more than numbers, a GPU's UUID or a MIG instance.

    DeepSpeed 0.19 asks NVML for the free memory, by these names as numbers, and ends with a
    ValueError. Without NVML (pynvml not installed) it asks PyTorch.
    """
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")
    if not all(name.strip().lstrip("-").isdigit() for name in names):
        cuda_accelerator.pynvml = None


def build_engine(
    model: JointModel,
    training: TrainingConfig,
    stage: TrainingStageConfig,
    queries_per_rank: int,
    bf16: bool,
    universal: bool = False,
) -> tuple["deepspeed.DeepSpeedEngine", dict[str, float]]:
    """Optimizer (AdamW, parameter groups per part) and engine; parameters move to its device.

    ``universal`` says that checkpoints will be loaded in DeepSpeed's universal form.
    Also returns the peak learning rate of each parameter group by name.
    """
    groups = list(model.parameter_groups(stage, training.weight_decay))
    assert groups, "the stage trains nothing"
    peaks = {str(group["name"]): float(group["lr"]) for group in groups}
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, fused=True)
    zero = zero_section(training)
    _keep_deepspeed_from_nvml()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": queries_per_rank,
            # An update is one reduction, whatever it is made of (one_reduction).
            "gradient_accumulation_steps": 1,
            "gradient_clipping": training.max_grad_norm,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": bf16},
            "steps_per_print": 1 << 31,
            "timers": {"throughput": {"enabled": False}},  # it would wait for the GPU every time
            "checkpoint": {"load_universal": universal},
        },
    )
    if hasattr(engine.optimizer, "scaled_global_norm"):
        # DeepSpeed 0.19 reads the norm once for each parameter group: from the GPU once is enough.
        on_device = engine.optimizer.scaled_global_norm
        engine.optimizer.scaled_global_norm = lambda: on_device().cpu()
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        # bf16 without ZeRO: DeepSpeed has made the optimizer's state by a step without gradient,
        # which decays the weights and counts as the first.
        engine.optimizer.refresh_fp32_params()
        engine.optimizer.state.clear()
    return engine, peaks
