"""The charts of the report, each with the sentence that stands for it. Knows what is drawn, not how."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from sp2dpo.evidence import Array, Evidence, median
from sp2dpo.numbers import dec
from sp2dpo.report import figures
from sp2dpo.report.agreement import Agreement
from sp2dpo.report.cards import visible
from sp2dpo.report.marks import Marks
from sp2dpo.report.panel import predictors_of
from sp2dpo.rubric import CATEGORIES
from sp2dpo.temperature import envelope

__all__ = [
    "Chart",
    "agreement_charts",
    "beta_chart",
    "disagreement_charts",
    "policy_chart",
    "reversed_chart",
    "source_chart",
]

MOST_SCATTERS = 9
MOST_SOURCES = 8
LONGEST_NAME = 24

Limits = tuple[float, float]


@dataclass(frozen=True)
class Chart:
    """An SVG, the sentence that stands for it, and its caption; `name` is unique among the charts of a report."""

    name: str
    svg: Markup
    alt: str
    caption: str


def beta_chart(evidence: Evidence) -> Chart:
    """β by category on the whole envelope."""
    values = {name: evidence.beta_i[evidence.category_i == name] for name in CATEGORIES}
    return Chart(
        "beta",
        figures.groups("beta", values, *_envelope(evidence), "β (the axis is the envelope)"),
        f"Histograms of β, one for each category. Median β: {_medians(values)}.",
        "Each row is scaled to its own peak. Bar: the middle half of the pairs; dot: median.",
    )


def _medians(values: Mapping[str, Array]) -> str:
    return "; ".join(f"{name}: {median(of):.3f} (n = {len(of):,})" for name, of in values.items() if len(of))


def _envelope(evidence: Evidence) -> Limits:
    return evidence.run.process.settings.schedule.widest_envelope


def _envelopes(evidence: Evidence) -> dict[str, Limits]:
    """The bounds of β of all categories that have none of their own, and of each that has."""
    settings = evidence.run.process.settings.schedule
    own: dict[str, Limits] = {name: (one.beta_min, one.beta_max) for name, one in settings.envelopes.items()}
    if len(own) == len(CATEGORIES):
        return own
    return {"all others" if own else "envelope": (settings.beta_min, settings.beta_max), **own}


def policy_chart(evidence: Evidence) -> Chart:
    """From the effective gap to β, with the envelope. Eq. 15."""
    envelopes = _envelopes(evidence)
    gap, beta = evidence.gap_i, evidence.beta_i
    off = int((np.abs(beta - _on_envelope(evidence)) > 1e-9).sum())
    lines = "; ".join(f"{name}: {low:g} to {high:g}" for name, (low, high) in envelopes.items())
    at = f"{off:,} of {len(beta):,} pairs lie off the line of their envelope" if off else "All pairs lie on the line"
    quartiles = ", ".join(f"{value:.3f}" for value in np.quantile(gap, (0.25, 0.5, 0.75)))
    return Chart(
        "gap-to-beta",
        figures.policy("gap-to-beta", gap, beta, envelopes, "effective gap of the pair"),
        f"β over the effective gap of {len(gap):,} pairs. Envelope: {lines}. Quartiles of the gap: {quartiles}. {at}.",
        f"How a gap becomes β, and below it how often each gap occurs. The line is the envelope; dots are pairs. {at}.",
    )


def _on_envelope(evidence: Evidence) -> Array:
    """β as the envelope of the pair's category gives it for the pair's gap."""
    envelopes, names = _envelopes(evidence), evidence.category_i
    bounds = np.array([envelopes.get(name) or next(iter(envelopes.values())) for name in names])
    beta: Array = envelope(evidence.gap_i, bounds[:, 0], bounds[:, 1])
    return beta


def source_chart(evidence: Evidence) -> Chart | None:
    """β by the source's own column `source`, if it has one with at least two names."""
    if "source" not in evidence.pairs.column_names:
        return None
    names = np.array([_short(name) for name in evidence.pairs["source"].to_pylist()], object)[evidence.at_i]
    most = [name for name, _ in Counter(names.tolist()).most_common(MOST_SOURCES)]
    if len(most) < 2:
        return None
    values = {name: evidence.beta_i[names == name] for name in most}
    rest = ~np.isin(names.astype(str), most)
    values |= {"(all others)": evidence.beta_i[rest]} if rest.any() else {}
    return Chart(
        "beta-by-source",
        figures.groups("beta-by-source", values, *_envelope(evidence), "β"),
        f"Histograms of β, one for each source of the data. Median β: {_medians(values)}.",
        "β by the column source of the data, the most frequent first. Each row is scaled to its own peak.",
    )


