"""What a reader in a hurry is told: a handful of sentences, each from numbers that the sections below show."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sp2dpo.evidence import Evidence
from sp2dpo.report.marks import Marks
from sp2dpo.report.sections import CategoryRow, Reversed
from sp2dpo.report.tally import Tally
from sp2dpo.report.training import Course, ends
from sp2dpo.tables import read_manifest

__all__ = ["WIDE", "in_short", "warnings"]

WIDE = 0.2
"""Judgements of a pair that lie further apart than this are called far apart."""


def in_short(
    evidence: Evidence,
    tally: Tally,
    rows: list[CategoryRow],
    reversed: Reversed | None,
    marks: Marks,
    courses: list[Course],
) -> list[str]:
    """Five to eight sentences."""
    said = [_rows(evidence), _beta(evidence), _categories(rows), _reversed(reversed, marks), _agreement(evidence)]
    said += [_training(evidence, marks, courses), _missing(tally, courses)]
    return [sentence for sentence in said if sentence]


def warnings(evidence: Evidence) -> list[str]:
    """What must be known before any number is read."""
    settings = evidence.run.process.settings
    toy = [_TOY] if settings.student and settings.student.model == "toy" else []
    names = [f"{a.name} (model: {a.model})" for a in settings.panel.annotators if a.kind == "recorded"]
    recorded = [f"Recorded answers, for which no model was asked in this run: {', '.join(names)}."] if names else []
    kinds = {a.name: a.kind for a in settings.panel.annotators if a.kind != "recorded"}
    listed = ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
    typed = [f"Typed decisions are not the paper's protocol ({listed})."] if "decisions" in kinds.values() else []
    return toy + recorded + typed


_TOY = (
    "The student is a toy: a tiny random model made in the run and trained for minutes. Its margins show that training "
    "works and how β acts; nothing about the quality of any model follows from them."
)


def _rows(evidence: Evidence) -> str:
    manifest = read_manifest(evidence.run.pairs)
    total = manifest["counts"]["raw"] if manifest else evidence.pairs.num_rows
    out = total - evidence.n
    left_out = f"{out:,} were left out, each with a reason" if out else "none was left out"
    return f"{evidence.n:,} of {total:,} source rows have a β; {left_out}."


def _beta(evidence: Evidence) -> str:
    beta, bounds = evidence.beta_i, evidence.run.process.settings.schedule
    envelope = f"the envelope [{bounds.beta_min:g}, {bounds.beta_max:g}]"
    return f"β runs from {beta.min():.4f} to {beta.max():.4f}, mean {beta.mean():.4f}, in {envelope}."


def _categories(rows: list[CategoryRow]) -> str:
    there = [row for row in rows if row.mean is not None]
    if len(there) == 1:
        return f"All pairs are of one category: {there[0].name}."
    ordered = sorted(there, key=lambda row: row.mean or 0)
    low, high = (f"{row.name} ({row.mean:.3f}, n = {row.n:,})" for row in (ordered[0], ordered[-1]))
    return f"The highest mean β has {high}, the lowest {low}."


def _reversed(of: Reversed | None, marks: Marks) -> str:
    if of is not None:
        return (
            f"The {of.n:,} pairs known to point the wrong way got mean β {of.mean:.3f}, all others "
            f"{of.mean_others:.3f} (AUC of the gap {of.auc:.3f}); {of.fooled:,} of them fooled the panel, with a β "
            "above the median of the others."
        )
    if marks.column is None:
        return "No pairs are marked as known to be reversed, so this run cannot show whether wrong labels get a low β."
    return f"Known reversed pairs: {marks.problem or f'{marks.n:,} in the schedule, nothing to compare'}."


def _agreement(evidence: Evidence) -> str:
    judged, spread = evidence.gap_ijk[0].size, evidence.spread_i
    if judged == 1:
        return "Each pair was judged once, so nothing is known about disagreement."
    return (
        f"The {judged} judgements of a pair lie {np.median(spread):.3f} apart in effective gap (range, median over "
        f"pairs); in {(spread > WIDE).mean():.0%} of pairs they lie more than {WIDE} apart."
    )


def _training(evidence: Evidence, marks: Marks, courses: list[Course]) -> str:
    done = [course for course in courses if course.trained]
    if not done:
        return ""
    sentence = f"Mean margin of the training pairs at the end, in nats: {_means(done, np.ones(evidence.n, bool))}."
    return f"{sentence} Of the reversed pairs alone: {_means(done, marks.reversed_i)}." if marks.usable else sentence


def _means(courses: list[Course], of_i: NDArray[np.bool_]) -> str:
    means = {course.method: ends(course, of_i).mean for course in courses}
    return ", ".join(f"{method} " + ("–" if value is None else f"{value:.1f}") for method, value in means.items())


def _missing(tally: Tally, courses: list[Course]) -> str:
    failed = tally.failed.total() + tally.not_asked
    missing = [f"{failed:,} answers of the panel"] if failed else []
    missing += [] if courses else ["training (the process has none)"]
    missing += [f"the training of {course.method} ({course.problem})" for course in courses if not course.trained]
    return "Missing: " + ", ".join([*missing, "any score on held-out data or a benchmark"]) + "."
