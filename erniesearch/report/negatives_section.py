"""Mined negatives: how positives and negatives score, and what denoising dropped."""

from collections.abc import Mapping
from typing import Any

from erniesearch.report.charts import histogram
from erniesearch.report.document import Chart, Table, Text
from erniesearch.report.run_files import Notes, Step

COUNTS = {
    "queries": "queries", "candidates": "candidates in the window",
    "dropped_as_positives": "relevant passages among what was found, left out",
    "dropped_as_duplicates": "copies of a relevant passage, left out",
    "dropped_by_teacher": "dropped by the teacher as likely answers",
    "negatives": "kept as negatives",
    "queries_without_negatives": "queries that keep none (random passages take their place)",
}  # fmt: skip
KINDS = {
    "positives": "relevant",
    "negatives": "kept negatives",
    "dropped": "dropped by the teacher",
}
MODELS = {"dual_encoder": "dual-encoder", "late_interaction": "late interaction",
          "teacher": "teacher"}  # fmt: skip


def negatives_blocks(steps: Mapping[str, Step], notes: Notes) -> list[Any]:
    """Counts and distributions of the step mine."""
    facts = steps["mine"].done if "mine" in steps else None
    if facts is None:
        return []
    rows = [[told, f"{facts[key]:,}"] for key, told in COUNTS.items()
            if isinstance(facts.get(key), int)]  # fmt: skip
    blocks: list[Any] = [Table("What mining found and kept", ["", "number"], rows)]
    dropped, candidates = facts.get("dropped_by_teacher"), facts.get("candidates")
    if isinstance(dropped, int) and isinstance(candidates, int) and candidates:
        blocks.append(Text(f"The teacher dropped {dropped / candidates:.1%} of the candidates."))
    for model, name in MODELS.items():
        if f"{model}_scores" not in facts:
            continue
        try:
            blocks.append(_distribution(name, facts[f"{model}_scores"]))
        except (KeyError, TypeError, ValueError, AttributeError):
            path = steps["mine"].folder / "done.json"
            notes.add(f"{path}: '{model}_scores' is damaged; that distribution is left out.")
    return blocks


def _distribution(name: str, found: dict[str, Any]) -> Chart:
    kinds = {told: found[kind] for kind, told in KINDS.items() if any(found.get(kind, {}).values())}
    counts = {told: [float(n) for n in own["counts"]] for told, own in kinds.items()}
    means = [f"{told} {own['mean']:.3f}" for told, own in kinds.items() if own["mean"] is not None]
    told = f"Shares of each kind by score. Means: {', '.join(means)}."
    return histogram(f"Scores of the {name}", found["bin_edges"], counts, "score", told)
