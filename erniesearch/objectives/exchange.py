"""What queries are compared with across ranks, sent off as soon as it is there.

The student's passages are read before the teacher reads its pairs, which takes longest: their
vectors are on their way meanwhile. What is known before the student begins, corpus positions and
lengths, goes first.
"""

import torch
from torch import Tensor

from erniesearch import distributed
from erniesearch.data.batches import Batch
from erniesearch.data.text_format import SCORED
from erniesearch.distributed import LengthGather, Ragged, RowGather, pack


class TokenGather:
    """Token vectors of every rank's sequences, which each padded to a length of its own.

    Only real tokens travel, and the host waits for a GPU once, for the other ranks' lengths, which
    are asked for when this is made.

    Args:
        mask_on_cpu: ``[num_sequences, num_tokens]``, True = real token; may have gaps. Every rank
            has as many sequences.
        device: where the tokens will be.
    """

    def __init__(self, mask_on_cpu: Tensor, device: torch.device) -> None:
        self.mask_on_cpu = mask_on_cpu
        self.lengths = LengthGather(mask_on_cpu.sum(1), device)
        self._rows: RowGather | None = None

    def start(self, tokens: Tensor) -> None:
        """Send ``[num_sequences, num_tokens, dim]`` off."""
        if distributed.world_size() > 1:
            own = pack(tokens.detach(), self.mask_on_cpu)
            self._rows = RowGather(own, self.lengths.take().sum(1))

    def take(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """``[world_size · num_sequences, longest, dim]`` (real tokens first, then zeros) with
        gradient to ``tokens``, and its mask; on one rank the arguments."""
        if distributed.world_size() == 1:
            return tokens, mask
        if self._rows is None:
            self.start(tokens)
        rows, self._rows = self._rows, None
        assert rows is not None
        whole = Ragged(self.lengths.take().flatten())
        packed = rows.take(pack(tokens, self.mask_on_cpu))
        return whole.pad(packed), whole.mask(tokens.device)


class Exchange:
    """One micro-step's passages between all ranks.

    Args:
        batch: this rank's; its passages' corpus positions are sent off at once.
        tokens: whether late interaction compares them; their lengths are asked for at once.
        rings: whether tokens go round instead (:mod:`erniesearch.objectives.ring`).
    """

    def __init__(self, batch: Batch, tokens: bool, rings: bool) -> None:
        self._index, self._rings = RowGather(batch.passage_index), rings
        self._vectors: dict[int, RowGather] = {}
        self.tokens: TokenGather | None = None
        if tokens:
            on_cpu = batch.passages(SCORED, on_cpu=True)
            self.tokens = TokenGather(on_cpu, batch.passage_ids.device)

    def start(self, number: int, vectors: Tensor, tokens: Tensor) -> None:
        """Send the passages of dropout pass ``number`` off; what is empty was not asked for."""
        if vectors.numel():
            self._vectors[number] = RowGather(vectors)
        if self.tokens is not None and tokens.numel() and not self._rings:
            self.tokens.start(tokens)

    def index(self, own: Tensor) -> Tensor:
        """Corpus positions of all ranks' passages."""
        return self._index.take(own)

    def vectors(self, number: int, own: Tensor) -> Tensor:
        """All ranks' vectors of a dropout pass, with gradient to this rank's."""
        return (self._vectors.pop(number, None) or RowGather(own)).take(own)
