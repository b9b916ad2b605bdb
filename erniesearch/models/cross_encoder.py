"""The teacher: s_ce(q, p) = w · CLS(transformer([CLS] q [SEP] p [SEP])), and its attention.

Pairs are assembled on the device from the token ids the student reads, so attention rows and
columns are the late-interaction tokens by construction. The attention map itself is never asked
for: the query and key projections of chosen layers are kept instead
(:mod:`erniesearch.models.projections`).
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from erniesearch.config.keys import TeacherConfig
from erniesearch.distributed import row_lengths
from erniesearch.errors import UserError
from erniesearch.models.backbone import load_classifier, save_weights
from erniesearch.models.lengths import blocks_by_length, put_back
from erniesearch.models.projections import Projections, ProjectionTap, split_heads
from erniesearch.objectives.outputs import TeacherAttention


class Pairs(NamedTuple):
    """Cross-encoder input for N = B·G pairs of longest length L.

    ``query_columns`` ``[N, Lq]`` and ``passage_columns`` ``[N, Lp]`` are where each token of the
    student's query and passage stands in the pair (padding points anywhere inside).
    """

    input_ids: Tensor
    mask: Tensor
    token_type_ids: Tensor
    query_columns: Tensor
    passage_columns: Tensor


class PairLayout(NamedTuple):
    """How a model family joins two texts: BERT ``[CLS] q [SEP] p [SEP]``, RoBERTa
    ``<s> q </s></s> p </s>`` (``double_separator``)."""

    sep_id: int
    double_separator: bool

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "PairLayout":
        """Read off the tokenizer's own pair template."""
        extra = tokenizer.num_special_tokens_to_add(pair=True)
        if extra not in (3, 4) or tokenizer.num_special_tokens_to_add(pair=False) != 2:
            raise UserError(
                f"the tokenizer adds {extra} special tokens to a pair; only BERT's and RoBERTa's"
                " layouts (3 and 4) are known"
            )
        return cls(int(tokenizer.sep_token_id), extra == 4)

    def lengths(self, query_mask: Tensor, passage_mask: Tensor) -> Tensor:
        """Tokens of the pairs ``[B·G]`` that :func:`assemble_pairs` makes of these masks."""
        group_size = len(passage_mask) // len(query_mask)
        pairs = query_mask.sum(1).repeat_interleave(group_size) + passage_mask.sum(1)
        return pairs - 1 + int(self.double_separator)


def assemble_pairs(
    query_ids: Tensor,
    query_mask: Tensor,
    passage_ids: Tensor,
    passage_mask: Tensor,
    layout: PairLayout,
    pad_id: int,
    longest: int | None = None,
) -> Pairs:
    """Join each query ``[B, Lq]`` with the passages of its group ``[B·G, Lp]``.

    Both sides come as ``[CLS] … [SEP] [PAD]…``; the passage's [CLS] is dropped (BERT) or becomes
    the second separator (RoBERTa). ``longest`` is that of the pairs (:meth:`PairLayout.lengths`)
    where it is known; asking masks on a GPU waits for it.
    """
    if longest is None:
        longest = int(layout.lengths(query_mask, passage_mask).max())
    group_size = passage_ids.shape[0] // query_ids.shape[0]
    query_ids = query_ids.repeat_interleave(group_size, 0)
    query_length = query_mask.sum(1, keepdim=True).repeat_interleave(group_size, 0)
    passage_length = passage_mask.sum(1, keepdim=True)
    # Column of passage token 0; with one separator token 0 ([CLS]) coincides with the query's last.
    start = query_length - 1 + int(layout.double_separator)
    length = start + passage_length
    columns = torch.arange(longest, device=query_ids.device).expand(len(query_ids), -1)
    from_query = columns < query_length
    query_part = query_ids.gather(1, columns.clamp(max=query_ids.shape[1] - 1))
    passage_part = passage_ids.gather(1, (columns - start).clamp(0, passage_ids.shape[1] - 1))
    ids = torch.where(from_query, query_part, passage_part)
    if layout.double_separator:
        ids = ids.masked_fill(columns == query_length, layout.sep_id)
    mask = columns < length
    last = columns.shape[1] - 1
    tokens_q = torch.arange(query_ids.shape[1], device=ids.device).expand(len(ids), -1)
    tokens_p = torch.arange(passage_ids.shape[1], device=ids.device).expand(len(ids), -1)
    return Pairs(
        ids.masked_fill(~mask, pad_id),
        mask,
        (mask & ~from_query).long(),
        tokens_q.clamp(max=last),
        (tokens_p + start).clamp(max=last),
    )


TEMPERATURE_FILE = "temperature.json"


