"""Charts as SVG inside the page, drawn by matplotlib.

Colours are names of the page's style sheet, so that one drawing serves light and dark; a line is
told from another by its dashes too. What a chart shows is said beside it in words.
"""

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.ndimage import uniform_filter1d

from erniesearch.report.document import Chart

MOST_POINTS = 300
"""Of a line: more would not be told apart in a chart this wide."""
SMOOTHED = 40
"""A smoothed line is the mean over one in so many of its points."""
_INK, _SOFT, _GRID = "#0a0b01", "#0a0b02", "#0a0b03"
_LINES = [f"#0a0b1{i}" for i in range(6)]
_NAMED = {_INK: "var(--ink)", _SOFT: "var(--soft)", _GRID: "var(--line)"} | {
    stand_in: f"var(--s{i})" for i, stand_in in enumerate(_LINES, 1)
}
_DASHES = ["-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1, 1.5)), (0, (3, 2)), (0, (8, 2))]
_STYLE = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 8, "text.color": _INK,
    "axes.edgecolor": _SOFT, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "grid.color": _GRID, "grid.linewidth": 0.6, "axes.linewidth": 0.6, "xtick.major.width": 0.6,
    "ytick.major.width": 0.6, "legend.frameon": False, "legend.fontsize": 7.5,
    "lines.linewidth": 1.4, "axes.unicode_minus": True,
}  # fmt: skip
_SMALL = (3.6, 2.1)
MARGINS = (0.5, 0.38, 0.08, 0.16)
"""Left, bottom, right, top of a chart of lines, in inches."""


@dataclass(frozen=True)
class Line:
    """A named course ``y`` over ``x``, both ``[n]``; points that are not finite are left out."""

    name: str
    x: np.ndarray
    y: np.ndarray

    def finite(self) -> "Line":
        """Without the points that are not finite."""
        there = np.isfinite(self.y)
        return Line(self.name, self.x[there], self.y[there])


