"""The schedule: one row for each pair that has a complete set of judgements, and a list of those that have not. E.3.

Columns are the paper's, in its order, then diagnostics, then `beta`, which training reads. Tables in, tables out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sp2dpo.calls import Cell
from sp2dpo.ensemble import (
    additive_fit,
    annotator_mad,
    annotator_std,
    damp,
    huber_mean,
    majority_categories,
    median_over_prompts,
    pooled_gap,
    prompt_disagreement,
    robust_median,
    trimmed_mean,
    weighted_mean,
    weighted_over_annotators,
    weighted_over_prompts,
)
from sp2dpo.errors import Unfinished
from sp2dpo.rubric import CATEGORIES
from sp2dpo.settings import Schedule
from sp2dpo.tables import schema_of
from sp2dpo.temperature import clip01, envelope, random_beta

Array = NDArray[np.float64]

__all__ = ["EXCLUDED_SCHEMA", "EXCLUSIONS", "columns_of", "excluded_table", "schedule_table"]

EXCLUDED_SCHEMA = schema_of(
    stage=pa.string(),
    source_row=pa.int64(),
    prompt_id=pa.string(),
    pair_id=pa.string(),
    reason=pa.string(),
    detail=pa.string(),
)

EXCLUSIONS: Final = {
    "no_valid_answer": "at least one question was asked and never answered validly",
    "not_asked": "its open questions were not asked yet, for example because of --limit",
}
"""Reasons for which a pair has no complete set of answers."""

_PER_CALL = ("category", "magnitude", "confidence", "effective_gap", "beta")


def columns_of(annotators: Sequence[str], variants: Sequence[str]) -> dict[str, str]:
    """Every column of the schedule in order, with what it is; the paper's are 64 for J = K = 3."""
    text = {"prompt_id": "the source's id of the pair", "pair_id": "sha256 of prompt, chosen and rejected"}
    text["prompt_variant_count"] = "K"
    meaning = {
        "category": "category of the call",
        "magnitude": "magnitude of the call (eq. 22)",
        "confidence": "confidence of the call (eq. 23)",
        "effective_gap": "magnitude × confidence (eq. 29)",
        "beta": "β of the call (eq. 15)",
    }
    for a in annotators:
        text |= {f"{metric}_{a}_{v}": meaning[metric] for v in variants for metric in _PER_CALL}
    for a in annotators:
        text[f"category_{a}_ens"] = "majority over prompts, ties by priority (eq. 32)"
        text[f"category_{a}_ens_tie_break"] = "whether a tie was broken"
        text[f"effective_gap_{a}_ens"] = "median over prompts (eq. 16), or as over_prompts, debias and damping say"
        text[f"beta_{a}_ens"] = "β of that gap (eq. 33)"
    text |= {f"beta_annotators_mean_{v}": "mean over annotators of the β of this prompt" for v in variants}
    text["beta_annotators_mean_ens"] = "mean over annotators of beta_A_ens (eq. 17, 18)"
    text["beta_random"] = "Rand-β control: one uniform draw for each pair of the filtered file"
    text |= {
        f"prompt_disagreement_{a}": "median absolute deviation of the gap over prompts (eq. 36)" for a in annotators
    }
    text["annotator_std"] = "standard deviation of β over annotators, ddof 0 (eq. 37)"
    text["annotator_mad"] = "median absolute deviation of β over annotators (eq. 38)"
    text["category"] = "majority over the annotators' categories, for audit only (Algorithm 2, line 14)"
    text["valid_calls"] = "valid answers about the pair; J × K unless min_calls asks for fewer"
    text["effective_gap"] = "gap of the pair: over annotators as β, or over all calls at once"
    text["beta"] = "the temperature that training reads"
    return text


def schedule_table(
    pairs: pa.Table, gaps: pa.Table, annotators: Sequence[str], variants: Sequence[str], settings: Schedule
) -> pa.Table:
    """The schedule of the pairs with enough valid answers, of J × K as a rule, in the order of `pairs`.

    Raises:
        Unfinished: no pair has enough.
    """
    unique = pairs["pair_id"].unique()
    cells = _cells(gaps, unique, annotators, variants)
    at = pc.index_in(pairs["pair_id"], unique).to_numpy()
    valid = (cells.category >= 0)[at]
    if settings.min_calls is None:
        needed, taken = len(annotators) * len(variants), valid
    else:
        needed, taken = settings.min_calls, valid & (_call_weights(annotators, variants, settings) > 0)
    kept = np.flatnonzero(taken.sum(axis=(1, 2)) >= needed)
    if not len(kept):
        raise Unfinished(
            f"no pair has {'a complete set of' if settings.min_calls is None else needed} valid answers; "
            "ask for them with: sp2dpo annotate PROCESS.yaml"
        )
    columns = {
        "prompt_id": pairs["prompt_id"].take(kept).combine_chunks(),
        "pair_id": pairs["pair_id"].take(kept).combine_chunks(),
        "prompt_variant_count": np.full(len(kept), len(variants)),
        "beta_random": random_beta(len(at), settings.beta_min, settings.beta_max, settings.random_seed)[kept],
        "valid_calls": valid[kept].sum(axis=(1, 2)),
        **_derived(_Cells(*(value[at[kept]] for value in cells)), annotators, variants, settings),
    }
    return pa.table({name: pa.array(columns[name], from_pandas=True) for name in columns_of(annotators, variants)})


