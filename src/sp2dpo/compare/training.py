"""Trained arms of runs side by side: what each reached, the same arm in two runs, the controls over several seeds.

Reads run directories only; no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from sp2dpo.audit.agreement import Estimate
from sp2dpo.compare.moves import Matched
from sp2dpo.compare.overview import Setting
from sp2dpo.evidence import Evidence
from sp2dpo.report.marks import read_marks
from sp2dpo.report.measured import (
    QUESTIONS,
    Contrast,
    Training,
    contrast,
    paired,
    prompt_numbers,
    training_of,
)
from sp2dpo.report.training import Course

__all__ = ["Between", "OverSeeds", "TrainedRun", "between", "over_seeds", "trained_run"]

SEEDS: Final = frozenset(("train.seed", "train.data_seed", "schedule.random_seed"))
"""Keys at which runs differ that are the same training drawn again."""


@dataclass(frozen=True)
class TrainedRun:
    """The arms of one run."""

    label: str
    training: Training


@dataclass(frozen=True)
class Between:
    """An arm of the other run less the same arm of the first one, on the pairs that both have held out."""

    labels: tuple[str, str]
    arm: str
    contrast: Contrast


@dataclass(frozen=True)
class OverSeeds:
    """sp2dpo less a control: the mean over runs that differ only in seeds, with a 95 % t interval over these runs."""

    asked: str
    against: str
    runs: int
    loss: Estimate
    accuracy: Estimate


def trained_run(label: str, evidence: Evidence, arms: Sequence[Course]) -> TrainedRun:
    """The arms of a run in numbers."""
    return TrainedRun(label, training_of(evidence, read_marks(evidence), arms))


def between(matched: Matched, first: Sequence[Course], other: Sequence[Course], beta: float) -> list[Between]:
    """The arms of two runs that were measured on some pair that both have held out; `beta` is that of the loss."""
    before, prompt_i = {arm.method: arm for arm in first}, prompt_numbers(matched.other, other)
    found = []
    for arm in other:
        rows = matched.rows[1], matched.rows[0]
        made = contrast(arm, before[arm.method], beta, prompt_i, rows) if arm.method in before else None
        found += [Between(matched.labels, arm.method, made)] if made else []
    return found


def over_seeds(trained: Sequence[TrainedRun], settings: Sequence[Setting]) -> list[OverSeeds]:
    """What the controls say over several seeds; nothing for runs that differ in more than that."""
    differ = {setting.key for setting in settings} - {"name"}
    if not differ or differ - SEEDS:
        return []
    asked = [one for run in trained for one in run.training.questions if one.contrast]
    found = []
    for against, question in QUESTIONS.items():
        each = [one.contrast for one in asked if one.against == against and one.contrast]
        if len(each) > 1:
            loss, accuracy = (_over([getattr(one, name).value for one in each]) for name in ("loss", "accuracy"))
            found.append(OverSeeds(question, against, len(each), loss, accuracy))
    return found


def _over(values: Sequence[float]) -> Estimate:
    return paired(np.array(values), np.zeros(len(values)), np.arange(len(values)))
