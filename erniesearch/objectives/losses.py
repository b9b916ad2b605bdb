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


def _masked(logits: Tensor, mask: Tensor | None) -> Tensor:
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    return logits if mask is None else logits.masked_fill(~mask, float("-inf"))