class _Cells(NamedTuple):
    """What the calls say, over i, j, k: the place of the category in `CATEGORIES`, −1 and NaN without an answer."""

    category: NDArray[np.int64]
    magnitude: Array
    confidence: Array
    effective_gap: Array


def _cells(gaps: pa.Table, pair_ids: Any, annotators: Sequence[str], variants: Sequence[str]) -> _Cells:
    axes = {"pair_id": pair_ids, "annotator": pa.array(annotators), "variant": pa.array(variants)}
    index = [pc.index_in(gaps[name], known) for name, known in axes.items()]
    ours = pc.and_(pc.and_(index[0].is_valid(), index[1].is_valid()), index[2].is_valid())
    at = tuple(one.filter(ours).to_numpy() for one in index)
    shape = tuple(len(known) for known in axes.values())
    category = np.full(shape, -1, dtype=np.int64)
    category[at] = pc.index_in(gaps["category"], pa.array(CATEGORIES)).filter(ours).to_numpy()
    numbers = []
    for name in ("magnitude", "confidence", "effective_gap"):
        number = np.full(shape, np.nan)
        number[at] = gaps[name].filter(ours).to_numpy()
        numbers.append(number)
    return _Cells(category, *numbers)


def _derived(cells: _Cells, annotators: Sequence[str], variants: Sequence[str], settings: Schedule) -> dict[str, Any]:
    """All columns that follow from the calls. Table 7: SA, SE, MA and JMAMP are one estimator."""
    category_ij, tie_ij = majority_categories(cells.category)
    category_i, _ = majority_categories(category_ij)
    numbers = {name: value for name, value in cells._asdict().items() if name != "category"}
    low, high = _bounds(category_i, settings)

    def f(gap: Array) -> Array:
        axes = (...,) + (None,) * (gap.ndim - 1)
        return envelope(gap, low[axes], high[axes])

    gap_ijk = cells.effective_gap
    disagreement_ij = prompt_disagreement(gap_ijk)
    beta_ijk, gap_ij = f(gap_ijk), _over_prompts(gap_ijk, disagreement_ij, variants, settings)
    beta_ij = f(gap_ij)
    columns: dict[str, Any] = {}
    for j, a in enumerate(annotators):
        for k, v in enumerate(variants):
            columns[f"beta_{a}_{v}"] = beta_ijk[:, j, k]
            columns[f"category_{a}_{v}"] = _named(cells.category[:, j, k])
            columns |= {f"{name}_{a}_{v}": value[:, j, k] for name, value in numbers.items()}
        columns[f"category_{a}_ens"] = _named(category_ij[:, j])
        columns[f"category_{a}_ens_tie_break"] = tie_ij[:, j]
        columns[f"effective_gap_{a}_ens"] = gap_ij[:, j]
        columns[f"beta_{a}_ens"] = beta_ij[:, j]
        columns[f"prompt_disagreement_{a}"] = disagreement_ij[:, j]
    for k, v in enumerate(variants):
        columns[f"beta_annotators_mean_{v}"] = weighted_mean(beta_ijk[:, :, k])
    columns["beta_annotators_mean_ens"] = weighted_mean(beta_ij)
    columns["annotator_std"], columns["annotator_mad"] = annotator_std(beta_ij), annotator_mad(beta_ij)
    columns["category"] = _named(category_i)
    if settings.over_calls:
        columns["effective_gap"] = _over_calls(gap_ijk, annotators, variants, settings)
        columns["beta"] = f(columns["effective_gap"])
    else:
        columns["effective_gap"] = _over_annotators(clip01(gap_ij), annotators, settings)
        in_gaps = settings.over_annotators == "huber"  # its δ is in units of the gap; the others commute with f
        columns["beta"] = f(columns["effective_gap"]) if in_gaps else _over_annotators(beta_ij, annotators, settings)
    return columns


def _bounds(category_i: NDArray[np.int64], settings: Schedule) -> tuple[Array, Array]:
    """The envelope of each pair, that of its category if it has one: two of (N,)."""
    envelopes = [settings.envelopes.get(category, settings) for category in CATEGORIES]
    low, high = (np.array([getattr(one, name) for one in envelopes]) for name in ("beta_min", "beta_max"))
    return low[category_i], high[category_i]


