"""What people's verdicts say of the labels and of the panel: wrong labels, AUC, reliability of confidence, weights.

Evidence and filled sheets in, plain numbers out. A verdict is *right* if the person prefers the response that the
source calls chosen. Figures are of the whole run: a verdict counts N_h / m_h, pairs of its stratum over verdicts in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sp2dpo.audit.intervals import Measured, auc, share
from sp2dpo.audit.sample import digest, draw
from sp2dpo.audit.sheet import Sheet, Verdict
from sp2dpo.audit.verdicts import Raters, Verdicts, raters_of, verdicts_of
from sp2dpo.audit.weights import FEWEST_OF_A_CLASS, learnt_weights
from sp2dpo.ensemble import median_over_prompts, weighted_mean
from sp2dpo.evidence import Array, Evidence
from sp2dpo.hashing import sha256_file
from sp2dpo.rubric import CATEGORIES
from sp2dpo.runs import Run
from sp2dpo.tables import write_atomic, write_manifest

__all__ = [
    "Bin",
    "InCategory",
    "Judge",
    "Score",
    "confidence_of",
    "reliability",
    "score",
    "write_score",
]

FEWEST_OF_A_CATEGORY: Final = 20
"""Verdicts below which a category has no figures of its own."""

BINS: Final = 5
PER_BIN: Final = 10


@dataclass(frozen=True)
class Bin:
    """Verdicts of similar confidence: what was claimed on average, and the share of labels that are right."""

    low: float
    high: float
    claimed: float
    right: Measured


@dataclass(frozen=True)
class Judge:
    """The panel, or one annotator, against people.

    Attributes:
        name: of the annotator; `panel` is the pair's own gap and the mean confidence of the annotators.
        auc_gap: of the effective gap against whether the label is right. ½: the gap does not know.
        auc_confidence: of the confidence, likewise.
        claimed: mean confidence.
        error: expected calibration error: |claimed − right| over the bins, by weight.
        curve: the reliability curve.
    """

    name: str
    auc_gap: Measured
    auc_confidence: Measured
    claimed: float | None
    error: float | None
    curve: tuple[Bin, ...]


@dataclass(frozen=True)
class InCategory:
    """The verdicts on pairs of one category of the schedule; no figures where there are too few."""

    category: str
    decided: int
    right: Measured | None
    panel: Judge | None


@dataclass(frozen=True)
class Score:
    """All of it; shares are of the pairs of the run, ties left out of everything but their own share.

    Attributes:
        sheets: file names.
        rows: different pairs on them.
        right: verdicts for the label; `wrong` and `ties` likewise. Of several people, a split counts with the ties.
        covered: share of the run that the verdicts stand for.
        agreement: share of labels that are right, of those that are right or wrong.
        tied: share of pairs on which people see no difference, or are split.
        judges: the panel first.
        categories: of the schedule.
        weights: α_j of eq. 42 by annotator; empty where the verdicts do not carry them.
        raters: None with one sheet.
        same_category: share of the categories given by people that are the schedule's; None if none were given.
        warnings: what to know before these figures are used.
        verdicts: by pair_id.
    """

    sheets: tuple[str, ...]
    rows: int
    right: int
    wrong: int
    ties: int
    covered: float
    agreement: Measured
    tied: Measured
    judges: tuple[Judge, ...]
    categories: tuple[InCategory, ...]
    weights: Mapping[str, float]
    raters: Raters | None
    same_category: Measured | None
    warnings: tuple[str, ...]
    verdicts: Mapping[str, Verdict]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def score(evidence: Evidence, sheets: Sequence[Sheet]) -> Score:
    """Figures of all sheets together.

    Raises:
        DataError: no verdict, a pair that the schedule does not have, or two sheets of one name.
    """
    verdicts = verdicts_of(evidence, sheets)
    decided, right = verdicts.decided, verdicts.right
    at, w, is_right = verdicts.at[decided], verdicts.weight[decided], right[decided]
    confidence_ij = confidence_of(evidence)[at]
    panel = _judge("panel", is_right, w, evidence.gap_i[at], weighted_mean(confidence_ij))
    annotators = [
        _judge(name, is_right, w, evidence.gap_ij[at, j], confidence_ij[:, j])
        for j, name in enumerate(evidence.annotators)
    ]
    counts = int(is_right.sum()), int((~is_right).sum())
    weights = learnt_weights({one.name: one.auc_gap.value for one in annotators}, min(counts))
    return Score(
        sheets=tuple(sheet.name for sheet in sheets),
        rows=len({pair for sheet in sheets for pair in (*sheet.unanswered, *(row.pair_id for row in sheet.rows))}),
        right=counts[0],
        wrong=counts[1],
        ties=int((~decided).sum()),
        covered=verdicts.covered,
        agreement=share(is_right, w),
        tied=share(~decided, verdicts.weight),
        judges=(panel, *annotators),
        categories=_by_category(evidence, verdicts),
        weights=weights,
        raters=raters_of(sheets) if len(sheets) > 1 else None,
        same_category=_same_category(evidence, sheets, verdicts),
        warnings=tuple(_warnings(evidence, sheets, counts, verdicts.covered, annotators, weights)),
        verdicts=dict(zip(verdicts.pair_id, verdicts.verdict.tolist(), strict=True)),
    )


def confidence_of(evidence: Evidence) -> Array:
    """Confidence of each annotator in each pair of the schedule, the median over prompts, (N, J)."""
    return median_over_prompts(evidence.confidence_ijk)


def _judge(name: str, right: NDArray[np.bool_], w: Array, gap: Array, confidence: Array) -> Judge:
    there = np.isfinite(confidence)
    claimed, curve = confidence[there], reliability(right[there], confidence[there], w[there])
    weight = np.array([w[there][_within(claimed, one)].sum() for one in curve])
    miss = np.array([abs(one.claimed - (one.right.value or 0.0)) for one in curve])
    return Judge(
        name=name,
        auc_gap=auc(right, gap, w),
        auc_confidence=auc(right, confidence, w),
        claimed=float(np.average(claimed, weights=w[there])) if len(claimed) else None,
        error=float(miss @ weight / weight.sum()) if len(claimed) else None,
        curve=curve,
    )


def reliability(right: NDArray[np.bool_], confidence: Array, w: Array) -> tuple[Bin, ...]:
    """The verdicts in bins of about as many each, five of them or one for each ten; equal confidences stay together."""
    if not len(confidence):
        return ()
    bins = int(np.clip(len(confidence) // PER_BIN, 1, BINS))
    edges = np.unique(np.quantile(confidence, np.arange(1, bins) / bins, method="inverted_cdf"))
    at = np.searchsorted(edges, confidence)
    return tuple(_bin(right[at == b], confidence[at == b], w[at == b]) for b in np.unique(at))


def _bin(right: NDArray[np.bool_], confidence: Array, w: Array) -> Bin:
    low, high = float(confidence.min()), float(confidence.max())
    return Bin(low, high, float(np.average(confidence, weights=w)), share(right, w))


def _within(confidence: Array, one: Bin) -> NDArray[np.bool_]:
    return (confidence >= one.low) & (confidence <= one.high)


def _by_category(evidence: Evidence, verdicts: Verdicts) -> tuple[InCategory, ...]:
    decided = verdicts.decided
    at, w, right = verdicts.at[decided], verdicts.weight[decided], verdicts.right[decided]
    confidence = weighted_mean(confidence_of(evidence)[at])
    found = []
    for category in CATEGORIES:
        of_it = np.asarray(evidence.category_i[at] == category, bool)
        if of_it.sum() >= FEWEST_OF_A_CATEGORY:
            panel = _judge("panel", right[of_it], w[of_it], evidence.gap_i[at][of_it], confidence[of_it])
            found.append(InCategory(category, int(of_it.sum()), share(right[of_it], w[of_it]), panel))
        elif (evidence.category_i == category).any():
            found.append(InCategory(category, int(of_it.sum()), None, None))
    return tuple(found)


def write_score(run: Run, score: Score, sheets: Sequence[Sheet]) -> Path:
    """`audit.json` of a run, with its manifest."""
    path = run.path / "audit.json"
    text = json.dumps(score.as_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomic(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    write_manifest(
        path,
        files={path.name: sha256_file(path)},
        inputs={run.schedule.name: sha256_file(run.schedule)} | {sheet.name: sheet.sha256 for sheet in sheets},
        lambda_hash=run.process.lambda_hash,
        counts={"right": score.right, "wrong": score.wrong, "ties": score.ties},
    )
    return path


def _same_category(evidence: Evidence, sheets: Sequence[Sheet], verdicts: Verdicts) -> Measured | None:
    where = {pair_id: n for n, pair_id in enumerate(verdicts.pair_id)}
    given = [(where[row.pair_id], row.category) for sheet in sheets for row in sheet.rows if row.category]
    if not given:
        return None
    same = [category == evidence.category_i[verdicts.at[n]] for n, category in given]
    return share(same, verdicts.weight[[n for n, _ in given]])


def _warnings(
    evidence: Evidence,
    sheets: Sequence[Sheet],
    counts: tuple[int, int],
    covered: float,
    annotators: Sequence[Judge],
    weights: Mapping[str, float],
) -> list[str]:
    said = [text for sheet in sheets for text in _about_sheet(evidence, sheet)]
    if covered < 1:
        said.append(f"no verdict in strata with {1 - covered:.1%} of the pairs: the shares are of the others")
    few = [f"{n} {kind}" for n, kind in zip(counts, ("right", "wrong"), strict=True) if n < FEWEST_OF_A_CLASS]
    if few:
        unmade = ", and no weights are made" if len(annotators) > 1 else ""
        said.append(
            f"{' and '.join(few)} labels among the verdicts, fewer than {FEWEST_OF_A_CLASS}: the AUC is hardly known"
            f"{unmade}; fill in more rows, or a second sheet drawn with another --seed"
        )
    below = [one.name for one in annotators if one.auc_gap.high is not None and one.auc_gap.high < 0.5]
    if below:
        said.append(
            f"larger gaps for wrong labels than for right ones: {', '.join(below)}; leave them out of the panel"
        )
    if len(annotators) > 1 and min(counts) >= FEWEST_OF_A_CLASS and not weights:
        said.append("no annotator's AUC is above ½: their gaps do not know wrong labels, and no weights are made")
    unsure = [one.name for one in annotators if one.auc_gap.low is not None and one.auc_gap.low <= 0.5]
    if weights and len(unsure) == len(annotators):
        said.append("no annotator's AUC is surely above ½: these weights may be worse than equal ones")
    return said


def _about_sheet(evidence: Evidence, sheet: Sheet) -> list[str]:
    said = []
    if digest(draw(evidence, sheet.asked, sheet.seed)) != sheet.draw:
        said.append(
            f"{sheet.name} was drawn from another schedule: its verdicts hold, but it is no random sample of this one; "
            "for shares of the run, score it with the run that it was drawn from"
        )
    if sheet.odd_categories:
        said.append(f"{sheet.name}: categories that are none of the six: {', '.join(map(repr, sheet.odd_categories))}")
    return said
