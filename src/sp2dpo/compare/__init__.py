"""Runs side by side: one table over all, what moved between the first and each other one, and what they trained.

Reads run directories only. Knows nothing of HTML or of the terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sp2dpo.compare.moves import Change, Matched, Moves, match, moves
from sp2dpo.compare.overview import RunRow, Setting, row_of, settings_that_differ
from sp2dpo.compare.training import Between, OverSeeds, TrainedRun, between, over_seeds, trained_run
from sp2dpo.errors import InputError
from sp2dpo.evidence import read_evidence
from sp2dpo.report.training import courses
from sp2dpo.runs import read_run

__all__ = [
    "Between",
    "Change",
    "Comparison",
    "Matched",
    "Moves",
    "OverSeeds",
    "RunRow",
    "Setting",
    "TrainedRun",
    "compare",
]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""What the runs are called beside their names, which may be alike."""


@dataclass(frozen=True)
class Comparison:
    """`moves` and `between` have the first run against each other one, in order; `training` has the runs with arms."""

    runs: tuple[RunRow, ...]
    settings: tuple[Setting, ...]
    moves: tuple[Moves, ...]
    training: tuple[TrainedRun, ...]
    between: tuple[Between, ...]
    over_seeds: tuple[OverSeeds, ...]


def compare(run_dirs: Sequence[Path], look: Callable[[Matched, Moves], None] = lambda *_: None) -> Comparison:
    """Compare scheduled runs; with one run there are only its row and its arms.

    Args:
        look: called with the arrays behind each of `moves`; no more than two runs are in memory at a time.

    Raises:
        InputError: no run, too many, or one directory twice.
        RunDirError, ProcessError, ScheduleError: no run directory, or one without a schedule; the message names the
            command that makes it.
    """
    _check(run_dirs)
    runs = [read_run(path) for path in run_dirs]
    settings = settings_that_differ(runs)
    first = read_evidence(runs[0])
    rows, moved, same_arm = [row_of(LETTERS[0], first)], [], []
    arms = courses(first)
    trained = [trained_run(LETTERS[0], first, arms)]
    for letter, run in zip(LETTERS[1:], runs[1:], strict=False):
        other = read_evidence(run)
        rows.append(row_of(letter, other))
        matched = match(first, other, (LETTERS[0], letter))
        moved.append(moves(matched))
        look(matched, moved[-1])
        others = courses(other)
        trained.append(trained_run(letter, other, others))
        same_arm += between(matched, arms, others, trained[0].training.beta)
    trained = [run for run in trained if run.training.arms]
    over = over_seeds(trained, settings)
    return Comparison(tuple(rows), settings, tuple(moved), tuple(trained), tuple(same_arm), tuple(over))


def _check(run_dirs: Sequence[Path]) -> None:
    if not 0 < len(run_dirs) <= len(LETTERS):
        raise InputError(f"compare takes 1 to {len(LETTERS)} run directories, not {len(run_dirs)}")
    folders = [path.resolve() for path in run_dirs]
    twice = next((path for n, path in enumerate(run_dirs) if folders.index(folders[n]) < n), None)
    if twice is not None:
        raise InputError(f"{twice} is given twice; a run compared with itself does not move")