def stored_temperature(folder: Path) -> float | None:
    """The temperature that lies with a cross-encoder; None if none does.

    Raises:
        UserError: for a damaged file.
    """
    path = folder / TEMPERATURE_FILE
    if not path.is_file():
        return None
    try:
        value = float(json.loads(path.read_text(encoding="utf-8"))["temperature"])
    except (OSError, ValueError, KeyError, TypeError):
        value = math.nan
    if not 0 < value < math.inf:
        raise UserError(f'{path}: expected {{"temperature": a number above 0}}')
    return value


class CrossEncoder(nn.Module):
    """Scores pairs; optionally hands out attention projections of its last forward pass.

    ``head`` are the parameters that the pretrained encoder has not, and ``temperature`` is the one
    at which its scores are likeliest (:mod:`erniesearch.training.calibration`), None if unknown.

    Args:
        settings: ``settings.path`` is a pretrained encoder or a saved cross-encoder.
        attention_layers: whose projections it keeps, counted from 0, or from the last one, -1.

    Raises:
        UserError: if attention is wanted from a model without query/key projections per layer, or
            from a layer that it has not.
    """

    def __init__(self, settings: TeacherConfig, attention_layers: Sequence[int] = ()) -> None:
        super().__init__()
        self.model, new = load_classifier(settings)
        parameters = dict(self.model.named_parameters())
        self.head = [parameters[name] for name in new]
        self.temperature = stored_temperature(Path(settings.path))
        self.num_heads = int(getattr(self.model.config, "num_attention_heads", 0))
        self.uses_token_types = int(getattr(self.model.config, "type_vocab_size", 0) or 0) >= 2
        self.tap: ProjectionTap | None = None
        if attention_layers:
            self.tap = ProjectionTap(self.model, "teacher", settings.path, attention_layers)

    def forward(self, pairs: Pairs, lengths: Tensor | None = None) -> Tensor:
        """Scores ``[N]`` in fp32. Pairs of similar length go together where the host knows their
        ``lengths`` ``[N]``: those given, or on a CPU."""
        if self.tap:  # its projections are those of one pass
            with self.tap:
                return self._scores(*pairs[:3])
        device = pairs.mask.device
        if lengths is None and device.type == "cpu":
            lengths = row_lengths(pairs.mask)
        blocks = []
        if lengths is not None:
            blocks = blocks_by_length(lengths, device, int(self.model.config.hidden_size))
        if len(blocks) < 2:
            return self._scores(*pairs[:3])
        scores = [
            self._scores(*(part[rows, :width] for part in pairs[:3])) for rows, width in blocks
        ]
        return put_back(scores, blocks)

    def _scores(self, input_ids: Tensor, mask: Tensor, token_type_ids: Tensor) -> Tensor:
        types = {"token_type_ids": token_type_ids} if self.uses_token_types else {}
        output = self.model(input_ids=input_ids, attention_mask=mask.long(), **types)
        return output.logits.squeeze(-1).float()

    @torch.no_grad()
    def attention(self, pairs: Pairs, chunk: int = 64) -> TeacherAttention:
        """The projections behind the last layer's attention in the last forward, detached.

        The row's log-sum-exp covers every real token of the pair, so that
        ``exp(q·k/√d - lse)`` is the attention the model really paid; chunks of pairs bound the
        memory.
        """
        queries, keys = self._projections(-1)
        own_queries = _take(queries, pairs.query_columns)
        lse = []
        for begin in range(0, len(queries), chunk):
            part = slice(begin, begin + chunk)
            scores = own_queries[part].float() @ keys[part].float().transpose(-1, -2)
            scores = scores / math.sqrt(queries.shape[-1])
            scores.masked_fill_(~pairs.mask[part, None, None, :], float("-inf"))
            lse.append(scores.logsumexp(-1))
        return TeacherAttention(own_queries, _take(keys, pairs.passage_columns), torch.cat(lse))

    @torch.no_grad()
    def sides(self, pairs: Pairs, layer: int) -> tuple[Projections, Projections]:
        """A layer's projections in the last forward, of query and of passage tokens, detached."""
        projections = self._projections(layer)
        query, passage = (
            Projections(*(_take(states, columns) for states in projections))
            for columns in (pairs.query_columns, pairs.passage_columns)
        )
        return query, passage

    def _projections(self, layer: int) -> Projections:
        """Of every token of the last forward's pairs ``[N, heads, L, d]``, detached."""
        assert self.tap is not None
        return Projections(*(split_heads(x, self.num_heads) for x in self.tap.of(layer)))

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Write ``state`` (this module's, gathered) as a transformers folder."""
        save_weights(self.model, folder, {k.removeprefix("model."): v for k, v in state.items()})
        if self.temperature is not None:
            content = json.dumps({"temperature": self.temperature}) + "\n"
            (folder / TEMPERATURE_FILE).write_text(content, encoding="utf-8")


def _take(states: Tensor, columns: Tensor) -> Tensor:
    """Columns ``[N, M]`` of ``[N, heads, L, d]``."""
    index = columns[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
    return states.gather(2, index)
