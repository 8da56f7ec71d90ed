"""The numbers of the sections, ready for the template. Knows nothing of HTML or charts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sp2dpo.audit.errors import LabelErrors
from sp2dpo.evidence import Evidence, mean, median
from sp2dpo.report.cards import Card, card
from sp2dpo.report.marks import Marks, auc
from sp2dpo.rubric import CATEGORIES

__all__ = [
    "CategoryRow",
    "Reversed",
    "category_rows",
    "doubted",
    "extremes",
    "first_read",
    "highest",
    "most_disagreed",
    "reversed_section",
]

SHOWN = 5
MOST_REVERSED = 30
MOST_WANTED = 500


@dataclass(frozen=True)
class CategoryRow:
    """β of the pairs of one category."""

    name: str
    n: int
    mean: float | None
    median: float | None
    low: float | None
    high: float | None
    magnitude: float | None
    confidence: float | None
    ties: int


def category_rows(evidence: Evidence) -> list[CategoryRow]:
    """A row for each category, in the order of priority."""
    return [_category(evidence, name, evidence.category_i == name) for name in CATEGORIES]


def _category(evidence: Evidence, name: str, of_i: NDArray[np.bool_]) -> CategoryRow:
    beta = evidence.beta_i[of_i]
    return CategoryRow(
        name=name,
        n=len(beta),
        mean=mean(beta),
        median=median(beta),
        low=float(beta.min()) if len(beta) else None,
        high=float(beta.max()) if len(beta) else None,
        magnitude=mean(evidence.magnitude_ijk[of_i].ravel()),
        confidence=mean(evidence.confidence_ijk[of_i].ravel()),
        ties=int(evidence.tie_ij[of_i].any(axis=1).sum()),
    )


def doubted(evidence: Evidence, marks: Marks, errors: LabelErrors) -> list[Card]:
    """The likeliest label errors."""
    return _cards(evidence, marks, errors.listed[:SHOWN])


def first_read(evidence: Evidence, marks: Marks, errors: LabelErrors) -> list[int]:
    """Pairs whose texts a reader wants before all others: the doubted, the reversed, the extremes, the disagreed."""
    by_beta, spread = np.argsort(-evidence.beta_i, kind="stable"), np.argsort(-evidence.spread_i, kind="stable")
    ends = [by_beta[:MOST_WANTED], by_beta[::-1][:MOST_WANTED], spread[:MOST_WANTED]]
    return [int(i) for i in np.concatenate([errors.listed, np.flatnonzero(marks.reversed_i), *ends])]


def highest(evidence: Evidence) -> int:
    """Row of the pair with the highest β, that `extremes` shows first."""
    return int(np.argsort(-evidence.beta_i, kind="stable")[0])


def extremes(evidence: Evidence, marks: Marks) -> tuple[list[Card], list[Card]]:
    """The pairs with the highest and with the lowest β; no pair is in both."""
    order = np.argsort(-evidence.beta_i, kind="stable")
    top = min(SHOWN, -(-evidence.n // 2))
    low = min(SHOWN, evidence.n - top)
    return _cards(evidence, marks, order[:top]), _cards(evidence, marks, order[::-1][:low])


def most_disagreed(evidence: Evidence, marks: Marks) -> list[Card]:
    """The pairs whose judgements lie furthest apart, if they differ at all."""
    order = np.argsort(-evidence.spread_i, kind="stable")[:SHOWN]
    return _cards(evidence, marks, order[evidence.spread_i[order] > 0])


def _cards(evidence: Evidence, marks: Marks, rows: NDArray[np.int64]) -> list[Card]:
    return [card(evidence, int(i), reversed=bool(marks.reversed_i[i])) for i in rows]


@dataclass(frozen=True)
class Reversed:
    """The pairs known to be reversed, those with the highest β first."""

    cards: list[Card]
    above: list[float]
    n: int
    n_others: int
    mean: float | None
    mean_others: float | None
    median_others: float
    auc: float | None
    fooled: int


def reversed_section(evidence: Evidence, marks: Marks) -> Reversed | None:
    """None if no pair of the schedule is marked, or all are."""
    if not marks.usable:
        return None
    wrong, right = evidence.beta_i[marks.reversed_i], evidence.beta_i[~marks.reversed_i]
    rows = np.flatnonzero(marks.reversed_i)
    rows = rows[np.argsort(-evidence.beta_i[rows], kind="stable")][:MOST_REVERSED]
    ranked = np.sort(right)
    return Reversed(
        cards=_cards(evidence, marks, rows),
        above=[float(np.searchsorted(ranked, beta) / len(ranked)) for beta in evidence.beta_i[rows]],
        n=len(wrong),
        n_others=len(right),
        mean=mean(wrong),
        mean_others=mean(right),
        median_others=float(np.median(right)),
        auc=auc(evidence.gap_i[~marks.reversed_i], evidence.gap_i[marks.reversed_i]),
        fooled=int((wrong > np.median(right)).sum()),
    )
