"""How good a predictor is on pairs that it was not fitted on: error, rank correlation, calibration, and what to compare
them with. Arrays in, plain numbers out.

A constant stands for knowing nothing of the texts: the mean of the fitted pairs for squared errors, their median for
absolute ones. One call of the panel stands for the noise of the judgements themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sp2dpo.correlation import correlation, rank_correlation
from sp2dpo.predictor.model import Predicted
from sp2dpo.rubric import CATEGORIES

__all__ = [
    "against_calls",
    "by_category",
    "calibration",
    "category_facts",
    "gap_facts",
    "magnitude_of",
    "number_facts",
    "statement",
]

Array = NDArray[np.float64]
Facts = dict[str, Any]

_BINS: Final = 5
_FOR_A_LINE: Final = 10
"""Pairs that a calibration line is drawn through, at least."""

_Z: Final = 1.96


def gap_facts(actual: Array, made: Array, fitted: Array, openings: Sequence[str]) -> Facts:
    """Of the effective gap of the held-out pairs.

    `saved` is the part of the constant's squared error that the predictor takes away (R² with the mean of the fitted
    pairs), `saved_low` and `saved_high` its 95 % interval over openings; `better` if the interval is above 0.

    Args:
        fitted: the gaps of the pairs that it was fitted on.
        openings: which held-out pairs belong together.
    """
    error, constant = (actual - made) ** 2, (actual - fitted.mean()) ** 2
    saved, half = _ratio_of_sums(constant - error, constant, openings)
    return {
        **number_facts(actual, made, fitted),
        "pearson": correlation(actual, made),
        "spearman": rank_correlation(actual, made),
        "saved": saved,
        "saved_low": None if saved is None or half is None else saved - half,
        "saved_high": None if saved is None or half is None else saved + half,
        "better": saved is not None and half is not None and saved - half > 0,
    }


def statement(gap: Facts) -> str:
    """What the held-out pairs allow to say, in words."""
    if gap["saved"] is None:
        return "On held-out pairs the gap is the same everywhere: nothing can be said of the predictor."
    low, high = gap["saved_low"], gap["saved_high"]
    of = f"{gap['saved']:z.0%} of its squared error saved"
    interval = "" if low is None else f", 95% interval {low:z.0%} to {high:z.0%}"
    if gap["better"]:
        return f"On held-out pairs the predictor is better than a constant: {of}{interval}."
    return (
        f"On held-out pairs the predictor is NOT shown to be better than a constant ({of}{interval}): as an annotator "
        "it may say nothing about a pair."
    )


def number_facts(actual: Array, made: Array, fitted: Array) -> Facts:
    """Mean absolute and root mean squared error, of the predictor and of a constant."""
    return {
        "mae": float(abs(actual - made).mean()),
        "rmse": float(np.sqrt(((actual - made) ** 2).mean())),
        "constant_mae": float(abs(actual - np.median(fitted)).mean()),
        "constant_rmse": float(np.sqrt(((actual - fitted.mean()) ** 2).mean())),
    }


def _ratio_of_sums(upper: Array, lower: Array, openings: Sequence[str]) -> tuple[float | None, float | None]:
    """Σ upper / Σ lower, and half of its 95 % interval, by linearization with openings as clusters."""
    total = float(lower.sum())
    if total <= 0:
        return None, None
    ratio = float(upper.sum()) / total
    _, at = np.unique(np.array(openings), return_inverse=True)
    rest = np.bincount(at, upper - ratio * lower)
    clusters = len(rest)
    if clusters < 2:
        return ratio, None
    return ratio, _Z * float(np.sqrt(clusters / (clusters - 1) * (rest**2).sum())) / total


def calibration(actual: Array, made: Array) -> Facts:
    """Bins of equal numbers of pairs by predicted gap, and the line actual = intercept + slope · predicted."""
    bins = [
        {"pairs": len(some), "predicted": float(made[some].mean()), "actual": float(actual[some].mean())}
        for some in np.array_split(np.argsort(made, kind="stable"), _BINS)
        if len(some)
    ]
    return {"bins": bins, **_line(actual, made)}


def _line(actual: Array, made: Array) -> Facts:
    if len(made) < _FOR_A_LINE or np.ptp(made) == 0:
        return {"slope": None, "intercept": None}
    slope = float(np.cov(made, actual)[0, 1] / np.var(made, ddof=1))
    return {"slope": slope, "intercept": float(actual.mean() - slope * made.mean())}


def by_category(actual: Array, made: Array, category: NDArray[np.int64], fitted: Array) -> dict[str, Facts]:
    """The same by the category of the panel, for those that occur."""
    facts = {}
    for place, name in enumerate(CATEGORIES):
        some = category == place
        if some.any():
            one, other = actual[some], made[some]
            means = {"pairs": int(some.sum()), "actual": float(one.mean()), "predicted": float(other.mean())}
            facts[name] = {**means, **number_facts(one, other, fitted), **_line(one, other)}
    return facts


def category_facts(actual: NDArray[np.int64], made: NDArray[np.int64], fitted: NDArray[np.int64]) -> Facts:
    """Accuracy beside that of always saying the most frequent category; `confusion[actual][predicted]` counts pairs."""
    most = int(np.bincount(fitted, minlength=len(CATEGORIES)).argmax())
    confusion: dict[str, dict[str, int]] = {}
    for one, other in zip(actual, made, strict=True):
        row = confusion.setdefault(CATEGORIES[one], {})
        row[CATEGORIES[other]] = row.get(CATEGORIES[other], 0) + 1
    return {
        "accuracy": float((actual == made).mean()),
        "most_frequent": CATEGORIES[most],
        "most_frequent_accuracy": float((actual == most).mean()),
        "confusion": {name: dict(sorted(confusion[name].items())) for name in CATEGORIES if name in confusion},
    }


def against_calls(gap_ijk: Array, gap_i: Array) -> Facts:
    """How far one call of the panel is from the gap of the pair, which it is itself part of; None of a single call."""
    calls = gap_ijk.reshape(len(gap_i), -1)
    if calls.shape[1] < 2:
        return {"mae": None, "rmse": None, "spearman": None}
    there = np.isfinite(calls)
    error = np.where(there, calls - gap_i[:, None], 0.0)
    ranks = [rank_correlation(calls[there[:, c], c], gap_i[there[:, c]]) for c in range(calls.shape[1])]
    known = [rank for rank in ranks if rank is not None]
    return {
        "mae": float(abs(error).sum() / there.sum()),
        "rmse": float(np.sqrt((error**2).sum() / there.sum())),
        "spearman": float(np.mean(known)) if known else None,
    }


def magnitude_of(made: Predicted) -> Array:
    """The magnitude that the predictor answers: the gap over the confidence, at most 1."""
    certain = np.maximum(made.confidence, made.gap)
    magnitude: Array = np.divide(made.gap, certain, out=np.zeros_like(certain), where=certain > 0)
    return magnitude
