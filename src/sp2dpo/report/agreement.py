"""How far judgements agree: prompt against prompt, annotator against annotator. C.4. Arrays in, numbers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from sp2dpo.evidence import Array, Evidence

__all__ = ["Agreement", "between_annotators", "between_prompts", "correlation"]


@dataclass(frozen=True)
class Agreement:
    """Two sets of effective gaps of the same pairs. `same_category` is the share of pairs with the same one."""

    of: str
    one: str
    other: str
    x: Array
    y: Array
    same_category: float

    @property
    def correlation(self) -> float | None:
        return correlation(self.x, self.y)

    @property
    def difference(self) -> float:
        return float(np.abs(self.x - self.y).mean())


def correlation(x: Array, y: Array) -> float | None:
    """Pearson's r; None where it is not defined."""
    if len(x) < 3 or np.ptp(x) < 1e-12 or np.ptp(y) < 1e-12:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def between_prompts(evidence: Evidence) -> list[Agreement]:
    """Each two prompt variants of each annotator."""
    return [
        _agreement(a, evidence.variants, k, m, evidence.gap_ijk[:, j], evidence.category_ijk[:, j])
        for j, a in enumerate(evidence.annotators)
        for k, m in combinations(range(len(evidence.variants)), 2)
    ]


def between_annotators(evidence: Evidence) -> list[Agreement]:
    """Each two annotators, by their medians over prompts."""
    names = evidence.annotators
    category = np.stack([evidence.schedule[f"category_{a}_ens"].to_numpy() for a in names], axis=1)
    return [
        _agreement("medians", names, j, m, evidence.gap_ij, category) for j, m in combinations(range(len(names)), 2)
    ]


def _agreement(of: str, names: Sequence[str], one: int, other: int, gap: Array, category: Any) -> Agreement:
    same = float((category[:, one] == category[:, other]).mean())
    return Agreement(of, names[one], names[other], gap[:, one], gap[:, other], same)
