"""Temperatures: effective gap to β. Sec. 4.3.2 to 4.3.5, A.6, A.7, C.2.

Arrays in, arrays out; knows nothing of LLMs, files or torch.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sp2dpo.ensemble import median_over_prompts, weighted_mean
from sp2dpo.errors import InputError

__all__ = ["BETA_MAX", "BETA_MIN", "clip01", "envelope", "mean_over_annotators", "random_beta", "schedule_beta"]

Array = NDArray[np.float64]

BETA_MIN: Final = 0.03
BETA_MAX: Final = 0.30


def clip01(z: ArrayLike) -> Array:
    """min(max(z, 0), 1), elementwise; NaN stays NaN.

    Eq. 27.
    """
    clipped: Array = np.minimum(np.maximum(np.asarray(z, dtype=np.float64), 0.0), 1.0)
    return clipped


def envelope(gap: ArrayLike, beta_min: ArrayLike = BETA_MIN, beta_max: ArrayLike = BETA_MAX) -> Array:
    """β_min + (β_max − β_min)·clip(gap, 0, 1), elementwise; the result never leaves [β_min, β_max].

    The bounds may be arrays that broadcast against the gaps, as where each category has an envelope of its own (J.5).

    Eq. 15, 26, 28, 30, 33, 57.

    Raises:
        InputError: not 0 < beta_min <= beta_max.
    """
    low, high = np.asarray(beta_min, dtype=np.float64), np.asarray(beta_max, dtype=np.float64)
    if not np.all((low > 0) & (low <= high) & np.isfinite(high)):
        raise InputError(f"the envelope needs 0 < beta_min <= beta_max, not [{low}, {high}]")
    beta: Array = np.clip(low + (high - low) * clip01(gap), low, high)
    return beta


def mean_over_annotators(beta_ij: ArrayLike) -> Array:
    """(N, J) → (N,).

    Eq. 17, 34.
    """
    return weighted_mean(beta_ij)


def schedule_beta(gap_ijk: ArrayLike, beta_min: float = BETA_MIN, beta_max: float = BETA_MAX) -> Array:
    """The schedule: effective gaps (N pairs, J annotators, K prompts) → β (N,), NaN where a call is missing (E.3).

    SA, SE, MA and JMAMP of Table 7 are the shapes J = K = 1; J = 1; K = 1; and any.

    Eq. 18, 35.
    """
    beta = mean_over_annotators(envelope(median_over_prompts(gap_ijk), beta_min, beta_max))
    return np.where(np.isnan(gap_ijk).any(axis=(1, 2)), np.nan, beta)


def random_beta(n: int, beta_min: float = BETA_MIN, beta_max: float = BETA_MAX, seed: int = 42) -> Array:
    """The Rand-β control: one draw from U[β_min, β_max] for each pair, in the order of the filtered file. Sec. 5.1."""
    return np.random.default_rng(seed).uniform(beta_min, beta_max, n)
