"""The dual-encoder's transformer as ONNX, where sentence-transformers looks for it.

    onnx/model.onnx    input_ids, attention_mask (, token_type_ids) -> last_hidden_state

Batch and sequence length are free. Pooling and normalisation stay in the folder's other modules.
The file is compared with PyTorch before it is kept.
"""

import importlib.util
import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from erniesearch.config.keys import StudentConfig
from erniesearch.errors import UserError
from erniesearch.models.backbone import load_encoder, load_tokenizer, max_positions

TOLERANCE = 1e-4
"""Largest difference of a real token's state, relative to the largest state."""
_SINGLE_FILE = 1 << 30  # parameters' bytes; a protobuf file ends at 2 GiB


def require_onnx() -> None:
    """Raises UserError where the packages are missing."""
    for name in ("onnx", "onnxruntime", "onnxscript"):
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"--onnx: {name} is not installed: pip install onnx onnxruntime onnxscript"
            )


def export_onnx(folder: Path) -> float:
    """Write ``onnx/model.onnx`` into an export folder.

    Returns:
        The largest relative difference to PyTorch over several batch sizes and lengths.

    Raises:
        UserError: if the model cannot be written as ONNX, or the result differs from PyTorch.
    """
    settings = StudentConfig(str(folder))
    model = load_encoder(settings).eval()
    wanted = load_tokenizer(settings).model_input_names
    names = [name for name in inspect.signature(model.forward).parameters if name in wanted]
    path = folder / "onnx" / "model.onnx"
    path.parent.mkdir()
    try:
        with _quiet():
            _write(model, names, path)
    except Exception as error:
        problem = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder}: no ONNX of this model ({problem}); export without --onnx"
        ) from error
    difference = _compare(model, names, path)
    if not difference <= TOLERANCE:
        raise UserError(
            f"{folder}: ONNX and PyTorch differ by {difference:.1e} of the largest state, more than"
            f" {TOLERANCE:.0e}; export without --onnx"
        )
    return difference


class _TokenStates(nn.Module):
    """The encoder with positional inputs and one output."""

    def __init__(self, model: PreTrainedModel, names: list[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *inputs: Tensor) -> Tensor:
        states: Tensor = self.model(**dict(zip(self.names, inputs, strict=True))).last_hidden_state
        return states


def _write(model: PreTrainedModel, names: list[str], path: Path) -> None:
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
    size = sum(parameter.nbytes for parameter in model.parameters())
    torch.onnx.export(
        _TokenStates(model, names), _inputs(model, names, 2, 7), path,
        input_names=names, output_names=["last_hidden_state"],
        dynamic_shapes=(({0: batch, 1: sequence},) * len(names),),
        external_data=size > _SINGLE_FILE, verbose=False,
    )  # fmt: skip


def _inputs(
    model: PreTrainedModel, names: list[str], batch: int, length: int
) -> tuple[Tensor, ...]:
    """Random token ids; the last row is padded to half its length."""
    generator = torch.Generator().manual_seed(batch * 1000 + length)
    vocabulary = int(model.config.vocab_size)
    ids = torch.randint(vocabulary, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[-1, (length + 1) // 2 :] = 0
    pad = int(getattr(model.config, "pad_token_id", 0) or 0)
    # RoBERTa counts positions by the padding id: it must stand in the padding and nowhere else.
    ids = torch.where(ids == pad, (pad + 1) % vocabulary, ids).masked_fill(mask == 0, pad)
    values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    return tuple(values[name] for name in names)


def _compare(model: PreTrainedModel, names: list[str], path: Path) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    longest = min(max_positions(model.config), 512)
    worst = 0.0
    for batch, length in ((1, 3), (1, longest), (3, 16), (5, 33), (2, 64)):
        inputs = _inputs(model, names, batch, min(length, longest))
        with torch.inference_mode():
            states = _TokenStates(model, names)(*inputs).numpy()
        found = session.run(
            None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        )[0]
        real = inputs[names.index("attention_mask")].numpy().astype(bool)
        difference = np.abs(found[real] - states[real]).max() / np.abs(states[real]).max()
        worst = max(worst, float(difference))
    return worst


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings about operators and packages that no encoder has."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
