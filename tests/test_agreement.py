"""Agreement: α against the library and what it must be, offsets that were planted, missing cells, the command."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from pathlib import Path

import krippendorff
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from conftest import Sp2dpo
from report_runs import judged, make_run, pair
from sp2dpo.audit.agreement import (
    AgreementReport,
    Among,
    _interval_alpha_of,
    _interval_parts,
    _nominal_alpha_of,
    _nominal_parts,
    _offset_parts,
    _offsets_of,
    agreement,
    agreement_of,
    compare,
    interval_alpha,
    nominal_alpha,
    rank_correlation,
)
from sp2dpo.ensemble import additive_fit
from sp2dpo.evidence import read_evidence
from sp2dpo.report.agreement import between_annotators, between_prompts

Array = NDArray[np.float64]

QUICKSTART = Path(__file__).resolve().parents[1] / "examples" / "quickstart" / "process.yaml"

cells = arrays(np.float64, (12, 4), elements=st.sampled_from([0.0, 0.1, 0.25, 0.7, 1.0, np.nan]))
codes = arrays(np.int64, (12, 4), elements=st.integers(-1, 5))


def of_arrays(gap_ijk: Array, code_ijk: NDArray[np.int64] | None = None, ridge: float = 0.0) -> AgreementReport:
    """The report of a panel by its gaps; annotators by their medians, and by their first answer's category."""
    j, k = gap_ijk.shape[1:]
    code = np.floor(np.nan_to_num(gap_ijk * 5, nan=-1)).astype(np.int64) if code_ijk is None else code_ijk
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a pair without any answer
        gap_ij = np.nanmedian(gap_ijk, axis=2)
    names = [f"a{n}" for n in range(j)], [f"v{n}" for n in range(k)]
    return agreement_of(*names, gap_ijk, code, gap_ij, code[:, :, 0], ridge)


def panel(n: int, seed: int, noise: float = 0.1, j: int = 3, k: int = 3) -> Array:
    rng = np.random.default_rng(seed)
    return np.clip(rng.beta(2, 3, (n, 1, 1)) + rng.normal(0, noise, (n, j, k)), 0, 1)


def value(among: Among | None) -> float:
    assert among is not None
    assert among.alpha_gap.value is not None
    return among.alpha_gap.value


# Krippendorff's α ---------------------------------------------------------------------------------------------------


@given(cells)
def test_interval_alpha_is_that_of_the_library_with_missing_cells(values: Array) -> None:
    paired = values[(~np.isnan(values)).sum(axis=1) > 1]
    ours = interval_alpha(values)
    if len(np.unique(paired[~np.isnan(paired)])) < 2:
        assert ours is None
    else:
        assert ours == pytest.approx(krippendorff.alpha(values.T, level_of_measurement="interval"), abs=1e-9)


@given(codes)
def test_nominal_alpha_is_that_of_the_library_and_of_the_sums_it_is_resampled_from(given_codes) -> None:
    ours = nominal_alpha(given_codes)
    from_sums = _nominal_alpha_of(_nominal_parts(given_codes).sum(axis=0))
    if ours is None:
        assert np.isnan(from_sums)
    else:
        missing = np.where(given_codes < 0, np.nan, given_codes)
        assert ours == pytest.approx(krippendorff.alpha(missing.T, level_of_measurement="nominal"), abs=1e-12)
        assert from_sums == pytest.approx(ours, abs=1e-12)


def test_interval_alpha_of_a_worked_example() -> None:
    """Three coders and fifteen units, 0.811: https://en.wikipedia.org/wiki/Krippendorff%27s_alpha."""
    x = np.nan
    a = [x, x, x, x, x, 3, 4, 1, 2, 1, 1, 3, 3, x, 3]
    b = [1, x, 2, 1, 3, 3, 4, 3, x, x, x, x, x, x, x]
    c = [x, x, 2, 1, 3, 4, 4, x, 2, 1, 1, 3, 3, x, 4]
    values = np.column_stack([a, b, c])
    assert interval_alpha(values) == pytest.approx(0.811, abs=0.5e-3)
    assert nominal_alpha(np.where(np.isnan(values), -1, values).astype(np.int64)) == pytest.approx(0.691, abs=0.5e-3)


def test_alpha_is_one_where_all_agree_and_its_interval_has_no_width() -> None:
    report = of_arrays(np.repeat(panel(50, 1)[:, :1, :1], 9, axis=1).reshape(50, 3, 3))
    for one in (report.annotators, *report.prompts, report.calls):
        assert one is not None
        assert dataclasses.astuple(one.alpha_gap) == pytest.approx((1, 1, 1))
        assert dataclasses.astuple(one.alpha_category) == pytest.approx((1, 1, 1))
        assert (one.same_category, one.mean_range, one.mean_mad) == (1, 0, 0)


