"""How far the panel agrees: Krippendorff's α, correlations, offsets of annotators and prompts. C.4, C.5.5.

Evidence in, plain numbers out; knows nothing of tables, charts or HTML. A unit is a pair and a rater is an annotator, a
prompt variant, or one of the J × K calls; a cell without a valid answer takes no part.

Intervals are 95 % percentile intervals over resamples of the pairs, all figures from the same resamples. Every figure
follows from sums over pairs, so a resample is one product of matrices, however many pairs there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, combinations
from typing import Any, Final, NamedTuple

import krippendorff
import numpy as np
from numpy.typing import ArrayLike, NDArray

from sp2dpo.correlation import correlation, rank_correlation
from sp2dpo.ensemble import additive_fit, robust_median
from sp2dpo.evidence import Array, Evidence, mean
from sp2dpo.rubric import CATEGORIES

__all__ = [
    "AgreementReport",
    "Among",
    "Codes",
    "Compared",
    "Estimate",
    "Offset",
    "agreement",
    "agreement_of",
    "category_codes",
    "compare",
    "interval_alpha",
    "majority_codes",
    "nominal_alpha",
]

RESAMPLES: Final = 500
SEED: Final = 42

_BLOCK: Final = 50
"""Resamples drawn at once: memory, not results."""

Codes = NDArray[np.int64]
"""Places of categories in `CATEGORIES`; −1 is no answer."""


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval. None is what is not defined; an interval is not where one pair bears on it."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Among:
    """How far several raters agree, over the pairs that at least two of them judged.

    Attributes:
        of: who they are: `annotators` (each by its schedule gap and majority category), `prompts of NAME`, `all calls`.
        raters: how many.
        pairs: how many pairs at least two of them judged.
        alpha_gap: interval α of the effective gap. 1: they always give the same number; 0: those of one pair are no
            closer than those of any two; below 0: further apart. It is low, too, where all pairs are alike.
        alpha_category: nominal α of the category, likewise.
        same_category: share of pairs to which all of them give the same category.
        mean_range: highest less lowest gap of a pair, on average over pairs, in units of the gap.
        mean_mad: median absolute deviation of the gaps of a pair (eq. 36), on average; blind to one outlier of three.
    """

    of: str
    raters: int
    pairs: int
    alpha_gap: Estimate
    alpha_category: Estimate
    same_category: float | None
    mean_range: float | None
    mean_mad: float | None


@dataclass(frozen=True)
class Compared:
    """Two raters, over the pairs that both judged.

    Attributes:
        of: `medians` (annotator against annotator), or the annotator whose prompts these are.
        one: name of the first.
        other: name of the second.
        pairs: how many pairs both judged.
        correlation: Pearson's r of their gaps: do they move together on a straight line? An offset does not lower it.
        rank_correlation: Spearman's ρ: do they put the pairs in the same order, on whatever scale?
        difference: mean absolute difference of their gaps, in units of the gap: an offset counts here.
        same_category: share of pairs with the same category.
    """

    of: str
    one: str
    other: str
    pairs: int
    correlation: float | None
    rank_correlation: float | None
    difference: float | None
    same_category: float | None


@dataclass(frozen=True)
class Offset:
    """How much higher, in units of the gap, an annotator or a prompt judges than the others do on the same pairs."""

    name: str
    offset: Estimate


@dataclass(frozen=True)
class AgreementReport:
    """All of it. What needs two annotators or two prompts is None or empty where there is one.

    Attributes:
        pairs: pairs of the schedule.
        answers: valid answers about them.
        annotators: agreement between annotators.
        prompts: agreement between the prompts of each annotator, its self-consistency.
        calls: agreement over all J × K calls, each a rater of its own.
        compared: each two annotators, then each two prompts of each annotator.
        annotator_offsets: b_j of gap_ijk = g_i + b_j + d_k (eq. 44); they sum to zero.
        prompt_offsets: d_k, likewise.
        ridge: penalty of that fit: what the process debiases with, or 0 if it does not.
        predictors: annotators that read no prompt and answer the same under each: one voice, so one rater in `calls`,
            with no place in `prompts` and none among the prompts in `compared`.
    """

    pairs: int
    answers: int
    annotators: Among | None
    prompts: tuple[Among, ...]
    calls: Among | None
    compared: tuple[Compared, ...]
    annotator_offsets: tuple[Offset, ...]
    prompt_offsets: tuple[Offset, ...]
    ridge: float
    predictors: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def agreement(evidence: Evidence) -> AgreementReport:
    """All figures of a run.

    Gaps of annotators are those of the schedule, so after debiasing and damping where the process has them; gaps of
    calls, and the offsets, are as answered.
    """
    settings = evidence.run.process.settings
    debias = settings.schedule.debias
    return agreement_of(
        evidence.annotators,
        evidence.variants,
        evidence.gap_ijk,
        category_codes(evidence.category_ijk),
        evidence.gap_ij,
        majority_codes(evidence),
        0.0 if debias is None else debias,
        settings.panel.predictors,
    )


def agreement_of(
    annotators: Sequence[str],
    variants: Sequence[str],
    gap_ijk: Array,
    code_ijk: Codes,
    gap_ij: Array,
    code_ij: Codes,
    ridge: float = 0.0,
    one_voice: Sequence[str] = (),
) -> AgreementReport:
    """All figures of these arrays: gaps and places of categories, of calls (N, J, K) and of annotators (N, J).

    Args:
        ridge: penalty of the offsets.
        one_voice: annotators whose answers under all variants are one and the same; their first variant is taken.
    """
    n = len(gap_ijk)
    groups = {"annotators": (gap_ij, code_ij)}
    prompted = [(j, a) for j, a in enumerate(annotators) if a not in one_voice]
    groups |= {f"prompts of {a}": (gap_ijk[:, j], code_ijk[:, j]) for j, a in prompted}
    if prompted and min(len(annotators), len(variants)) > 1:  # or they are the annotators, or the prompts of one
        voices = np.array([a not in one_voice or k == 0 for a in annotators for k in range(len(variants))])
        groups["all calls"] = gap_ijk.reshape(n, -1)[:, voices], code_ijk.reshape(n, -1)[:, voices]
    among, (b, d) = _estimated({of: one for of, one in groups.items() if one[0].shape[1] > 1}, gap_ijk, ridge)
    compared = [_each_two("medians", annotators, gap_ij, code_ij)]
    compared += [_each_two(a, variants, gap_ijk[:, j], code_ijk[:, j]) for j, a in prompted]
    return AgreementReport(
        pairs=n,
        answers=int((code_ijk >= 0).sum()),
        annotators=among.get("annotators"),
        prompts=tuple(one for of, one in among.items() if of.startswith("prompts of ")),
        calls=among.get("all calls"),
        compared=tuple(chain.from_iterable(compared)),
        annotator_offsets=_offsets(annotators, b),
        prompt_offsets=_offsets(variants, d) if prompted else (),
        ridge=ridge,
        predictors=tuple(a for a in annotators if a in one_voice),
    )


def majority_codes(evidence: Evidence) -> Codes:
    """The category of each annotator over its prompts, as the schedule has it: (N, J)."""
    return np.stack(
        [category_codes(evidence.schedule[f"category_{a}_ens"].to_numpy()) for a in evidence.annotators], axis=1
    )


def category_codes(categories: NDArray[np.object_]) -> Codes:
    """Places in `CATEGORIES`, −1 for None; any shape."""
    codes = np.full(categories.shape, -1, dtype=np.int64)
    for place, name in enumerate(CATEGORIES):
        codes[categories == name] = place
    return codes


# Krippendorff's α ---------------------------------------------------------------------------------------------------


def interval_alpha(values: ArrayLike) -> float | None:
    """Krippendorff's α of numbers, (units, raters) with NaN for missing; None where it is not defined.

    In its variance form, which is the coincidence form with (v − w)² as distance: with m_u values in unit u, n in all
    units that have two, and sums of squares about the means, α = 1 − (n − 1)/n · Σ_u m_u/(m_u − 1)·SS_u / SS_total.
    The library needs a matrix over all distinct values of all units, which continuous gaps do not allow.
    """
    return _defined(_interval_alpha_of(_interval_parts(np.asarray(values, dtype=np.float64)).sum(axis=0)))


def nominal_alpha(codes: Codes) -> float | None:
    """Krippendorff's α of categories, (units, raters) by place in `CATEGORIES`; None where it is not defined."""
    counts = _category_counts(codes)
    if (counts.sum(axis=0) > 0).sum() < 2:
        return None
    return float(krippendorff.alpha(value_counts=counts, level_of_measurement="nominal"))


