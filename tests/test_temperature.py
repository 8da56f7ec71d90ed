"""Gap to β: printed tables, Table 7 as slices of one estimator, and the identities that hold or must not hold."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from sp2dpo import envelope, schedule_beta
from sp2dpo.ensemble import median_over_prompts
from sp2dpo.errors import InputError
from sp2dpo.temperature import BETA_MAX, BETA_MIN, clip01, mean_over_annotators, random_beta

ANY = st.floats(allow_nan=False)
gaps_ijk = arrays(np.float64, array_shapes(min_dims=3, max_dims=3, max_side=4), elements=st.floats(0, 1))
wild_ijk = arrays(np.float64, array_shapes(min_dims=3, max_dims=3, max_side=4), elements=st.floats(-5, 5))
bounds = st.tuples(st.floats(1e-6, 10), st.floats(1e-6, 10)).map(sorted)

TWO_PAIRS = [
    [[0.81, 0.76, 0.765], [0.2, 0.54, 0.2], [0.1, 0.12, 0.15]],
    [[0.24, 0.18, 0.18], [0.05, 0.105, 0.05], [0.21, 0.07, 0.18]],
]


# Envelope -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gap", "beta"), [(0, 0.03), (0.5, 0.165), (1, 0.3)])
def test_table_4(gap: float, beta: float) -> None:
    assert envelope(gap) == pytest.approx(beta, rel=1e-15)


def test_the_envelope_of_the_paper_is_a_factor_of_ten() -> None:
    assert (BETA_MIN, BETA_MAX) == (0.03, 0.30)


def test_another_envelope_is_obeyed() -> None:
    np.testing.assert_allclose(envelope([0, 0.5, 1], 0.1, 0.5), [0.1, 0.3, 0.5], rtol=1e-15)


def test_gaps_outside_the_unit_interval_saturate() -> None:
    np.testing.assert_array_equal(envelope([-np.inf, -0.2, 1.7, np.inf]), [0.03, 0.03, 0.3, 0.3])
    np.testing.assert_array_equal(clip01([-0.2, 0.25, 1.7]), [0.0, 0.25, 1.0])


@given(ANY, bounds)
def test_no_gap_leaves_any_envelope(gap: float, envelope_of: list[float]) -> None:
    low, high = envelope_of
    assert low <= envelope(gap, low, high) <= high


@given(ANY, ANY, bounds)
def test_a_larger_gap_never_has_a_smaller_beta(one: float, other: float, envelope_of: list[float]) -> None:
    small, large = sorted((one, other))
    assert envelope(small, *envelope_of) <= envelope(large, *envelope_of)


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_inside_the_unit_interval_beta_grows_by_0_27_for_each_unit_of_gap(one: float, other: float) -> None:
    assert envelope(one) - envelope(other) == pytest.approx(0.27 * (one - other), abs=1e-15)


def test_a_missing_gap_is_not_clipped_into_a_beta() -> None:
    np.testing.assert_array_equal(np.isnan(envelope([np.nan, 0.5])), [True, False])
    assert np.isnan(schedule_beta([[[np.nan, 0.1, 0.2]]])).all()


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 0.3), (-0.1, 0.3), (0.3, 0.03), (np.nan, 0.3), (0.03, np.nan), (0.03, np.inf), (np.inf, np.inf)],
)
def test_an_envelope_that_is_empty_or_reaches_zero_is_refused(low: float, high: float) -> None:
    with pytest.raises(InputError, match="0 < beta_min <= beta_max"):
        envelope(0.5, low, high)
    with pytest.raises(InputError, match="0 < beta_min <= beta_max"):
        schedule_beta(TWO_PAIRS, low, high)


@given(ANY)
def test_an_envelope_of_one_point_gives_that_point(gap: float) -> None:
    assert envelope(gap, 0.1, 0.1) == 0.1


# Schedule -------------------------------------------------------------------------------------------------------------


def test_a_schedule_worked_out_by_hand() -> None:
    """Medians 0.765, 0.2, 0.12 and 0.18, 0.05, 0.18; the second pair is case 6 of appendix K."""
    beta_ij = envelope(median_over_prompts(TWO_PAIRS))
    np.testing.assert_allclose(beta_ij, [[0.23655, 0.084, 0.0624], [0.0786, 0.0435, 0.0786]], rtol=1e-12)
    np.testing.assert_allclose(schedule_beta(TWO_PAIRS), [0.12765, 0.0669], rtol=1e-12)


def test_an_outlier_prompt_has_the_beta_of_the_median() -> None:
    assert schedule_beta([[[0.05, 0.06, 0.90]]]).item() == pytest.approx(0.0462, rel=1e-12)


@given(gaps_ijk)
def test_the_four_configurations_of_table_7_are_slices_of_one_estimator(gap_ijk: Any) -> None:
    def f(gap: float) -> float:
        return 0.03 + 0.27 * gap

    rows = gap_ijk.tolist()
    expected = {
        "SA": [f(row[0][0]) for row in rows],
        "SE": [f(statistics.median(row[0])) for row in rows],
        "MA": [statistics.fmean(f(one[0]) for one in row) for row in rows],
        "JMAMP": [statistics.fmean(f(statistics.median(one)) for one in row) for row in rows],
    }
    panels = {"SA": gap_ijk[:, :1, :1], "SE": gap_ijk[:, :1], "MA": gap_ijk[:, :, :1], "JMAMP": gap_ijk}
    for name, panel in panels.items():
        np.testing.assert_allclose(schedule_beta(panel), expected[name], rtol=1e-12, err_msg=name)


@given(gaps_ijk)
def test_the_mean_of_beta_is_beta_of_the_mean_gap_inside_the_unit_interval(gap_ijk: Any) -> None:
    mean_gap = median_over_prompts(gap_ijk).mean(axis=1)
    np.testing.assert_allclose(schedule_beta(gap_ijk), envelope(mean_gap), rtol=1e-12)


def test_the_mean_of_beta_is_not_beta_of_the_mean_gap_where_a_gap_is_clipped() -> None:
    """(0.3 + 0.084)/2 = 0.192, but the mean gap 0.8 has β 0.246: the order of the paper is kept."""
    gap = np.array([[[1.4], [0.2]]])
    assert schedule_beta(gap).item() == pytest.approx(0.192, rel=1e-12)
    assert envelope(median_over_prompts(gap).mean()) == pytest.approx(0.246, rel=1e-12)


def test_clipping_comes_after_the_median() -> None:
    """For an even K it matters: the median of 0.4 and 1.4 is 0.9, that of 0.4 and 1.0 would be 0.7."""
    assert schedule_beta([[[0.4, 1.4]]]).item() == pytest.approx(0.03 + 0.27 * 0.9, rel=1e-12)


@given(wild_ijk, bounds)
def test_no_schedule_leaves_its_envelope(gap_ijk: Any, envelope_of: list[float]) -> None:
    low, high = envelope_of
    beta = schedule_beta(gap_ijk, low, high)
    assert beta.shape == gap_ijk.shape[:1]
    assert (beta >= low * (1 - 1e-12)).all()
    assert (beta <= high * (1 + 1e-12)).all()


@given(gaps_ijk, st.randoms(use_true_random=False))
def test_a_schedule_does_not_depend_on_the_order_of_annotators_or_prompts(gap_ijk: Any, random: Any) -> None:
    _, j, k = gap_ijk.shape
    shuffled = gap_ijk[:, random.sample(range(j), j)][:, :, random.sample(range(k), k)]
    np.testing.assert_allclose(schedule_beta(shuffled), schedule_beta(gap_ijk), rtol=1e-14)


@given(gaps_ijk, st.randoms(use_true_random=False))
def test_the_beta_of_a_pair_does_not_depend_on_the_other_pairs(gap_ijk: Any, random: Any) -> None:
    order = random.sample(range(len(gap_ijk)), len(gap_ijk))
    np.testing.assert_array_equal(schedule_beta(gap_ijk[order]), schedule_beta(gap_ijk)[order])
    np.testing.assert_array_equal(schedule_beta(gap_ijk[:1]), schedule_beta(gap_ijk)[:1])


@given(gaps_ijk, st.data())
def test_raising_one_gap_never_lowers_a_beta(gap_ijk: Any, data: st.DataObject) -> None:
    cell = tuple(data.draw(st.integers(0, size - 1)) for size in gap_ijk.shape)
    raised = gap_ijk.copy()
    raised[cell] = data.draw(st.floats(gap_ijk[cell], 1))
    assert (schedule_beta(raised) >= schedule_beta(gap_ijk)).all()


@given(gaps_ijk)
def test_an_annotator_who_is_asked_twice_counts_twice(gap_ijk: Any) -> None:
    assume(gap_ijk.shape[1] > 1)
    twice = np.concatenate([gap_ijk, gap_ijk[:, :1]], axis=1)
    j = gap_ijk.shape[1]
    expected = (j * schedule_beta(gap_ijk) + schedule_beta(gap_ijk[:, :1])) / (j + 1)
    np.testing.assert_allclose(schedule_beta(twice), expected, rtol=1e-12)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 0, 3), (2, 3, 0)])
def test_a_schedule_of_the_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"pairs, annotators, prompts"):
        schedule_beta(np.zeros(shape))


def test_no_pairs_are_an_empty_schedule() -> None:
    assert schedule_beta(np.zeros((0, 3, 3))).shape == (0,)


def test_the_mean_over_annotators_keeps_the_pairs_apart() -> None:
    np.testing.assert_allclose(mean_over_annotators([[0.1, 0.2], [0.3, 0.1]]), [0.15, 0.2], rtol=1e-15)


# Rand-β ---------------------------------------------------------------------------------------------------------------


def test_rand_beta_is_the_stream_of_seed_42_stretched_to_the_envelope() -> None:
    """The first numbers of NumPy's default generator under seed 42, as its documentation prints them."""
    stream = np.array([0.77395605, 0.43887844, 0.85859792, 0.69736803, 0.09417735])
    np.testing.assert_allclose(random_beta(5), 0.03 + 0.27 * stream, atol=1e-8)
    np.testing.assert_allclose(random_beta(5, 0.1, 0.5), 0.1 + 0.4 * stream, atol=1e-8)


def test_rand_beta_is_one_draw_per_pair_in_order() -> None:
    np.testing.assert_array_equal(random_beta(1000)[:7], random_beta(7))
    assert random_beta(0).shape == (0,)
    assert not np.array_equal(random_beta(7, seed=43), random_beta(7))


def test_rand_beta_is_uniform_over_the_envelope() -> None:
    beta = random_beta(20_000)
    assert scipy.stats.kstest(beta, scipy.stats.uniform(0.03, 0.27).cdf).statistic < 0.012
    assert beta.min() >= 0.03
    assert beta.max() <= 0.3