def _over_prompts(gap_ijk: Array, disagreement_ij: Array, variants: Sequence[str], settings: Schedule) -> Array:
    """Gaps of calls (N, J, K) to gaps of annotators (N, J)."""
    gap = _debiased(gap_ijk, settings)
    if settings.over_prompts == "mean":
        gap_ij = weighted_over_prompts(gap, _weights(settings.prompt_weights, variants))
    else:
        gap_ij = median_over_prompts(gap)
    if settings.damping:
        gap_ij = damp(gap_ij, disagreement_ij, settings.damping.strength, settings.damping.form)
    return gap_ij


def _over_annotators(values_ij: Array, annotators: Sequence[str], settings: Schedule) -> Array:
    """(N, J) to (N,)."""
    if settings.annotator_weights is not None:
        return weighted_over_annotators(values_ij, _weights(settings.annotator_weights, annotators))
    return _centre(settings.over_annotators, values_ij, settings)


def _over_calls(gap_ijk: Array, annotators: Sequence[str], variants: Sequence[str], settings: Schedule) -> Array:
    """Gaps of calls (N, J, K) to gaps of pairs (N,), all calls at once."""
    gap = _debiased(gap_ijk, settings)
    if settings.over_calls == "mean":
        pooled = pooled_gap(gap, _call_weights(annotators, variants, settings))
    else:
        pooled = _centre(str(settings.over_calls), gap.reshape(len(gap), -1), settings)
    return clip01(pooled)


def _centre(operator: str, values: Array, settings: Schedule) -> Array:
    """One of the operators over the last axis."""
    if operator == "huber":
        return huber_mean(values, settings.huber_delta)
    if operator == "trimmed_mean":
        return trimmed_mean(values, settings.trim)
    return robust_median(values) if operator == "median" else weighted_mean(values)


def _debiased(gap_ijk: Array, settings: Schedule) -> Array:
    if settings.debias is None:
        return gap_ijk
    offsets = additive_fit(gap_ijk, settings.debias)
    debiased: Array = gap_ijk - offsets.b[:, None] - offsets.d
    return debiased


def _weights(weights: Mapping[str, float] | None, names: Sequence[str]) -> Array:
    return np.ones(len(names)) if weights is None else np.array([weights[name] for name in names])


def _call_weights(annotators: Sequence[str], variants: Sequence[str], settings: Schedule) -> Array:
    """w_jk = α_j·γ_k, (J, K)."""
    alpha, gamma = _weights(settings.annotator_weights, annotators), _weights(settings.prompt_weights, variants)
    return np.outer(alpha, gamma)


def _named(codes: NDArray[np.int64]) -> Any:
    """Categories by their places, null for −1."""
    return pc.take(pa.array(CATEGORIES), pa.array(codes, pa.int64(), mask=codes < 0))


def excluded_table(
    pairs: pa.Table,
    dropped: pa.Table,
    gaps: pa.Table,
    scheduled: pa.Table,
    failures: Mapping[Cell, str],
    annotators: Sequence[str],
    variants: Sequence[str],
) -> pa.Table:
    """Every row of the source that is not in the schedule: dropped by `prepare`, or without a full set of answers.

    Args:
        failures: how the last attempt at a question without a valid answer ended.
    """
    rows = [{"stage": "prepare", "detail": None, **row} for row in dropped.to_pylist()]
    known = [name for name in ("pair_id", "prompt_id", "source_row") if name in pairs.column_names]
    answered = _answered(_without(gaps, scheduled))
    for pair in _without(pairs.select(known), scheduled).to_pylist():
        cells = [(pair["pair_id"], a, v) for a in annotators for v in variants]
        missing = [cell for cell in cells if cell not in answered]
        rows.append({"stage": "annotate", **pair, **_why(missing, failures)})
    return pa.Table.from_pylist(rows, schema=EXCLUDED_SCHEMA)


def _without(table: pa.Table, scheduled: pa.Table) -> pa.Table:
    """Rows of pairs that are not in the schedule."""
    return table.filter(pc.invert(pc.is_in(table["pair_id"], scheduled["pair_id"].unique())))


def _answered(gaps: pa.Table) -> set[Cell]:
    return set(zip(*(gaps[name].to_pylist() for name in ("pair_id", "annotator", "variant")), strict=True))


def _why(missing: Sequence[Cell], failures: Mapping[Cell, str]) -> dict[str, str]:
    outcome = {cell: failures.get(cell, "not asked") for cell in missing}
    detail = "; ".join(f"{annotator}/{variant}: {why}" for (_, annotator, variant), why in outcome.items())
    asked = any(cell in failures for cell in missing)
    return {"reason": "no_valid_answer" if asked else "not_asked", "detail": detail}
