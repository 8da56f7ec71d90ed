"""The charts of training: what all arms did over the steps, the main ones by group of pairs, and the trainer's log.

Knows what is drawn and what is told about it, not how it is drawn or counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from sp2dpo.evidence import Array, Evidence
from sp2dpo.numbers import dec
from sp2dpo.report import figures
from sp2dpo.report.charts import Chart
from sp2dpo.report.marks import Marks
from sp2dpo.report.measured import pulls, training_groups
from sp2dpo.report.training import Course, curve, from_log, step_edges

__all__ = ["group_charts", "log_charts", "main_arms", "overall_charts"]

MOST_LINES: Final = 5
"""Arms that the charts of single groups show."""

_FIRST: Final = ("sp2dpo", "constant_beta", "shuffled_beta", "weighted_loss", "rand_beta")

Lines = Mapping[Course, Mapping[str, Array]]
Limits = tuple[float, float]


@dataclass(frozen=True)
class _Kind:
    """What a chart of lines over the steps is of; `told` begins its sentence, whose numbers have so many places."""

    label: str
    told: str
    places: int

    def chart(self, name: str, title: str, lines: Lines, edges: Array, ylim: Limits) -> Chart:
        """`edges` end with the last step."""
        ends = {course.method: line["y"][-1] for course, line in lines.items() if len(line["y"])}
        last = ", ".join(f"{method} {dec(float(end), self.places)}" for method, end in ends.items())
        strokes = {course.stroke: line for course, line in lines.items()}
        svg = figures.curves(name, strokes, (0.0, float(edges[-1])), ylim, self.label)
        return Chart(name, svg, f"{self.told}, {title}. Over the last steps: {last}.", title)


_MARGIN: Final = _Kind("mean Δ, nats", "Mean margin over training, in nats", 1)
_ACCURACY: Final = _Kind("share with Δ > 0", "Share of pairs with a margin above 0 over training", 2)
_SATURATION: Final = _Kind("mean β·σ(−βΔ)", "Mean of β·σ(−βΔ) over training", 3)
_LOGGED: Final = {
    "loss": ("Loss, of arms that have DPO’s", _Kind("loss", "As logged over training", 3)),
    "grad_norm": ("Gradient norm, before clipping", _Kind("norm", "As logged over training", 2)),
    "learning_rate": ("Learning rate", _Kind("learning rate", "As logged over training", 7)),
}


def main_arms(trained: Sequence[Course]) -> list[Course]:
    """The few arms that every chart has room for: the schedule and its controls before all others."""
    moved = [course for course in trained if course.moved]
    places = {name: n for n, name in enumerate(_FIRST)}
    kept = sorted(moved, key=lambda course: places.get(course.method, len(places)))[:MOST_LINES]
    return _on_top([course for course in moved if course in kept])


def _on_top(drawn: Iterable[Course]) -> list[Course]:
    """With the schedule's own arm first, which is drawn last."""
    return sorted(drawn, key=lambda course: course.method != "sp2dpo")


def overall_charts(evidence: Evidence, trained: Sequence[Course]) -> list[Chart]:
    """Margin, accuracy and saturation of all training pairs, of every arm."""
    drawn = _on_top(course for course in trained if course.moved)
    everything = np.ones(evidence.n, bool)
    edges = step_edges(drawn, [everything])

    def lines(values: Callable[[Course], Array]) -> Lines:
        return {course: curve(course, everything, edges, values(course)) for course in drawn}

    if not drawn:
        return []
    margin, accuracy, pull = lines(_margin), lines(_right), lines(_pull)
    charts = [
        _MARGIN.chart("margin", "Margin, all pairs", margin, edges, _around(margin.values())),
        _ACCURACY.chart("accuracy", "Accuracy, all pairs", accuracy, edges, (0.0, 1.02)),
    ]
    pull = {course: line for course, line in pull.items() if np.isfinite(line["y"]).all()}
    if pull:
        top = 1.05 * max(float(line["y"].max()) for line in pull.values())
        charts.append(_SATURATION.chart("saturation", "Saturation, all pairs", pull, edges, (0.0, top)))
    return charts


def _margin(course: Course) -> Array:
    return course.margin


def _right(course: Course) -> Array:
    return (course.margin > 0).astype(np.float64)


def _pull(course: Course) -> Array:
    """NaN of an arm whose loss has no such coefficient."""
    if not course.logistic:
        return np.full(len(course.row), np.nan)
    return pulls(course.beta_i[course.row], course.weight_i[course.row], course.margin)


def group_charts(evidence: Evidence, marks: Marks, trained: Sequence[Course]) -> list[Chart]:
    """The course of the mean margin of each group, on shared axes."""
    drawn, groups = main_arms(trained), training_groups(evidence, marks)
    del groups["all pairs"]
    if not drawn:
        return []
    edges = step_edges(drawn, groups.values())
    lines = {name: {course: curve(course, of_i, edges) for course in drawn} for name, of_i in groups.items()}
    ylim = _around(line for of in lines.values() for line in of.values())
    return [_MARGIN.chart(f"margin-{n}", name, of, edges, ylim) for n, (name, of) in enumerate(lines.items())]


def log_charts(trained: Sequence[Course]) -> list[Chart]:
    """Loss, gradient norm and learning rate, as the trainer logged them."""
    drawn, charts = _on_top(course for course in trained if course.log), []
    for key, (title, kind) in _LOGGED.items():
        shown = [course for course in drawn if key != "loss" or course.logistic]
        lines = {course: line for course in shown if len((line := from_log(course, key))["x"])}
        if lines:
            x, y = (np.concatenate([line[axis] for line in lines.values()]) for axis in "xy")
            ylim = min(0.0, float(y.min())), 1.05 * float(y.max()) or 1.0
            charts.append(kind.chart(f"log-{key}", title, lines, np.array([0.0, x.max()]), ylim))
    return charts


def _around(lines: Iterable[Mapping[str, Array]]) -> Limits:
    """Limits that hold all values and zero."""
    seen = np.concatenate([*(line["y"] for line in lines), np.zeros(1)])
    pad = 0.05 * float(np.ptp(seen)) or 1.0
    return float(seen.min()) - pad, float(seen.max()) + pad
