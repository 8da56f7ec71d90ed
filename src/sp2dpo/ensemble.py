"""From calls to one gap per annotator and per pair, how far they agree, and the paper's other operators. Sec. 4.3.3, C.

Arrays in, arrays out. Index letters: i pairs, j annotators, k prompt variants. NaN is a call without a valid answer: it
takes no part, and where nothing takes part the result is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sp2dpo.errors import InputError
from sp2dpo.rubric import CATEGORIES, priority

__all__ = [
    "Additive",
    "additive_fit",
    "annotator_mad",
    "annotator_std",
    "damp",
    "damping",
    "effective_gap",
    "huber_mean",
    "majority_categories",
    "majority_category",
    "median_over_prompts",
    "pooled_gap",
    "prompt_disagreement",
    "robust_median",
    "trimmed_mean",
    "weighted_mean",
    "weighted_over_annotators",
    "weighted_over_prompts",
]

Array = NDArray[np.float64]

_ROUNDING: Final = 1e-14
"""Part of the size of values within which their sums are zero."""


def effective_gap(magnitude: ArrayLike, confidence: ArrayLike) -> Array:
    """Magnitude × confidence, elementwise; any shape.

    Eq. 29.
    """
    product: Array = np.asarray(magnitude, dtype=np.float64) * np.asarray(confidence, dtype=np.float64)
    return product


# Over the last axis ------------------------------------------------------------------------------------------------


def robust_median(values: ArrayLike) -> Array:
    """Median over the last axis: (…, M) → (…). For an even number of values the mean of the two middle ones.

    C.5.3.
    """
    v = np.asarray(values, dtype=np.float64)
    if not np.isnan(v).any():
        median: Array = np.median(v, axis=-1)
        return median
    return _where_any(v, lambda rows: np.nanmedian(rows, axis=-1))


def weighted_mean(values: ArrayLike, weights: ArrayLike | None = None) -> Array:
    """Mean over the last axis, (…, M) → (…), with weights (M,) ≥ 0 that need not sum to one; without them, the mean.

    Where all values that are there weigh nothing, the result is NaN.

    Raises:
        InputError: a negative weight, or none above zero.
    """
    v = np.asarray(values, dtype=np.float64)
    if weights is None and not np.isnan(v).any():
        mean: Array = np.mean(v, axis=-1)
        return mean
    w = np.ones(v.shape[-1]) if weights is None else np.asarray(weights, dtype=np.float64)
    if w.shape != v.shape[-1:] or not np.isfinite(w).all() or np.any(w < 0) or not w.sum() > 0:
        raise InputError(f"{v.shape[-1]} weights, not negative and not all zero, are needed; they are {w.tolist()}")
    taken = np.where(np.isnan(v), 0.0, w)
    total = taken.sum(axis=-1)
    summed = (np.nan_to_num(v) * taken).sum(axis=-1)
    weighed: Array = np.divide(summed, total, out=np.full(total.shape, np.nan), where=total > 0)
    return weighed


def trimmed_mean(values: ArrayLike, trim: float) -> Array:
    """Mean over the last axis without the ⌊ρM⌋ lowest and as many highest of the M values there: (…, M) → (…).

    C.5.3; the rounding is this project's.

    Raises:
        InputError: not 0 <= trim < 0.5.
    """
    if not 0 <= trim < 0.5:
        raise InputError(f"trim is the part that goes from each end, in [0, 0.5); it is {trim}")
    v = np.sort(np.asarray(values, dtype=np.float64), axis=-1)  # NaN last
    there = (~np.isnan(v)).sum(axis=-1, keepdims=True)
    cut = np.floor(trim * there + 1e-9)
    rank = np.arange(v.shape[-1])
    return weighted_mean(np.where((rank >= cut) & (rank < there - cut), v, np.nan))


def huber_mean(values: ArrayLike, delta: float) -> Array:
    """The centre μ of least Huber loss over the last axis: (…, M) → (…). Values further off than `delta` pull no more.

    Solved exactly: Σ clip(v − μ, −δ, δ) falls in μ and is linear between the points v ± δ, so its zero lies between two
    of these; where it is zero on an interval, the middle. A large δ gives the mean, a small one the median.

    C.5.3; the loss is that of Huber, "Robust Estimation of a Location Parameter", 1964.

    Raises:
        InputError: not delta > 0.
    """
    if not 0 < delta < np.inf:
        raise InputError(f"delta of the Huber mean must be positive, it is {delta}")
    return _where_any(np.asarray(values, dtype=np.float64), lambda rows: _huber(rows, delta))


def _huber(v: Array, delta: float) -> Array:
    """For rows (N, M) with a value in each."""
    knots = np.sort(np.concatenate([v - delta, v + delta], axis=1), axis=1)
    pull = np.stack([np.nansum(np.clip(v - knot[:, None], -delta, delta), axis=1) for knot in knots.T], axis=1)
    pull[np.isnan(knots)] = -np.inf
    pull[np.abs(pull) < _ROUNDING * (np.nanmax(np.abs(v), axis=1, keepdims=True) + delta)] = 0.0
    rows = np.arange(len(v))
    low = (pull > 0).sum(axis=1) - 1
    high = (pull >= 0).sum(axis=1)
    left, right = knots[rows, low], knots[rows, high]
    down, up = pull[rows, low], -pull[rows, high]
    crossing = left + (right - left) * down / (down + up)
    flat = (knots[rows, low + 1] + knots[rows, high - 1]) / 2
    centre: Array = np.where(high - low > 1, flat, crossing)
    return centre


def _where_any(v: Array, centre: Callable[[Array], Array]) -> Array:
    """`centre` of each row that has a value, NaN for the others: (…, M) → (…)."""
    rows = v.reshape(-1, v.shape[-1])
    some = ~np.isnan(rows).all(axis=1)
    result = np.full(len(rows), np.nan)
    if some.any():
        result[some] = centre(rows[some])
    centres: Array = result.reshape(v.shape[:-1])
    return centres


# Over prompts, over annotators, over all calls --------------------------------------------------------------------


def _calls_array(gap_ijk: ArrayLike) -> Array:
    gap = np.asarray(gap_ijk, dtype=np.float64)
    if gap.ndim != 3 or 0 in gap.shape[1:]:
        raise InputError(f"gap_ijk has shape {gap.shape}; it must be (pairs, annotators, prompts)")
    return gap


def median_over_prompts(gap_ijk: ArrayLike) -> Array:
    """(N, J, K) → (N, J). For an even K the mean of the two middle values.

    Eq. 16, 31.
    """
    return robust_median(_calls_array(gap_ijk))


def weighted_over_prompts(gap_ijk: ArrayLike, gamma_k: ArrayLike) -> Array:
    """Mean over prompts with reliability weights γ_k (K,): (N, J, K) → (N, J).

    Eq. 41.
    """
    return weighted_mean(_calls_array(gap_ijk), gamma_k)


def weighted_over_annotators(beta_ij: ArrayLike, alpha_j: ArrayLike) -> Array:
    """Mean over annotators with reliability weights α_j (J,): (N, J) → (N,).

    Eq. 42.
    """
    return weighted_mean(beta_ij, alpha_j)


def pooled_gap(gap_ijk: ArrayLike, w_jk: ArrayLike) -> Array:
    """Weighted mean over all J × K calls at once: (N, J, K), (J, K) → (N,).

    Eq. 43.
    """
    gap = _calls_array(gap_ijk)
    return weighted_mean(gap.reshape(len(gap), -1), np.asarray(w_jk, dtype=np.float64).ravel())


def majority_category(categories: Sequence[str]) -> tuple[str, bool]:
    """The most frequent category and whether a tie was broken, by priority, to find it.

    Eq. 32.

    Raises:
        InputError: no categories, or an unknown one.
    """
    if len(categories) == 0:
        raise InputError("majority_category needs at least one category")
    [winner], [tie] = majority_categories([[priority(category) for category in categories]])
    return CATEGORIES[winner], bool(tie)


def majority_categories(codes: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """`majority_category` over the last axis, for places in `CATEGORIES`: (…, M) → two of (…). −1 is no answer.

    Eq. 32.
    """
    given = np.asarray(codes)
    votes = np.stack([(given == code).sum(axis=-1) for code in range(len(CATEGORIES))], axis=-1)
    most = votes.max(axis=-1, keepdims=True)
    winner = np.where(most[..., 0] > 0, votes.argmax(axis=-1), -1)  # the first of several is the first in priority
    return winner, (most[..., 0] > 0) & ((votes == most).sum(axis=-1) > 1)


# Disagreement and damping -----------------------------------------------------------------------------------------


def prompt_disagreement(gap_ijk: ArrayLike) -> Array:
    """Median absolute deviation over the prompt variants: (N, J, K) → (N, J).

    Eq. 36.
    """
    return _mad(_calls_array(gap_ijk))


def annotator_std(beta_ij: ArrayLike) -> Array:
    """Population standard deviation over annotators (ddof = 0): (N, J) → (N,).

    Eq. 37.
    """
    beta = np.asarray(beta_ij, dtype=np.float64)
    if not np.isnan(beta).any():
        spread: Array = np.std(beta, axis=1)
        return spread
    return _where_any(beta, lambda rows: np.nanstd(rows, axis=1))


def annotator_mad(beta_ij: ArrayLike) -> Array:
    """Median absolute deviation over annotators: (N, J) → (N,).

    Eq. 38.
    """
    return _mad(np.asarray(beta_ij, dtype=np.float64))


def _mad(values: Array) -> Array:
    return robust_median(np.abs(values - robust_median(values)[..., None]))


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


# Additive bias ----------------------------------------------------------------------------------------------------


class Additive(NamedTuple):
    """gap_ijk ≈ g_i + b_j + d_k: latent gaps (N,) in [0, 1], offsets of annotators (J,) and of prompts (K,)."""

    g: Array
    b: Array
    d: Array


def additive_fit(gap_ijk: ArrayLike, ridge: float = 1.0) -> Additive:
    """Minimize Σ(gap − g_i − b_j − d_k)² + ridge·(Σb² + Σd²) over the calls that are there, with Σb = Σd = 0.

    The latent gaps are eliminated, each being the mean of what the offsets leave of its pair; J + K normal equations
    remain, so 61,000 pairs take milliseconds. Their solution of least norm has Σb = Σd = 0 by itself. g is clipped to
    [0, 1] at the end, and NaN for a pair without a call.

    The ridge, the constraints and the clipping are this project's.

    Eq. 44.

    Raises:
        InputError: not three axes, no call at all, or a negative ridge.
    """
    gap = _calls_array(gap_ijk)
    there = ~np.isnan(gap)
    if not there.any() or not 0 <= ridge < np.inf:
        raise InputError(f"additive_fit needs a call and ridge >= 0, not {there.sum()} calls and {ridge}")
    j = gap.shape[1]
    calls = np.maximum(there.sum(axis=(1, 2)), 1)[:, None]
    centred = np.where(there, gap - (np.nansum(gap, axis=(1, 2)) / calls[:, 0])[:, None, None], 0.0)
    seen = np.concatenate([there.sum(axis=2), there.sum(axis=1)], axis=1).astype(np.float64)  # (N, J + K)
    normal = np.diag(seen.sum(axis=0) + ridge) - (seen / calls).T @ seen
    both = there.sum(axis=0)
    normal[:j, j:] += both
    normal[j:, :j] += both.T
    right = np.concatenate([centred.sum(axis=(0, 2)), centred.sum(axis=(0, 1))])
    offsets = np.linalg.lstsq(normal, right, rcond=None)[0]
    b, d = offsets[:j] - offsets[:j].mean(), offsets[j:] - offsets[j:].mean()
    left = (gap - b[:, None] - d).reshape(len(gap), -1)
    return Additive(np.clip(weighted_mean(left), 0.0, 1.0), b, d)
