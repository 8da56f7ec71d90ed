"""From calls to one gap per annotator: medians, votes and spreads against hand values and independent code."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from sp2dpo.ensemble import (
    additive_fit,
    annotator_mad,
    annotator_std,
    damp,
    damping,
    effective_gap,
    majority_category,
    median_over_prompts,
    pooled_gap,
    prompt_disagreement,
    weighted_over_annotators,
    weighted_over_prompts,
)
from sp2dpo.errors import InputError

PRIORITY = ["Safety", "Factuality", "Instruction", "Reasoning", "Helpfulness", "Style"]
UNIT = st.floats(0, 1)

gaps_ijk = arrays(np.float64, array_shapes(min_dims=3, max_dims=3, max_side=5), elements=UNIT)
betas_ij = arrays(np.float64, array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.floats(0.03, 0.3))


# Effective gap and median ---------------------------------------------------------------------------------------------


def test_the_effective_gap_is_magnitude_times_confidence_of_each_call() -> None:
    magnitude = [[0.9, 0.8, 0.85], [0.4, 0.9, 0.5], [0.2, 0.3, 0.25]]
    confidence = [[0.9, 0.95, 0.9], [0.5, 0.6, 0.4], [0.5, 0.4, 0.6]]
    gap = effective_gap(magnitude, confidence)
    np.testing.assert_allclose(gap, [[0.81, 0.76, 0.765], [0.2, 0.54, 0.2], [0.1, 0.12, 0.15]], rtol=1e-12)
    np.testing.assert_allclose(median_over_prompts(gap[None]), [[0.765, 0.2, 0.12]], rtol=1e-12)


def test_one_outlier_prompt_moves_the_mean_and_not_the_median() -> None:
    """The example of C.3: the mean is 0.3367, more than five times the median 0.0600."""
    gap = np.array([[[0.0500, 0.0600, 0.9000]]])
    assert median_over_prompts(gap).tolist() == [[0.0600]]
    assert gap.mean() == pytest.approx(0.3367, abs=0.5e-4)
    assert gap.mean() > 5 * median_over_prompts(gap).item()


@pytest.mark.parametrize("outlier", [0.06, 0.5, 1.0])
def test_an_outlier_of_any_size_gives_the_same_median(outlier: float) -> None:
    assert median_over_prompts([[[0.05, outlier, 0.06]]]).tolist() == [[0.06]]


def test_the_median_of_an_even_number_of_prompts_is_the_mean_of_the_two_in_the_middle() -> None:
    assert median_over_prompts([[[0.9, 0.1, 0.6, 0.2]]]).item() == pytest.approx(0.4, abs=1e-15)


@given(gaps_ijk)
def test_the_median_is_that_of_the_standard_library_in_every_cell(gap_ijk: Any) -> None:
    expected = [[statistics.median(prompts) for prompts in annotators] for annotators in gap_ijk.tolist()]
    np.testing.assert_allclose(median_over_prompts(gap_ijk), expected, rtol=1e-12, atol=1e-300)


@given(gaps_ijk, st.randoms(use_true_random=False))
def test_the_order_of_the_prompts_changes_neither_median_nor_disagreement(gap_ijk: Any, random: Any) -> None:
    order = random.sample(range(gap_ijk.shape[2]), gap_ijk.shape[2])
    np.testing.assert_array_equal(median_over_prompts(gap_ijk[:, :, order]), median_over_prompts(gap_ijk))
    np.testing.assert_array_equal(prompt_disagreement(gap_ijk[:, :, order]), prompt_disagreement(gap_ijk))


def test_the_median_of_products_is_not_the_product_of_medians() -> None:
    magnitude, confidence = np.array([[[0.9, 0.5, 0.1]]]), np.array([[[0.1, 0.5, 0.9]]])
    assert median_over_prompts(effective_gap(magnitude, confidence)).item() == pytest.approx(0.09)
    assert (median_over_prompts(magnitude) * median_over_prompts(confidence)).item() == 0.25


def test_a_missing_gap_is_not_hidden_by_the_median() -> None:
    median = median_over_prompts([[[np.nan, 0.5, 0.6], [0.1, 0.2, 0.3]]])
    np.testing.assert_array_equal(median, [[np.nan, 0.2]])


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 0, 3), (2, 3, 0), (2, 1, 1, 3)])
@pytest.mark.parametrize("function", [median_over_prompts, prompt_disagreement])
def test_gaps_that_are_not_pairs_by_annotators_by_prompts_are_refused(function: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"pairs, annotators, prompts"):
        function(np.zeros(shape))


def test_magnitudes_and_confidences_of_different_calls_do_not_multiply() -> None:
    with pytest.raises(ValueError, match="shapes"):
        effective_gap([0.1, 0.2], [0.1, 0.2, 0.3])


# Majority vote --------------------------------------------------------------------------------------------------------


def votes_counted_by_hand(votes: tuple[str, ...]) -> tuple[str, bool]:
    ranked = sorted(set(votes), key=lambda name: (-votes.count(name), PRIORITY.index(name)))
    return ranked[0], len(ranked) > 1 and votes.count(ranked[0]) == votes.count(ranked[1])


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_the_vote_is_right_for_every_possible_ballot(k: int) -> None:
    ballots = list(itertools.product(PRIORITY, repeat=k))
    assert len(ballots) == 6**k
    assert [majority_category(ballot) for ballot in ballots] == [votes_counted_by_hand(ballot) for ballot in ballots]


@pytest.mark.parametrize(
    ("ballot", "category", "tie"),
    [
        (["Style", "Style", "Safety"], "Style", False),
        (["Style", "Reasoning", "Factuality"], "Factuality", True),
        (["Helpfulness", "Style", "Style", "Helpfulness"], "Helpfulness", True),
        (["Safety", "Style", "Style", "Reasoning", "Reasoning"], "Reasoning", True),
        (["Instruction"], "Instruction", False),
    ],
)
def test_priority_decides_only_between_the_most_frequent(ballot: list[str], category: str, tie: bool) -> None:
    assert majority_category(ballot) == (category, tie)


def test_a_vote_without_voters_is_refused() -> None:
    with pytest.raises(InputError, match="at least one"):
        majority_category([])


@pytest.mark.parametrize(("vote", "known"), [("Saftey", "Safety"), ("style", "Style"), ("Factuality/Truth", "Factual")])
def test_a_vote_for_no_category_is_refused_and_the_nearest_one_named(vote: str, known: str) -> None:
    with pytest.raises(InputError, match=f"'{vote}' is not a category .did you mean '{known}"):
        majority_category(["Style", "Style", "Style", vote])


# Disagreement ---------------------------------------------------------------------------------------------------------


def test_prompt_disagreement_is_the_median_distance_from_the_median() -> None:
    """Distances from 0.06 are 0.01, 0 and 0.84; from 0.3 they are 0.2, 0.1, 0.1 and 0.3 (even K)."""
    assert prompt_disagreement([[[0.05, 0.06, 0.90]]]).item() == pytest.approx(0.01, abs=1e-12)
    assert prompt_disagreement([[[0.1, 0.2, 0.4, 0.6]]]).item() == pytest.approx(0.15, abs=1e-12)


def test_the_annotators_of_case_6_differ_by_0_0165() -> None:
    """β 0.0786, 0.0435, 0.0786 have the mean 0.0669 and deviations 0.0117, −0.0234, 0.0117; ddof is 0."""
    assert annotator_std([[0.0786, 0.0435, 0.0786]]).item() == pytest.approx(0.0117 * 2**0.5, rel=1e-9)


def test_two_annotators_that_agree_hide_a_third_from_the_mad_and_not_from_the_std() -> None:
    beta = [[0.0786, 0.0435, 0.0786], [0.1, 0.2, 0.4 - 0.1]]
    np.testing.assert_allclose(annotator_mad(beta), [0.0, 0.1], atol=1e-12)
    assert (annotator_std(beta) > 0.01).all()


@given(gaps_ijk)
def test_prompt_disagreement_is_the_mad_of_scipy(gap_ijk: Any) -> None:
    expected = scipy.stats.median_abs_deviation(gap_ijk, axis=2)
    np.testing.assert_allclose(prompt_disagreement(gap_ijk), expected, rtol=1e-12, atol=1e-15)


@given(betas_ij)
def test_annotator_spreads_are_those_of_independent_code(beta_ij: Any) -> None:
    np.testing.assert_allclose(annotator_mad(beta_ij), scipy.stats.median_abs_deviation(beta_ij, axis=1), atol=1e-15)
    expected = [statistics.pstdev(row) for row in beta_ij.tolist()]
    np.testing.assert_allclose(annotator_std(beta_ij), expected, rtol=1e-9, atol=1e-15)


@given(betas_ij, st.randoms(use_true_random=False))
def test_the_order_of_the_annotators_changes_no_spread(beta_ij: Any, random: Any) -> None:
    order = random.sample(range(beta_ij.shape[1]), beta_ij.shape[1])
    np.testing.assert_allclose(annotator_std(beta_ij[:, order]), annotator_std(beta_ij), atol=1e-15)
    np.testing.assert_array_equal(annotator_mad(beta_ij[:, order]), annotator_mad(beta_ij))


@given(st.floats(0, 1), st.integers(1, 4), st.integers(1, 4))
def test_a_panel_of_one_mind_has_no_disagreement(gap: float, j: int, k: int) -> None:
    assert prompt_disagreement(np.full((2, j, k), gap)).tolist() == [[0.0] * j] * 2
    assert annotator_mad(np.full((2, j), gap)).tolist() == [0.0, 0.0]
    np.testing.assert_allclose(annotator_std(np.full((2, j), gap)), 0.0, atol=1e-15)


# The paper's other operators ------------------------------------------------------------------------------------------


def test_damping_of_a_disagreement_of_one_half_at_strength_two() -> None:
    """exp(−1) = 0.3679 and 1/(1 + 1) = 0.5."""
    assert damping(0.5, 2.0) == pytest.approx(0.367879441, rel=1e-8)
    assert damping(0.5, 2.0, "rational") == 0.5
    np.testing.assert_allclose(damp([[0.8, 0.4]], [[0.5, 0.0]], 2.0, "rational"), [[0.4, 0.4]])


@pytest.mark.parametrize("form", ["exponential", "rational"])
@given(u=st.floats(0, 1), more=st.floats(0, 1), strength=st.floats(0, 20))
def test_damping_never_raises_a_gap_and_falls_with_disagreement(
    form: Any, u: float, more: float, strength: float
) -> None:
    assert damping(0.0, strength, form) == damping(u, 0.0, form) == 1.0
    assert 0.0 < damping(u + more, strength, form) <= damping(u, strength, form) <= 1.0


def test_damping_that_would_reward_disagreement_is_refused() -> None:
    with pytest.raises(InputError, match="must not be negative"):
        damping(0.1, -1.0)


def test_weights_over_prompts_annotators_and_calls_worked_out_by_hand() -> None:
    gap = [[[0.2, 0.4, 0.6], [0.1, 0.1, 0.5]]]
    np.testing.assert_allclose(weighted_over_prompts(gap, [1, 1, 2]), [[0.45, 0.3]])
    np.testing.assert_allclose(weighted_over_annotators([[0.1, 0.3]], [3, 1]), [0.15])
    np.testing.assert_allclose(pooled_gap(gap, [[1, 0, 0], [0, 0, 3]]), [(0.2 + 3 * 0.5) / 4])


@given(gaps_ijk, st.floats(0.1, 10))
def test_equal_weights_are_the_mean_whatever_their_size(gap_ijk: Any, weight: float) -> None:
    _, j, k = gap_ijk.shape
    over_prompts = weighted_over_prompts(gap_ijk, np.full(k, weight))
    np.testing.assert_allclose(over_prompts, gap_ijk.mean(axis=2), rtol=1e-9, atol=1e-300)
    pooled = pooled_gap(gap_ijk, np.full((j, k), weight))
    np.testing.assert_allclose(pooled, gap_ijk.mean(axis=(1, 2)), rtol=1e-9, atol=1e-300)
    np.testing.assert_allclose(
        weighted_over_annotators(over_prompts, np.full(j, weight)), pooled, rtol=1e-9, atol=1e-300
    )


@pytest.mark.parametrize("weights", [[0, 0], [1, -0.5], [np.nan, 1]])
def test_weights_that_are_negative_or_all_zero_are_refused(weights: list[float]) -> None:
    with pytest.raises(InputError, match="not all zero"):
        weighted_over_annotators([[0.1, 0.3]], weights)
    with pytest.raises(InputError, match="not all zero"):
        weighted_over_prompts([[[0.1, 0.3]]], weights)


def test_the_additive_fit_finds_offsets_that_were_planted() -> None:
    g, b, d = np.array([0.3, 0.5, 0.7]), np.array([0.1, -0.1]), np.array([0.05, 0.0, -0.05])
    fit = additive_fit(g[:, None, None] + b[:, None] + d, ridge=0.0)
    for found, planted in zip(fit, (g, b, d), strict=True):
        np.testing.assert_allclose(found, planted, atol=1e-12)


@given(gaps_ijk, st.floats(0.01, 10))
def test_the_additive_fit_is_the_ridge_solution_of_least_squares(gap_ijk: Any, ridge: float) -> None:
    """The penalty alone makes the offsets sum to zero, so no constraint is given to the solver."""
    n, j, k = gap_ijk.shape
    cells = np.array(list(np.ndindex(n, j, k)))
    design = np.hstack([np.eye(size)[cells[:, axis]] for axis, size in enumerate((n, j, k))])
    penalty = np.sqrt(ridge) * np.eye(n + j + k)[n:]
    targets = np.concatenate([gap_ijk.ravel(), np.zeros(j + k)])
    solution, *_ = np.linalg.lstsq(np.vstack([design, penalty]), targets, rcond=None)
    np.testing.assert_allclose(np.concatenate(additive_fit(gap_ijk, ridge)), solution, atol=1e-8)


def test_the_gaps_of_an_additive_fit_stay_in_the_unit_interval() -> None:
    g, b, d = additive_fit([[[1.2]], [[-0.4]]])
    assert (g.tolist(), b.tolist(), d.tolist()) == ([1.0, 0.0], [0.0], [0.0])
