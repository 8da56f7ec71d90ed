"""Fitting: ridge regression on part of the pairs of a run; the rest is held out, and no prompt is on both sides.

The regularisation is chosen by cross-validation within the part that is fitted on. Knows nothing of files.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import sparse  # type: ignore[import-untyped]
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold

from sp2dpo.hashing import sha256_json, sha256_text
from sp2dpo.predictor.features import Features
from sp2dpo.predictor.model import Weights

__all__ = ["ALPHAS", "HELD_OUT", "choose_alpha", "fit_weights", "held_out", "opening_of", "rows_of"]

Array = NDArray[np.float64]

HELD_OUT: Final = 0.2
"""Share of the pairs that is held out, at most."""

ALPHAS: Final = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0)
"""Regularisations that are tried."""

_FOLDS: Final = 3
_TRIED_ON: Final = 5_000
"""Pairs that are enough to choose among them."""


def opening_of(prompt: Sequence[Mapping[str, str]]) -> str:
    """What makes two prompts one for the split: a hash of their first message of a user, less case and white space.

    Later turns of a conversation so stay on the side of the earlier ones.
    """
    first = next((m for m in prompt if m["role"] == "user"), None) or next(iter(prompt), {"content": ""})
    return sha256_text(" ".join(first["content"].casefold().split()))


def held_out(openings: Sequence[str], seed: int) -> NDArray[np.bool_]:
    """Which pairs are held out: whole openings, in the order of a hash, as long as they fit into the share."""
    rows: dict[str, list[int]] = defaultdict(list)
    for n, opening in enumerate(openings):
        rows[opening].append(n)
    held, left = np.zeros(len(openings), bool), int(HELD_OUT * len(openings))
    for opening in sorted(rows, key=lambda opening: sha256_json([seed, opening])):
        if len(rows[opening]) <= left:
            held[rows[opening]] = True
            left -= len(rows[opening])
    return held


def rows_of(features: Features, rows: Iterable[int]) -> Features:
    """The features of some pairs."""
    at = np.fromiter(rows, np.int64)
    lengths = features.starts[at + 1] - features.starts[at]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    picked = np.arange(starts[-1]) + np.repeat(features.starts[at] - starts[:-1], lengths)
    return Features(features.dense[at], features.columns[picked], features.values[picked], starts)


def fit_weights(
    features: Features, targets_it: Array, alpha: float, hashed: int, fitted_on: NDArray[np.uint64]
) -> Weights:
    """The linear model of all targets; a category that no pair has is never the answer.

    Args:
        targets_it: pairs by `TARGETS`.
        hashed: columns of hashed words.
    """
    centre, spread = features.dense.mean(axis=0), features.dense.std(axis=0)
    scale = np.where(spread > 1e-9, spread, 1.0)
    ridge = _ridge(_matrix(features, centre, scale, hashed), targets_it, alpha)
    weights, bias = np.asarray(ridge.coef_.T, np.float32), np.asarray(ridge.intercept_, np.float32)
    bias[~targets_it.any(axis=0)] = -np.inf
    return Weights(centre.astype(np.float32), scale.astype(np.float32), weights, bias, fitted_on)


def choose_alpha(features: Features, gap_i: Array, openings: Sequence[str], hashed: int) -> float:
    """The regularisation with the least squared error of the gap in cross-validation; of equals, the strongest."""
    at = np.linspace(0, len(gap_i) - 1, min(len(gap_i), _TRIED_ON)).astype(np.int64)
    some, gap, groups = rows_of(features, at), gap_i[at], [openings[n] for n in at]
    centre, scale = some.dense.mean(axis=0), np.maximum(some.dense.std(axis=0), 1e-9)
    matrix = _matrix(some, centre, scale, hashed)
    errors: dict[float, float] = dict.fromkeys(ALPHAS, 0.0)
    for fit, test in GroupKFold(_FOLDS).split(gap, groups=groups):
        for alpha in ALPHAS:
            made = _ridge(matrix[fit], gap[fit], alpha).predict(matrix[test])
            errors[alpha] += float(((made.clip(0, 1) - gap[test]) ** 2).sum())
    return min(reversed(ALPHAS), key=lambda alpha: errors[alpha])


def _matrix(features: Features, centre: Array, scale: Array, hashed: int) -> Any:
    """All columns side by side: dense if nothing is hashed."""
    dense = ((features.dense - centre) / scale).astype(np.float32)
    if not hashed:
        return dense
    shape = (len(dense), hashed)
    words = sparse.csr_matrix((features.values, features.columns, features.starts), shape=shape)
    return sparse.hstack([sparse.csr_matrix(dense), words], format="csr")


def _ridge(matrix: Any, targets: Array, alpha: float) -> Any:
    solver = "sparse_cg" if sparse.issparse(matrix) else "cholesky"
    return Ridge(alpha=alpha, solver=solver, tol=1e-3).fit(matrix, targets.astype(np.float32))