def _interval_parts(values: Array) -> Array:
    """What `_interval_alpha_of` needs of each unit, (N, 4): m, Σv, Σv², m/(m − 1)·SS; zeros where m < 2."""
    there = ~np.isnan(values)
    there &= there.sum(axis=1, keepdims=True) > 1
    if not there.any():
        return np.zeros((len(values), 4))
    v = np.where(there, values - values[there].mean(), 0.0)
    m = there.sum(axis=1)
    total = v.sum(axis=1)
    within = (np.where(there, v - (total / np.maximum(m, 1))[:, None], 0.0) ** 2).sum(axis=1)
    return np.column_stack([m, total, (v**2).sum(axis=1), within * m / np.maximum(m - 1, 1)])


def _interval_alpha_of(sums: Array) -> Array:
    """(…, 4) → (…)."""
    n, total, squares, within = np.moveaxis(sums, -1, 0)
    spread = squares - total**2 / np.maximum(n, 1)
    return 1 - _ratio((n - 1) * within, n * spread, spread > 1e-12 * n)


def _nominal_parts(codes: Codes) -> Array:
    """What `_nominal_alpha_of` needs of each unit, (N, C + 1): its values of each category, and their disagreement."""
    counts = _category_counts(codes)
    m = counts.sum(axis=1, keepdims=True)
    apart = (counts * (m - counts)).sum(axis=1) / np.maximum(m[:, 0] - 1, 1)
    return np.column_stack([counts, apart]).astype(np.float64)


