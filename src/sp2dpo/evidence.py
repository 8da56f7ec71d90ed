"""A run directory as arrays: what the report and the audit are made from. Reads only; knows nothing of HTML or charts.

Index letters: i pairs of the schedule, j annotators, k prompt variants. A call without a valid answer (which only
`min_calls` lets into the schedule) is NaN, None in `category_ijk`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sp2dpo.errors import ScheduleError
from sp2dpo.pairs import read_pairs
from sp2dpo.runs import Run
from sp2dpo.schedule import columns_of
from sp2dpo.stages import read_schedule

__all__ = ["Array", "Evidence", "mean", "median", "read_evidence"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Evidence:
    """The schedule and the judgements behind it; `at_i` is the row of each scheduled pair in `pairs`.

    `gap_i` is the effective gap of the pair, which β is made from; `gap_ij` that of an annotator over its prompts.
    """

    run: Run
    annotators: tuple[str, ...]
    variants: tuple[str, ...]
    pairs: pa.Table
    schedule: pa.Table
    at_i: NDArray[np.int64]
    beta_i: Array
    gap_i: Array
    category_i: NDArray[np.object_]
    category_ijk: NDArray[np.object_]
    magnitude_ijk: Array
    confidence_ijk: Array
    gap_ijk: Array
    gap_ij: Array
    beta_ij: Array
    tie_ij: NDArray[np.bool_]
    disagreement_ij: Array
    annotator_std_i: Array

    @property
    def n(self) -> int:
        return len(self.beta_i)

    @property
    def pair_ids(self) -> list[str]:
        """Of all pairs, scheduled or not."""
        ids: list[str] = self.pairs["pair_id"].to_pylist()  # type: ignore[assignment]
        return ids

    @property
    def spread_i(self) -> Array:
        """Highest less lowest effective gap of all judgements of a pair."""
        gaps = self.gap_ijk.reshape(self.n, -1)
        spread: Array = np.nanmax(gaps, axis=1) - np.nanmin(gaps, axis=1)
        return spread


def read_evidence(run: Run) -> Evidence:
    """Read the schedule and its pairs.

    Raises:
        RunDirError: a file is missing.
        ScheduleError: the schedule lacks a column, or has a pair that is not among the pairs.
    """
    panel = run.process.settings.panel
    annotators, variants = tuple(a.name for a in panel.annotators), panel.variants
    pairs, schedule = read_pairs(run.pairs, run.command("annotate")), read_schedule(run)
    missing = [name for name in columns_of(annotators, variants) if name not in schedule.column_names]
    if missing:
        wrong = f"{run.schedule} has no column {', '.join(missing)}"
        raise ScheduleError(f"{wrong}; make it with: {run.command('schedule')}")
    metrics = ("category", "magnitude", "confidence", "effective_gap")
    cell = {metric: _cells(schedule, metric, annotators, variants) for metric in metrics}
    return Evidence(
        run=run,
        annotators=annotators,
        variants=variants,
        pairs=pairs,
        schedule=schedule,
        at_i=_rows_of(run, pairs, schedule),
        beta_i=_column(schedule, "beta"),
        gap_i=_column(schedule, "effective_gap"),
        category_i=_column(schedule, "category"),
        category_ijk=cell["category"],
        magnitude_ijk=cell["magnitude"],
        confidence_ijk=cell["confidence"],
        gap_ijk=cell["effective_gap"],
        gap_ij=_each(schedule, "effective_gap_{}_ens", annotators),
        beta_ij=_each(schedule, "beta_{}_ens", annotators),
        tie_ij=_each(schedule, "category_{}_ens_tie_break", annotators),
        disagreement_ij=_each(schedule, "prompt_disagreement_{}", annotators),
        annotator_std_i=_column(schedule, "annotator_std"),
    )


def _column(table: pa.Table, name: str) -> Any:
    return table[name].to_numpy()


def _each(schedule: pa.Table, name: str, annotators: Sequence[str]) -> Any:
    return np.stack([_column(schedule, name.format(a)) for a in annotators], axis=1)


def _cells(schedule: pa.Table, metric: str, annotators: Sequence[str], variants: Sequence[str]) -> Any:
    return np.stack([np.stack([_column(schedule, f"{metric}_{a}_{v}") for v in variants], 1) for a in annotators], 1)


def _rows_of(run: Run, pairs: pa.Table, schedule: pa.Table) -> NDArray[np.int64]:
    """Row in `pairs` of each row of the schedule; the prompt_id tells apart two pairs of the same text."""
    known = {key: n for n, key in enumerate(zip(*_keys(pairs), strict=True))}
    rows = [known.get(key) for key in zip(*_keys(schedule), strict=True)]
    lost = next((n for n, row in enumerate(rows) if row is None), None)
    if lost is not None:
        pair = schedule["pair_id"][lost].as_py()
        raise ScheduleError(f"pair {pair} of the schedule is not in pairs.parquet; run: {run.command('schedule')}")
    return np.array(rows, np.int64)


def _keys(table: pa.Table) -> tuple[list[Any], list[Any]]:
    return table["pair_id"].to_pylist(), table["prompt_id"].to_pylist()


def mean(values: Array) -> float | None:
    """The mean of the numbers that are there, or None of nothing."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else None


def median(values: Array) -> float | None:
    """The median of the numbers that are there, or None of nothing."""
    return float(np.nanmedian(values)) if np.isfinite(values).any() else None
