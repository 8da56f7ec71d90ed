"""Margins of the training runs: Δ of each pair as training saw it, by group and over time. Eq. 1.

Margins are log-ratios in nats without β, so that methods with different β can be compared. Knows nothing of torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sp2dpo.evidence import Array
from sp2dpo.hashing import sha256_file
from sp2dpo.runs import Run
from sp2dpo.tables import read_manifest, read_table

__all__ = ["Course", "Ended", "courses", "curve", "ends", "step_edges"]

MOST_BINS: Final = 12
PER_BIN: Final = 15
"""So many margins of the smallest group in a bin, about, so that a line shows more than who was in a batch."""


@dataclass(frozen=True, eq=False)
class Course:
    """One method: its margins over training, or the reason why there are none.

    `last_i` is NaN where a pair was not seen; `line` says how its line is drawn, the same in all charts.
    """

    method: str
    step: NDArray[np.int64]
    row: NDArray[np.int64]
    margin: Array
    last_i: Array
    line: int
    problem: str | None = None

    @property
    def trained(self) -> bool:
        return self.problem is None

    @property
    def passes(self) -> float:
        """How often a pair was seen on average."""
        seen = np.isfinite(self.last_i).sum()
        return len(self.row) / seen if seen else 0.0


@dataclass(frozen=True)
class Ended:
    """The last margins of a group of pairs."""

    n: int
    mean: float | None
    positive: float | None


def courses(run: Run, n: int) -> list[Course]:
    """Every method of the process, trained or not, in the order of the process file."""
    train = run.process.settings.train
    methods = train.methods if train else ()
    drawn = sorted(methods, key=lambda method: method != "sp2dpo")
    return [_course(run, method, n, drawn.index(method) % 4) for method in methods]


def _course(run: Run, method: str, n: int, line: int) -> Course:
    empty, unseen = np.array([], np.int64), np.full(n, np.nan)
    problem = _problem(run, method)
    if problem:
        return Course(method, empty, empty, np.array([]), unseen, line, problem)
    table = read_table(run.training(method) / "margins.parquet", "sp2dpo train PROCESS.yaml")
    step, row, margin = (table[name].to_numpy() for name in ("step", "row", "margin"))
    if not len(row) or row.min() < 0 or row.max() >= n:
        return Course(method, empty, empty, np.array([]), unseen, line, "its margins.parquet does not fit the schedule")
    order = np.argsort(step, kind="stable")
    step, row, margin = step[order], row[order], margin[order].astype(np.float64)
    unseen[row] = margin
    return Course(method, step, row, margin, unseen, line)


def _problem(run: Run, method: str) -> str | None:
    """Why the margins of a method cannot be shown."""
    folder = run.training(method)
    manifest = read_manifest(folder / "metrics.json")
    if manifest is None or not (folder / "margins.parquet").is_file():
        return "not trained to the end" if folder.is_dir() else "not trained"
    if manifest["inputs"].get(run.schedule.name) != sha256_file(run.schedule):
        return "trained on another schedule than the one here"
    return None


def ends(course: Course, of_i: NDArray[np.bool_]) -> Ended:
    """What a group of pairs ended with: each pair's margin when it was last seen."""
    last = course.last_i[of_i & np.isfinite(course.last_i)]
    if not len(last):
        return Ended(0, None, None)
    return Ended(len(last), float(last.mean()), float((last > 0).mean()))


def step_edges(all_courses: list[Course], groups: Iterable[NDArray[np.bool_]]) -> Array:
    """Edges of the bins of steps that all charts share; fewer of them where groups are small."""
    steps = max((int(course.step.max()) + 1 for course in all_courses if course.trained), default=1)
    seen = min((int(of_i[course.row].sum()) for of_i in groups for course in all_courses), default=0)
    return np.linspace(0, steps, min(steps, max(4, min(MOST_BINS, seen // PER_BIN))) + 1)


def curve(course: Course, of_i: NDArray[np.bool_], edges: Array) -> Mapping[str, Array]:
    """Mean margin of a group in each bin of steps; bins without one of its pairs are left out."""
    of = of_i[course.row]
    bins = np.searchsorted(edges, course.step[of], "right") - 1
    count = np.bincount(bins, minlength=len(edges) - 1)
    total = np.bincount(bins, course.margin[of], len(edges) - 1)
    there = count > 0
    return {"x": ((edges[:-1] + edges[1:]) / 2)[there], "y": total[there] / count[there]}
