"""The trained arms of a run as their files have them: β, margins over training and after it, the trainer's log. Eq. 1.

Margins Δ are log-ratios in nats without β, so that arms with different β can be compared. Reads only; no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sp2dpo.arms import ARMS, Arm, arm_of
from sp2dpo.errors import InputError
from sp2dpo.evidence import Array, Evidence
from sp2dpo.hashing import sha256_file
from sp2dpo.report.canvas import LINES, Stroke
from sp2dpo.runs import Run
from sp2dpo.tables import read_manifest, read_table
from sp2dpo.train.data import HELD_OUT_SCHEMA, arm_columns

__all__ = ["Course", "arms_of", "courses", "curve", "from_log", "step_edges"]

MOST_BINS: Final = 12
PER_BIN: Final = 15
"""So many margins of the smallest group in a bin, about, so that a line shows more than who was in a batch."""

MOST_LOGGED: Final = 30
"""Points of a line from the trainer's log."""

_MADE_BY: Final = "sp2dpo train PROCESS.yaml"
_STROKES: Final = {
    "sp2dpo": Stroke(0, "-", 2.3),
    "constant_beta": Stroke(1, "-"),
    "weighted_loss": Stroke(2, "--"),
    "shuffled_beta": Stroke(3, "-."),
    "rand_beta": Stroke(4, ":"),
    "dpo": Stroke(5, "-"),
}
_DPO_AT, _OTHER = 5, 6
"""Colours that arms share which differ in dash alone: DPO at several β, and methods with a loss of their own."""


@dataclass(frozen=True, eq=False)
class Course:
    """One arm: its margins, or the reason why there are none. All arrays `_i` are over the schedule.

    `margin` is Δ of a pair (`row` of the schedule) as training saw it at `step`; `last_i` the last of these, NaN of a
    pair that was not trained; `held_i` Δ after training, NaN of a pair that was not held out. `beta_i` and `weight_i`
    are those of the arm's loss. `ranking` is the share of held-out pairs whose chosen response
    is the more probable one after training. `log` has the entries of the trainer's log that tell a loss.
    """

    arm: Arm
    stroke: Stroke
    step: NDArray[np.int64]
    row: NDArray[np.int64]
    margin: Array
    last_i: Array
    held_i: Array
    beta_i: Array
    weight_i: Array
    ranking: float | None = None
    log: tuple[Mapping[str, float], ...] = ()
    problem: str | None = None

    @property
    def method(self) -> str:
        """The name of the arm."""
        return self.arm.name

    @property
    def trained(self) -> bool:
        """Whether there is something to show."""
        return self.problem is None

    @property
    def moved(self) -> bool:
        """Whether there are margins over training; the untuned student has none."""
        return len(self.row) > 0

    @property
    def logistic(self) -> bool:
        """Whether the loss is w·(−log σ(βΔ)), which saturation is defined for."""
        return self.arm.loss == "sp2dpo"

    @property
    def held_out(self) -> bool:
        """Whether it was measured on held-out pairs."""
        return bool(np.isfinite(self.held_i).any())

    @property
    def pairs(self) -> int:
        """How many pairs were trained on."""
        return int(np.isfinite(self.last_i).sum())

    @property
    def steps(self) -> int:
        """How many steps were taken."""
        return int(self.step.max()) + 1 if self.moved else 0

    @property
    def passes(self) -> float:
        """How often a pair was seen on average."""
        return len(self.row) / self.pairs if self.pairs else 0.0


class _Unfit(Exception):
    """Why an arm cannot be shown."""


