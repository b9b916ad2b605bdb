"""The student: one transformer, two heads.

    dual-encoder      u = pool(H)                        pool: first token, or mean over tokens
    late interaction  E = normalize(H · W_li)            W_li: [hidden, late_interaction_dim]

H are the token states. Queries and passages share the transformer unless ``tied`` is false.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from erniesearch.config.keys import StudentConfig
from erniesearch.data.text_format import ATTENDED, POOLED, having
from erniesearch.data.text_format import Side as Side
from erniesearch.distributed import row_lengths
from erniesearch.errors import UserError
from erniesearch.models.attention import PACKED
from erniesearch.models.backbone import load_encoder, save_weights, weights_wanted
from erniesearch.models.families import word_scorer
from erniesearch.models.lengths import blocks_by_length, put_back
from erniesearch.models.projections import ProjectionTap
from erniesearch.models.start import HEAD_FILE as HEAD_FILE
from erniesearch.models.start import read_start
from erniesearch.objectives.outputs import Encoded


class StudentEncoder(nn.Module):
    """Dual-encoder and late interaction over one pretrained encoder.

    Attributes:
        text_format: how its texts are read; who tokenises for it must know.

    Args:
        settings: ``settings.path`` is a pretrained encoder, a published model
            (:mod:`erniesearch.models.published`), or a folder written by :meth:`save`.
        masked_lm: also load the language-model head (post-training).
        head: safetensors file of the late-interaction projection, where it is not in
            ``settings.path``.
        passage_path: folder of an untied passage tower, where it is not in ``settings.path``.

    Raises:
        UserError: for a start that contradicts the settings, or cannot be kept.
    """

    query_tower: PreTrainedModel
    passage_tower: PreTrainedModel

    def __init__(
        self,
        settings: StudentConfig,
        masked_lm: bool = False,
        head: Path | None = None,
        passage_path: Path | None = None,
    ) -> None:
        super().__init__()
        start = read_start(settings)
        self.text_format, settings = start.text_format, start.settings
        self.settings = settings
        self.masked_lm: PreTrainedModel | None = None
        self.taps: dict[str, ProjectionTap] = {}
        own = passage_path or start.head.parent / "passage_tower"
        head = head or start.head
        passage_settings = settings
        if not settings.tied and own.is_dir():
            passage_settings = replace(settings, path=str(own))
        if masked_lm:  # words are masked in passages
            self.masked_lm = load_encoder(passage_settings, masked_lm=True)
            self.passage_tower = cast(PreTrainedModel, self.masked_lm.base_model)
        else:
            self.passage_tower = load_encoder(passage_settings)
        self.query_tower = self.passage_tower if settings.tied else load_encoder(settings)
        if settings.freeze_embeddings:
            for tower in (self.query_tower, self.passage_tower):
                tower.get_input_embeddings().requires_grad_(False)
        query = self.text_format.query
        if query.expand and not query.attend and settings.attn_implementation in PACKED:
            raise UserError(
                f"student.attn_implementation is {settings.attn_implementation}, which leaves out"
                f" the tokens that '{settings.path}' fills queries up with but does not attend to:"
                " set it to null"
            )
        self.hidden_size = int(self.query_tower.config.hidden_size)
        self.projection = self._new_projection(head)

    def _new_projection(self, head: Path) -> nn.Linear:
        """The projection of token states, ``head``'s if that is there."""
        dim, state = self.settings.late_interaction_dim, {}
        if head.is_file():
            with safe_open(head, "pt") as file:
                held = set(file.keys())
                names = [name for name in ("linear.weight", "linear.bias") if name in held]
                state = {name.removeprefix("linear."): file.get_tensor(name) for name in names}
        projection = nn.Linear(self.hidden_size, dim, bias="bias" in state)
        if state and weights_wanted():
            if state["weight"].shape != projection.weight.shape:
                raise UserError(
                    f"{head}: shape {tuple(state['weight'].shape)}, but"
                    f" student.late_interaction_dim and hidden size make"
                    f" {tuple(projection.weight.shape)}"
                )
            projection.load_state_dict({name: value.float() for name, value in state.items()})
        return projection

    def tap_layers(self, layers: Sequence[int]) -> None:
        """Choose the layers whose projections :meth:`forward` can return.

        Raises:
            UserError: if the model family has no such projections.
        """
        path = self.settings.path
        for side, tower in (("query", self.query_tower), ("passage", self.passage_tower)):
            self.taps[side] = ProjectionTap(tower, "student", path, layers)

    def forward(
        self,
        input_ids: Tensor,
        mask: Tensor,
        side: Side,
        vectors: bool = True,
        tokens: bool = True,
        projections: bool = False,
        mask_on_cpu: Tensor | None = None,
        roles: Tensor | None = None,
    ) -> Encoded:
        """Encode ``[N, L]`` token ids; ``mask`` is True on all but padding, ``roles`` say what each
        token is there for (:mod:`erniesearch.data.text_format`), None if for everything.

        Texts of similar length go together where the host knows their lengths: on a CPU, or by
        ``mask_on_cpu``, the mask once more.
        """
        wanted = side, vectors, tokens, projections
        masks = having(mask, roles, ATTENDED), having(mask, roles, POOLED)
        known = mask if mask.device.type == "cpu" else mask_on_cpu
        blocks = []
        if known is not None:
            blocks = blocks_by_length(row_lengths(known), mask.device, self.hidden_size)
        if len(blocks) < 2:
            return self._encode(input_ids, masks, *wanted)
        parts = []
        for rows, width in blocks:
            own = masks[0][rows, :width], masks[1][rows, :width]
            encoded = self._encode(input_ids[rows, :width], own, *wanted)
            parts.append(encoded.padded(mask.shape[1]))
        return Encoded(*(put_back(list(part), blocks) for part in zip(*parts, strict=True)))

    def _encode(
        self,
        input_ids: Tensor,
        masks: tuple[Tensor, Tensor],
        side: Side,
        vectors: bool,
        tokens: bool,
        projections: bool,
    ) -> Encoded:
        """``masks``: what the transformer attends to, and what is pooled."""
        attended, pooled = masks
        tower = self.query_tower if side == "query" else self.passage_tower
        with self.taps[side] if projections else nullcontext():
            states = tower(input_ids=input_ids, attention_mask=attended.long()).last_hidden_state
        return Encoded(
            self._pool(states, pooled) if vectors else states.new_empty(0),
            self._project(states) if tokens else states.new_empty(0),
            self.taps[side].stacked() if projections else states.new_empty(0),
        )

    def _project(self, states: Tensor) -> Tensor:
        # Normalised in fp32, sent over the wire and into MaxSim in the compute dtype.
        return F.normalize(self.projection(states).float(), dim=-1).to(states.dtype)

    def _pool(self, states: Tensor, mask: Tensor) -> Tensor:
        if self.settings.pooling == "cls":
            pooled = states[:, 0].float()
        else:
            weights = mask.unsqueeze(-1).to(states.dtype)
            pooled = (states * weights).float().sum(1) / weights.float().sum(1).clamp(min=1)
        return F.normalize(pooled, dim=-1) if self.settings.normalize else pooled

    def masked_lm_loss(
        self, input_ids: Tensor, mask: Tensor, labels: Tensor, words: Tensor | None = None
    ) -> Tensor:
        """Sum of the masked words' cross-entropies, ``labels`` -100 where nothing is predicted;
        ``words`` is where something is in the flattened labels, if that is known: asking labels on
        a GPU waits for it.

        The vocabulary's scores are of the masked words alone where the family's modules for them
        are known (:func:`word_scorer`): they cost as much as the layers of a small encoder.
        """
        assert self.masked_lm is not None
        if words is None:
            words = (labels != -100).flatten().nonzero().squeeze(1)
        inputs = {"input_ids": input_ids, "attention_mask": mask.long()}
        scorer = word_scorer(self.masked_lm)
        if scorer is None:
            logits = self.masked_lm(**inputs).logits.flatten(0, 1)[words]
        else:
            logits = scorer(self.passage_tower(**inputs).last_hidden_state.flatten(0, 1)[words])
        return F.cross_entropy(logits.float(), labels.flatten()[words], reduction="sum")

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Write ``state`` (this module's, gathered) as safetensors that :meth:`__init__` reads."""
        save_weights(self.query_tower, folder, _own(state, "query_tower."))
        if not self.settings.tied:
            own = _own(state, "passage_tower.")
            save_weights(self.passage_tower, folder / "passage_tower", own)
        head = _own(state, "projection.")
        save_file({f"linear.{name}": value.float().contiguous() for name, value in head.items()},
                  folder / HEAD_FILE)  # fmt: skip
        self.text_format.save(folder)


def _own(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


@torch.no_grad()
def content_mask(input_ids: Tensor, mask: Tensor, special_ids: Tensor) -> Tensor:
    """Real tokens that are neither [CLS] nor [SEP], ``[N, L]``."""
    return mask & ~torch.isin(input_ids, special_ids)
