"""The loss terms as pure functions of scores, equations above the code.

Logits are ``[num_queries, num_passages]``; ``mask`` is True on candidates and at least one stands
in every row. All losses are means over queries in fp32.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def contrastive_loss(logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """L = -mean over q of log( exp s(q,p+) / sum over candidates p of exp s(q,p) ).

    The cross-entropy of all three models (ERNIE-Search eq. 1, 3, 5): the cross-encoder over the
    group, the students over all cross-batch passages.
    """
    return F.cross_entropy(_masked(logits, mask), labels)


def kl_divergence(
    target_logits: Tensor, logits: Tensor, mask: Tensor | None = None, detach: bool = True
) -> Tensor:
    """L = mean over q of sum over p of P_t(p|q) · (log P_t(p|q) - log P_s(p|q)).

    P_t and P_s are softmaxes over the candidates, of logits that are divided by their temperatures
    already. The gradient stops at the target when ``detach``.
    """
    if detach:
        target_logits = target_logits.detach()
    target = _masked(target_logits, mask).log_softmax(-1)
    student = _masked(logits, mask).log_softmax(-1)
    if mask is not None:  # -inf - -inf is NaN, and its gradient too: finite before the product
        target, student = (x.masked_fill(~mask, 0.0) for x in (target, student))
        return (target.exp() * mask * (target - student)).sum(-1).mean()
    return (target.exp() * (target - student)).sum(-1).mean()


def margin_mse(
    target_logits: Tensor, logits: Tensor, mask: Tensor | None = None, detach: bool = True
) -> Tensor:
    """L = mean over q of mean over p ≠ p+ of ( (s(q,p+) - s(q,p)) - (t(q,p+) - t(q,p)) )².

    MarginMSE (Hofstätter et al. 2020, arXiv 2010.02666) over lists ``[num_queries, G]`` whose
    column 0 is the positive: not the scores must agree but their distances. Scores are divided by
    their temperatures already; a query without another candidate counts as 0.
    """
    if detach:
        target_logits = target_logits.detach()
    squared = (_margins(logits) - _margins(target_logits)).square()
    return _mean_over_negatives(squared, mask).mean()


@torch.no_grad()
def margin_statistics(
    target_logits: Tensor, logits: Tensor, mask: Tensor | None = None
) -> dict[str, Tensor]:
    """How large margins are on average, whatever their sign, ``{target,student}_margin``: whether
    both sides are of one scale."""
    return {
        f"{side}_margin": _mean_over_negatives(_margins(scores).abs(), mask).mean()
        for side, scores in (("target", target_logits), ("student", logits))
    }


@torch.no_grad()
def kl_statistics(
    target_logits: Tensor, logits: Tensor, mask: Tensor | None = None
) -> dict[str, Tensor]:
    """What the two distributions of a KL look like: ``{target,student}_{top1,entropy}``.

    ``top1`` is the mean over q of max over p of P(p|q), ``entropy`` the mean over q of the entropy
    of P(.|q) in nats. A target of top1 1 says what the label says already, one of the entropy
    log(number of candidates) says nothing.
    """
    statistics = {}
    for side, scores in (("target", target_logits), ("student", logits)):
        log_probabilities = _masked(scores, mask).log_softmax(-1)
        probabilities = log_probabilities.exp()
        surprise = log_probabilities if mask is None else log_probabilities.masked_fill(~mask, 0.0)
        statistics[f"{side}_top1"] = probabilities.amax(-1).mean()
        statistics[f"{side}_entropy"] = -(probabilities * surprise).sum(-1).mean()
    return statistics


def symmetric_kl(first: Tensor, second: Tensor, mask: Tensor | None = None) -> Tensor:
    """L = ½ · (KL(P_1 ‖ P_2) + KL(P_2 ‖ P_1)), gradient through both (dual regularisation)."""
    forward = kl_divergence(first, second, mask, detach=False)
    return 0.5 * (forward + kl_divergence(second, first, mask, detach=False))


@torch.no_grad()
def accuracy(logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """Share of queries whose positive has the highest score."""
    return (_masked(logits, mask).argmax(-1) == labels).float().mean()


def _margins(logits: Tensor) -> Tensor:
    """``[num_queries, G]`` to the positive's lead over each of the others, ``[num_queries, n]``."""
    logits = _wide(logits)
    return logits[:, :1] - logits[:, 1:]


def _mean_over_negatives(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values.mean(-1)
    others = mask[:, 1:]
    return values.masked_fill(~others, 0.0).sum(-1) / others.sum(-1).clamp(min=1)


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _masked(logits: Tensor, mask: Tensor | None) -> Tensor:
    logits = _wide(logits)
    return logits if mask is None else logits.masked_fill(~mask, float("-inf"))
