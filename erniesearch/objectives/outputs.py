"""What the models make of a micro-step."""

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from erniesearch.objectives.exchange import Exchange


class Encoded(NamedTuple):
    """``vectors`` ``[N, hidden]``, ``tokens`` ``[N, L, late_interaction_dim]`` (unit length) and
    ``projections`` ``[N, L, layers, 2, hidden]``, the tapped layers' queries and keys; what was not
    asked for is empty."""

    vectors: Tensor
    tokens: Tensor
    projections: Tensor

    def padded(self, length: int) -> "Encoded":
        """With zeros behind the states of each text, up to L = ``length``."""
        return Encoded(
            self.vectors, _padded(self.tokens, length), _padded(self.projections, length)
        )


class TeacherAttention(NamedTuple):
    """Last-layer projections of query rows ``[N, heads, Lq, head_dim]``, of passage columns
    ``[N, heads, Lp, head_dim]``, and the log-sum-exp of each whole row ``[N, heads, Lq]``."""

    queries: Tensor
    keys: Tensor
    lse: Tensor


class Outputs(NamedTuple):
    """What the models made of this rank's B queries and B·G passages; None where no term asks.

    Attributes:
        queries, passages: the student's first pass.
        second_queries, second_passages: ``[B, hidden]`` and ``[B·G, hidden]``, dual-encoder vectors
            of a second pass with other dropout.
        teacher_scores: ``[B·G]``, the cross-encoder's; None also where stored ones take its place.
        attention, virt, mlm: these terms themselves; they need no passage of another query.
        exchange: the passages' way to the other ranks; None: it begins with the objective.
    """

    queries: Encoded | None = None
    passages: Encoded | None = None
    second_queries: Tensor | None = None
    second_passages: Tensor | None = None
    teacher_scores: Tensor | None = None
    attention: Tensor | None = None
    virt: Tensor | None = None
    mlm: Tensor | None = None
    exchange: Exchange | None = None


def _padded(rows: Tensor, length: int) -> Tensor:
    """``[N, l, …]`` to ``[N, length, …]``, zeros behind; something empty stays so."""
    if not rows.numel():
        return rows
    return F.pad(rows, (*[0, 0] * (rows.dim() - 2), 0, length - rows.shape[1]))