def _nominal_alpha_of(sums: Array) -> Array:
    """(…, C + 1) → (…)."""
    n_c, apart = sums[..., :-1], sums[..., -1]
    n = n_c.sum(axis=-1)
    expected = n**2 - (n_c**2).sum(axis=-1)
    return 1 - _ratio((n - 1) * apart, expected, expected > 0)


def _category_counts(codes: Codes) -> Codes:
    """Values of each category in each unit, (N, C); zeros for a unit with fewer than two."""
    counts = np.stack([(codes == code).sum(axis=1) for code in range(len(CATEGORIES))], axis=1)
    counts[counts.sum(axis=1) < 2] = 0
    return counts


def _ratio(over: Array, under: Array, defined: NDArray[np.bool_]) -> Array:
    ratio: Array = np.divide(over, under, out=np.full(np.shape(over), np.nan), where=defined)
    return ratio


# Offsets ------------------------------------------------------------------------------------------------------------


def _offset_parts(gap_ijk: Array) -> Array:
    """The normal equations of eq. 44 as each pair adds to them, its g_i eliminated: (N, P² + P) for P = J + K."""
    n, j, k = gap_ijk.shape
    gap = gap_ijk.reshape(n, j * k)
    design = np.column_stack([np.repeat(np.eye(j), k, axis=0), np.tile(np.eye(k), (j, 1))])  # (JK, P)
    there = (~np.isnan(gap)).astype(np.float64)
    calls = np.maximum(there.sum(axis=1, keepdims=True), 1)
    centred = np.where(there > 0, gap - np.nansum(gap, axis=1, keepdims=True) / calls, 0.0)
    seen = there @ design
    products = (design[:, :, None] * design[:, None, :]).reshape(j * k, -1)
    normal = there @ products - (seen[:, :, None] * seen[:, None, :]).reshape(n, -1) / calls
    return np.column_stack([normal, centred @ design])


def _offsets_of(sums: Array, j: int, k: int, ridge: float) -> Array:
    """(R, P² + P) → (R, P), the part of annotators and that of prompts each with sum zero."""
    p = j + k
    normal = sums[:, : p * p].reshape(-1, p, p) + ridge * np.eye(p)
    right = sums[:, p * p :, None]
    solved = (np.linalg.pinv(normal, rcond=1e-10, hermitian=True) @ right)[..., 0]
    solved[:, :j] -= solved[:, :j].mean(axis=1, keepdims=True)
    solved[:, j:] -= solved[:, j:].mean(axis=1, keepdims=True)
    return solved


def _offsets(names: Sequence[str], estimates: Sequence[Estimate]) -> tuple[Offset, ...]:
    return tuple(map(Offset, names, estimates)) if len(names) > 1 else ()


# Intervals ----------------------------------------------------------------------------------------------------------


class _Figure(NamedTuple):
    """What each pair adds to the sums of a figure, (N, S), and the figure of such sums, (R, S) → (R, …)."""

    parts: Array
    of_sums: Callable[[Array], Array]


