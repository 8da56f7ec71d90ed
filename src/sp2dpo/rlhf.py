"""Where β comes from: the KL-regularized problem behind DPO, for a finite set of candidate responses. Appendix D.1.

Arrays over the candidates of one prompt; rewards in nats, policies as probabilities that sum to one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "bradley_terry",
    "implied_reward",
    "kl_regularized_value",
    "optimal_policy",
    "partition",
    "policy_preference",
    "reward_difference",
]

Array = NDArray[np.float64]


def _a(values: ArrayLike) -> Array:
    return np.asarray(values, dtype=np.float64)


def kl_regularized_value(policy: ArrayLike, reference: ArrayLike, reward: ArrayLike, beta: float) -> float:
    """E_π[r] − β·KL(π ‖ π_ref) of one prompt.

    Eq. 45.
    """
    p, q = _a(policy), _a(reference)
    used = p > 0
    return float(p @ _a(reward) - beta * np.sum(p[used] * np.log(p[used] / q[used])))


def partition(reference: ArrayLike, reward: ArrayLike, beta: float) -> float:
    """Z(x) = Σ_y π_ref(y)·exp(r(y)/β).

    Eq. 47.
    """
    return float(_a(reference) @ np.exp(_a(reward) / beta))


def optimal_policy(reference: ArrayLike, reward: ArrayLike, beta: float) -> Array:
    """π_r(y) = π_ref(y)·exp(r(y)/β)/Z, the maximizer of eq. 45.

    Eq. 46.
    """
    tilt = (_a(reward) - np.max(_a(reward))) / beta  # a constant of the prompt cancels, and keeps exp finite
    return _a(reference) * np.exp(tilt) / (_a(reference) @ np.exp(tilt))


def implied_reward(policy: ArrayLike, reference: ArrayLike, beta: float, z: float = 1.0) -> Array:
    """r(y) = β·log(π(y)/π_ref(y)) + β·log Z; with the default Z, up to a constant of the prompt.

    Eq. 48.
    """
    reward: Array = beta * np.log(_a(policy) / _a(reference)) + beta * np.log(z)
    return reward


def bradley_terry(reward_w: ArrayLike, reward_l: ArrayLike) -> Array:
    """Pr(w ≻ l) = σ(r_w − r_l).

    Eq. 49.
    """
    preferred: Array = np.exp(-np.logaddexp(0.0, _a(reward_l) - _a(reward_w)))
    return preferred


def reward_difference(policy: ArrayLike, reference: ArrayLike, beta: float, w: int, l: int) -> float:  # noqa: E741
    """r(w) − r(l) from policies alone: the partition cancels.

    Eq. 50.
    """
    reward = implied_reward(policy, reference, beta)
    return float(reward[w] - reward[l])


def policy_preference(policy: ArrayLike, reference: ArrayLike, beta: float, w: int, l: int) -> float:  # noqa: E741
    """Pr(w ≻ l) that a policy implies.

    Eq. 51.
    """
    return float(bradley_terry(reward_difference(policy, reference, beta, w, l), 0.0))
