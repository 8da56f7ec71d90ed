"""A comparison in words and printed numbers, the same on the terminal and on the page."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from sp2dpo.audit.agreement import Estimate
from sp2dpo.compare.moves import ELSEWHERE, MOVED, Lone, LonePair, Moved, Moves
from sp2dpo.compare.overview import RunRow
from sp2dpo.compare.training import OverSeeds, TrainedRun
from sp2dpo.numbers import dec, percent, signed, some
from sp2dpo.report.cards import visible
from sp2dpo.report.measured import reading
from sp2dpo.schedule import EXCLUSIONS

__all__ = [
    "ONE_SEED",
    "answered",
    "headline",
    "lacking",
    "measured_on",
    "named",
    "not_shown",
    "over_seeds",
    "panel_of",
    "place_of",
    "summary",
    "transitions",
]

ONE_SEED: Final = (
    "Intervals (95 %) are over pairs and know nothing of the seed: differences of one seed are mostly noise. Before a "
    "claim, compare runs that differ in train.seed alone."
)


def named(pair: Moved | LonePair) -> str:
    """The source's id, or the start of the pair's own where the source has none."""
    return pair.pair_id[:12] if pair.prompt_id == pair.pair_id else visible(pair.prompt_id)[:60]


def panel_of(run: RunRow) -> str:
    """Who was asked, and how often."""
    return f"{', '.join(run.annotators)} × {', '.join(run.variants)}"


def place_of(run: RunRow) -> str:
    """The directory as it was given; its own name where that is but dots."""
    return run.path if Path(run.path).name.strip(".") else Path(run.path).resolve().name


def headline(moves: Moves) -> str:
    """Which pairs there are."""
    one, other = moves.labels
    told = f"{moves.both:,} pairs have a β in both, {moves.lost.n:,} only in {one}, {moves.gained.n:,} only in {other}."
    return told if moves.both else f"{told} With no pair in common there is nothing to compare."


def summary(moves: Moves) -> list[str]:
    """How far β moved, which category most, and how many pairs changed theirs; nothing if no pair is in both."""
    change, (one, other) = moves.all, moves.labels
    if not moves.both:
        return []
    if not moves.moved_most:
        said = [f"No β differs between {one} and {other}."]
    else:
        rank = "" if moves.spearman is None else f"; the rank correlation (Spearman) is {dec(moves.spearman, 3)}"
        said = [
            f"From {one} to {other}, β changes by {signed(change.mean)} in the mean and by {dec(change.mean_absolute)} "
            f"in the mean of absolute values; {percent(change.moved)} of the pairs move by more than {MOVED} "
            f"({percent(change.up)} up, {percent(change.down)} down){rank}.",
            _most_moved_category(moves),
        ]
    changed = sum(n for _, _, n in transitions(moves))
    if changed == 1:
        return [*said, "1 pair changes its category."]
    return [*said, f"{changed:,} pairs change their category." if changed else "No pair changes its category."]


def _most_moved_category(moves: Moves) -> str:
    most = max((each for each in moves.categories if each.n), key=lambda each: each.mean_absolute or 0.0)
    return (
        f"{most.name} moves most: mean β {dec(most.beta_one)} → {dec(most.beta_other)}, "
        f"mean |Δβ| {dec(most.mean_absolute)} over {most.n:,} pairs."
    )


def transitions(moves: Moves) -> list[tuple[str, str, int]]:
    """Category in the first run, in the other, and how many pairs, where these differ; the most frequent first."""
    changed = [(each.name, to, n) for each in moves.categories for to, n in each.to.items() if n and to != each.name]
    return sorted(changed, key=lambda each: -each[2])


def lacking(lone: Lone, other: str) -> list[tuple[int, str]]:
    """How many of the pairs the other run has not, and why; the reason in brackets is that of excluded.csv."""
    return [(n, _why(reason, other)) for reason, n in lone.reasons.items()]


def _why(reason: str, other: str) -> str:
    if reason == ELSEWHERE:
        return f"not in the source of {other}"
    meaning = EXCLUSIONS.get(reason)
    return f"left out of {other}: {meaning} ({reason})" if meaning else f"left out of {other} ({visible(reason)})"


def measured_on(run: TrainedRun) -> str:
    """What the numbers of a run's arms are of."""
    training = run.training
    last = "" if training.measured_on == "held-out pairs" else ", each when it was last seen in training"
    return f"{run.label}: {some(training.n, training.measured_on.removesuffix('s'))}{last}"


def not_shown(run: TrainedRun) -> list[str]:
    """The arms of a run that have no numbers, and why."""
    return [f"{run.label} {arm.arm}: {arm.problem}" for arm in run.training.arms if arm.problem]


def answered(run: TrainedRun) -> list[str]:
    """What the controls of a run say about its schedule, as far as they were measured."""
    asked = [(one.asked, one.contrast) for one in run.training.questions if one.contrast]
    return [
        f"{run.label}: {question} sp2dpo less {one.against}, held-out loss {_interval(one.loss)}: {reading(one)}."
        for question, one in asked
    ]


def over_seeds(one: OverSeeds) -> str:
    """What several seeds say together."""
    return f"Over {one.runs} seeds: {one.asked} sp2dpo less {one.against}, held-out loss {_interval(one.loss)}."


def _interval(one: Estimate) -> str:
    return signed(one.value, 3) + ("" if one.low is None else f" ({signed(one.low, 3)} to {signed(one.high, 3)})")
