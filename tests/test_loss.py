"""The loss against known values, SciPy, autograd and finite differences; and how it departs from loss weighting."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.special

torch = pytest.importorskip("torch", reason="needs the train extra")

from sp2dpo.loss import (  # noqa: E402
    coefficient_difference,
    dpo_loss,
    gradient_coefficient,
    gradient_curvature,
    gradient_slope,
    implicit_margin,
    log_ratio,
    matching_weight,
    pair_loss,
    sp2dpo_loss,
    weighted_gradient_coefficient,
)
from sp2dpo.rlhf import optimal_policy, policy_preference  # noqa: E402


def f64(*values: float) -> Any:
    return torch.tensor(values, dtype=torch.float64)


def close(found: Any, expected: Any, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10 if found.dtype == torch.float64 else 1e-6, atol=atol)


# Four pairs: log-probabilities of policy and reference, and per-pair β.
CHOSEN, REF_CHOSEN = f64(-12, -20, -9, -15), f64(-13, -19, -9.2, -16)
REJECTED, REF_REJECTED = f64(-14, -18.5, -9.5, -22), f64(-13.5, -18, -9, -20)
MARGIN = f64(1.5, -0.5, 0.7, 3.0)
BETA = f64(0.03, 0.165, 0.3, 0.1)

BETAS = [0.03, 0.1, 0.165, 0.3, 1.0]
MARGINS = torch.linspace(-30, 30, 61, dtype=torch.float64)


# Values ---------------------------------------------------------------------------------------------------------------


def test_the_margin_is_the_difference_of_two_log_ratios() -> None:
    close(log_ratio(CHOSEN, REF_CHOSEN), f64(1.0, -1.0, 0.2, 1.0))
    close(log_ratio(REJECTED, REF_REJECTED), f64(-0.5, -0.5, -0.5, -2.0))
    close(implicit_margin(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED), MARGIN)


def test_dpo_at_beta_0_1() -> None:
    losses = f64(0.6209570477895321, 0.7184596480132863, 0.6587595555486971, 0.5543552444685271)
    close(pair_loss(0.1, MARGIN), losses)
    close(dpo_loss(0.1, MARGIN), torch.tensor(0.6381328739550107, dtype=torch.float64))


def test_each_pair_is_judged_by_its_own_beta() -> None:
    losses = f64(0.6709002842054063, 0.7352477206431228, 0.5936495810217839, 0.5543552444685271)
    close(pair_loss(BETA, MARGIN), losses)
    close(sp2dpo_loss(BETA, MARGIN), torch.tensor(0.63853820758471, dtype=torch.float64))


def test_equal_betas_are_dpo_to_the_last_bit() -> None:
    assert torch.equal(sp2dpo_loss(torch.full_like(MARGIN, 0.1), MARGIN), dpo_loss(0.1, MARGIN))


@pytest.mark.parametrize("beta", BETAS)
def test_a_margin_of_zero_costs_log_2_whatever_beta(beta: float) -> None:
    assert pair_loss(beta, f64(0.0)).item() == pytest.approx(math.log(2), abs=1e-15)


@pytest.mark.parametrize("beta", BETAS)
def test_the_pair_loss_is_the_negative_log_expit_of_scipy(beta: float) -> None:
    np.testing.assert_allclose(pair_loss(beta, MARGINS).numpy(), -scipy.special.log_expit(beta * MARGINS.numpy()))


def test_a_huge_margin_overflows_on_neither_side() -> None:
    close(pair_loss(0.3, f64(-1e5, 1e5)), f64(3e4, 0.0))
    assert pair_loss(0.3, torch.tensor([-1e5, 1e5])).isfinite().all()


# Gradients ------------------------------------------------------------------------------------------------------------


def derivative(function: Callable[[Any], Any], at: Any) -> Any:
    x = at.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(x).sum(), x)
    return gradient


def difference(function: Callable[[Any], Any], at: Any, step: float = 1e-4) -> Any:
    return (function(at + step) - function(at - step)) / (2 * step)


def test_the_gradient_of_dpo_at_beta_0_1() -> None:
    expected = f64(-0.04625701546562505, -0.051249739648421035, -0.04825071423336104, -0.0425557483188341)
    close(gradient_coefficient(0.1, MARGIN), expected)


def test_the_gradient_of_the_mean_is_a_quarter_of_each_coefficient() -> None:
    close(derivative(lambda margin: sp2dpo_loss(BETA, margin), MARGIN), gradient_coefficient(BETA, MARGIN) / 4)


@pytest.mark.parametrize("beta", BETAS)
def test_coefficient_slope_and_curvature_are_the_derivatives_of_autograd(beta: float) -> None:
    b = torch.full_like(MARGINS, beta)
    close(gradient_coefficient(b, MARGINS), derivative(lambda x: pair_loss(b, x), MARGINS))
    close(gradient_slope(b, MARGINS), derivative(lambda x: -gradient_coefficient(b, x), MARGINS))
    close(gradient_curvature(b, MARGINS), derivative(lambda x: gradient_slope(b, x), MARGINS))


@pytest.mark.parametrize("beta", BETAS)
def test_coefficient_slope_and_curvature_are_finite_differences(beta: float) -> None:
    b = torch.full_like(MARGINS, beta)
    close(gradient_coefficient(b, MARGINS), difference(lambda x: pair_loss(b, x), MARGINS), atol=1e-8)
    close(gradient_slope(b, MARGINS), difference(lambda x: -gradient_coefficient(b, x), MARGINS), atol=1e-8)
    close(gradient_curvature(b, MARGINS), difference(lambda x: gradient_slope(b, x), MARGINS), atol=1e-8)


def test_the_curvature_has_the_opposite_sign_of_the_printed_equation() -> None:
    """At β = 1 and Δ = log 3, σ = 3/4: the slope is −3/16 and grows back to 0, so the curvature is +3/32."""
    beta, margin = f64(1.0), f64(math.log(3))
    close(gradient_slope(beta, margin), f64(-3 / 16))
    close(gradient_curvature(beta, margin), f64(3 / 32))
    s = torch.sigmoid(margin)
    close(beta**3 * s * (1 - s) * (1 - 2 * s), f64(-3 / 32))  # as printed


@pytest.mark.parametrize("beta", BETAS)
def test_the_gradient_changes_fastest_at_the_boundary_where_its_slope_is_a_quarter_of_beta_squared(beta: float) -> None:
    slope = gradient_slope(torch.full_like(MARGINS, beta), MARGINS)
    assert MARGINS[slope.argmin()] == 0
    assert slope.min().item() == pytest.approx(-(beta**2) / 4, rel=1e-12)


def test_a_larger_beta_steps_further_at_the_boundary_and_less_far_from_it() -> None:
    at_zero, far = f64(0.0), f64(20.0)
    assert gradient_coefficient(0.3, at_zero).item() == pytest.approx(-0.15)
    assert gradient_coefficient(0.03, at_zero).item() == pytest.approx(-0.015)
    assert gradient_coefficient(0.3, far).abs() < gradient_coefficient(0.03, far).abs()


@pytest.mark.parametrize("function", [gradient_coefficient, gradient_slope, gradient_curvature])
def test_a_beta_given_as_a_number_is_as_precise_as_the_margins(function: Any) -> None:
    close(function(0.1, MARGINS), function(torch.full_like(MARGINS, 0.1), MARGINS), atol=0)


# Not a loss weight ----------------------------------------------------------------------------------------------------


def test_at_a_margin_of_zero_per_pair_beta_is_weighting_by_beta_over_beta_bar() -> None:
    zero = torch.zeros_like(BETA)
    close(matching_weight(BETA, 0.1, zero), BETA / 0.1)
    close(coefficient_difference(BETA, BETA / 0.1, 0.1, zero), zero)


def test_the_matching_weight_closes_the_difference_at_its_own_margin() -> None:
    weight = matching_weight(BETA, 0.1, MARGIN)
    close(coefficient_difference(BETA, weight, 0.1, MARGIN), torch.zeros_like(MARGIN))
    close(weighted_gradient_coefficient(weight, 0.1, MARGIN), gradient_coefficient(BETA, MARGIN))


def test_the_matching_weight_at_a_margin_of_10_is_0_529_and_not_3() -> None:
    """0.3·σ(−3) / (0.1·σ(−1)) = 3 · 0.0474259 / 0.2689414."""
    assert matching_weight(f64(0.3), 0.1, f64(10.0)).item() == pytest.approx(0.529028, abs=1e-6)


def test_the_matching_weight_of_a_saturated_pair_is_still_a_number() -> None:
    """Both coefficients underflow in float32 at Δ = 2000; their ratio is 3·exp(−400), and 3 at Δ = −2000."""
    margin = torch.tensor([2000.0, -2000.0])
    close(matching_weight(torch.full_like(margin, 0.3), 0.1, margin), torch.tensor([0.0, 3.0]), atol=1e-6)


@pytest.mark.parametrize("beta", [0.03, 0.099, 0.101, 0.3])
def test_no_fixed_weight_matches_at_three_distinct_margins(beta: float) -> None:
    margins = f64(-5.0, 1.0, 10.0)
    weight = matching_weight(f64(beta), 0.1, margins)
    assert len({round(w, 4) for w in weight.tolist()}) == 3
    for fixed in weight:
        gaps = coefficient_difference(f64(beta), fixed, 0.1, margins).abs()
        assert (gaps < 1e-12).sum() == 1


def test_with_beta_bar_itself_the_weight_is_one_at_every_margin() -> None:
    close(matching_weight(torch.full_like(MARGINS, 0.1), 0.1, MARGINS), torch.ones_like(MARGINS))


def test_the_first_step_from_the_reference_is_loss_weighting_and_the_second_is_not() -> None:
    features = torch.tensor([[1.0, 0.5], [-2.0, 1.0], [0.3, 3.0], [1.0, -1.0]], dtype=torch.float64)

    def steps(loss: Callable[[Any], Any]) -> list[Any]:
        theta, path = torch.zeros(2, dtype=torch.float64), []
        for _ in range(2):
            theta = theta - 20.0 * derivative(lambda t: loss(features @ t), theta)
            path.append(theta)
        return path

    per_pair = steps(lambda margin: sp2dpo_loss(BETA, margin))
    weighted = steps(lambda margin: (BETA / 0.1 * pair_loss(0.1, margin)).mean())
    close(per_pair[0], weighted[0])
    assert (per_pair[1] - weighted[1]).abs().max() > 0.01


# Where it comes from --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", BETAS)
def test_the_pair_loss_is_the_surprise_of_the_preference_that_a_policy_implies(beta: float) -> None:
    reference = np.array([0.2, 0.5, 0.3])
    policy = optimal_policy(reference, [1.0, -0.5, 0.2], beta)
    logps, refs = torch.tensor(np.log(policy)), torch.tensor(np.log(reference))
    margin = implicit_margin(logps[0], logps[1], refs[0], refs[1])
    assert pair_loss(beta, margin).item() == pytest.approx(-math.log(policy_preference(policy, reference, beta, 0, 1)))


@pytest.mark.parametrize("beta", BETAS)
def test_the_margin_at_rest_shrinks_as_beta_grows(beta: float) -> None:
    """For a preference that holds with probability 0.9, the expected loss is least at logit(0.9)/β."""
    rest = f64(math.log(9) / beta)
    slope = 0.9 * gradient_coefficient(beta, rest) - 0.1 * gradient_coefficient(beta, -rest)
    assert slope.item() == pytest.approx(0.0, abs=1e-12)
