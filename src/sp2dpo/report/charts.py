"""The charts of the report, each with the sentence that stands for it. Knows what is drawn, not how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from sp2dpo.evidence import Array, Evidence, median
from sp2dpo.report import figures
from sp2dpo.report.agreement import Agreement
from sp2dpo.report.marks import Marks
from sp2dpo.report.sections import training_groups
from sp2dpo.report.training import Course, curve, step_edges
from sp2dpo.rubric import CATEGORIES

__all__ = ["Chart", "agreement_charts", "beta_chart", "disagreement_charts", "reversed_chart", "training_charts"]

MOST_SCATTERS = 9

Limits = tuple[float, float]


@dataclass(frozen=True)
class Chart:
    """An SVG, the sentence that stands for it, and its caption."""

    svg: Markup
    alt: str
    caption: str


def beta_chart(evidence: Evidence) -> Chart:
    """β by category on the whole envelope."""
    values = {name: evidence.beta_i[evidence.category_i == name] for name in CATEGORIES}
    told = "; ".join(f"{name}: {median(of):.3f} (n = {len(of):,})" for name, of in values.items() if len(of))
    return Chart(
        figures.groups("beta", values, *_envelope(evidence), "β (the axis is the envelope)"),
        f"Histograms of β, one for each category. Median β: {told}.",
        "Each row is scaled to its own peak. Bar: the middle half of the pairs; dot: median.",
    )


def _envelope(evidence: Evidence) -> Limits:
    bounds = evidence.run.process.settings.schedule
    return bounds.beta_min, bounds.beta_max


def reversed_chart(evidence: Evidence, marks: Marks) -> Chart | None:
    """β of the pairs known to be reversed beside that of all others, if there are both."""
    if not marks.usable:
        return None
    values = {"all others": evidence.beta_i[~marks.reversed_i], "known reversed": evidence.beta_i[marks.reversed_i]}
    told = "; ".join(f"{name}: {median(of):.3f}" for name, of in values.items())
    return Chart(
        figures.groups("reversed", values, *_envelope(evidence), "β", wrong=["known reversed"]),
        f"Histograms of β of the pairs known to be reversed and of all others. Medians: {told}.",
        "β of the pairs known to be reversed, and of all others. Each row is scaled to its own peak.",
    )


def disagreement_charts(evidence: Evidence) -> list[Chart]:
    """Disagreement over prompts for each annotator, and over annotators if there are several."""
    charts = []
    for j, a in enumerate(evidence.annotators if len(evidence.variants) > 1 else ()):
        label, caption = "MAD of the effective gap over prompts", f"{a}, over prompts (eq. 36)"
        charts.append(_histogram(f"mad{j}", evidence.disagreement_ij[:, j], label, caption))
    if len(evidence.annotators) > 1:
        charts.append(
            _histogram("std", evidence.annotator_std_i, "standard deviation of β", "over annotators (eq. 37)")
        )
    return charts


def _histogram(key: str, values: Array, label: str, caption: str) -> Chart:
    told = f"Median {np.median(values):.4f}, highest {np.max(values):.4f}, {len(values):,} pairs"
    alt = f"Histogram, {caption}: {label}. {told}."
    return Chart(figures.histogram(key, values, label), alt, f"{caption}. The line is the median.")


def agreement_charts(agreements: list[Agreement]) -> list[Chart]:
    """A scatter for each two prompts of an annotator, of the first few."""
    return [_scatter(f"agree{n}", one) for n, one in enumerate(agreements[:MOST_SCATTERS])]


def _scatter(key: str, one: Agreement) -> Chart:
    r = "not defined" if one.correlation is None else f"{one.correlation:.3f}"
    drawn = len(figures.sample(one.x))
    of = f" Drawn: {drawn:,} of {len(one.x):,} pairs." if drawn < len(one.x) else ""
    return Chart(
        figures.scatter(key, one.x, one.y, f"effective gap, {one.one}", f"effective gap, {one.other}"),
        f"Scatter of the effective gap of {one.of} under {one.one} and {one.other}: correlation {r}, "
        f"mean difference {one.difference:.3f}.",
        f"{one.of}: {one.other} against {one.one}, r = {r}. On the line both are equal.{of}",
    )


def training_charts(evidence: Evidence, marks: Marks, trained: list[Course]) -> list[Chart]:
    """The course of the mean margin of each group, on shared axes."""
    groups = training_groups(evidence, marks)
    if marks.usable:
        del groups["all pairs"]
    edges = step_edges(trained, groups.values())
    lines = {name: {c: curve(c, of_i, edges) for c in trained} for name, of_i in groups.items()}
    seen = np.concatenate([line["y"] for group in lines.values() for line in group.values()] + [np.zeros(1)])
    pad = 0.05 * float(np.ptp(seen)) or 1.0
    ylim = float(seen.min()) - pad, float(seen.max()) + pad
    shown = enumerate(lines.items()) if trained else ()
    return [_curves(f"margin{n}", name, group, (0.0, float(edges[-1])), ylim) for n, (name, group) in shown]


def _curves(key: str, name: str, lines: Mapping[Course, Mapping[str, Array]], xlim: Limits, ylim: Limits) -> Chart:
    told = ", ".join(f"{course.method} {line['y'][-1]:.1f}" for course, line in lines.items() if len(line["y"]))
    svg = figures.curves(key, {course.line: line for course, line in lines.items()}, xlim, ylim)
    return Chart(svg, f"Mean margin over training, {name}. Mean over the last steps, in nats: {told}.", name)