def test_alpha_is_near_zero_where_each_rater_answers_about_other_pairs() -> None:
    rng = np.random.default_rng(3)
    column = rng.beta(2, 3, 3000)
    shuffled = np.column_stack([rng.permutation(column) for _ in range(9)]).reshape(-1, 3, 3)
    report = of_arrays(shuffled)
    for one in (report.annotators, *report.prompts, report.calls):
        assert one is not None
        assert abs(value(one)) < 0.05
        assert one.alpha_gap.low is not None
        assert one.alpha_gap.high is not None
        assert one.alpha_gap.low < value(one) < one.alpha_gap.high


def test_alpha_is_lower_where_the_panel_is_noisier() -> None:
    assert value(of_arrays(panel(400, 5, 0.05)).annotators) > value(of_arrays(panel(400, 5, 0.2)).annotators) + 0.1


@given(st.permutations(range(3)), st.permutations(range(3)))
def test_alpha_does_not_depend_on_the_order_of_annotators_and_prompts(annotators, prompts) -> None:
    gap = panel(40, 7)
    gap[::5, 0, 1] = np.nan
    one, other = of_arrays(gap), of_arrays(gap[:, annotators][:, :, prompts])
    assert value(other.annotators) == pytest.approx(value(one.annotators), abs=1e-12)
    assert value(other.calls) == pytest.approx(value(one.calls), abs=1e-12)
    assert [value(p) for p in other.prompts] == pytest.approx([value(one.prompts[j]) for j in annotators], abs=1e-12)


def test_the_interval_of_alpha_holds_the_alpha_of_the_population_about_95_times_in_100() -> None:
    population = value(of_arrays(panel(20_000, 0, 0.15)).calls)
    held = 0
    for seed in range(1, 101):
        one = of_arrays(panel(80, seed, 0.15)).calls
        assert one is not None
        assert one.alpha_gap.low is not None
        assert one.alpha_gap.high is not None
        held += one.alpha_gap.low <= population <= one.alpha_gap.high
    assert 87 <= held <= 100


# Offsets ------------------------------------------------------------------------------------------------------------


@given(arrays(np.float64, (6, 2, 3), elements=st.sampled_from([0.0, 0.2, 0.6, 1.0, np.nan])), st.sampled_from([0, 1]))
def test_the_sums_that_are_resampled_give_the_offsets_of_the_additive_fit(gap_ijk: Array, ridge: float) -> None:
    gap_ijk[0] = 0.5  # a pair with all of its calls, so that the offsets are determined
    fit = additive_fit(gap_ijk, ridge)
    [ours] = _offsets_of(_offset_parts(gap_ijk).sum(axis=0, keepdims=True), 2, 3, ridge)
    np.testing.assert_allclose(ours, [*fit.b, *fit.d], atol=1e-9)


def test_planted_offsets_are_within_their_intervals_about_95_times_in_100() -> None:
    """Over 100 panels of 60 pairs with a tenth of the calls missing, and 3 + 3 offsets in each."""
    b, d = np.array([0.08, -0.02, -0.06]), np.array([-0.03, 0.0, 0.03])
    held = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        gap = rng.uniform(0.3, 0.7, (60, 1, 1)) + b[:, None] + d + rng.normal(0, 0.05, (60, 3, 3))
        gap[rng.random(gap.shape) < 0.1] = np.nan
        report = of_arrays(gap)
        found = [one.offset for one in (*report.annotator_offsets, *report.prompt_offsets)]
        held += [one.low <= true <= one.high for one, true in zip(found, (*b, *d), strict=True)]
    assert 0.91 <= np.mean(held) <= 0.985


def test_offsets_are_named_sum_to_zero_and_are_left_out_where_there_is_one_rater() -> None:
    report = of_arrays(panel(30, 2))
    assert [one.name for one in report.annotator_offsets] == ["a0", "a1", "a2"]
    assert sum(one.offset.value or 0 for one in report.annotator_offsets) == pytest.approx(0, abs=1e-12)
    alone = of_arrays(panel(30, 2, j=1))
    assert alone.annotator_offsets == ()
    assert len(alone.prompt_offsets) == 3


def test_a_ridge_holds_the_offsets_back() -> None:
    gap = panel(20, 4) + np.array([0.3, 0.0, -0.3])[:, None]
    loose, tight = (abs(of_arrays(gap, ridge=r).annotator_offsets[0].offset.value or 0) for r in (0.0, 100.0))
    assert tight < 0.5 * loose


# Two raters ---------------------------------------------------------------------------------------------------------


@given(arrays(np.float64, (2, 15), elements=st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.9])))
def test_rank_correlation_is_that_of_scipy_with_ties(xy: Array) -> None:
    x, y = xy
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert rank_correlation(x, y) is None
    else:
        assert rank_correlation(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-12)


