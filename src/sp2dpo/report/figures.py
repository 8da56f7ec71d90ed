"""The drawings of the report, in its one style. Small on purpose: as wide as a phone, so that nothing in them shrinks.

Numbers and names in, inline SVG out; knows nothing of runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from markupsafe import Markup
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator

from sp2dpo.evidence import Array
from sp2dpo.report.canvas import ACCENT, INK, LINE, LINES, METHOD_COLOURS, MUTED, WRONG, Stroke, canvas, svg
from sp2dpo.report.hexagons import CORNERS, Limits, hexagons, levels, steps

__all__ = [
    "LINES",
    "MOST_POINTS",
    "Line",
    "bars",
    "curves",
    "density",
    "groups",
    "heatmap",
    "histogram",
    "joint",
    "lengths",
    "overlay",
    "policy",
]

MOST_POINTS: Final = 300
"""Of more pairs than that a chart shows hexagons with counts instead of dots."""

MOST_DOTS: Final = 150
LEVELS: Final = (0.24, 0.42, 0.6, 0.8, 1.0)
SQUARE: Final = np.array([(-0.47, -0.47), (0.47, -0.47), (0.47, 0.47), (-0.47, 0.47), (-0.47, -0.47)])


def groups(
    key: str, values: Mapping[str, Array], low: float, high: float, label: str, *, wrong: Sequence[str] = ()
) -> Markup:
    """A row for each group: its histogram, scaled to its own peak, and below it the middle half and the median."""
    named = list(values.items())
    edges = np.linspace(low, high if high > low else low + 1e-3, 28)
    with canvas(0.55 + 0.38 * len(named)) as (figure, axes):
        for n, (name, of) in enumerate(named):
            _row(axes, -n, np.asarray(of), edges, WRONG if name in wrong else ACCENT)
        axes.set_yticks(
            [-n for n in range(len(named))], [f"{name}\nn = {len(of):,}" for name, of in named], fontsize=6.8
        )
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set(xlim=(edges[0], edges[-1]), ylim=(-len(named) + 0.6, 0.85), xlabel=label)
        axes.grid(axis="x", color=LINE, linewidth=0.5)
        return svg(figure, key)


def _row(axes: Any, y: float, of: Array, edges: Array, colour: str) -> None:
    if not len(of):
        return
    counts, _ = np.histogram(of, edges)
    peak = max(counts.max(), 1)
    axes.stairs(y + 0.72 * counts / peak, edges, baseline=y, fill=True, color=colour, alpha=0.45, linewidth=0)
    axes.plot([edges[0], edges[-1]], [y, y], color=LINE, linewidth=0.6)
    low, mid, high = np.quantile(of, (0.25, 0.5, 0.75))
    axes.plot([low, high], [y - 0.1, y - 0.1], color=colour, linewidth=2.4, solid_capstyle="butt")
    axes.plot(mid, y - 0.1, "o", color=colour, markersize=3.6)


def histogram(key: str, values: Array, label: str) -> Markup:
    """How often each value occurs; the axis begins at 0."""
    top = max(float(np.max(values, initial=0.0)), 1e-3)
    with canvas(1.6) as (figure, axes):
        axes.hist(values, bins=np.linspace(0, top, 25), color=ACCENT, alpha=0.6, linewidth=0)
        axes.axvline(float(np.median(values)), color=INK, linewidth=1)
        axes.set(xlabel=label, ylabel="pairs", xlim=(0, top))
        axes.yaxis.get_major_locator().set_params(integer=True)
        return svg(figure, key)


@dataclass(frozen=True)
class Line:
    """A value on the axis of a histogram, with its name; `dash` is a line style of matplotlib."""

    name: str
    at: float
    dash: str = "-"


def lengths(key: str, values: Array, edges: Array, label: str, lines: Sequence[Line]) -> Markup:
    """A histogram that may leave out the longest, under names of a few values; one beyond the edge has an arrow."""
    with canvas(1.55 + 0.14 * len(lines)) as (figure, axes):
        counts, _ = np.histogram(values, edges)
        peak = max(float(counts.max()), 1.0)
        axes.stairs(counts, edges, fill=True, color=ACCENT, alpha=0.6, linewidth=0)
        for n, line in enumerate(sorted(lines, key=lambda line: line.at)):
            _named_line(axes, line, edges, peak * (1.1 + 0.13 * n))
        ticks = np.asarray(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]).tick_values(0, peak))
        axes.set_yticks(ticks[ticks <= peak])
        axes.spines["left"].set_bounds(0, peak)
        axes.set(xlabel=label, ylabel="pairs", xlim=(edges[0], edges[-1]), ylim=(0, peak * (1.04 + 0.13 * len(lines))))
        return svg(figure, key)


def _named_line(axes: Any, line: Line, edges: Array, y: float) -> None:
    """A line up to its name, which stands left of it as a rule: above the names of all lines further left."""
    inside = line.at <= edges[-1]
    if inside:
        axes.plot([line.at] * 2, [0, y], line.dash, color=INK, linewidth=0.9, clip_on=False)
    side = "left" if line.at < edges[0] + 0.35 * (edges[-1] - edges[0]) else "right"
    place = {"xy": (min(line.at, edges[-1]), y), "xytext": (3 if side == "left" else -3, 0)}
    text = line.name if inside else f"{line.name} →"
    axes.annotate(text, **place, textcoords="offset points", ha=side, va="center", fontsize=7, color=INK)


def overlay(key: str, values: Mapping[str, Array], edges: Array, label: str) -> Markup:
    """Histograms of up to three groups on each other, told apart by line and colour; values beyond are left out."""
    with canvas(1.85) as (figure, axes):
        for n, (name, of) in enumerate(values.items()):
            counts, _ = np.histogram(of, edges)
            style = {"color": METHOD_COLOURS[(0, 2, 3)[n]], "linestyle": LINES[n], "linewidth": 1.3}
            axes.stairs(counts, edges, label=name, **style)
            axes.stairs(counts, edges, fill=True, alpha=0.13, color=style["color"], linewidth=0)
        axes.set(xlabel=label, ylabel="pairs", xlim=(edges[0], edges[-1]), ylim=(0, None))
        axes.yaxis.get_major_locator().set_params(integer=True)
        figure.legend(loc="outside upper left", ncol=3)
        return svg(figure, key)


def density(
    key: str, x: Array, y: Array, labels: tuple[str, str], xlim: Limits, ylim: Limits, *, diagonal: bool = False
) -> Markup:
    """How many pairs lie where: hexagons, fuller for more pairs. `diagonal`: the line on which both are equal."""
    with canvas(2.95) as (figure, axes):
        _hexagons(figure, axes, x, y, xlim, ylim)
        if diagonal:
            ends = [max(xlim[0], ylim[0]), min(xlim[1], ylim[1])]
            axes.plot(ends, ends, color=INK, linewidth=0.8, linestyle="--")
        axes.set(xlim=xlim, ylim=ylim, xlabel=labels[0], ylabel=labels[1])
        return svg(figure, key)


def _hexagons(figure: Any, axes: Any, x: Array, y: Array, xlim: Limits, ylim: Limits) -> None:
    """One shape for each range of counts, and the key above."""
    centres, counts = hexagons(x, y, xlim, ylim)
    ring = CORNERS * steps(xlim, ylim)
    handles = [Patch(alpha=0, label="pairs:")]
    ranges = levels(int(counts.max(initial=1)))
    for (low, high), alpha in zip(ranges, LEVELS[-len(ranges) :], strict=True):
        style: dict[str, Any] = {"facecolor": ACCENT, "alpha": alpha, "linewidth": 0}
        _shapes(axes, centres[(counts >= low) & (counts <= high)], ring, **style)
        handles.append(Patch(**style, label=f"{low:,}" if high == low else f"{low:,}–{high:,}"))
    spacing = {"handlelength": 0.8, "handletextpad": 0.4, "columnspacing": 0.9, "fontsize": 6.5}
    figure.legend(handles=handles, loc="outside upper left", ncol=len(handles), **spacing)


def _shapes(axes: Any, at: Array, ring: Array, **style: Any) -> None:
    """The same shape at many places, as one path."""
    if len(at):
        path = Path.make_compound_path(*(Path(place + ring, closed=True) for place in at))
        axes.add_patch(PathPatch(path, **style))


def joint(key: str, x: Array, y: Array, x_label: str, y_label: str) -> Markup:
    """Two values in [0, 1] of each pair and the line on which they are equal: dots, or hexagons if there are many."""
    with canvas(2.8) as (figure, axes):
        if len(x) > MOST_POINTS:
            _hexagons(figure, axes, x, y, (0, 1), (0, 1))
        else:
            axes.plot(x, y, "o", color=ACCENT, markersize=2.6, alpha=0.45, markeredgewidth=0)
        axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle="--")
        axes.set(xlim=(-0.05, 1.05), ylim=(-0.05, 1.05), xlabel=x_label, ylabel=y_label, aspect="equal")
        axes.set_xticks([0, 0.5, 1])
        axes.set_yticks([0, 0.5, 1])
        return svg(figure, key)


def policy(key: str, gap: Array, beta: Array, envelopes: Mapping[str, Limits], label: str) -> Markup:
    """β over the gap beside the line of each envelope, and below it how often each gap occurs.

    Of many pairs every n-th is a dot, in the order of their gaps.
    """
    low, high = min(low for low, _ in envelopes.values()), max(high for _, high in envelopes.values())
    pad = 0.06 * (high - low) or 0.01
    drawn = np.argsort(gap, kind="stable")[:: -(-len(gap) // MOST_DOTS)]
    with canvas(2.9) as (figure, axes):
        axes.remove()
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        for n, (name, ends) in enumerate(envelopes.items()):
            axes.plot([0, 1], ends, LINES[n % 4], color=(INK, *METHOD_COLOURS)[n % 5], linewidth=1, label=name)
        axes.plot(gap[drawn], beta[drawn], "o", color=ACCENT, markersize=2.8, alpha=0.45, markeredgewidth=0)
        if len(envelopes) > 1:
            figure.legend(loc="outside upper left", ncol=3)
        counts, edges = np.histogram(gap, np.linspace(0, 1, 41))
        below.stairs(counts, edges, fill=True, color=ACCENT, alpha=0.6, linewidth=0)
        axes.set(ylim=(low - pad, high + pad), ylabel="β")
        below.set(xlim=(-0.03, 1.03), xlabel=label, ylabel="pairs")
        below.yaxis.get_major_locator().set_params(integer=True, nbins=2)
        return svg(figure, key)


def heatmap(key: str, names: Sequence[str], values: Array) -> Markup:
    """A square of correlations in hundredths, each told once: one colour above 0, another below, a dash for NaN."""
    n = len(names)
    rows, columns = np.tril_indices(n, -1)
    told = values[rows, columns]
    shade = np.minimum(np.ceil(np.abs(np.nan_to_num(told)) * 5), 5).astype(int)
    with canvas(0.95 + 0.235 * n) as (figure, axes):
        for colour, of in ((ACCENT, told > 0), (WRONG, told < 0)):
            for step in range(1, 6):
                at = np.stack([columns, rows], axis=1)[of & (shade == step)]
                _shapes(axes, at, SQUARE, facecolor=colour, alpha=0.1 * step - 0.04, linewidth=0)
        for row, column, value in zip(rows, columns, told, strict=True):
            shown = _hundredths(value)
            axes.text(column, row, shown, ha="center", va="center", fontsize=6.6 if len(shown) < 4 else 5.4)
        axes.set(xlim=(-0.5, n - 1.5), ylim=(n - 0.5, 0.5))
        axes.set_xticks(range(n - 1), names[:-1], rotation=90, fontsize=6.8)
        axes.set_yticks(range(1, n), names[1:], fontsize=6.8)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        return svg(figure, key)


def _hundredths(value: float) -> str:
    return "–" if np.isnan(value) else f"{round(100 * value)}".replace("-", "−")


def bars(key: str, names: Sequence[str], values: Array, low: Array, high: Array, label: str) -> Markup:
    """A dot for each value in [−1, 1] with its interval; NaN has none."""
    n = len(names)
    with canvas(0.5 + 0.19 * n) as (figure, axes):
        axes.axvline(0, color=MUTED, linewidth=0.8)
        y = -np.arange(n)
        for at, left, right in zip(y, low, high, strict=True):
            axes.plot([left, right], [at, at], color=ACCENT, linewidth=1.4, alpha=0.6, solid_capstyle="butt")
        axes.plot(values, y, "o", color=ACCENT, markersize=3.8)
        axes.set(xlim=(-1.02, 1.02), ylim=(-n + 0.4, 0.6), xlabel=label)
        axes.set_yticks(y, names, fontsize=6.8)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color=LINE, linewidth=0.5)
        return svg(figure, key)


def curves(key: str, lines: Mapping[Stroke, Mapping[str, Array]], xlim: Limits, ylim: Limits, label: str) -> Markup:
    """One line for each arm over the steps; the first is drawn last, on the others."""
    with canvas(1.75) as (figure, axes):
        if ylim[0] < 0 < ylim[1]:
            axes.axhline(0, color=MUTED, linewidth=0.7)
        for stroke, line in reversed(list(lines.items())):
            style = {"color": METHOD_COLOURS[stroke.colour], "linestyle": stroke.dash, "linewidth": stroke.width}
            axes.plot(line["x"], line["y"], **style, marker="o" if len(line["x"]) == 1 else "", markersize=3)
        axes.set(xlim=xlim, ylim=ylim, xlabel="training step", ylabel=label)
        axes.grid(axis="y", color=LINE, linewidth=0.5)
        return svg(figure, key)
