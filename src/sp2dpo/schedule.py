"""The schedule: one row for each pair that has a complete set of judgements, and a list of those that have not. E.3.

Columns are the paper's, in its order, then diagnostics, then `beta`, which training reads. Tables in, tables out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sp2dpo.calls import Cell
from sp2dpo.ensemble import annotator_mad, annotator_std, majority_category, median_over_prompts, prompt_disagreement
from sp2dpo.errors import Unfinished
from sp2dpo.settings import Schedule
from sp2dpo.tables import schema_of
from sp2dpo.temperature import envelope, mean_over_annotators, random_beta

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
        text[f"effective_gap_{a}_ens"] = "median over prompts (eq. 16)"
        text[f"beta_{a}_ens"] = "β of that median (eq. 33)"
    text |= {f"beta_annotators_mean_{v}": "mean over annotators of the β of this prompt" for v in variants}
    text["beta_annotators_mean_ens"] = "mean over annotators of beta_A_ens (eq. 17, 18)"
    text["beta_random"] = "Rand-β control: one uniform draw for each pair of the filtered file"
    text |= {
        f"prompt_disagreement_{a}": "median absolute deviation of the gap over prompts (eq. 36)" for a in annotators
    }
    text["annotator_std"] = "standard deviation of β over annotators, ddof 0 (eq. 37)"
    text["annotator_mad"] = "median absolute deviation of β over annotators (eq. 38)"
    text["category"] = "majority over the annotators' categories, for audit only (Algorithm 2, line 14)"
    text["beta"] = "the temperature that training reads"
    return text


def schedule_table(
    pairs: pa.Table, gaps: pa.Table, annotators: Sequence[str], variants: Sequence[str], settings: Schedule
) -> pa.Table:
    """The schedule of all pairs with a gap in each of their J × K cells, in the order of `pairs`.

    Raises:
        Unfinished: no pair has a complete set.
    """
    unique = pairs["pair_id"].unique()
    values, present = _cells(gaps, unique.to_pylist(), annotators, variants)
    at = pc.index_in(pairs["pair_id"], unique).to_numpy()
    kept = np.flatnonzero(present[at].all(axis=(1, 2)))
    if not len(kept):
        raise Unfinished("no pair has a complete set of valid answers; ask for them with: sp2dpo annotate PROCESS.yaml")
    random = random_beta(len(at), settings.beta_min, settings.beta_max, settings.random_seed)[kept]
    columns = {
        "prompt_id": pairs["prompt_id"].take(kept),
        "pair_id": pairs["pair_id"].take(kept),
        "prompt_variant_count": pa.array([len(variants)] * len(kept), pa.int64()),
        **_derived({name: value[at[kept]] for name, value in values.items()}, annotators, variants, settings, random),
    }
    return pa.table({name: columns[name] for name in columns_of(annotators, variants)})


def _cells(
    gaps: pa.Table, pair_ids: Sequence[Any], annotators: Sequence[str], variants: Sequence[str]
) -> tuple[dict[str, Any], NDArray[np.bool_]]:
    """Each value of the gaps as an array over i, j, k (i: `pair_ids`), and where there is one."""
    axes = {"pair_id": pair_ids, "annotator": annotators, "variant": variants}
    index = [pc.index_in(gaps[name], pa.array(known, pa.string())) for name, known in axes.items()]
    ours = pc.and_(pc.and_(index[0].is_valid(), index[1].is_valid()), index[2].is_valid())
    at = tuple(one.filter(ours).to_numpy() for one in index)
    shape = tuple(len(known) for known in axes.values())
    values: dict[str, Any] = {}
    for name in _PER_CALL[:-1]:
        values[name] = np.empty(shape, dtype=object if name == "category" else np.float64)
        values[name][at] = gaps[name].filter(ours).to_numpy()
    present = np.zeros(shape, dtype=np.bool_)
    present[at] = True
    return values, present


def _derived(
    values: Mapping[str, Any],
    annotators: Sequence[str],
    variants: Sequence[str],
    settings: Schedule,
    random: NDArray[np.float64],
) -> dict[str, Any]:
    """All columns that follow from the gaps. Table 7: SA, SE, MA and JMAMP are one estimator."""

    def f(gap: NDArray[np.float64]) -> NDArray[np.float64]:
        return envelope(gap, settings.beta_min, settings.beta_max)

    category_ijk, gap_ijk = values["category"], values["effective_gap"]
    beta_ijk = f(gap_ijk)
    gap_ij = median_over_prompts(gap_ijk)
    beta_ij = f(gap_ij)
    ens = [[majority_category(one) for one in row] for row in category_ijk]
    columns: dict[str, Any] = {}
    for j, a in enumerate(annotators):
        for k, v in enumerate(variants):
            for metric, value in (*values.items(), ("beta", beta_ijk)):
                columns[f"{metric}_{a}_{v}"] = value[:, j, k]
        columns[f"category_{a}_ens"] = [row[j][0] for row in ens]
        columns[f"category_{a}_ens_tie_break"] = [row[j][1] for row in ens]
        columns[f"effective_gap_{a}_ens"] = gap_ij[:, j]
        columns[f"beta_{a}_ens"] = beta_ij[:, j]
        columns[f"prompt_disagreement_{a}"] = prompt_disagreement(gap_ijk)[:, j]
    for k, v in enumerate(variants):
        columns[f"beta_annotators_mean_{v}"] = mean_over_annotators(beta_ijk[:, :, k])
    columns["beta_annotators_mean_ens"] = columns["beta"] = mean_over_annotators(beta_ij)
    columns["beta_random"] = random
    columns["annotator_std"] = annotator_std(beta_ij)
    columns["annotator_mad"] = annotator_mad(beta_ij)
    columns["category"] = [majority_category([one[0] for one in row])[0] for row in ens]
    return columns


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
