"""Two raters as a chart shows them: the figures of `audit.agreement` beside the gaps that they come from. C.4."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from sp2dpo.audit.agreement import Codes, Compared, category_codes, compare, majority_codes
from sp2dpo.evidence import Array, Evidence
from sp2dpo.report.panel import predictors_of

__all__ = ["Agreement", "between_annotators", "between_prompts"]


@dataclass(frozen=True)
class Agreement(Compared):
    """Two raters and their effective gaps of the pairs that both judged."""

    x: Array
    y: Array


def between_prompts(evidence: Evidence) -> list[Agreement]:
    """Each two prompt variants of each annotator that is no predictor."""
    predictors = predictors_of(evidence)
    codes = category_codes(evidence.category_ijk)
    return [
        _agreement(a, evidence.variants, one, other, evidence.gap_ijk[:, j], codes[:, j])
        for j, a in enumerate(evidence.annotators)
        if a not in predictors
        for one, other in combinations(range(len(evidence.variants)), 2)
    ]


def between_annotators(evidence: Evidence) -> list[Agreement]:
    """Each two annotators, by their gaps over prompts."""
    names, codes = evidence.annotators, majority_codes(evidence)
    return [
        _agreement("medians", names, one, other, evidence.gap_ij, codes)
        for one, other in combinations(range(len(names)), 2)
    ]


def _agreement(of: str, names: Sequence[str], one: int, other: int, gap: Array, codes: Codes) -> Agreement:
    x, y = gap[:, one], gap[:, other]
    both = ~np.isnan(x) & ~np.isnan(y)
    return Agreement(**vars(compare(of, names, one, other, gap, codes)), x=x[both], y=y[both])
