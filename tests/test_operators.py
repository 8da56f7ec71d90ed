"""The operators of C.4 and C.5 that the default estimator does not use, against hand values and independent code."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy.optimize import minimize_scalar

from sp2dpo.ensemble import (
    additive_fit,
    annotator_mad,
    annotator_std,
    damp,
    damping,
    huber_mean,
    majority_categories,
    majority_category,
    pooled_gap,
    prompt_disagreement,
    robust_median,
    trimmed_mean,
    weighted_mean,
    weighted_over_annotators,
    weighted_over_prompts,
)
from sp2dpo.errors import InputError
from sp2dpo.rubric import CATEGORIES

UNIT = st.floats(0, 1).map(lambda x: round(x, 6))
MISSING = st.one_of(UNIT, UNIT, UNIT, st.just(float("nan")))

rows = arrays(np.float64, array_shapes(min_dims=2, max_dims=2, max_side=7), elements=UNIT)
rows_with_holes = arrays(np.float64, array_shapes(min_dims=2, max_dims=2, max_side=7), elements=MISSING)
gaps_ijk = arrays(np.float64, array_shapes(min_dims=3, max_dims=3, max_side=5), elements=UNIT)
gaps_with_holes = arrays(np.float64, array_shapes(min_dims=3, max_dims=3, max_side=5), elements=MISSING)

CENTRES: dict[str, Callable[[Any], Any]] = {
    "median": robust_median,
    "mean": weighted_mean,
    "trimmed": partial(trimmed_mean, trim=0.2),
    "huber": partial(huber_mean, delta=0.1),
}
centres = pytest.mark.parametrize("centre", CENTRES.values(), ids=CENTRES)


# A centre of several values -------------------------------------------------------------------------------------------


@centres
@given(values=rows, random=st.randoms(use_true_random=False))
def test_a_centre_lies_among_its_values_whatever_their_order(centre: Any, values: Any, random: Any) -> None:
    centred = centre(values)
    assert (centred >= values.min(axis=1) - 1e-12).all()
    assert (centred <= values.max(axis=1) + 1e-12).all()
    order = random.sample(range(values.shape[1]), values.shape[1])
    np.testing.assert_allclose(centre(values[:, order]), centred, atol=1e-12)


@centres
@given(values=rows, more=st.floats(0, 1), column=st.integers(0, 6))
def test_a_centre_never_falls_when_a_value_rises(centre: Any, values: Any, more: float, column: int) -> None:
    risen = values.copy()
    risen[:, column % values.shape[1]] += more
    assert (centre(risen) >= centre(values) - 1e-12).all()


@centres
@given(values=rows_with_holes)
def test_a_missing_value_takes_no_part_in_a_centre(centre: Any, values: Any) -> None:
    for row, centred in zip(values, centre(values), strict=True):
        there = row[~np.isnan(row)]
        np.testing.assert_allclose(centred, centre(there) if len(there) else np.nan, atol=1e-12)


@centres
@given(values=rows, scale=st.floats(0.1, 1), shift=st.floats(-1, 1))
def test_a_centre_moves_with_an_affine_map(centre: Any, values: Any, scale: float, shift: float) -> None:
    """So β of the gap and the gap of β are one, with a δ of the Huber mean in the units of its values."""
    if centre is CENTRES["huber"]:
        moved = huber_mean(values * scale + shift, 0.1 * scale)
    else:
        moved = centre(values * scale + shift)
    np.testing.assert_allclose(moved, centre(values) * scale + shift, atol=1e-9)


@given(rows, st.floats(0, 0.49))
def test_the_trimmed_mean_is_that_of_scipy(values: Any, trim: float) -> None:
    np.testing.assert_allclose(trimmed_mean(values, trim), scipy.stats.trim_mean(values, trim, axis=1), atol=1e-12)


def test_a_trim_of_a_tenth_takes_one_of_ten_from_each_end_and_none_of_nine() -> None:
    values = np.arange(10.0)[None] ** 2
    assert trimmed_mean(values, 0.1) == values[0, 1:9].mean()
    assert trimmed_mean(values[:, :9], 0.1) == pytest.approx(values[0, :9].mean())


@given(rows, st.floats(0.01, 0.5))
def test_the_huber_mean_has_the_least_loss_that_a_search_finds(values: Any, delta: float) -> None:
    def loss(centre: float, row: Any) -> float:
        off = np.abs(row - centre)
        return float(np.where(off <= delta, off**2 / 2, delta * (off - delta / 2)).sum())

    for row, centre in zip(values, huber_mean(values, delta), strict=True):
        found = minimize_scalar(loss, bounds=(-0.1, 1.1), args=(row,), method="bounded", options={"xatol": 1e-10})
        assert loss(centre, row) <= found.fun + 1e-12


@given(rows)
def test_the_huber_mean_goes_from_the_median_to_the_mean(values: Any) -> None:
    np.testing.assert_allclose(huber_mean(values, 10.0), values.mean(axis=1), atol=1e-9)
    np.testing.assert_allclose(huber_mean(values, 1e-9), np.median(values, axis=1), atol=1e-8)


def test_two_camps_that_are_far_apart_meet_in_the_middle() -> None:
    np.testing.assert_allclose(huber_mean([[0.1, 0.1, 0.9, 0.9], [0.0, 0.2, 0.8, 1.0]], 0.05), [0.5, 0.5])


@given(rows, st.floats(1, 1e6))
def test_one_outlier_pulls_the_huber_mean_no_further_than_a_near_one(values: Any, far: float) -> None:
    near = np.concatenate([values, np.full((len(values), 1), 2.2)], axis=1)
    outlier = np.concatenate([values, np.full((len(values), 1), 2.2 + far)], axis=1)
    if values.shape[1] > 1:
        np.testing.assert_allclose(huber_mean(outlier, 0.1), huber_mean(near, 0.1), atol=1e-9)


@pytest.mark.parametrize("delta", [0.0, -1.0, np.inf])
def test_a_huber_delta_that_is_no_distance_is_refused(delta: float) -> None:
    with pytest.raises(InputError, match="delta"):
        huber_mean([[0.1, 0.2]], delta)


@pytest.mark.parametrize("trim", [-0.1, 0.5])
def test_a_trim_that_leaves_nothing_is_refused(trim: float) -> None:
    with pytest.raises(InputError, match="trim"):
        trimmed_mean([[0.1, 0.2]], trim)


# Weights --------------------------------------------------------------------------------------------------------------


def test_weights_over_prompts_annotators_and_calls_worked_out_by_hand() -> None:
    gap = [[[0.2, 0.4, 0.6], [0.1, 0.1, 0.5]]]
    np.testing.assert_allclose(weighted_over_prompts(gap, [1, 1, 2]), [[0.45, 0.3]])
    np.testing.assert_allclose(weighted_over_annotators([[0.1, 0.3]], [3, 1]), [0.15])
    np.testing.assert_allclose(pooled_gap(gap, [[1, 0, 0], [0, 0, 3]]), [(0.2 + 3 * 0.5) / 4])


def test_the_weights_of_those_that_are_there_carry_a_mean() -> None:
    np.testing.assert_allclose(weighted_over_annotators([[0.1, np.nan, 0.3]], [3, 5, 1]), [0.15])
    np.testing.assert_array_equal(weighted_over_annotators([[0.1, np.nan]], [0, 1]), [np.nan])


@given(gaps_ijk, st.floats(0.1, 10))
def test_equal_weights_are_the_mean_whatever_their_size(gap_ijk: Any, weight: float) -> None:
    _, j, k = gap_ijk.shape
    over_prompts = weighted_over_prompts(gap_ijk, np.full(k, weight))
    np.testing.assert_allclose(over_prompts, gap_ijk.mean(axis=2), rtol=1e-9, atol=1e-300)
    pooled = pooled_gap(gap_ijk, np.full((j, k), weight))
    np.testing.assert_allclose(pooled, gap_ijk.mean(axis=(1, 2)), rtol=1e-9, atol=1e-300)


@given(gaps_ijk, st.data())
def test_factorized_pooling_weights_are_one_mean_inside_the_other(gap_ijk: Any, data: Any) -> None:
    alpha, gamma = (np.array(data.draw(st.lists(st.floats(0.1, 5), min_size=n, max_size=n))) for n in gap_ijk.shape[1:])
    nested = weighted_over_annotators(weighted_over_prompts(gap_ijk, gamma), alpha)
    np.testing.assert_allclose(pooled_gap(gap_ijk, np.outer(alpha, gamma)), nested, atol=1e-12)


@pytest.mark.parametrize("weights", [[0, 0], [1, -0.5], [np.nan, 1], [1, 1, 1]])
def test_weights_that_are_no_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(InputError, match="not all zero"):
        weighted_over_annotators([[0.1, 0.3]], weights)
    with pytest.raises(InputError, match="not all zero"):
        weighted_over_prompts([[[0.1, 0.3]]], weights)


# Votes and spreads with holes -----------------------------------------------------------------------------------------


@given(arrays(np.int64, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(-1, 5)))
def test_votes_of_many_pairs_are_those_of_each(codes: Any) -> None:
    for row, winner, tie in zip(codes, *majority_categories(codes), strict=True):
        ballot = [CATEGORIES[code] for code in row if code >= 0]
        found = (CATEGORIES[winner] if winner >= 0 else None, bool(tie))
        assert found == (majority_category(ballot) if ballot else (None, False))


@given(gaps_with_holes)
def test_spreads_are_those_of_the_values_that_are_there(gap_ijk: Any) -> None:
    for pair, spread in zip(gap_ijk, prompt_disagreement(gap_ijk), strict=True):
        for calls, found in zip(pair, spread, strict=True):
            there = calls[~np.isnan(calls)]
            expected = scipy.stats.median_abs_deviation(there) if len(there) else np.nan
            np.testing.assert_allclose(found, expected, atol=1e-12)
    gap_ij = gap_ijk[:, :, 0]
    for row, std, mad in zip(gap_ij, annotator_std(gap_ij), annotator_mad(gap_ij), strict=True):
        there = row[~np.isnan(row)]
        np.testing.assert_allclose(std, statistics.pstdev(there.tolist()) if len(there) else np.nan, atol=1e-12)
        expected = scipy.stats.median_abs_deviation(there) if len(there) else np.nan
        np.testing.assert_allclose(mad, expected, atol=1e-12)


# Damping --------------------------------------------------------------------------------------------------------------


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


# Additive bias --------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.floats(0, 0.4))
def test_the_additive_fit_finds_offsets_that_were_planted_though_calls_are_missing(seed: int, part: float) -> None:
    rng = np.random.default_rng(seed)
    g, b, d = rng.uniform(0.3, 0.7, 40), np.array([0.1, -0.04, -0.06]), np.array([0.05, 0.02, -0.07])
    gap = g[:, None, None] + b[:, None] + d
    gap[1:][rng.random((39, 3, 3)) < part] = np.nan  # one whole pair ties every annotator to every prompt
    fit = additive_fit(gap, ridge=0.0)
    np.testing.assert_allclose(fit.b, b, atol=1e-9)
    np.testing.assert_allclose(fit.d, d, atol=1e-9)
    np.testing.assert_allclose(fit.g, np.where(np.isnan(gap).all(axis=(1, 2)), np.nan, g), atol=1e-9)


@given(gaps_with_holes, st.floats(0.01, 10))
def test_the_additive_fit_is_the_ridge_solution_of_least_squares(gap_ijk: Any, ridge: float) -> None:
    """The penalty alone makes the offsets sum to zero, so no constraint is given to the solver."""
    if np.isnan(gap_ijk).all():
        with pytest.raises(InputError, match="needs a call"):
            additive_fit(gap_ijk, ridge)
        return
    n, j, k = gap_ijk.shape
    there = ~np.isnan(gap_ijk)
    cells = np.argwhere(there)
    design = np.hstack([np.eye(size)[cells[:, axis]] for axis, size in enumerate((n, j, k))])
    penalty = np.sqrt(ridge) * np.eye(n + j + k)[n:]
    targets = np.concatenate([gap_ijk[there], np.zeros(j + k)])
    solution, *_ = np.linalg.lstsq(np.vstack([design, penalty]), targets, rcond=None)
    fit = additive_fit(gap_ijk, ridge)
    np.testing.assert_allclose(np.concatenate([fit.b, fit.d]), solution[n:], atol=1e-8)
    g = np.where(there.any(axis=(1, 2)), np.clip(solution[:n], 0, 1), np.nan)
    np.testing.assert_allclose(fit.g, g, atol=1e-8)


@given(gaps_ijk, st.floats(0, 1e3))
def test_on_a_full_panel_the_latent_gap_is_the_pooled_mean(gap_ijk: Any, ridge: float) -> None:
    np.testing.assert_allclose(additive_fit(gap_ijk, ridge).g, gap_ijk.mean(axis=(1, 2)), atol=1e-9)


def test_the_gaps_of_an_additive_fit_stay_in_the_unit_interval() -> None:
    g, b, d = additive_fit([[[1.2]], [[-0.4]]])
    assert (g.tolist(), b.tolist(), d.tolist()) == ([1.0, 0.0], [0.0], [0.0])
