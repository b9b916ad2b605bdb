"""The READMEs' table and plot, from the committed results of the ablation `controls`.

python benchmarks/readme_figures.py     # rewrites both tables and docs/images/cascade-gain-*.svg
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
RESULTS, IMAGES = ROOT / "docs" / "results", ROOT / "docs" / "images"
SETS = {  # of the name in docs/results/controls-NAME.json, what is asked there
    "squad-chunk": {"README.md": "Wikipedia questions", "README.zh-CN.md": "维基百科问题"},
    "pycode": {"README.md": "code search", "README.zh-CN.md": "代码检索"},
}
BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
INKS = {"light": ("#1f2328", "#59636e", "#d1d9e0"), "dark": ("#f0f6fc", "#9198a1", "#3d444d")}
TEACHERS = {"late interaction": "#2f81f7", "cross-encoder": "#d29922"}
STUDENT = "#2da44e"


def load() -> dict[str, dict[str, Any]]:
    """The results of each set: arms with mean, deviation and teachers' gain, and comparisons."""
    return {name: json.loads((RESULTS / f"controls-{name}.json").read_text()) for name in SETS}


def cascade_of(results: dict[str, Any]) -> dict[str, Any]:
    """The comparison of the cascade with contrastive training on the same lists."""
    (found,) = [c for c in results["comparisons"] if c["arm"] == results["primary"]]
    return found


def gains_of(results: dict[str, Any]) -> list[float]:
    """By how much each teacher reranks the student's own candidates better than the student."""
    arm = results["arms"][results["primary"]]
    return [arm["late_interaction_gain"], arm["teacher_gain"]]


def rows(readme: str) -> list[str]:
    """The lines of the table, one a set, in the language of ``readme``."""
    lines = []
    for name, results in load().items():
        control, cascade = (results["arms"][arm]["MRR@10"]
                            for arm in (results["control"], results["primary"]))  # fmt: skip
        c = cascade_of(results)
        cells = [
            f"{SETS[name][readme]} ({name}, {results['num_queries']:,})",
            *(f"{of['mean']:.3f} ± {of['sd']:.3f}" for of in (control, cascade)),
            f"{c['difference']:+.3f} [{c['low']:+.3f}, {c['high']:+.3f}]",
            *(f"{gain:+.3f}" for gain in gains_of(results)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def with_rows(text: str, readme: str) -> str:
    """``text`` with the table's lines between its markers made anew; its head stays."""
    before, rest = text.split(BEGIN, 1)
    table, after = rest.split(END, 1)
    head = table.strip("\n").split("\n")[:2]
    return before + "\n".join([BEGIN, *head, *rows(readme), END]) + after


def draw(style: str, path: Path) -> None:
    """Left what the teachers gain over the student, right what the student has of it."""
    ink, grey, line = INKS[style]
    settings: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": "erniesearch", "font.family": "sans-serif",
        "text.color": ink, "ytick.color": ink, "axes.labelcolor": grey, "xtick.color": grey,
        "axes.edgecolor": line,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(8.4, 2.7), layout="constrained")
        figure.patch.set_alpha(0.0)
        left, right = figure.subplots(1, 2, sharex=True)
        for height, results in enumerate(reversed(load().values())):
            _teachers(left, height, gains_of(results), ink)
            _student(right, height, cascade_of(results), ink)
        left.set_title("its teachers, over the student that they teach", fontsize=10)
        right.set_title("the student after it, over contrastive training", fontsize=10)
        left.set_yticks(range(len(SETS)), reversed(SETS))
        right.set_yticks(range(len(SETS)), [""] * len(SETS))
        left.legend(frameon=False, fontsize=9, loc="lower right")
        right.legend(frameon=False, fontsize=9, loc="lower right")
        for axes in (left, right):
            axes.set_xlabel("gain in MRR@10")
            axes.axvline(0.0, color=grey, linewidth=1.0)
            axes.set_facecolor("none")
            axes.set_ylim(-0.6, len(SETS) - 0.4)
            axes.tick_params(length=0)
            for side in ("top", "right", "left"):
                axes.spines[side].set_visible(False)
        left.set_xlim(-0.03, 0.22)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _teachers(axes: Axes, height: int, gains: list[float], ink: str) -> None:
    for offset, (gain, (teacher, colour)) in enumerate(zip(gains, TEACHERS.items(), strict=True)):
        place = height + 0.16 - 0.32 * offset
        axes.barh(place, gain, 0.28, color=colour, label=None if height else teacher)
        axes.text(gain + 0.004, place, f"{gain:+.3f}", va="center", fontsize=9, color=ink)


def _student(axes: Axes, height: int, c: dict[str, Any], ink: str) -> None:
    axes.plot([c["low"], c["high"]], [height, height], color=STUDENT, linewidth=3,
              label=None if height else "95 % interval")  # fmt: skip
    axes.scatter(list(c["per_seed"].values()), [height] * len(c["per_seed"]), s=22, zorder=3,
                 color=ink, linewidths=0, label=None if height else "one seed")  # fmt: skip
    axes.text(0.012, height, f"{c['difference']:+.3f}", va="center", fontsize=9, color=ink)


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    for style in INKS:
        draw(style, IMAGES / f"cascade-gain-{style}.svg")
    for readme in ("README.md", "README.zh-CN.md"):
        path = ROOT / readme
        path.write_text(with_rows(path.read_text(encoding="utf-8"), readme), encoding="utf-8")
    sys.stdout.write("README.md, README.zh-CN.md, docs/images\n")


if __name__ == "__main__":
    main()