def lines(
    title: str,
    given: Sequence[Line],
    x_label: str = "update",
    smooth: bool = True,
    wide: bool = False,
) -> Chart | None:
    """A chart of courses; None if no point is finite. Of one line that is smoothed, what it was is
    drawn behind it."""
    shown = [line for line in (line.finite() for line in given) if len(line.y)]
    if not shown:
        return None
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        figure, axes = _start((6.8, 3.2) if wide else _SMALL, MARGINS)
        for i, line in enumerate(shown):
            color, dashes = _LINES[i % 6], _DASHES[(i + i // 6) % 6]
            window = len(line.y) // SMOOTHED if smooth else 0
            course = line
            if window > 1:
                if len(shown) == 1:
                    axes.plot(*thinned(line.x, line.y), color=color, linewidth=0.7, alpha=0.35)
                course = Line(line.name, line.x, uniform_filter1d(line.y, window, mode="nearest"))
            mark = "o" if len(line.y) == 1 else "." if len(line.y) <= 12 else ""
            axes.plot(*thinned(course.x, course.y), color=color, label=line.name, marker=mark,
                      linestyle=dashes if len(shown) > 1 else "-")  # fmt: skip
        axes.grid(axis="y")
        axes.locator_params(nbins=5)
        axes.ticklabel_format(axis="y", scilimits=(-3, 5))
        axes.set_xlabel(x_label)
        if len(shown) > 1:
            axes.legend(ncols=1 if len(shown) < 5 else 2)
        return Chart(title, _svg(figure, title), "; ".join(map(_told, shown)) + ".")


def thinned(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most ``most`` of the points ``[n]``: the lowest and the highest of stretches of equal
    length, so that no peak is lost; all where they are few."""
    if len(y) <= most:
        return x, y
    edges = np.linspace(0, len(y), most // 2 + 1).astype(int)
    kept = {int(i) for start, end in pairwise(edges)
            for i in (start + y[start:end].argmin(), start + y[start:end].argmax())}  # fmt: skip
    rows = np.array(sorted(kept))
    return x[rows], y[rows]


def bars(title: str, values: dict[str, float], unit: str) -> Chart | None:
    """Horizontal bars with their values; None without any."""
    if not values:
        return None
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        figure, axes = _start((6.8, 0.5 + 0.27 * len(values)))
        names, sizes = list(values)[::-1], list(values.values())[::-1]
        axes.barh(range(len(names)), sizes, color=_LINES[0], height=0.62)
        for row, size in enumerate(sizes):
            axes.text(max(size, 0.0), row, f" {number(size)}", va="center")
        axes.set_yticks(range(len(names)), [_short(name) for name in names])
        axes.set_xlabel(unit)
        axes.margins(x=0.12)
        told = ", ".join(f"{name} {number(size)}" for name, size in values.items())
        return Chart(title, _svg(figure, title), f"{unit}: {told}.")


def histogram(
    title: str,
    edges: Sequence[float],
    counts: Mapping[str, Sequence[float]],
    x_label: str,
    told: str,
) -> Chart:
    """Shares of several kinds in the same bins, each kind's own adding up to 1."""
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        figure, axes = _start((5.2, 2.6), MARGINS)
        for i, (name, numbers) in enumerate(counts.items()):
            shares = np.asarray(numbers, dtype=float)
            shares = shares / max(shares.sum(), 1.0)
            axes.stairs(shares, edges, fill=True, color=_LINES[i], alpha=0.18)
            axes.stairs(shares, edges, color=_LINES[i], linestyle=_DASHES[i], linewidth=1.5,
                        label=f"{name} ({int(sum(numbers)):,})")  # fmt: skip
        axes.set_xlabel(x_label)
        axes.set_ylabel("share")
        axes.grid(axis="y")
        axes.legend()
        return Chart(title, _svg(figure, title), told)


@dataclass(frozen=True)
class Interval:
    """A row of a forest chart: a mean, its 95 % interval, and single values (seeds)."""

    name: str
    mean: float
    low: float
    high: float
    dots: tuple[float, ...] = ()


def forest(title: str, rows: Sequence[Interval], x_label: str, zero: bool) -> Chart | None:
    """Means with their intervals, one below the other, which a table above the chart has in
    figures; ``zero`` draws a line at 0."""
    rows = [row for row in rows if np.isfinite([row.mean, row.low, row.high]).all()]
    if not rows:
        return None
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        figure, axes = _start((6.8, 0.6 + 0.27 * len(rows)))
        draw_forest(axes, rows, zero, (_SOFT, _INK, _LINES[0]))
        axes.set_xlabel(x_label)
        told = f"{x_label}, the bar its 95 % interval; the figures stand in the table above."
        return Chart(title, _svg(figure, title), told)


def draw_forest(
    axes: Axes, rows: Sequence[Interval], zero: bool, colors: tuple[str, str, str]
) -> None:
    """The rows of :func:`forest` on any axes, the first on top; colours of bars, means and dots."""
    for height, row in enumerate(reversed(rows)):
        axes.plot([row.low, row.high], [height, height], color=colors[0], linewidth=2, zorder=1)
        axes.scatter(row.dots, [height] * len(row.dots), s=14, color=colors[2], alpha=0.7, zorder=2)
        axes.plot(row.mean, height, "D", color=colors[1], markersize=4.5, zorder=3)
    if zero:
        axes.axvline(0.0, color=colors[0], linewidth=0.8)
    axes.set_yticks(range(len(rows)), [_short(row.name) for row in reversed(rows)])
    axes.grid(axis="x")


def number(value: float) -> str:
    """A figure with about four digits, thousands separated."""
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e9):
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


def _short(name: str) -> str:
    return name if len(name) <= 44 else name[:43] + "…"


def _told(line: Line) -> str:
    y = line.y
    if len(y) == 1:
        return f"{line.name} {number(y[0])} at {number(line.x[0])}"
    low, high = (f"{number(y[i])} (at {number(line.x[i])})" for i in (y.argmin(), y.argmax()))
    return f"{line.name}: from {number(y[0])} to {number(y[-1])}, between {low} and {high}"


def _start(
    size: tuple[float, float], margins: tuple[float, float, float, float] | None = None
) -> tuple[Figure, Axes]:
    """A figure that fits its texts, or with given margins in inches, which costs half the time."""
    if margins is None:
        figure = Figure(figsize=size, layout="constrained")
    else:
        left, bottom, right, top = margins
        figure = Figure(figsize=size)
        figure.subplots_adjust(left / size[0], bottom / size[1], 1 - right / size[0],
                               1 - top / size[1])  # fmt: skip
    return figure, figure.subplots()


def _svg(figure: Figure, title: str) -> Markup:
    """The drawing as an element of the page: no ids but those that it refers to itself, which no
    other drawing has."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": title}):
        figure.savefig(text, format="svg", transparent=True, metadata={
            "Date": None, "Creator": None, "Format": None, "Type": None,
        })  # fmt: skip
    found = text.getvalue()
    box = re.search(r'viewBox="([^"]*)"', found)
    assert box is not None
    inner = found[found.index(">", box.end()) + 1 : found.rindex("</svg>")]
    inner = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", inner, flags=re.S)
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', inner))
    inner = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", inner)
    own = hashlib.sha256((title + inner).encode()).hexdigest()[:8]
    inner = re.sub(r'( id="|url\(#|href="#)([^")]+)', rf"\1\2-{own}", inner)
    inner = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", inner)
    inner = re.sub(r"#0a0b[01]\d", lambda m: _NAMED[m[0]], inner)
    inner = re.sub(r"\s*\n\s*", " ", inner)
    return Markup(
        f'<svg viewBox="{escape(box[1])}" role="img" aria-label="{escape(title)}">{inner}</svg>'
    )
