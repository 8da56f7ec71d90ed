"""What each arm of training reached, by group of pairs, and how sure that is. Eq. 1, 8, 9.

Saturation is the size of an arm's gradient coefficient, w_i·β_i·σ(−β_i Δ_i): how hard a pair still pulls. It begins at
w_i·β_i/2, and a pair whose margin is large pulls no more. Intervals are over pairs; they know nothing of other seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, stdtrit  # type: ignore[import-untyped]

from sp2dpo.audit.agreement import Estimate
from sp2dpo.evidence import Array, Evidence
from sp2dpo.hashing import canonical_json
from sp2dpo.report.marks import Marks
from sp2dpo.report.training import Course
from sp2dpo.rubric import CATEGORIES

__all__ = [
    "QUESTIONS",
    "ArmRow",
    "Basis",
    "Contrast",
    "Measured",
    "Question",
    "Training",
    "contrast",
    "measure",
    "paired",
    "prompt_numbers",
    "pulls",
    "reading",
    "training_groups",
    "training_of",
]

Rows = NDArray[np.int64]
Basis = Literal["held-out pairs", "training pairs"]

BASE: Final = "constant_beta"
"""The control that differs from the schedule only in that all pairs have its mean."""

QUESTIONS: Final = {
    "constant_beta": "Does it help that pairs have different β?",
    "shuffled_beta": "Does it matter which pair has which β?",
    "weighted_loss": "Is β inside the sigmoid more than a weight of the loss?",
}
"""What the schedule is asked by each of its controls, all three of which have its mean β."""


@dataclass(frozen=True)
class Measured:
    """A group of pairs under one arm; None is what is not defined.

    `margin` is mean Δ in nats, `accuracy` the share with Δ > 0, `saturation` the mean of w·β·σ(−βΔ), `left` that over
    its value at Δ = 0, and `beta_margin` mean β times mean |Δ|.
    """

    n: int
    margin: float | None = None
    accuracy: float | None = None
    saturation: float | None = None
    left: float | None = None
    beta_margin: float | None = None


@dataclass(frozen=True)
class Contrast:
    """One arm less another on the same held-out pairs: DPO loss at one β for all, and share of pairs with Δ > 0."""

    against: str
    n: int
    loss: Estimate
    accuracy: Estimate


@dataclass(frozen=True)
class ArmRow:
    """One arm. `groups` and `seen` are by name, of the pairs that it is measured on and of those that it trained on.

    `final_loss` is the arm's own loss as it was last logged, under its own β, and `held_out_loss` the DPO loss of the
    held-out pairs at `train.beta`. `ranking` is the share of held-out pairs whose chosen response is the more probable
    one. `versus` is against `constant_beta`.
    """

    arm: str
    says: str
    problem: str | None
    pairs: int
    steps: int
    passes: float
    beta_mean: float | None
    beta_min: float | None
    beta_max: float | None
    final_loss: float | None
    held_out_loss: float | None
    ranking: float | None
    groups: dict[str, Measured]
    seen: dict[str, Measured]
    versus: Contrast | None


@dataclass(frozen=True)
class Question:
    """What a control answers about the schedule; no contrast where one of the two is not there."""

    asked: str
    against: str
    contrast: Contrast | None


@dataclass(frozen=True)
class Training:
    """All arms of a run. `measured_on` is what their `groups` are of, and `beta` that of the held-out loss."""

    measured_on: Basis
    beta: float
    arms: tuple[ArmRow, ...]
    questions: tuple[Question, ...]

    @property
    def trained(self) -> list[ArmRow]:
        """The arms that there is something to show of."""
        return [arm for arm in self.arms if arm.problem is None]

    @property
    def n(self) -> int:
        """How many pairs the arms are measured on."""
        return max((arm.groups["all pairs"].n for arm in self.arms), default=0)


def training_groups(evidence: Evidence, marks: Marks) -> dict[str, NDArray[np.bool_]]:
    """The groups of pairs that are measured: all, the known reversed and the others, each category."""
    groups = {"all pairs": np.ones(evidence.n, bool)}
    if marks.usable:
        groups |= {"known reversed": marks.reversed_i, "all others": ~marks.reversed_i}
    return groups | {name: evidence.category_i == name for name in CATEGORIES if (evidence.category_i == name).any()}


def measure(course: Course, of_i: NDArray[np.bool_], basis: Basis = "training pairs") -> Measured:
    """A group of pairs: the held-out ones after training, or the trained ones, each when it was last seen."""
    margin_i = course.held_i if basis == "held-out pairs" else course.last_i
    of_i = of_i & np.isfinite(margin_i)
    delta, beta, weight = margin_i[of_i], course.beta_i[of_i], course.weight_i[of_i]
    if not len(delta):
        return Measured(0)
    if not course.arm.trained:
        return Measured(len(delta), float(delta.mean()))
    told = Measured(len(delta), float(delta.mean()), float((delta > 0).mean()))
    if not course.logistic:
        return told
    pull, start = pulls(beta, weight, delta), float((weight * beta / 2).mean())
    saturation = float(pull.mean())
    return Measured(
        told.n,
        told.margin,
        told.accuracy,
        saturation=saturation,
        left=saturation / start if start else None,
        beta_margin=float(beta.mean() * np.abs(delta).mean()),
    )


def pulls(beta: Array, weight: Array, margin: Array) -> Array:
    """w_i·β_i·σ(−β_i Δ_i).

    Eq. 8, 9.
    """
    pull: Array = weight * beta * expit(-beta * margin)
    return pull


def paired(one: Array, other: Array, prompt: NDArray[np.int64]) -> Estimate:
    """The mean of `one` less `other` over the same pairs, with a 95 % t interval that takes a prompt for one draw.

    No interval for fewer than two prompts, or where no pair differs.
    """
    difference = one - other
    value, clusters = float(difference.mean()), len(np.unique(prompt))
    residual = np.bincount(np.unique(prompt, return_inverse=True)[1], difference - value)
    if clusters < 2 or not difference.any():
        return Estimate(value, None, None)
    error = math.sqrt(clusters / (clusters - 1) * float(residual @ residual)) / len(difference)
    half = float(stdtrit(clusters - 1, 0.975)) * error
    return Estimate(value, value - half, value + half)


def contrast(
    one: Course, other: Course, beta: float, prompt_i: NDArray[np.int64], rows: tuple[Rows, Rows] | None = None
) -> Contrast | None:
    """One arm less another on the pairs that both have held out; None if there are none.

    Args:
        beta: that of the loss.
        prompt_i: a number for each prompt, over the schedule of `one`.
        rows: of two arms of different runs, the rows of the same pairs in the schedules of both.
    """
    every = np.arange(len(one.held_i))
    at, at_other = rows or (every, every)
    a, b, prompt = one.held_i[at], other.held_i[at_other], prompt_i[at]
    there = np.isfinite(a) & np.isfinite(b)
    if not there.any():
        return None
    a, b, prompt = a[there], b[there], prompt[there]
    moved = one.arm.trained and other.arm.trained
    accuracy = paired(_right(a), _right(b), prompt) if moved else Estimate(None, None, None)
    return Contrast(other.method, len(a), paired(_loss(beta, a), _loss(beta, b), prompt), accuracy)


def _loss(beta: float, margin: Array) -> Array:
    """−log σ(βΔ)."""
    loss: Array = np.logaddexp(0.0, -beta * margin)
    return loss


def _right(margin: Array) -> Array:
    return (margin > 0).astype(np.float64)


def prompt_numbers(evidence: Evidence, courses: Sequence[Course]) -> NDArray[np.int64]:
    """A number for the prompt of each held-out pair, −1 for all others."""
    rows = np.flatnonzero(np.any([np.isfinite(course.held_i) for course in courses] or [np.zeros(evidence.n)], axis=0))
    prompts = [canonical_json(prompt) for prompt in evidence.pairs["prompt"].take(evidence.at_i[rows]).to_pylist()]
    numbers = np.full(evidence.n, -1)
    if prompts:
        numbers[rows] = np.unique(prompts, return_inverse=True)[1]
    return numbers


def training_of(evidence: Evidence, marks: Marks, courses: Sequence[Course]) -> Training:
    """The arms of a run in numbers; on held-out pairs if any arm was measured on such."""
    train, groups = evidence.run.process.settings.train, training_groups(evidence, marks)
    prompt_i = prompt_numbers(evidence, courses)
    beta = train.beta if train else 0.1
    on: Basis = "held-out pairs" if any(course.held_out for course in courses) else "training pairs"
    by_name = {course.method: course for course in courses}

    def less(one: str, other: str) -> Contrast | None:
        there = one in by_name and other in by_name and one != other
        return contrast(by_name[one], by_name[other], beta, prompt_i) if there else None

    return Training(
        measured_on=on,
        beta=beta,
        arms=tuple(_row(course, groups, on, beta, less(course.method, BASE)) for course in courses),
        questions=tuple(Question(asked, name, less("sp2dpo", name)) for name, asked in QUESTIONS.items()),
    )


def _row(
    course: Course, groups: dict[str, NDArray[np.bool_]], on: Basis, beta: float, versus: Contrast | None
) -> ArmRow:
    trained = course.beta_i[np.isfinite(course.last_i)]
    held = course.held_i[np.isfinite(course.held_i)]
    low, mean, high = (float(of(trained)) if len(trained) else None for of in (np.min, np.mean, np.max))
    return ArmRow(
        arm=course.method,
        says=course.arm.says,
        problem=course.problem,
        pairs=course.pairs,
        steps=course.steps,
        passes=course.passes,
        beta_mean=mean,
        beta_min=low,
        beta_max=high,
        final_loss=float(course.log[-1]["loss"]) if course.log else None,
        held_out_loss=float(_loss(beta, held).mean()) if len(held) else None,
        ranking=course.ranking,
        groups={name: measure(course, of_i, on) for name, of_i in groups.items()},
        seen={name: measure(course, of_i) for name, of_i in groups.items()},
        versus=versus,
    )


def reading(one: Contrast) -> str:
    """What an interval of the loss says, and no more."""
    loss = one.loss
    if loss.low is None or loss.high is None or loss.low <= 0 <= loss.high:
        return f"cannot be told on these {one.n:,} pairs"
    return f"{'lower' if loss.high < 0 else 'higher'} loss than {one.against} on these {one.n:,} pairs, with this seed"
