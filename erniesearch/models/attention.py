"""Which of transformers' attentions a model computes with, and texts without their padding.

``unpadded`` and ``flash_attention_2`` pack the tokens of a batch into one row, so that linear
layers compute no padding either; their attention is told where the texts end. What the encoder
hands out is padded again, so that nobody else knows.
"""

import importlib.util
import itertools
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import (
    MODEL_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from erniesearch.config.keys import StudentConfig, TeacherConfig
from erniesearch.errors import UserError
from erniesearch.models.families import AFTER_PADDING, FAMILIES

UNPADDED = "erniesearch_unpadded"
PACKED = ("unpadded", "flash_attention_2")
_SUPPORT = {
    "sdpa": "_supports_sdpa", "flash_attention_2": "_supports_flash_attn",
    "unpadded": "_supports_flash_attn",
}  # fmt: skip


def attention_options(
    settings: StudentConfig | TeacherConfig, config: PretrainedConfig, planned: bool = False
) -> dict[str, Any]:
    """transformers' keyword for ``settings.attn_implementation``; empty where that is null.

    Args:
        planned: the model will see no text: what packs computes as sdpa, and no GPU is needed.

    Raises:
        UserError: if the model or this machine has no such attention.
    """
    chosen = settings.attn_implementation
    if chosen is None:
        return {}
    part = "teacher" if isinstance(settings, TeacherConfig) else "student"
    key = f"{part}.attn_implementation"
    model = MODEL_MAPPING.get(type(config), None)
    lacking = chosen == "unpadded" and config.model_type not in FAMILIES
    if lacking or (chosen in _SUPPORT and not getattr(model, _SUPPORT[chosen], chosen == "sdpa")):
        raise UserError(
            f"{key} is {chosen}, which '{settings.path}' ({config.model_type}) does not have: set"
            " it to null or eager"
        )
    if planned:
        return {"attn_implementation": "sdpa" if chosen in PACKED else chosen}
    if chosen == "unpadded":
        for name in ("attention_probs_dropout_prob", "attention_dropout"):
            if getattr(config, name, 0):
                raise UserError(
                    f"{key} is unpadded, which has no attention dropout, but '{settings.path}' has"
                    f" {name} {getattr(config, name)}: set {part}.dropout to 0, or {key} to null"
                )
        return {"attn_implementation": UNPADDED}
    if chosen == "flash_attention_2":
        if not torch.cuda.is_available():
            raise UserError(f"{key} is flash_attention_2, but there is no GPU: set it to null")
        if importlib.util.find_spec("flash_attn") is None:
            raise UserError(
                f"{key} is flash_attention_2, but the package flash_attn is not installed: pip"
                f" install flash-attn, or set {key} to unpadded, which is PyTorch's own"
            )
    return {"attn_implementation": chosen}


class Packing(NamedTuple):
    """Where the real tokens stand, ``[T]`` places in the flattened ``[N, L]``."""

    places: Tensor
    shape: tuple[int, int]

    def padded(self, states: Tensor) -> Tensor:
        """``[1, T, …]`` to ``[N, L, …]``, zeros in the padding."""
        number, length = self.shape
        out = states.new_zeros(number * length, *states.shape[2:])
        return out.index_copy(0, self.places, states[0]).unflatten(0, self.shape)


_packing: ContextVar[Packing | None] = ContextVar("packing", default=None)


def current_packing() -> Packing | None:
    """That of the texts which a packed encoder is reading; None elsewhere."""
    return _packing.get()


def pack_texts(model: PreTrainedModel) -> None:
    """Let the encoder read every batch as one row of real tokens. The host waits once a batch for
    the mask of a GPU."""
    encoder = model.base_model
    inner, config = encoder.forward, model.config
    first = int(config.pad_token_id or 0) + 1 if config.model_type in AFTER_PADDING else 0
    has_types = int(getattr(config, "type_vocab_size", 0) or 0) > 0

    def forward(
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        **options: Any,
    ) -> BaseModelOutputWithPooling:
        _check_precision(model)
        lengths = attention_mask.sum(1)
        known = lengths.tolist()
        places = torch.nonzero_static(attention_mask.flatten(), size=sum(known)).squeeze(1)
        bounds = F.pad(lengths.cumsum(0), (1, 0)).int()
        positions = torch.arange(input_ids.shape[1], device=input_ids.device) + first
        packed = {"position_ids": positions.expand_as(input_ids)}
        if has_types:
            types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            packed["token_type_ids"] = types
        packed = {name: part.flatten()[None, places] for name, part in packed.items()}
        packing = Packing(places, (len(input_ids), input_ids.shape[1]))
        token = _packing.set(packing)
        try:
            output = inner(
                input_ids=input_ids.flatten()[None, places], cu_seq_lens_q=bounds,
                cu_seq_lens_k=bounds, max_length_q=max(known), max_length_k=max(known),
                **(options | packed),
            )  # fmt: skip
        finally:
            _packing.reset(token)
        states = packing.padded(output.last_hidden_state)
        pooler = getattr(encoder, "pooler", None)
        return BaseModelOutputWithPooling(
            last_hidden_state=states, pooler_output=pooler(states) if pooler is not None else None
        )

    encoder.forward = forward


def _check_precision(model: PreTrainedModel) -> None:
    if model.device.type == "cuda" and model.dtype == torch.float32:
        raise UserError(
            "attn_implementation: unpadded and flash_attention_2 compute in bf16 on a GPU; set the"
            " precision to bf16, or attn_implementation to null"
        )


def _unpadded(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **packed: Any,
) -> tuple[Tensor, None]:
    """Attention within each of the texts that are packed in one row, ``[1, heads, T, d]`` to
    ``[1, T, heads, d]``: PyTorch's for variable lengths on a GPU, text by text elsewhere."""
    assert attention_mask is None
    assert not dropout
    bounds, longest = packed["cu_seq_lens_q"], packed["max_length_q"]
    reach = -1 if sliding_window is None else sliding_window - 1
    if query.is_cuda:
        return _all_at_once(query, key, value, bounds, longest, scaling, reach), None
    return _text_by_text(query, key, value, bounds.tolist(), scaling, reach), None


def _all_at_once(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: int,
    scale: float | None,
    reach: int,
) -> Tensor:
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
    out = varlen_attn(
        query, key, value, bounds, bounds, longest, longest, scale=scale,
        window_size=(reach, reach),
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out[None]


def _text_by_text(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Sequence[int],
    scale: float | None,
    reach: int,
) -> Tensor:
    outputs = []
    for begin, end in itertools.pairwise(bounds):
        if begin == end:
            continue
        near = None
        if 0 <= reach < end - begin - 1:
            places = torch.arange(end - begin, device=query.device)
            near = (places[:, None] - places).abs() <= reach
        own_query, own_key, own_value = (part[:, :, begin:end] for part in (query, key, value))
        outputs.append(
            F.scaled_dot_product_attention(
                own_query, own_key, own_value, attn_mask=near, scale=scale
            )
        )
    return torch.cat(outputs, 2).transpose(1, 2)


def _no_mask(*_: Any, **__: Any) -> None:
    return None


AttentionInterface.register(UNPADDED, _unpadded)
AttentionMaskInterface.register(UNPADDED, _no_mask)
