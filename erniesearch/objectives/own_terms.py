"""Loss terms of one's own: what they read, and what they must return."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from erniesearch.config.terms import LossTerm
from erniesearch.data.batches import Batch
from erniesearch.errors import UserError
from erniesearch.objectives import scores


@dataclass(frozen=True)
class Scores:
    """What a :class:`LossTerm` reads: this rank's B queries against the P passages that
    ``objective.candidates`` names, and against the G of each query's own group, its positive first.

    Attributes:
        dual_encoder, late_interaction: ``[B, P]``, divided by ``tau_de`` and ``tau_li``; None where
            no term of the stage asks for them.
        cross_encoder: ``[B, G]``, without a temperature, live (also where the stage has both) or
            stored; None likewise.
        labels: ``[B]``, the column of each query's positive in ``[B, P]``.
        mask: ``[B, P]``, False on false negatives, which no term compares.
        group_mask: ``[B, G]``, False on false negatives, and where a passage has no stored score.

    In a stage without a student ``labels`` and ``mask`` are those of the group.
    """

    dual_encoder: Tensor | None
    late_interaction: Tensor | None
    cross_encoder: Tensor | None
    labels: Tensor
    mask: Tensor
    group_mask: Tensor

    def own_group(self, students: Tensor) -> Tensor:
        """A student's scores of each query's own group, ``[B, P]`` to ``[B, G]``, to compare with
        the cross-encoder's."""
        return scores.own_group(students, self.labels, self.group_mask.shape[1])


def value_of(term: LossTerm, given: Scores, batch: Batch) -> Tensor:
    """The term's scalar, in fp32 at least.

    Raises:
        UserError: if its function returns no tensor of one number, or one without a gradient.
    """
    if given.cross_encoder is not None and not term.trains_teacher:
        given = replace(given, cross_encoder=given.cross_encoder.detach())
    value = term.function(given, batch)
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise UserError(f"LossTerm '{term.name}': its function must return a tensor of one number,"
                        f" the mean over the queries; it returned {found}")  # fmt: skip
    if torch.is_grad_enabled() and not value.requires_grad:
        raise UserError(f"LossTerm '{term.name}': no gradient goes from its value to the scores of"
                        f" {', '.join(term.models)}")  # fmt: skip
    value = value.reshape(())
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
