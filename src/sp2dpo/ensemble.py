"""From calls to one gap per annotator, and how far they agree. Sec. 4.3.3, C.1, C.2, C.4.

Arrays in, arrays out. Index letters: i pairs, j annotators, k prompt variants.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sp2dpo.errors import InputError
from sp2dpo.rubric import CATEGORIES, priority

__all__ = [
    "annotator_mad",
    "annotator_std",
    "effective_gap",
    "majority_category",
    "median_over_prompts",
    "prompt_disagreement",
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
    if not categories:
        raise InputError("majority_category needs at least one category")
    counts = Counter(sorted(categories, key=priority))
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
