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
    the second separator (RoBERTa, whose tokens all have type 0). ``longest`` is that of the pairs
    (:meth:`PairLayout.lengths`) where it is known; asking masks on a GPU waits for it.
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
        (mask & ~from_query & (not layout.double_separator)).long(),
        tokens_q.clamp(max=last),
        (tokens_p + start).clamp(max=last),
    )


def of_the_text(ids: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens ``[N, L]`` that ``keep`` names, first and in their order; their mask; and where each
    of the L tokens now stands (anywhere, if it is left out)."""
    order = keep.long().argsort(dim=1, descending=True, stable=True)
    return ids.gather(1, order), keep.gather(1, order), (keep.long().cumsum(1) - 1).clamp(min=0)


TEMPERATURE_FILE = "temperature.json"
LOGITS = 1 << 24
"""Of a teacher's attention, at a time."""


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
    def attention(self, pairs: Pairs, budget: int = LOGITS, layer: int = -1) -> TeacherAttention:
        """What a layer's attention in the last forward follows from, detached.

        The row's log-sum-exp covers every real token of the pair, so that
        ``exp(q·k/√d - lse)`` is the attention the model really paid; at most ``budget`` logits
        exist at a time, or one row of each head.
        """
        every = self._projections(layer)
        queries = _take(every.queries, pairs.query_columns)
        logits = queries.shape[1] * queries.shape[2] * every.keys.shape[2]  # of a pair
        lse = [
            self._row_sums(queries[part], every.keys[part], pairs, part, budget)
            for part in _parts(len(queries), budget // logits)
        ]
        query, passage = self.sides(pairs, layer)
        return TeacherAttention(query.queries, passage.keys, torch.cat(lse))

    @torch.no_grad()
    def sides(self, pairs: Pairs, layer: int) -> tuple[Projections, Projections]:
        """What a layer's attention in the last forward follows from, of query and of passage
        tokens, detached: ``[N, heads, L, d']`` with ``q·k/√d'`` the logit from one to the other.

        Where the family adds a bias to the logits, ``d'`` is larger than the head dimension by the
        query tokens' number: each has a dimension of its own, in which it is 1 and a token of the
        passage is their bias.
        """
        projections = self._projections(layer)
        (query_q, query_k), (passage_q, passage_k) = (
            [_take(states, columns) for states in projections]
            for columns in (pairs.query_columns, pairs.passage_columns)
        )
        assert self.tap is not None
        if (bias := self.tap.bias) is not None:
            of_query, of_passage = pairs.query_columns[:, None], pairs.passage_columns[:, :, None]
            own = torch.eye(query_q.shape[2], dtype=query_q.dtype, device=query_q.device)
            own = own.expand(*query_q.shape[:2], -1, -1)
            size = query_q.shape[-1]
            wide = size + own.shape[-1]
            grown = math.sqrt(wide / size)
            # Of a passage token as the key of the query's tokens, and as their query.
            as_key, as_query = (
                bias[rows, columns].permute(0, 3, 1, 2).to(own.dtype)
                for rows, columns in ((of_query, of_passage), (of_passage, of_query))
            )
            query_q = torch.cat((grown * query_q, math.sqrt(wide) * own), -1)
            query_k = torch.cat((query_k, own), -1)
            passage_q = torch.cat((grown * passage_q, math.sqrt(wide) * as_query), -1)
            passage_k = torch.cat((passage_k, as_key), -1)
        return Projections(query_q, query_k), Projections(passage_q, passage_k)

    def _row_sums(
        self, queries: Tensor, keys: Tensor, pairs: Pairs, part: slice, budget: int
    ) -> Tensor:
        """Log-sum-exp ``[n, heads, Lq]`` of the query tokens' rows in the pairs ``part``."""
        assert self.tap is not None
        keys = keys.float().mT / math.sqrt(keys.shape[-1])
        closed = ~pairs.mask[part, None, None, :]
        row = len(keys) * keys.shape[1] * keys.shape[3]
        sums = []
        for rows in _parts(queries.shape[2], budget // row):
            logits = queries[:, :, rows].float() @ keys
            if self.tap.bias is not None:
                columns = pairs.query_columns[part, rows]
                logits += self.tap.bias[columns].permute(0, 3, 1, 2)
            sums.append(logits.masked_fill_(closed, float("-inf")).logsumexp(-1))
        return torch.cat(sums, 2)

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


def _parts(total: int, size: int) -> list[slice]:
    """``total`` in parts of ``size``, of 1 at least."""
    return [slice(i, i + max(1, size)) for i in range(0, total, max(1, size))]
