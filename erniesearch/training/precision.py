"""How a device computes: in which precision, and by which of several equal ways."""

import torch

from erniesearch.config.keys import RunConfig
from erniesearch.models.joint import JointModel

PLAIN_ATTENTION_TOKENS = 256
"""Longest pair for which plain attention's maps are kept."""


def use_bf16(precision: str, device: torch.device) -> bool:
    """``auto`` is bf16 on a GPU that has it, fp32 elsewhere."""
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return precision == "bf16"


def tune_for_device(model: JointModel, config: RunConfig, device: torch.device) -> None:
    """Ways to compute the same that differ in speed and memory."""
    if config.training.activation_checkpointing:
        model.enable_activation_checkpointing()
    longest = config.data.max_query_length + config.data.max_passage_length
    bf16 = use_bf16(config.training.precision, device)
    if device.type == "cpu" and bf16 and longest <= PLAIN_ATTENTION_TOKENS:
        # PyTorch's fused attention goes backwards slower in bf16 on a CPU than products do.
        for tower in model.towers():
            tower.set_attn_implementation("eager")
