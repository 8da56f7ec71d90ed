"""Points counted in a honeycomb, which is of the same size for ten points and for a million. Arrays in, arrays out."""

from __future__ import annotations

from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sp2dpo.evidence import Array

__all__ = ["CORNERS", "Limits", "hexagons", "levels", "steps"]

Limits = tuple[float, float]

ACROSS: Final = 19
UP: Final = 11
"""Hexagons side by side, and rows of them on each of the two grids: about regular ones on a square."""

RANGES: Final = 5

CORNERS: Final = np.array([(3, 1), (0, 2), (-3, 1), (-3, -1), (0, -2), (3, -1), (3, 1)]) / 6
"""Of a hexagon around 0, in steps."""


def steps(xlim: Limits, ylim: Limits) -> Array:
    """How far one centre of a grid is from the next, sideways and upwards; the second grid lies half a step off."""
    return np.array([(xlim[1] - xlim[0]) / ACROSS, (ylim[1] - ylim[0]) / UP])


def hexagons(x: Array, y: Array, xlim: Limits, ylim: Limits) -> tuple[Array, NDArray[np.int64]]:
    """Centres (M, 2) and counts (M,) of the hexagons that hold a point; points beyond the limits are left out."""
    there = (x >= xlim[0]) & (x <= xlim[1]) & (y >= ylim[0]) & (y <= ylim[1])
    step, origin = steps(xlim, ylim), (xlim[0], ylim[0])
    at = (np.stack([x[there], y[there]], axis=1) - origin) / step
    on, between = np.rint(at), np.floor(at) + 0.5
    nearer = (at - on) ** 2 @ (1, 3) <= (at - between) ** 2 @ (1, 3)
    centres, counts = np.unique(np.where(nearer[:, None], on, between), axis=0, return_counts=True)
    return centres * step + origin, counts


def levels(most: int) -> list[tuple[int, int]]:
    """Up to five ranges of counts from 1 to `most`, each about as many times wider than the one before."""
    edges = np.unique(np.rint(np.geomspace(1, most + 1, RANGES + 1)).astype(int)).tolist()
    return [(low, high - 1) for low, high in pairwise(edges)]
