"""The loss terms: what each of them runs, compares and reads. A new one is entered here; one of a
user's own is a :class:`LossTerm`."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from erniesearch.config.keys import RunConfig
from erniesearch.config.stage_keys import LossWeights
from erniesearch.errors import UserError, nearest

Model = Literal["dual_encoder", "late_interaction", "cross_encoder"]
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
    "de": Term(_reads("vectors"), "candidates", settings=("tau_de", "matryoshka_dims")),
    "ce_to_li": Term(
        _reads("teacher", "tokens"), "group", "cross_encoder", ("tau_ce", "tau_li", "tau_li_kl"),
        ("group_ce", "group_li"),
    ),
    "ce_to_de": Term(
        _reads("teacher", "vectors"), "group", "cross_encoder",
        ("tau_ce", "tau_de", "tau_de_kl", "matryoshka_dims"),
        ("group_ce", "group_de"),
    ),
    "li_to_de": Term(
        _reads("tokens", "vectors"), "candidates", "late_interaction",
        ("tau_li", "tau_li_target", "tau_de", "tau_de_kl", "matryoshka_dims"), ("li", "de"),
    ),
    "margin_mse_li": Term(
        _reads("teacher", "tokens"), "group", "cross_encoder",
        ("tau_ce", "tau_li", "tau_li_margin"), ("group_ce", "group_li"),
    ),
    "margin_mse_de": Term(
        _reads("teacher", "vectors"), "group", "cross_encoder",
        ("tau_ce", "tau_de", "tau_de_margin", "matryoshka_dims"), ("group_ce", "group_de"),
    ),
    "attention": Term(
        _reads("teacher", "tokens"), "pairs", "cross_encoder", ("tau_att",),
        ("group_ce", "group_li"),
    ),
    "dual_reg": Term(_reads("vectors"), "candidates", settings=("tau_de", "matryoshka_dims")),
    "virt": Term(
        _reads("teacher", "projections"), "pairs", "cross_encoder", ("virt_layers",),
        ("group_ce", "group_de"),
    ),
    "mlm": Term(_reads("words")),
}  # fmt: skip


@dataclass(frozen=True)
class LossTerm:
    """A loss term of one's own: weighted, logged, gradient-cached and averaged over ranks like the
    built-in ones, and part of what decides whether a stage is done (by name and weight).

    Attributes:
        name: as it is logged.
        function: ``function(scores, batch)`` gives a scalar tensor, the mean over this rank's
            queries, from :class:`erniesearch.objectives.own_terms.Scores` and
            :class:`erniesearch.data.batches.Batch`. What is made of these tensors alone has the
            right gradient on any number of ranks and with ``chunk_size``.
        weight: factor in the stage's loss.
        models: whose scores the function reads; the stage runs them.
        trains_teacher: whether the gradient goes on into the cross-encoder; if not, its scores
            come detached, as a target.

    Raises:
        UserError: for a name that is taken or no word, a weight that is not above 0, or an unknown
            model.
    """

    name: str
    function: Callable[..., Any]
    weight: float = 1.0
    models: tuple[Model, ...] = ("dual_encoder",)
    trains_teacher: bool = False

    def __post_init__(self) -> None:
        models = (self.models,) if isinstance(self.models, str) else tuple(self.models)
        object.__setattr__(self, "models", models)
        if not re.fullmatch(r"[A-Za-z]\w*", self.name):
            raise UserError(f"LossTerm {self.name!r}: a name has letters, digits and underscores")
        if self.name in TERMS or self.name in LOGGED or LOGGED_OF_A_TERM.search(self.name):
            raise UserError(
                f"LossTerm '{self.name}': this name is logged already (loss terms"
                f" {', '.join(TERMS)}); give it another"
            )
        if not callable(self.function):
            raise UserError(f"LossTerm '{self.name}': {self.function!r} is no function")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise UserError(f"LossTerm '{self.name}': weight {self.weight} must be above 0")
        known = get_args(Model)
        for model in models:
            if model not in known:
                hint = f"{nearest(str(model), known)}; one of {', '.join(known)}"
                raise UserError(f"LossTerm '{self.name}': no model '{model}'{hint}")
        if not models or (self.trains_teacher and "cross_encoder" not in models):
            raise UserError(f"LossTerm '{self.name}': models {models} must name whose scores it"
                            " reads, with trains_teacher the cross_encoder too")  # fmt: skip

    @property
    def term(self) -> Term:
        """What it runs and compares."""
        read = {"dual_encoder": "vectors", "late_interaction": "tokens", "cross_encoder": "teacher"}
        taus = {"dual_encoder": "tau_de", "late_interaction": "tau_li"}
        settings = tuple(taus[model] for model in self.models if model in taus)
        return Term(
            frozenset(read[model] for model in self.models),  # type: ignore[misc]
            "candidates" if settings else "group", settings=settings,
        )  # fmt: skip


LOGGED = ("loss", "step", "grad_norm", "num_tokens", "skipped_updates", "learning_rate", "speed")
"""What metrics.jsonl has beside the terms."""
LOGGED_OF_A_TERM = re.compile(r"^accuracy_|_(top1|entropy|margin)$")


@dataclass(frozen=True)
class AllWeights(LossWeights):
    """A stage's weights with loss terms of one's own beside the built-in ones."""

    own: tuple[LossTerm, ...] = ()


def own_terms(weights: LossWeights) -> tuple[LossTerm, ...]:
    """The loss terms that are no keys of :class:`LossWeights`."""
    return weights.own if isinstance(weights, AllWeights) else ()


def weight_of(weights: LossWeights) -> dict[str, float]:
    """Every term's weight by its name, 0 for those that are not computed."""
    built_in = {field.name: getattr(weights, field.name) for field in fields(LossWeights)}
    return built_in | {term.name: term.weight for term in own_terms(weights)}


def with_terms(config: RunConfig, stage: str, terms: Sequence[LossTerm]) -> RunConfig:
    """The config with loss terms of one's own in a stage; not for a file.

    Raises:
        UserError: for two of one name, or a cross-encoder's scores in ``post_train``.
    """
    names = [term.name for term in terms]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"LossTerm '{name}' is there twice: give each a name of its own")
        if stage == "post_train" and "cross_encoder" in terms[names.index(name)].models:
            raise UserError(f"LossTerm '{name}': post_train has no cross_encoder to read scores of")
    if not terms:
        return config
    settings = getattr(config.stages, stage)
    weights = AllWeights(**weight_of(settings.weights), own=tuple(terms))
    stages = replace(config.stages, **{stage: replace(settings, weights=weights)})
    return replace(config, stages=stages)


def active(weights: LossWeights) -> dict[str, Term]:
    """The terms that are computed: those of a weight above 0."""
    known = TERMS | {term.name: term.term for term in own_terms(weights)}
    return {name: known[name] for name, weight in weight_of(weights).items() if weight}


def trains_teacher(weights: LossWeights, detach_targets: bool) -> bool:
    """Whether any term's gradient reaches the cross-encoder."""
    own = any(term.trains_teacher for term in own_terms(weights))
    return bool(weights.ce) or own or not detach_targets


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
