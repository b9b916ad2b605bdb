"""How a device computes: in which precision, and by which of several equal ways."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from erniesearch.config.keys import Precision, RunConfig
from erniesearch.models.backbone import check_recomputes
from erniesearch.models.joint import JointModel

PLAIN_ATTENTION_TOKENS = 256
"""Longest pair for which plain attention's maps are kept."""

MASKED = "sdpa_masked"
"""PyTorch's fused attention, always with a mask. transformers asks every mask first whether it has
padding at all, and the host waits for a GPU's answer at each call of an encoder; a batch of texts
has."""


def _mask(*arguments: Any, **options: Any) -> Tensor | None:
    return sdpa_mask(*arguments, **options | {"allow_is_bidirectional_skip": False})


AttentionInterface.register(MASKED, sdpa_attention_forward)
AttentionMaskInterface.register(MASKED, _mask)


def use_bf16(precision: Precision, device: torch.device) -> bool:
    """``auto`` is bf16 where the device multiplies matrices in it, fp32 elsewhere: on a CPU, bf16
    without AVX512-BF16 or AMX is slower than fp32."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def convert(model: nn.Module, bf16: bool) -> None:
    """For inference: to bf16, or as it is; a score head stays in fp32 (:func:`widen_head`)."""
    if bf16:
        model.bfloat16()
        widen_head(model)


def widen_head(model: nn.Module) -> None:
    """The score head of a model in bf16 to fp32: scores in bf16 would fall on few values, and many
    passages on the same."""
    for module in model.modules():  # XLM-R has its head before the encoder
        if isinstance(module, nn.Linear) and module.out_features == 1:
            module.float().register_forward_pre_hook(_widen)


def _widen(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(part.float() for part in inputs)


def tune_for_device(model: JointModel, config: RunConfig, device: torch.device, bf16: bool) -> None:
    """Ways to compute the same that differ in speed and memory.

    Raises:
        UserError: if activations are to be recomputed of a model that cannot.
    """
    if config.training.activation_checkpointing:
        for tower in model.towers():
            check_recomputes(tower.config)
        model.enable_activation_checkpointing()
    longest = config.data.max_query_length + config.data.max_passage_length
    in_bf16_on_cpu = device.type == "cpu" and bf16 and longest <= PLAIN_ATTENTION_TOKENS
    for tower in model.towers():
        part = config.teacher if model.teacher and tower is model.teacher.model else config.student
        if tower.config._attn_implementation != "sdpa":
            continue
        if device.type != "cpu":
            tower.set_attn_implementation(MASKED)
        elif in_bf16_on_cpu and part.attn_implementation is None:
            # PyTorch's fused attention goes backwards slower in bf16 on a CPU than products do.
            tower.set_attn_implementation("eager")
