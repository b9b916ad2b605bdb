"""The loss terms: what each of them runs, compares and reads. A new one is entered here."""

from dataclasses import asdict, dataclass
from typing import Literal

from erniesearch.config.stage_keys import LossWeights

Read = Literal["vectors", "tokens", "projections", "teacher", "words"]


@dataclass(frozen=True)
class Term:
    """A key of :class:`LossWeights`.

    Attributes:
        reads: what must be computed for it: the student's passage and query vectors, token vectors
            or tapped projections, the cross-encoder's scores, or the masked words.
        compares: passages of the query's own group, those of ``objective.candidates``, or, for a
            term over the teacher's attention, the tokens of each pair.
        teacher: whose scores or attention are its target.
        settings: keys of :class:`ObjectiveConfig` that it reads beside those of all terms like it.
        gate: running accuracies of its teacher and its student (``objective.competence_gate``).
    """

    reads: frozenset[Read]
    compares: Literal["group", "candidates", "pairs"] | None = None
    teacher: Literal["cross_encoder", "late_interaction"] | None = None
    settings: tuple[str, ...] = ()
    gate: tuple[str, str] = ("", "")


def _reads(*names: Read) -> frozenset[Read]:
    return frozenset(names)


TERMS = {
    "ce": Term(_reads("teacher"), "group"),
    "li": Term(_reads("tokens"), "candidates", settings=("tau_li",)),
    "de": Term(_reads("vectors"), "candidates", settings=("tau_de",)),
    "ce_to_li": Term(
        _reads("teacher", "tokens"), "group", "cross_encoder", ("tau_ce", "tau_li", "tau_li_kl"),
        ("group_ce", "group_li"),
    ),
    "ce_to_de": Term(
        _reads("teacher", "vectors"), "group", "cross_encoder", ("tau_ce", "tau_de", "tau_de_kl"),
        ("group_ce", "group_de"),
    ),
    "li_to_de": Term(
        _reads("tokens", "vectors"), "candidates", "late_interaction",
        ("tau_li", "tau_li_target", "tau_de", "tau_de_kl"), ("li", "de"),
    ),
    "attention": Term(
        _reads("teacher", "tokens"), "pairs", "cross_encoder", ("tau_att",),
        ("group_ce", "group_li"),
    ),
    "dual_reg": Term(_reads("vectors"), "candidates", settings=("tau_de",)),
    "virt": Term(
        _reads("teacher", "projections"), "pairs", "cross_encoder", ("virt_layers",),
        ("group_ce", "group_de"),
    ),
    "mlm": Term(_reads("words")),
}  # fmt: skip


def active(weights: LossWeights) -> dict[str, Term]:
    """The terms that are computed: those of a weight above 0."""
    return {name: TERMS[name] for name, weight in asdict(weights).items() if weight}


def reads(weights: LossWeights, *wanted: Read) -> bool:
    """Whether any term needs any of these."""
    return any(term.reads & set(wanted) for term in active(weights).values())


def comparing(weights: LossWeights, what: str) -> list[str]:
    """The terms that compare the passages of the ``group`` or the ``candidates``, or ``pairs``."""
    return [name for name, term in active(weights).items() if term.compares == what]


def settings_read(weights: LossWeights) -> set[str]:
    """The keys of the objective that decide what these terms are."""
    found: set[str] = set()
    for term in active(weights).values():
        found |= set(term.settings)
        if term.teacher:
            found.add("competence_gate")
            if term.compares != "pairs":  # attention is always detached
                found.add("detach_targets")
        if term.compares == "candidates":
            found.add("candidates")
    return found
