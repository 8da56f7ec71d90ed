"""A comparison as one HTML file that opens offline, in the style of the report.

The same runs give the same bytes. The text of a pair is hostile input: everything is escaped, and the page's own policy
forbids scripts and every request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from sp2dpo.compare import Comparison, Matched, Moves, compare, words
from sp2dpo.compare.moves import MOVED, Moved
from sp2dpo.evidence import Array, Evidence, median
from sp2dpo.numbers import count, dec, percent, signed
from sp2dpo.report import figures
from sp2dpo.report.cards import LONGEST, Card, card, visible
from sp2dpo.report.charts import Chart
from sp2dpo.report.measured import QUESTIONS, Question, reading
from sp2dpo.rubric import CATEGORIES
from sp2dpo.tables import write_atomic

__all__ = ["write_page"]


@dataclass(frozen=True)
class Answers:
    """One question of the panel about a pair and its answer in each run: category, magnitude, confidence, gap."""

    annotator: str
    variant: str
    one: tuple[str, float, float, float] | None
    other: tuple[str, float, float, float] | None

    @property
    def changed(self) -> bool:
        return self.one != self.other


@dataclass(frozen=True)
class Shown:
    """A pair that moved, with its texts and what the panel of each run said."""

    moved: Moved
    texts: Card
    answers: tuple[Answers, ...]


@dataclass(frozen=True)
class View:
    """The section about one other run."""

    moves: Moves
    charts: tuple[Chart, ...]
    pairs: tuple[Shown, ...]


def write_page(run_dirs: Sequence[Path], path: Path) -> Comparison:
    """Compare runs, write the page to `path`, and return the comparison.

    Raises:
        Sp2dpoError: as `compare` does.
    """
    views: list[View] = []

    def look(matched: Matched, moves: Moves) -> None:
        charts = tuple(_charts(matched)) if moves.both else ()
        views.append(View(moves, charts, tuple(_shown(matched, pair) for pair in moves.moved_most)))

    compared = compare(run_dirs, look)
    arms = [(f"{run.label} {arm.arm}", arm) for run in compared.training for arm in run.training.trained]
    moved = [(label, arm) for label, arm in arms if arm.steps]
    html = _template().render(
        compared=compared,
        views=views,
        names={run.label: f"{run.label} · {run.name}" for run in compared.runs},
        categories=CATEGORIES,
        arms=arms,
        moved=moved,
        grouped=[name for name in CATEGORIES if moved and all(name in arm.groups for _, arm in moved)],
        asked=_asked(compared),
        measured=any(arm.held_out_loss is not None for _, arm in arms),
        longest=LONGEST,
        threshold=MOVED,
        words=words,
    )
    write_atomic(path, lambda partial: partial.write_text(html, encoding="utf-8"))
    return compared


def _asked(compared: Comparison) -> list[tuple[str, Question]]:
    """What the controls of each run answer, question by question."""
    return [
        (run.label, one)
        for against in QUESTIONS
        for run in compared.training
        for one in run.training.questions
        if one.against == against and one.contrast
    ]


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(f"sp2dpo.{room}", ".") for room in ("compare", "report")]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown: dict[str, Any] = {"count": count, "dec": dec, "percent": percent, "signed": signed, "visible": visible}
    environment.filters |= shown | {"reading": reading}
    return environment.get_template("page.html")


def _charts(matched: Matched) -> list[Chart]:
    return [_by_category(matched), _changes(matched), _against(matched)]


def _by_category(matched: Matched) -> Chart:
    """β of each category of the first run, in both: two rows each."""
    one, other = matched.labels
    of = {name: matched.category[0] == name for name in CATEGORIES if (matched.category[0] == name).any()}
    rows = {f"{name}, {label}": beta[mask] for name, mask in of.items() for label, beta in _sides(matched)}
    told = "; ".join(f"{name} {median(values):.3f}" for name, values in rows.items())
    low, high = _limits(matched)
    svg = figures.groups(
        _key(matched, "beta"), rows, low, high, "β", wrong=[name for name in rows if name.endswith(other)]
    )
    return Chart(
        name=_key(matched, "beta"),
        svg=svg,
        alt=f"Histograms of β by category, in {one} and in {other}. Medians: {told}.",
        caption=f"β of the same pairs in {one} and in {other}, by their category in {one}. Each row is scaled to "
        "its own peak. Bar: the middle half of the pairs; dot: median.",
    )


def _changes(matched: Matched) -> Chart:
    """β of the other run less β of the first, by category of the first."""
    delta, category = matched.delta, matched.category[0]
    rows = {"all": delta} | {name: delta[category == name] for name in CATEGORIES if (category == name).any()}
    widest = max(float(np.abs(delta).max()), 1e-3)
    told = "; ".join(f"{name} {signed(median(values))}" for name, values in rows.items())
    one, other = matched.labels
    return Chart(
        name=_key(matched, "delta"),
        svg=figures.groups(_key(matched, "delta"), rows, -widest, widest, f"Δβ = β in {other} − β in {one}"),
        alt=f"Histograms of the change of β from {one} to {other}, of all pairs and by category. Medians: {told}.",
        caption=f"How far β moves. Right of 0: {other} gives a higher β than {one}.",
    )


def _against(matched: Matched) -> Chart:
    (one, x), (other, y) = _sides(matched)
    labels, limits = (f"β in {one}", f"β in {other}"), _limits(matched)
    higher, lower = (percent(float(of.mean())) for of in (y > x, y < x))
    return Chart(
        name=_key(matched, "scatter"),
        svg=figures.density(_key(matched, "scatter"), x, y, labels, limits, limits, diagonal=True),
        alt=f"β in {other} against β in {one}, {len(x):,} pairs: {higher} lie above the line of equals, {lower} below.",
        caption=f"β in {other} against β in {one}; on the line both are equal. Fuller: more pairs.",
    )


def _sides(matched: Matched) -> list[tuple[str, Array]]:
    return list(zip(matched.labels, matched.beta, strict=True))


def _limits(matched: Matched) -> tuple[float, float]:
    """The envelopes of both runs, and no β outside of the axes."""
    low, high = (float(of([of(beta) for beta in matched.beta])) for of in (np.min, np.max))
    bounds = [evidence.run.process.settings.schedule.widest_envelope for evidence in (matched.one, matched.other)]
    low, high = min(low, *(lowest for lowest, _ in bounds)), max(high, *(highest for _, highest in bounds))
    return (low, high) if high > low else (low - 0.01, high + 0.01)


def _key(matched: Matched, name: str) -> str:
    return f"{''.join(matched.labels).lower()}-{name}"


def _shown(matched: Matched, pair: Moved) -> Shown:
    i, m = pair.rows
    annotators = dict.fromkeys(matched.one.annotators + matched.other.annotators)
    variants = dict.fromkeys(matched.one.variants + matched.other.variants)
    answers = (
        Answers(a, v, _answer(matched.one, i, a, v), _answer(matched.other, m, a, v))
        for a in annotators
        for v in variants
    )
    return Shown(pair, card(matched.one, i), tuple(one for one in answers if one.one or one.other))


def _answer(evidence: Evidence, i: int, annotator: str, variant: str) -> tuple[str, float, float, float] | None:
    if annotator not in evidence.annotators or variant not in evidence.variants:
        return None
    at = i, evidence.annotators.index(annotator), evidence.variants.index(variant)
    category = evidence.category_ijk[at]
    numbers = (evidence.magnitude_ijk[at], evidence.confidence_ijk[at], evidence.gap_ijk[at])
    magnitude, confidence, gap = (float(value) for value in numbers)
    return None if category is None else (str(category), magnitude, confidence, gap)
