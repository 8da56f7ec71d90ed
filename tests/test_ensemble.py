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
    annotator_mad,
    annotator_std,
    effective_gap,
    majority_category,
    median_over_prompts,
    prompt_disagreement,
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


def test_a_missing_call_takes_no_part_in_the_median() -> None:
    nan = np.nan
    median = median_over_prompts([[[nan, 0.5, 0.6], [0.1, 0.2, 0.3]], [[nan, nan, nan], [nan, 0.4, nan]]])
    np.testing.assert_array_equal(median, [[0.55, 0.2], [nan, 0.4]])


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
