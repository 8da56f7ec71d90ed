"""95 % intervals of shares and of AUC that hold with few verdicts and at 0 and 1. Numbers in, numbers out.

Weights enter through Kish's effective number, (Σw)² / Σw²: how many equally weighted verdicts say as much.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import roc_auc_score

from sp2dpo.audit.agreement import Estimate

__all__ = ["Measured", "auc", "effective_number", "share", "wilson"]

Z: Final = 1.959963984540054
"""Of the normal distribution, 97.5 %."""


@dataclass(frozen=True)
class Measured(Estimate):
    """An estimate and the number of verdicts that it comes from."""

    n: int


def effective_number(weights: ArrayLike) -> float:
    """(Σw)² / Σw²; 0 of nothing."""
    w = np.asarray(weights, dtype=np.float64)
    return float(w.sum() ** 2 / (w**2).sum()) if len(w) else 0.0


def wilson(p: float, n: float) -> tuple[float, float]:
    """Wilson's interval of a share `p` of `n`."""
    middle, spread = p + Z * Z / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    low, high = ((middle + sign * spread) / (1 + Z * Z / n) for sign in (-1, 1))
    return max(low, 0.0), min(high, 1.0)


def share(yes: ArrayLike, weights: ArrayLike) -> Measured:
    """Weighted share of `yes`, with Wilson's interval."""
    is_so, w = np.asarray(yes, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    if not len(w):
        return Measured(None, None, None, 0)
    p = float(np.clip(is_so @ w / w.sum(), 0, 1))
    return Measured(p, *wilson(p, effective_number(w)), len(w))


def auc(right: ArrayLike, values: ArrayLike, weights: ArrayLike) -> Measured:
    """How often a right label has the larger value than a wrong one, ties counting half; NaN values are left out.

    The interval is Newcombe's: all AUC θ that differ from the one found by at most z·√V(θ), with Hanley and McNeil's
    V(θ) for (m + n)/2 of each class; doi 10.1002/sim.2324, method 5. With 12 wrong labels of 60 it holds 94 to 97 % of
    the time, where DeLong's does 72 to 93 % (AUC .98 to .5).
    """
    x = np.asarray(values, dtype=np.float64)
    there = np.isfinite(x)
    x, is_right = x[there], np.asarray(right, dtype=bool)[there]
    w = np.asarray(weights, dtype=np.float64)[there]
    if is_right.all() or not is_right.any():
        return Measured(None, None, None, len(x))
    found = float(roc_auc_score(is_right, x, sample_weight=w))
    m, n = effective_number(w[is_right]), effective_number(w[~is_right])

    def beyond(theta: float) -> float:
        larger = (m + n) / 2 - 1
        variance = theta * (1 - theta) / (m * n)
        variance *= 1 + larger * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return (found - theta) ** 2 - Z * Z * variance

    return Measured(found, _edge(beyond, 0.0, found), _edge(beyond, 1.0, found), len(x))


def _edge(beyond: Callable[[float], float], outside: float, inside: float) -> float:
    """Where `beyond` changes its sign between a point outside the interval and one inside."""
    for _ in range(60):
        middle = (outside + inside) / 2
        outside, inside = (middle, inside) if beyond(middle) > 0 else (outside, middle)
    return (outside + inside) / 2
