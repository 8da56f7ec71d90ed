"""How far two lists of numbers go together: Pearson's r and Spearman's ρ. Arrays in, numbers out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["correlation", "rank_correlation", "ranks"]

Array = NDArray[np.float64]


def correlation(x: Array, y: Array) -> float | None:
    """Pearson's r; None where it is not defined: fewer than three values, or one of the two constant."""
    if len(x) < 3 or np.ptp(x) < 1e-12 or np.ptp(y) < 1e-12:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def rank_correlation(x: Array, y: Array) -> float | None:
    """Spearman's ρ, with mean ranks for ties; None where it is not defined."""
    return None if correlation(x, y) is None else correlation(ranks(x), ranks(y))


def ranks(x: Array) -> Array:
    """Ranks from 1, the mean rank for equal values."""
    _, place, times = np.unique(x, return_inverse=True, return_counts=True)
    mean_ranks: Array = (np.cumsum(times) - (times - 1) / 2)[place]
    return mean_ranks
