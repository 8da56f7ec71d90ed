"""The operators of C.4 and C.5 that the default estimator does not use."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from sp2dpo.ensemble import (
    additive_fit,
    damp,
    damping,
    pooled_gap,
    prompt_disagreement,
    weighted_over_annotators,
    weighted_over_prompts,
)
from sp2dpo.errors import InputError

GAP = np.random.default_rng(0).uniform(size=(5, 3, 2))


def test_damping_is_one_without_disagreement_and_falls_with_it() -> None:
    for form in ("exponential", "rational"):
        damped = damping([0.0, 0.1, 0.5], 2.0, form)  # type: ignore[arg-type]
        assert damped[0] == 1.0
        assert np.all(np.diff(damped) < 0)
        assert np.all(damped > 0)


def test_the_two_forms_of_damping_have_their_hand_values() -> None:
    assert damping(0.5, 2.0)[()] == pytest.approx(0.36787944)
    assert damping(0.5, 2.0, "rational")[()] == pytest.approx(0.5)


def test_strength_zero_leaves_the_gap() -> None:
    gap = GAP[:, :, 0]
    assert np.array_equal(damp(gap, prompt_disagreement(GAP), 0.0), gap)


def test_equal_weights_are_a_mean_and_one_weight_is_a_choice() -> None:
    assert weighted_over_prompts(GAP, [2.0, 2.0]) == pytest.approx(GAP.mean(axis=2))
    assert np.array_equal(weighted_over_annotators(GAP[:, :, 0], [0.0, 1.0, 0.0]), GAP[:, 1, 0])


def test_factorized_pooling_weights_are_one_mean_inside_the_other() -> None:
    alpha, gamma = np.array([1.0, 2.0, 3.0]), np.array([1.0, 4.0])
    nested = weighted_over_annotators(weighted_over_prompts(GAP, gamma), alpha)
    assert pooled_gap(GAP, np.outer(alpha, gamma)) == pytest.approx(nested)


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0]])
def test_weights_that_are_no_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(InputError, match="weights"):
        weighted_over_prompts(GAP, weights)


def test_the_additive_fit_finds_planted_offsets() -> None:
    rng = np.random.default_rng(1)
    g, b, d = rng.uniform(0.3, 0.6, 200), np.array([0.1, -0.04, -0.06]), np.array([0.05, -0.05])
    fitted_g, fitted_b, fitted_d = additive_fit(g[:, None, None] + b[:, None] + d, ridge=0.0)
    assert fitted_g == pytest.approx(g)
    assert fitted_b == pytest.approx(b)
    assert fitted_d == pytest.approx(d)


def test_the_additive_fit_is_the_minimum_that_an_optimizer_finds() -> None:
    n = len(GAP)
    ridge = 3.0

    def offsets(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.array([*x[n : n + 2], -x[n] - x[n + 1]]), np.array([x[n + 2], -x[n + 2]])

    def objective(x: np.ndarray) -> float:
        b, d = offsets(x)
        residual = GAP - x[:n, None, None] - b[:, None] - d
        return float((residual**2).sum() + ridge * ((b**2).sum() + (d**2).sum()))

    found = minimize(objective, np.zeros(n + 3), options={"gtol": 1e-10}).x
    g, b, d = additive_fit(GAP, ridge)
    assert found[:n] == pytest.approx(g, abs=1e-5)
    assert offsets(found)[0] == pytest.approx(b, abs=1e-5)
    assert offsets(found)[1] == pytest.approx(d, abs=1e-5)