def arms_of(run: Run) -> list[Arm]:
    """The arms of λ and those that have a folder beside them, in an order that is the same in all runs."""
    train, folder = run.process.settings.train, run.path / "train"
    if train is None:
        return []
    there = (path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else ()
    found = (_arm(name, train.beta, train.knobs) for name in {*train.methods, *there})
    return sorted((arm for arm in found if arm), key=_place)


def _arm(name: str, beta: float, knobs: Mapping[str, Any]) -> Arm | None:
    """None for a folder that is no arm's, such as one that was set aside."""
    try:
        return arm_of(name, beta=beta, knobs=knobs)
    except InputError:
        return None


def _place(arm: Arm) -> tuple[int, float, str]:
    base = re.sub(r"^dpo_.*", "dpo", arm.name)
    return [*ARMS, base].index(base), (arm.beta or 0.0) if base != arm.name else 0.0, arm.name


def _strokes(arms: Sequence[Arm]) -> dict[str, Stroke]:
    """How the line of each arm is drawn in all charts of a report."""
    at = [arm.name for arm in arms if arm.name.startswith("dpo_")]
    other = [arm.name for arm in arms if arm.name not in _STROKES and arm.name not in at]
    shared = {name: Stroke(_DPO_AT, LINES[1:][n % 3]) for n, name in enumerate(at)}
    return _STROKES | shared | {name: Stroke(_OTHER, LINES[n % 4]) for n, name in enumerate(other)}


def courses(evidence: Evidence) -> list[Course]:
    """Every arm of a run, trained or not."""
    arms = arms_of(evidence.run)
    strokes = _strokes(arms)
    return [_course(evidence, arm, strokes[arm.name]) for arm in arms]


def _course(evidence: Evidence, arm: Arm, stroke: Stroke) -> Course:
    nothing, none = np.full(evidence.n, np.nan), np.array([], np.int64)
    try:
        rows = _manifest(evidence.run, arm)
        held, ranking = _held_out(evidence, arm)
        step, row, margin = _margins(evidence, arm) if arm.trained else (none, none, np.array([]))
    except _Unfit as problem:
        return Course(arm, stroke, none, none, np.array([]), nothing, nothing, nothing, nothing, problem=str(problem))
    last_i = nothing.copy()
    last_i[row] = margin
    of = evidence.schedule.slice(0, rows)
    seed = evidence.run.process.settings.schedule.random_seed
    columns = arm_columns(of, arm, held_out=np.isfinite(held[: of.num_rows]), seed=seed)
    beta_i, weight_i = nothing.copy(), nothing.copy()
    beta_i[: of.num_rows], weight_i[: of.num_rows] = columns.beta, columns.weight
    log = _log(evidence.run.training(arm.name))
    return Course(arm, stroke, step, row, margin, last_i, held, beta_i, weight_i, ranking, log)


def _manifest(run: Run, arm: Arm) -> int | None:
    """How many rows of the schedule the arm was given; None: all."""
    folder = run.training(arm.name)
    manifest = read_manifest(folder / "metrics.json")
    if manifest is None:
        raise _Unfit("not trained to the end" if folder.is_dir() else "not trained")
    if manifest["inputs"].get(run.schedule.name) != sha256_file(run.schedule):
        raise _Unfit("trained on another schedule than the one here")
    rows = manifest["inputs"].get("rows")
    return None if rows is None else int(rows)


def _margins(evidence: Evidence, arm: Arm) -> tuple[NDArray[np.int64], NDArray[np.int64], Array]:
    """Step, row and Δ, in the order of steps."""
    table = _table(evidence, arm, "margins.parquet")
    if table is None:
        raise _Unfit("its margins.parquet is missing")
    step, row, margin = (table[name].to_numpy() for name in ("step", "row", "margin"))
    order = np.argsort(step, kind="stable")
    return step[order], row[order], margin[order].astype(np.float64)


def _held_out(evidence: Evidence, arm: Arm) -> tuple[Array, float | None]:
    """Δ of the held-out pairs, and the share whose chosen response is the more probable one."""
    held_i, table = np.full(evidence.n, np.nan), _table(evidence, arm, "held_out.parquet")
    if table is None:
        return held_i, None
    value = {name: table[name].to_numpy().astype(np.float64) for name in HELD_OUT_SCHEMA.names}
    held_i[table["row"].to_numpy()] = value["chosen_log_ratio"] - value["rejected_log_ratio"]
    return held_i, float((value["chosen_log_prob"] > value["rejected_log_prob"]).mean())


def _table(evidence: Evidence, arm: Arm, name: str) -> pa.Table | None:
    path = evidence.run.training(arm.name) / name
    if not path.is_file():
        return None
    table = read_table(path, _MADE_BY)
    row = table["row"].to_numpy()
    if not len(row) or row.min() < 0 or row.max() >= evidence.n:
        raise _Unfit(f"its {name} does not fit the schedule")
    return table


def _log(folder: Path) -> tuple[Mapping[str, float], ...]:
    path = folder / "trainer_state.json"
    if not path.is_file():
        return ()
    history = json.loads(path.read_text(encoding="utf-8")).get("log_history", [])
    return tuple(entry for entry in history if "loss" in entry and "step" in entry)


def step_edges(all_courses: Sequence[Course], groups: Iterable[NDArray[np.bool_]]) -> Array:
    """Edges of the bins of steps that all charts share; fewer of them where groups are small."""
    moved = [course for course in all_courses if course.moved]
    steps = max((course.steps for course in moved), default=1)
    seen = min((int(of_i[course.row].sum()) for of_i in groups for course in moved), default=0)
    return np.linspace(0, steps, min(steps, max(4, min(MOST_BINS, seen // PER_BIN))) + 1)


def curve(course: Course, of_i: NDArray[np.bool_], edges: Array, values: Array | None = None) -> Mapping[str, Array]:
    """Mean of a group in each bin of steps, of the margins or of other values of each; empty bins are left out."""
    of = of_i[course.row]
    bins = np.searchsorted(edges, course.step[of], "right") - 1
    count = np.bincount(bins, minlength=len(edges) - 1)
    total = np.bincount(bins, (course.margin if values is None else values)[of], len(edges) - 1)
    there = count > 0
    return {"x": ((edges[:-1] + edges[1:]) / 2)[there], "y": total[there] / count[there]}


def from_log(course: Course, key: str) -> Mapping[str, Array]:
    """What the trainer logged under a key, over the steps: means of stretches where there is much of it.

    A value that is not finite is left out.
    """
    seen = [(entry["step"], entry[key]) for entry in course.log if np.isfinite(entry.get(key, np.nan))]
    parts = np.array_split(np.array(seen, np.float64).reshape(-1, 2), min(len(seen), MOST_LOGGED) or 1)
    x, y = np.array([part.mean(axis=0) for part in parts if len(part)]).reshape(-1, 2).T
    return {"x": x, "y": y}