def _resampled(figures: Sequence[_Figure]) -> list[Array]:
    """Each figure for each of `RESAMPLES` draws of as many pairs with replacement."""
    parts = np.concatenate([one.parts for one in figures], axis=1)
    n, rng = len(parts), np.random.default_rng(SEED)
    varying = np.ptp(parts, axis=0) > 0  # without missing cells, half of them do not
    sums = np.tile(n * parts[0], (RESAMPLES, 1))
    parts_varying = parts[:, varying]
    for start in range(0, RESAMPLES, _BLOCK):
        drawn = [np.bincount(rng.integers(0, n, n), minlength=n) for _ in range(_BLOCK)]
        sums[start : start + _BLOCK, varying] = np.array(drawn, dtype=np.float64) @ parts_varying
    ends = np.cumsum([one.parts.shape[1] for one in figures])
    return [one.of_sums(some) for one, some in zip(figures, np.split(sums, ends[:-1], axis=1), strict=True)]


def _estimate(value: float | None, drawn: Array, pairs: int) -> Estimate:
    drawn = drawn[~np.isnan(drawn)]
    if value is None or pairs < 2 or not len(drawn):
        return Estimate(value, None, None)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(value, float(low), float(high))


def _estimated(
    groups: dict[str, tuple[Array, Codes]], gap_ijk: Array, ridge: float
) -> tuple[dict[str, Among], tuple[list[Estimate], list[Estimate]]]:
    """Each group of raters by its name, and the offsets of annotators and of prompts."""
    j, k = gap_ijk.shape[1:]
    figures = [_Figure(_offset_parts(gap_ijk), lambda sums: _offsets_of(sums, j, k, ridge))]
    for gap, codes in groups.values():
        figures.append(_Figure(_interval_parts(gap), _interval_alpha_of))
        figures.append(_Figure(_nominal_parts(codes), _nominal_alpha_of))
    offsets_r, *alphas = _resampled(figures)
    fit = additive_fit(gap_ijk, ridge)
    values = zip((*fit.b, *fit.d), offsets_r.T, strict=True)
    offsets = [_estimate(float(value), drawn, len(gap_ijk)) for value, drawn in values]
    drawn = zip(alphas[::2], alphas[1::2], strict=True)
    among = {of: _among(of, *group, *r) for (of, group), r in zip(groups.items(), drawn, strict=True)}
    return among, (offsets[:j], offsets[j:])


def _among(of: str, gap: Array, codes: Codes, gap_r: Array, category_r: Array) -> Among:
    judged = (codes >= 0).sum(axis=1) > 1
    codes, pairs = codes[judged], int(judged.sum())
    gap = gap[(~np.isnan(gap)).sum(axis=1) > 1]
    same = ((codes == codes.max(axis=1, keepdims=True)) | (codes < 0)).all(axis=1)
    return Among(
        of=of,
        raters=gap.shape[1],
        pairs=pairs,
        alpha_gap=_estimate(interval_alpha(gap), gap_r, pairs),
        alpha_category=_estimate(nominal_alpha(codes), category_r, pairs),
        same_category=mean(same.astype(np.float64)),
        mean_range=mean(np.nanmax(gap, axis=1) - np.nanmin(gap, axis=1)),
        mean_mad=mean(robust_median(np.abs(gap - robust_median(gap)[:, None]))),
    )


def _defined(value: Array) -> float | None:
    return None if np.isnan(value) else float(value)


# Two raters ---------------------------------------------------------------------------------------------------------


def compare(of: str, names: Sequence[str], one: int, other: int, gap: Array, codes: Codes) -> Compared:
    """Columns `one` and `other` of gaps and categories, (N, M) for the M raters in `names`."""
    both = ~np.isnan(gap[:, one]) & ~np.isnan(gap[:, other])
    x, y = gap[both, one], gap[both, other]
    answered = (codes[:, one] >= 0) & (codes[:, other] >= 0)
    same = codes[answered, one] == codes[answered, other]
    return Compared(
        of=of,
        one=names[one],
        other=names[other],
        pairs=int(both.sum()),
        correlation=correlation(x, y),
        rank_correlation=rank_correlation(x, y),
        difference=mean(np.abs(x - y)),
        same_category=mean(same.astype(np.float64)),
    )


def _each_two(of: str, names: Sequence[str], gap: Array, codes: Codes) -> Iterator[Compared]:
    for one, other in combinations(range(len(names)), 2):
        yield compare(of, names, one, other, gap, codes)
