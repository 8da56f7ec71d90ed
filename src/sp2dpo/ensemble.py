"""From calls to one gap per annotator, how far they agree, and the paper's other operators. Sec. 4.3.3, C.

Arrays in, arrays out. Index letters: i pairs, j annotators, k prompt variants.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sp2dpo.errors import InputError
from sp2dpo.rubric import CATEGORIES, priority

__all__ = [
    "additive_fit",
    "annotator_mad",
    "annotator_std",
    "damp",
    "damping",
    "effective_gap",
    "majority_category",
    "median_over_prompts",
    "pooled_gap",
    "prompt_disagreement",
    "weighted_over_annotators",
    "weighted_over_prompts",
]

Array = NDArray[np.float64]


def effective_gap(magnitude: ArrayLike, confidence: ArrayLike) -> Array:
    """Magnitude × confidence, elementwise; any shape.

    Eq. 29.
    """
    product: Array = np.asarray(magnitude, dtype=np.float64) * np.asarray(confidence, dtype=np.float64)
    return product


def median_over_prompts(gap_ijk: ArrayLike) -> Array:
    """(N, J, K) → (N, J). For an even K the mean of the two middle values.

    Eq. 16, 31.
    """
    gap = np.asarray(gap_ijk, dtype=np.float64)
    if gap.ndim != 3 or 0 in gap.shape[1:]:
        raise InputError(f"gap_ijk has shape {gap.shape}; it must be (pairs, annotators, prompts)")
    median: Array = np.median(gap, axis=2)
    return median


def majority_category(categories: Sequence[str]) -> tuple[str, bool]:
    """The most frequent category and whether a tie was broken, by priority, to find it.

    Eq. 32.

    Raises:
        InputError: no categories, or an unknown one.
    """
    if len(categories) == 0:
        raise InputError("majority_category needs at least one category")
    for category in categories:
        priority(category)
    counts = Counter(categories)
    tied = [category for category in CATEGORIES if counts[category] == max(counts.values())]
    return tied[0], len(tied) > 1


def prompt_disagreement(gap_ijk: ArrayLike) -> Array:
    """Median absolute deviation over the prompt variants: (N, J, K) → (N, J).

    Eq. 36.
    """
    centre = median_over_prompts(gap_ijk)[:, :, None]
    spread: Array = np.median(np.abs(np.asarray(gap_ijk, dtype=np.float64) - centre), axis=2)
    return spread


def annotator_std(beta_ij: ArrayLike) -> Array:
    """Population standard deviation over annotators (ddof = 0): (N, J) → (N,).

    Eq. 37.
    """
    spread: Array = np.std(np.asarray(beta_ij, dtype=np.float64), axis=1)
    return spread


def annotator_mad(beta_ij: ArrayLike) -> Array:
    """Median absolute deviation over annotators: (N, J) → (N,).

    Eq. 38.
    """
    beta = np.asarray(beta_ij, dtype=np.float64)
    spread: Array = np.median(np.abs(beta - np.median(beta, axis=1)[:, None]), axis=1)
    return spread


def damping(u: ArrayLike, strength: float, form: Literal["exponential", "rational"] = "exponential") -> Array:
    """h(u) in (0, 1] of a disagreement u ≥ 0: exp(−λu) or 1/(1 + λu), elementwise.

    Eq. 40.
    """
    if strength < 0:
        raise InputError(f"the strength λ of damping must not be negative, it is {strength}")
    if form not in ("exponential", "rational"):
        raise InputError(f"damping is 'exponential' or 'rational', not '{form}'")
    scaled = strength * np.asarray(u, dtype=np.float64)
    damped: Array = np.exp(-scaled) if form == "exponential" else 1.0 / (1.0 + scaled)
    return damped


def damp(
    gap_ij: ArrayLike,
    disagreement_ij: ArrayLike,
    strength: float,
    form: Literal["exponential", "rational"] = "exponential",
) -> Array:
    """Gaps (N, J), less where the prompts disagree (N, J).

    Eq. 39.
    """
    damped: Array = np.asarray(gap_ij, dtype=np.float64) * damping(disagreement_ij, strength, form)
    return damped


def _weighted(values: ArrayLike, weights: ArrayLike, axis: int | tuple[int, int]) -> Array:
    w = np.asarray(weights, dtype=np.float64)
    if np.any(w < 0) or not w.sum() > 0:
        raise InputError(f"weights must not be negative and not all zero, they are {w.tolist()}")
    mean: Array = np.average(np.asarray(values, dtype=np.float64), axis=axis, weights=w)
    return mean


def weighted_over_prompts(gap_ijk: ArrayLike, gamma_k: ArrayLike) -> Array:
    """Mean over prompts with reliability weights γ_k (K,): (N, J, K) → (N, J).

    Eq. 41.
    """
    return _weighted(gap_ijk, gamma_k, 2)


def weighted_over_annotators(beta_ij: ArrayLike, alpha_j: ArrayLike) -> Array:
    """Mean over annotators with reliability weights α_j (J,): (N, J) → (N,).

    Eq. 42.
    """
    return _weighted(beta_ij, alpha_j, 1)


def pooled_gap(gap_ijk: ArrayLike, w_jk: ArrayLike) -> Array:
    """Weighted mean over all J × K calls at once: (N, J, K), (J, K) → (N,).

    Eq. 43.
    """
    return _weighted(gap_ijk, w_jk, (1, 2))


def additive_fit(gap_ijk: ArrayLike, ridge: float = 1.0) -> tuple[Array, Array, Array]:
    """Latent gaps g (N,), offsets of annotators b (J,) and of prompts d (K,), by least squares on a complete array.

    Minimizes Σ(gap − g_i − b_j − d_k)² + ridge·(Σb² + Σd²) under Σb = Σd = 0. The design is balanced, so the minimum
    is in closed form: means, with offsets shrunk by NK/(NK + ridge) and NJ/(NJ + ridge); g is clipped to [0, 1].

    Eq. 44.
    """
    gap = np.asarray(gap_ijk, dtype=np.float64)
    if gap.ndim != 3 or gap.size == 0 or not ridge >= 0:
        raise InputError(f"additive_fit needs (pairs, annotators, prompts) and ridge >= 0, not {gap.shape} and {ridge}")
    n, j, k = gap.shape
    grand = gap.mean()
    b = (gap.mean(axis=(0, 2)) - grand) * (n * k / (n * k + ridge))
    d = (gap.mean(axis=(0, 1)) - grand) * (n * j / (n * j + ridge))
    return np.clip(gap.mean(axis=(1, 2)), 0.0, 1.0), b, d
