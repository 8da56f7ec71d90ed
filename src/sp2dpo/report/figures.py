"""Charts as inline SVG: text stays text, colours are CSS variables, equal numbers give equal bytes.

The only file that knows matplotlib. Small on purpose: a chart is about as wide as a phone, so nothing in it shrinks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from typing import Any, Final

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from sp2dpo.evidence import Array

__all__ = ["LINES", "curves", "groups", "histogram", "sample", "scatter"]

INK, MUTED, LINE, ACCENT, WRONG = "#010203", "#010204", "#010205", "#010206", "#010207"
METHOD_COLOURS: Final = ("#010208", "#010209", "#01020a", "#01020b")
_VARIABLES: Final = {
    INK: "--ink",
    MUTED: "--muted",
    LINE: "--line",
    ACCENT: "--accent",
    WRONG: "--wrong",
    **{colour: f"--m{n}" for n, colour in enumerate(METHOD_COLOURS)},
}

LINES: Final = ("-", "--", ":", "-.")
"""One dash for each method beside its colour, so that no line is told by colour alone."""

MOST_POINTS: Final = 600
WIDTH: Final = 3.5

_STYLE: Final = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sp2dpo",
    "font.family": "DejaVu Sans",
    "font.size": 7.5,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 7.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.6,
    "figure.constrained_layout.use": True,
}


@contextmanager
def _figure(height: float) -> Iterator[tuple[Any, Any]]:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, height))
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.set_axisbelow(True)
        yield figure, axes


def _svg(figure: Any, key: str) -> Markup:
    """The drawing without prologue, metadata or style sheet; `key` keeps its ids apart from those of other charts."""
    out = StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = out.getvalue()
    text = re.sub(r"<style.*?</style>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{key}-", text)
    text = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true" focusable="false">', text, count=1
    )
    return Markup(re.sub(r"\n\s*", "\n", text))  # noqa: S704 (drawn here, from numbers and names that λ restricts)


def groups(
    key: str, values: Mapping[str, Array], low: float, high: float, label: str, *, wrong: Sequence[str] = ()
) -> Markup:
    """A row for each group: its histogram, scaled to its own peak, and below it the middle half and the median."""
    named = list(values.items())
    edges = np.linspace(low, high if high > low else low + 1e-3, 28)
    with _figure(0.55 + 0.38 * len(named)) as (figure, axes):
        for n, (name, of) in enumerate(named):
            _row(axes, -n, np.asarray(of), edges, WRONG if name in wrong else ACCENT)
        axes.set_yticks(
            [-n for n in range(len(named))], [f"{name}\nn = {len(of):,}" for name, of in named], fontsize=6.8
        )
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set(xlim=(edges[0], edges[-1]), ylim=(-len(named) + 0.6, 0.85), xlabel=label)
        axes.grid(axis="x", color=LINE, linewidth=0.5)
        return _svg(figure, key)


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
    with _figure(1.6) as (figure, axes):
        axes.hist(values, bins=np.linspace(0, top, 25), color=ACCENT, alpha=0.6, linewidth=0)
        axes.axvline(float(np.median(values)), color=INK, linewidth=1)
        axes.set(xlabel=label, ylabel="pairs", xlim=(0, top))
        axes.yaxis.get_major_locator().set_params(integer=True)
        return _svg(figure, key)


def sample(values: Array) -> Array:
    """Each value, or each n-th of many."""
    return values[:: -(-len(values) // MOST_POINTS)]


def scatter(key: str, x: Array, y: Array, x_label: str, y_label: str) -> Markup:
    """One dot for each pair on [0, 1]²; of many pairs an even sample."""
    with _figure(2.6) as (figure, axes):
        axes.plot([0, 1], [0, 1], color=LINE, linewidth=1)
        axes.plot(sample(x), sample(y), "o", color=ACCENT, markersize=2.6, alpha=0.45, markeredgewidth=0)
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel=x_label, ylabel=y_label, aspect="equal")
        axes.set_xticks([0, 0.5, 1])
        axes.set_yticks([0, 0.5, 1])
        return _svg(figure, key)


def curves(
    key: str, lines: Mapping[int, Mapping[str, Array]], xlim: tuple[float, float], ylim: tuple[float, float]
) -> Markup:
    """One line for each method over the steps, on axes that all such charts share; keys are places in `LINES`."""
    with _figure(1.75) as (figure, axes):
        axes.axhline(0, color=MUTED, linewidth=0.7)
        for n, line in lines.items():
            style = {"color": METHOD_COLOURS[n], "linestyle": LINES[n]}
            axes.plot(line["x"], line["y"], **style, marker="o" if len(line["x"]) == 1 else "", markersize=3)
        axes.set(xlim=xlim, ylim=ylim, xlabel="training step", ylabel="mean margin Δ, nats")
        axes.grid(axis="y", color=LINE, linewidth=0.5)
        return _svg(figure, key)
