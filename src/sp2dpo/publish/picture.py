"""The picture of the card: β over the envelope, as PNG on white. The only file of this room that knows matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sp2dpo.evidence import Array

__all__ = ["draw_beta"]

_STYLE: Final = {"font.family": "DejaVu Sans", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
_BINS: Final = 30


def draw_beta(beta: Array, low: float, high: float, path: Path) -> None:
    """A histogram of β; equal numbers give equal bytes under one version of matplotlib."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7, 2.6), dpi=150, facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.hist(beta, bins=np.linspace(low, max(high, low + 1e-3), _BINS + 1).tolist(), color="#1f6f8b")
        axes.axvline(float(np.mean(beta)), color="#222222", linewidth=1, linestyle="--")
        axes.set(xlabel="β (the axis is the envelope; the dashed line is the mean)", ylabel="pairs")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", metadata={"Software": None})