def test_an_offset_lowers_neither_correlation_and_is_the_difference() -> None:
    x = panel(40, 6)[:, 0, 0]
    one = compare("medians", ["a", "b"], 0, 1, np.column_stack([x, x + 0.1]), np.zeros((40, 2), np.int64))
    assert one.correlation == pytest.approx(1)
    assert one.rank_correlation == pytest.approx(1)
    assert one.difference == pytest.approx(0.1)
    assert one.same_category == 1


def test_two_raters_are_compared_on_the_pairs_that_both_judged() -> None:
    gap = np.array([[0.1, 0.2], [0.5, np.nan], [np.nan, 0.5], [0.3, 0.4], [0.9, 0.6]])
    code = np.array([[0, 0], [1, -1], [-1, -1], [2, 3], [4, 4]])
    one = compare("medians", ["a", "b"], 0, 1, gap, code)
    assert (one.pairs, one.same_category) == (3, pytest.approx(2 / 3))
    assert one.difference == pytest.approx((0.1 + 0.1 + 0.3) / 3)
    assert one.correlation == pytest.approx(np.corrcoef([0.1, 0.3, 0.9], [0.2, 0.4, 0.6])[0, 1])


# A run --------------------------------------------------------------------------------------------------------------


def test_self_consistency_of_an_annotator_by_hand() -> None:
    gap = np.array([[[0.1, 0.2, 0.6]], [[0.5, 0.5, 0.5]], [[0.4, np.nan, 0.6]], [[np.nan, np.nan, 0.9]]])
    code = np.array([[[0, 0, 1]], [[2, 2, 2]], [[3, -1, 3]], [[-1, -1, 5]]])
    [one] = of_arrays(gap, code).prompts
    assert (one.of, one.raters, one.pairs) == ("prompts of a0", 3, 3)
    assert one.same_category == pytest.approx(2 / 3)
    assert one.mean_range == pytest.approx((0.5 + 0 + 0.2) / 3)
    assert one.mean_mad == pytest.approx((0.1 + 0 + 0.1) / 3)


@pytest.mark.parametrize(("j", "k", "groups"), [(1, 1, 0), (1, 3, 1), (3, 1, 1), (2, 2, 4)])
def test_what_needs_two_raters_is_left_out_where_there_is_one(j: int, k: int, groups: int) -> None:
    report = of_arrays(panel(10, 8, j=j, k=k))
    assert sum(one is not None for one in (report.annotators, *report.prompts, report.calls)) == groups
    assert len(report.compared) == j * (j - 1) // 2 + j * k * (k - 1) // 2


def test_one_pair_has_figures_and_no_intervals() -> None:
    report = of_arrays(panel(1, 9))
    assert report.annotators is not None
    assert report.annotators.alpha_gap.value is not None
    assert report.annotators.alpha_gap.low is None
    assert report.annotator_offsets[0].offset.high is None
    assert report.compared[0].correlation is None


def test_a_prompt_that_never_answered_leaves_nothing_that_is_no_number() -> None:
    gap = panel(20, 10)
    gap[:, :, 2] = np.nan
    gap[:, 1, 1] = np.nan  # a1 has one prompt left
    report = of_arrays(gap)
    json.dumps(report.as_json(), allow_nan=False)
    assert [one.pairs for one in report.prompts] == [20, 0, 20]
    assert report.prompts[1].mean_range is None
    assert report.compared[-1].pairs == 0


def test_the_same_run_gives_the_same_intervals() -> None:
    gap = panel(25, 11)
    assert of_arrays(gap) == of_arrays(gap)


def test_a_run_is_read_as_it_was_answered(tmp_path: Path) -> None:
    def answer(n: int, annotator: str, variant: str) -> str:
        category = "Safety" if annotator == "b" and n == 0 else "Style"
        return judged(category, min(n / 10 + (0.2 if annotator == "b" else 0), 1.0), 1.0)

    evidence = read_evidence(make_run(tmp_path, [pair(n) for n in range(6)], answer, annotators=("a", "b")))
    report = agreement(evidence)
    assert (report.pairs, report.answers, report.ridge) == (6, 36, 0)
    assert report.annotators is not None
    assert report.annotators.same_category == pytest.approx(5 / 6)
    assert [one.alpha_gap.value for one in report.prompts] == [1, 1]
    assert [one.offset.value for one in report.annotator_offsets] == pytest.approx([-0.1, 0.1])
    assert [(one.of, one.one, one.other) for one in report.compared[:2]] == [("medians", "a", "b"), ("a", "v1", "v2")]


