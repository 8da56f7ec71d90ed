"""What moved between two schedules: β of the pairs that both have, by category, and the pairs that only one has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sp2dpo.compare.overview import operators
from sp2dpo.correlation import rank_correlation
from sp2dpo.evidence import Array, Evidence, mean
from sp2dpo.rubric import CATEGORIES
from sp2dpo.stages import read_excluded

__all__ = [
    "MOVED",
    "CategoryMove",
    "Change",
    "ELSEWHERE",
    "Lone",
    "Matched",
    "Moved",
    "Moves",
    "match",
    "moves",
]

MOVED: Final = 0.01
"""A β that changes by more than this is called moved."""

SHOWN: Final = 10
"""Pairs that are listed, of those that moved most and of those that only one run has."""

ELSEWHERE: Final = "not_in_source"
"""Reason for a pair that the other run has neither scheduled nor excluded."""

_SAME: Final = 1e-9
"""Gaps that differ by less are the same answer."""

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Matched:
    """Two runs joined by pair_id: rows of their schedules, each pair_id once, in the order of the first run.

    `rows` are of the pairs that both have, `alone` of those that the run alone has.
    """

    one: Evidence
    other: Evidence
    labels: tuple[str, str]
    rows: tuple[Rows, Rows]
    alone: tuple[Rows, Rows]
    operators: tuple[str, ...]

    @cached_property
    def beta(self) -> tuple[Array, Array]:
        return self.one.beta_i[self.rows[0]], self.other.beta_i[self.rows[1]]

    @cached_property
    def category(self) -> tuple[NDArray[np.object_], NDArray[np.object_]]:
        return self.one.category_i[self.rows[0]], self.other.category_i[self.rows[1]]

    @cached_property
    def delta(self) -> Array:
        """β of the other run less β of the first."""
        change: Array = self.beta[1] - self.beta[0]
        return change


@dataclass(frozen=True)
class Change:
    """How β changes over `n` pairs; numbers are None for no pairs.

    Shares of these pairs: `moved` by more than `MOVED`, `up` or `down` by so much, and in the `same_category`.
    """

    n: int
    beta_one: float | None
    beta_other: float | None
    mean: float | None
    mean_absolute: float | None
    moved: float | None
    up: float | None
    down: float | None
    same_category: float | None


@dataclass(frozen=True)
class CategoryMove(Change):
    """The pairs of a category of the first run, and where the other run puts them."""

    name: str
    to: dict[str, int]


@dataclass(frozen=True)
class Moved:
    """A pair that both have; `rows` are its rows in the two schedules."""

    pair_id: str
    prompt_id: str
    beta: tuple[float, float]
    category: tuple[str, str]
    why: str
    rows: tuple[int, int]


@dataclass(frozen=True)
class LonePair:
    """A pair that only one run has."""

    pair_id: str
    prompt_id: str
    beta: float
    reason: str


@dataclass(frozen=True)
class Lone:
    """The pairs that only one run has: how many, why the other has them not, and the first of them."""

    label: str
    n: int
    reasons: dict[str, int]
    first: tuple[LonePair, ...]


@dataclass(frozen=True)
class Moves:
    """The first run against another one."""

    labels: tuple[str, str]
    both: int
    all: Change
    spearman: float | None
    categories: tuple[CategoryMove, ...]
    moved_most: tuple[Moved, ...]
    lost: Lone
    gained: Lone


def match(one: Evidence, other: Evidence, labels: tuple[str, str]) -> Matched:
    """Join two runs; of several rows with the same texts, and so the same β, the first stands for all."""
    (ids, first), (other_ids, other_first) = _distinct(one), _distinct(other)
    _, here, there = np.intersect1d(ids, other_ids, assume_unique=True, return_indices=True)
    order = np.argsort(first[here])
    alone = np.sort(np.delete(first, here)), np.sort(np.delete(other_first, there))
    rows = first[here][order], other_first[there][order]
    return Matched(one, other, labels, rows, alone, operators(one.run, other.run))


def _distinct(evidence: Evidence) -> tuple[NDArray[np.str_], Rows]:
    """Each pair_id, and its first row."""
    return np.unique(np.array(evidence.schedule["pair_id"].to_pylist(), np.str_), return_index=True)


def moves(matched: Matched) -> Moves:
    """The numbers of a comparison."""
    most = np.argsort(-np.abs(matched.delta), kind="stable")[:SHOWN]
    return Moves(
        labels=matched.labels,
        both=len(matched.delta),
        all=_change(matched, np.ones(len(matched.delta), bool)),
        spearman=rank_correlation(*matched.beta),
        categories=tuple(_category(matched, name) for name in CATEGORIES),
        moved_most=tuple(_moved(matched, int(at)) for at in most if matched.delta[at]),
        lost=_lone(matched.one, matched.other, matched.alone[0], matched.labels[0]),
        gained=_lone(matched.other, matched.one, matched.alone[1], matched.labels[1]),
    )


def _change(matched: Matched, of: NDArray[np.bool_]) -> Change:
    delta, (one, other) = matched.delta[of], matched.category
    return Change(
        n=int(of.sum()),
        beta_one=mean(matched.beta[0][of]),
        beta_other=mean(matched.beta[1][of]),
        mean=mean(delta),
        mean_absolute=mean(np.abs(delta)),
        moved=_share(np.abs(delta) > MOVED),
        up=_share(delta > MOVED),
        down=_share(delta < -MOVED),
        same_category=_share(one[of] == other[of]),
    )


def _share(of: NDArray[np.bool_]) -> float | None:
    return float(of.mean()) if len(of) else None


def _category(matched: Matched, name: str) -> CategoryMove:
    of = matched.category[0] == name
    to = Counter(matched.category[1][of].tolist())
    return CategoryMove(**vars(_change(matched, of)), name=name, to={each: to[each] for each in CATEGORIES})


def _moved(matched: Matched, at: int) -> Moved:
    i, m = (int(rows[at]) for rows in matched.rows)
    return Moved(
        pair_id=matched.one.schedule["pair_id"][i].as_py(),
        prompt_id=matched.one.schedule["prompt_id"][i].as_py(),
        beta=(float(matched.beta[0][at]), float(matched.beta[1][at])),
        category=(str(matched.category[0][at]), str(matched.category[1][at])),
        why="; ".join(_why(matched, i, m)),
        rows=(i, m),
    )


def _why(matched: Matched, i: int, m: int) -> Iterator[str]:
    """The annotator whose gap moved most, who was asked in one run only, the operators that differ."""
    one, other = matched.one, matched.other
    moved = [_gap_of(matched, a, i, m) for a in one.annotators if a in other.annotators]
    if any(how_far for _, how_far, _ in moved):
        yield max(moved)[2]
    panels = [*_only(matched.labels, one.annotators, other.annotators)]
    panels += [(label, f"prompt {v}") for label, v in _only(matched.labels, one.variants, other.variants)]
    yield from (f"{name} only in {label}" for label, name in panels)
    if matched.operators:
        yield "settings: " + ", ".join(key.removeprefix("schedule.") for key in matched.operators)
    schedule = one.run.process.settings.schedule
    if schedule.envelopes and one.category_i[i] != other.category_i[m]:
        yield "the envelope of another category"
    if schedule.debias is not None and not (panels or matched.operators or any(answers for answers, _, _ in moved)):
        yield "same answers; the offsets of debiasing come from all pairs"


def _gap_of(matched: Matched, a: str, i: int, m: int) -> tuple[bool, float, str]:
    """Whether an annotator's answers changed, how far its gap over the prompts moved, and that in words."""
    one, other = matched.one, matched.other
    j, at_other = one.annotators.index(a), other.annotators.index(a)
    shared = [v for v in one.variants if v in other.variants]
    before = one.gap_ijk[i, j, [one.variants.index(v) for v in shared]]
    after = other.gap_ijk[m, at_other, [other.variants.index(v) for v in shared]]
    answers = not np.allclose(before, after, rtol=0, atol=_SAME, equal_nan=True)
    gaps = float(one.gap_ij[i, j]), float(other.gap_ij[m, at_other])
    told = " → ".join("no answer" if np.isnan(gap) else f"{gap:.2f}" for gap in gaps)
    how_far = 0.0 if all(np.isnan(gaps)) else abs(np.nan_to_num(gaps[1]) - np.nan_to_num(gaps[0]))
    return answers, float(how_far) if how_far > _SAME else 0.0, f"gap of {a} {told}"


def _only(labels: tuple[str, str], one: tuple[str, ...], other: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Names that are on one side only, with its label."""
    yield from ((labels[0], name) for name in one if name not in other)
    yield from ((labels[1], name) for name in other if name not in one)


def _lone(having: Evidence, lacking: Evidence, rows: Rows, label: str) -> Lone:
    """Pairs of `having` that `lacking` has no β for, with what its excluded.csv says of them."""
    excluded = read_excluded(lacking.run)
    known = dict(zip(excluded["pair_id"].to_pylist(), excluded["reason"].to_pylist(), strict=True))
    reasons = [str(known.get(pair, ELSEWHERE)) for pair in having.schedule["pair_id"].take(rows).to_pylist()]
    first = tuple(_lone_pair(having, int(i), why) for i, why in zip(rows[:SHOWN], reasons, strict=False))
    return Lone(label, len(rows), dict(Counter(reasons).most_common()), first)


def _lone_pair(having: Evidence, i: int, reason: str) -> LonePair:
    pair, prompt = (str(having.schedule[name][i].as_py()) for name in ("pair_id", "prompt_id"))
    return LonePair(pair, prompt, float(having.beta_i[i]), reason)
