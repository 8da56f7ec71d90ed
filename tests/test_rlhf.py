"""The KL-regularized problem over a finite set of responses: its optimum, and that eq. 45 to 51 tell one story."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st

from sp2dpo.rlhf import (
    bradley_terry,
    implied_reward,
    kl_regularized_value,
    optimal_policy,
    partition,
    policy_preference,
    reward_difference,
)

betas = st.floats(0.03, 3)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Any, Any, float]:
    """A reference policy, rewards and β over two to six responses."""
    n = draw(st.integers(2, 6))
    weights = np.array(draw(st.lists(st.floats(0.05, 1), min_size=n, max_size=n)))
    reward = np.array(draw(st.lists(st.floats(-2, 2), min_size=n, max_size=n)))
    return weights / weights.sum(), reward, draw(betas)


def test_two_even_responses_whose_rewards_differ_by_beta_log_3() -> None:
    """Z = (1 + 3)/2 = 2 and the policy is 1/4, 3/4."""
    reference, reward = [0.5, 0.5], [0.0, 0.1 * math.log(3)]
    assert partition(reference, reward, 0.1) == pytest.approx(2.0)
    np.testing.assert_allclose(optimal_policy(reference, reward, 0.1), [0.25, 0.75])


def test_staying_at_the_reference_is_worth_its_mean_reward() -> None:
    assert kl_regularized_value([0.25, 0.75], [0.25, 0.75], [1.0, -1.0], 0.3) == pytest.approx(-0.5)


def test_moving_all_mass_to_one_of_two_even_responses_costs_beta_log_2() -> None:
    assert kl_regularized_value([1.0, 0.0], [0.5, 0.5], [1.0, 5.0], 0.3) == pytest.approx(1.0 - 0.3 * math.log(2))


@given(problems(), st.integers(0, 2**32 - 1))
def test_the_value_is_the_reward_less_beta_times_the_kl_of_scipy(problem: Any, seed: int) -> None:
    reference, reward, beta = problem
    policy = np.random.default_rng(seed).dirichlet(np.ones(len(reference)))
    expected = (policy * reward).sum() - beta * scipy.special.rel_entr(policy, reference).sum()
    assert kl_regularized_value(policy, reference, reward, beta) == pytest.approx(expected, abs=1e-12)


@given(problems())
def test_the_optimal_policy_is_a_softmax_of_log_reference_plus_reward_over_beta(problem: Any) -> None:
    reference, reward, beta = problem
    expected = scipy.special.softmax(np.log(reference) + reward / beta)
    np.testing.assert_allclose(optimal_policy(reference, reward, beta), expected, rtol=1e-9)


@given(problems(), st.integers(0, 2**32 - 1))
def test_no_random_policy_beats_the_optimal_one(problem: Any, seed: int) -> None:
    reference, reward, beta = problem
    best = kl_regularized_value(optimal_policy(reference, reward, beta), reference, reward, beta)
    for policy in np.random.default_rng(seed).dirichlet(np.ones(len(reference)), size=50):
        assert kl_regularized_value(policy, reference, reward, beta) <= best + 1e-12


@given(problems())
def test_the_value_of_the_optimum_is_beta_log_z(problem: Any) -> None:
    reference, reward, beta = problem
    best = kl_regularized_value(optimal_policy(reference, reward, beta), reference, reward, beta)
    assert best == pytest.approx(beta * math.log(partition(reference, reward, beta)), abs=1e-9)


@given(problems())
def test_the_reward_implied_by_the_optimal_policy_is_the_reward(problem: Any) -> None:
    reference, reward, beta = problem
    policy, z = optimal_policy(reference, reward, beta), partition(reference, reward, beta)
    np.testing.assert_allclose(implied_reward(policy, reference, beta, z), reward, atol=1e-9)


@given(problems())
def test_reward_differences_come_from_the_policies_alone(problem: Any) -> None:
    reference, reward, beta = problem
    policy = optimal_policy(reference, reward, beta)
    assert reward_difference(policy, reference, beta, 0, 1) == pytest.approx(reward[0] - reward[1], abs=1e-9)
    assert reward_difference(policy, reference, beta, 1, 0) == pytest.approx(reward[1] - reward[0], abs=1e-9)


@given(problems())
def test_the_preference_that_a_policy_implies_is_bradley_terry_on_the_rewards(problem: Any) -> None:
    reference, reward, beta = problem
    policy = optimal_policy(reference, reward, beta)
    expected = scipy.special.expit(reward[0] - reward[1])
    assert policy_preference(policy, reference, beta, 0, 1) == pytest.approx(expected, abs=1e-9)
    assert bradley_terry(reward[0], reward[1]) == pytest.approx(expected, abs=1e-12)


def test_a_reward_lead_of_log_3_is_preferred_three_times_in_four() -> None:
    np.testing.assert_allclose(bradley_terry([math.log(3), 0.0], [0.0, math.log(3)]), [0.75, 0.25])


def test_a_large_beta_stays_at_the_reference_and_a_small_one_takes_the_best_response() -> None:
    reference, reward = [0.7, 0.2, 0.1], [0.0, 1.0, 0.5]
    np.testing.assert_allclose(optimal_policy(reference, reward, 1e6), reference, atol=1e-5)
    np.testing.assert_allclose(optimal_policy(reference, reward, 0.01), [0.0, 1.0, 0.0], atol=1e-12)


def test_a_reward_of_many_nats_does_not_overflow_at_a_small_beta() -> None:
    np.testing.assert_allclose(optimal_policy([0.5, 0.5], [30.0, 0.0], 0.03), [1.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(optimal_policy([0.5, 0.5], [-30.0, -30.3], 0.1), scipy.special.expit([3.0, -3.0]))


def test_a_hopeless_comparison_does_not_overflow() -> None:
    np.testing.assert_array_equal(bradley_terry([0.0, 1000.0], [1000.0, 0.0]), [0.0, 1.0])