def test_the_charts_have_the_gaps_of_the_pairs_that_both_judged(tmp_path: Path) -> None:
    evidence = read_evidence(make_run(tmp_path, [pair(n) for n in range(5)], annotators=("a", "b")))
    holes = evidence.gap_ijk.copy()
    holes[1, 0, 0] = np.nan
    evidence = dataclasses.replace(evidence, gap_ijk=holes)
    first, *_ = between_prompts(evidence)
    assert (first.of, first.one, first.other, first.pairs) == ("a", "v1", "v2", 4)
    np.testing.assert_array_equal(first.x, holes[[0, 2, 3, 4], 0, 0])
    [medians] = between_annotators(evidence)
    assert (medians.of, len(medians.x), medians.difference) == ("medians", 5, 0)


def test_a_predictor_is_one_voice_among_the_calls_and_has_no_prompts_to_compare() -> None:
    gap = panel(30, 12, j=2)
    gap[:, 1] = gap[:, 1, :1]
    code = np.floor(gap * 5).astype(np.int64)
    names, gap_ij = (["a", "local"], ["v1", "v2", "v3"]), np.median(gap, axis=2)
    report = agreement_of(*names, gap, code, gap_ij, code[:, :, 0], one_voice=["local"])
    assert report.predictors == ("local",)
    assert [one.of for one in report.prompts] == ["prompts of a"]
    assert {one.of for one in report.compared} == {"medians", "a"}
    assert report.calls is not None
    assert report.calls.raters == 4
    assert report.calls.alpha_gap.value == pytest.approx(interval_alpha(np.column_stack([gap[:, 0], gap[:, 1, 0]])))
    assert report.as_json()["predictors"] == ("local",)


@pytest.mark.parametrize(("j", "groups"), [(1, 0), (2, 1)])
def test_a_panel_of_predictors_has_no_figures_of_prompts_or_calls(j: int, groups: int) -> None:
    gap = np.repeat(panel(20, 13, j=j)[:, :, :1], 3, axis=2)
    code = np.floor(gap * 5).astype(np.int64)
    names = [f"a{n}" for n in range(j)]
    report = agreement_of(names, ["v1", "v2", "v3"], gap, code, gap[:, :, 0], code[:, :, 0], one_voice=names)
    assert sum(one is not None for one in (report.annotators, *report.prompts, report.calls)) == groups
    assert (report.calls, report.prompts, report.prompt_offsets) == (None, (), ())


# The command --------------------------------------------------------------------------------------------------------


@pytest.fixture
def quickstart(sp2dpo: Sp2dpo, tmp_path: Path) -> Path:
    """The schedule of the quickstart's 192 pairs."""
    run = tmp_path / "run"
    assert [sp2dpo(verb, QUICKSTART, "--run-dir", run).code for verb in ("annotate", "schedule")] == [0, 0]
    return run


def test_audit_agreement_prints_tables_and_with_json_one_object(sp2dpo: Sp2dpo, quickstart: Path) -> None:
    shown = sp2dpo("audit", "agreement", quickstart)
    assert (shown.code, shown.err) == (0, "")
    assert "192 pairs, 576 answers" in shown.out
    assert "prompts of authors" in shown.out
    told = json.loads(sp2dpo("audit", "agreement", quickstart, "--json").out)
    [prompts] = told["prompts"]
    alpha = prompts["alpha_gap"]
    assert f"{alpha['value']:.2f} ({alpha['low']:.2f}, {alpha['high']:.2f})" in shown.out
    assert (told["annotators"], told["calls"], told["annotator_offsets"]) == (None, None, [])
    assert [one["name"] for one in told["prompt_offsets"]] == ["v1", "v2", "v3"]
    assert told["predictors"] == []
    assert "\n\n\n" not in "\n".join(line.strip() for line in shown.out.splitlines())


def test_audit_agreement_of_one_annotator_and_one_prompt_says_that_there_is_nothing(sp2dpo: Sp2dpo, tmp_path) -> None:
    run = make_run(tmp_path / "one", [pair(n) for n in range(3)], variants=("v1",))
    shown = sp2dpo("audit", "agreement", run.path)
    assert shown.code == 0
    assert "nothing to compare" in shown.out


def test_audit_agreement_of_a_folder_that_is_no_run_is_one_line(sp2dpo: Sp2dpo, tmp_path: Path) -> None:
    ended = sp2dpo("audit", "agreement", tmp_path)
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)


def test_audit_agreement_without_the_extra_names_it(sp2dpo: Sp2dpo, quickstart: Path, monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "sp2dpo.audit.agreement")
    monkeypatch.setitem(sys.modules, "krippendorff", None)
    ended = sp2dpo("audit", "agreement", quickstart)
    assert ended.code == 2
    assert "pip install 'sp2dpo[report]'" in ended.err


def test_interval_parts_of_a_unit_with_one_value_are_nothing() -> None:
    parts = _interval_parts(np.array([[0.5, np.nan], [0.1, 0.3]]))
    assert parts[0].tolist() == [0, 0, 0, 0]
    assert parts[1, 0] == 2
    assert np.isnan(_interval_alpha_of(np.zeros(4)))