def _short(name: object) -> str:
    text = "(none)" if name is None else " ".join(visible(str(name)).split()) or "(empty)"
    return text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 1] + "…"


def reversed_chart(evidence: Evidence, marks: Marks) -> Chart | None:
    """β of the pairs known to be reversed beside that of all others, if there are both."""
    if not marks.usable:
        return None
    values = {"all others": evidence.beta_i[~marks.reversed_i], "known reversed": evidence.beta_i[marks.reversed_i]}
    told = "; ".join(f"{name}: {median(of):.3f}" for name, of in values.items())
    return Chart(
        "reversed",
        figures.groups("reversed", values, *_envelope(evidence), "β", wrong=["known reversed"]),
        f"Histograms of β of the pairs known to be reversed and of all others. Medians: {told}.",
        "β of the pairs known to be reversed, and of all others. Each row is scaled to its own peak.",
    )


def disagreement_charts(evidence: Evidence) -> list[Chart]:
    """Disagreement over prompts for each annotator that is no predictor, and over annotators if there are several."""
    charts, predictors = [], predictors_of(evidence)
    for j, a in enumerate(evidence.annotators if len(evidence.variants) > 1 else ()):
        if a in predictors:
            continue
        label, caption = "MAD of the effective gap over prompts", f"{a}, over prompts (eq. 36)"
        charts += _histogram(f"disagreement-{a}", evidence.disagreement_ij[:, j], label, caption)
    if len(evidence.annotators) > 1:
        label, caption = "standard deviation of β", "over annotators (eq. 37)"
        charts += _histogram("disagreement", evidence.annotator_std_i, label, caption)
    return charts


def _histogram(key: str, values: Array, label: str, caption: str) -> list[Chart]:
    """Nothing if there is no number."""
    there = values[np.isfinite(values)]
    if not len(there):
        return []
    told = f"Median {np.median(there):.4f}, highest {np.max(there):.4f}, {len(there):,} pairs"
    alt = f"Histogram, {caption}: {label}. {told}."
    return [Chart(key, figures.histogram(key, there, label), alt, f"{caption}. The line is the median.")]


def agreement_charts(agreements: list[Agreement]) -> list[Chart]:
    """Gap against gap of each two prompts of an annotator, or of each two annotators; of the first few."""
    drawn = [_joint(one) for one in agreements[:MOST_SCATTERS]]
    return [chart for chart in drawn if chart]


def _joint(one: Agreement) -> Chart | None:
    """None if no pair was judged by both."""
    if not len(one.x):
        return None
    r = "not defined" if one.correlation is None else dec(one.correlation, 3)
    name = f"agreement-{one.of}+{one.one}+{one.other}"
    drawn = "" if len(one.x) <= figures.MOST_POINTS else " Hexagons: fuller for more pairs."
    return Chart(
        name,
        figures.joint(name, one.x, one.y, f"effective gap, {one.one}", f"effective gap, {one.other}"),
        f"Effective gap of {len(one.x):,} pairs, {one.of}, under {one.one} and {one.other}: correlation {r}, "
        f"mean difference {np.abs(one.x - one.y).mean():.3f}.",
        f"{one.of}: {one.other} against {one.one}, r = {r}. On the line both are equal.{drawn}",
    )
