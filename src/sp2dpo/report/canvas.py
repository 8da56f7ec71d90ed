"""The paper that charts are drawn on: inline SVG whose text stays text and whose colours are CSS variables.

Equal drawings give equal bytes. Colours are stand-ins while matplotlib draws. Knows no chart.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from typing import Any, Final

import matplotlib
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

__all__ = ["ACCENT", "INK", "LINE", "LINES", "METHOD_COLOURS", "MUTED", "WRONG", "Stroke", "canvas", "svg"]

INK: Final = "#010203"
MUTED: Final = "#010204"
LINE: Final = "#010205"
ACCENT: Final = "#010206"
WRONG: Final = "#010207"
METHOD_COLOURS: Final = ("#010208", "#010209", "#01020a", "#01020b", "#01020c", "#01020d", "#01020e")
_VARIABLES: Final = {
    INK: "--ink",
    MUTED: "--muted",
    LINE: "--line",
    ACCENT: "--accent",
    WRONG: "--wrong",
    **{colour: f"--m{n}" for n, colour in enumerate(METHOD_COLOURS)},
}

LINES: Final = ("-", "--", ":", "-.")
"""Dashes, so that no line is told by its colour alone."""


@dataclass(frozen=True)
class Stroke:
    """How a line is drawn: the place of its colour in `METHOD_COLOURS`, its dash, its width in points."""

    colour: int
    dash: str
    width: float = 1.5


WIDTH: Final = 3.5

_STYLE: Final = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sp2dpo",
    "text.parse_math": False,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.2,
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
def canvas(height: float) -> Iterator[tuple[Any, Any]]:
    """A figure of that height in inches, and its axes, in the style of the report."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the reader's fonts draw the text
        figure = Figure(figsize=(WIDTH, height))
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.set_axisbelow(True)
        yield figure, axes


def svg(figure: Any, key: str) -> Markup:
    """The drawing without prologue, metadata or style sheet; `key` keeps its ids apart from those of other charts."""
    out = StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = out.getvalue()
    text = re.sub(r"<style.*?</style>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    text = re.sub(r' (?:d|x|y|points|transform)="[^"]*"', _rounded, text)
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{key}-", text)
    text = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true" focusable="false">', text, count=1
    )
    return Markup(re.sub(r"\n\s*", "\n", text))  # noqa: S704 (drawn here; matplotlib escapes text)


def _rounded(attribute: re.Match[str]) -> str:
    """Coordinates to hundredths of a point, on one line."""
    return re.sub(r"(\.\d\d)\d+", r"\1", attribute[0]).replace("\n", "")
