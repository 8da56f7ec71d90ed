"""Pairs known to point the wrong way, against all others. The column that marks them is read by no other stage."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sp2dpo.evidence import Array, Evidence

__all__ = ["Marks", "auc", "read_marks"]


@dataclass(frozen=True)
class Marks:
    """`reversed_i` over the schedule; `problem` says why there is none."""

    column: str | None
    reversed_i: NDArray[np.bool_]
    in_source: int = 0
    unmarked: int = 0
    problem: str | None = None

    @property
    def n(self) -> int:
        return int(self.reversed_i.sum())

    @property
    def usable(self) -> bool:
        """Whether there is something to compare: a marked and an unmarked pair."""
        return 0 < self.n < len(self.reversed_i)


def read_marks(evidence: Evidence) -> Marks:
    """The marks of the scheduled pairs, from the column that `report.known_reversed` names."""
    column = evidence.run.process.settings.report.known_reversed
    none = np.zeros(evidence.n, bool)
    if column is None:
        return Marks(None, none)
    if column not in evidence.pairs.column_names:
        return Marks(column, none, problem=f"the source has no column '{column}'")
    values = evidence.pairs[column]
    if not (pa.types.is_boolean(values.type) or pa.types.is_integer(values.type)):
        return Marks(column, none, problem=f"column '{column}' holds {values.type}, not true and false")
    marked = np.array([bool(value) for value in values.to_pylist()])
    return Marks(column, marked[evidence.at_i], int(marked.sum()), values.null_count)


def auc(higher: Array, lower: Array) -> float | None:
    """P(a value of `higher` exceeds one of `lower`), ties half; None if either is empty."""
    if not len(higher) or not len(lower):
        return None
    ranked = np.sort(lower)
    below, upto = np.searchsorted(ranked, higher, "left"), np.searchsorted(ranked, higher, "right")
    return float((below + upto).sum() / 2 / (len(higher) * len(lower)))
