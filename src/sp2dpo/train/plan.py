"""What a sweep is to train, decided before any model is loaded: the arms, their pairs, and what is there already.

Reads the run directory and writes nothing; no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from sp2dpo.arms import Arm
from sp2dpo.errors import ProcessError, ScheduleError
from sp2dpo.hashing import sha256_file
from sp2dpo.numbers import some
from sp2dpo.pairs import read_pairs
from sp2dpo.runs import Run
from sp2dpo.settings import Train
from sp2dpo.stages import read_excluded, read_schedule
from sp2dpo.tables import is_current, read_manifest
from sp2dpo.train.data import arm_columns, check_arm, check_cover, held_out, scheduled_pairs, with_arm

__all__ = ["Planned", "beta_of", "noted_inputs", "plan_arms", "steps_of", "train_settings"]

_WHOLE: Final = "checkpoint-*/margins.parquet"
"""What a checkpoint has last."""

_ROWS: Final = "rows"
"""How many rows of the schedule were taken, among the inputs of an arm."""


@dataclass(frozen=True, eq=False)
class Planned:
    """One arm and what it needs: `pairs` to train on, `held_out` ones to be measured on, and where it goes.

    Both tables have `prompt`, `chosen`, `rejected`, `category`, `row`, `pair_id`, `beta` and `weight`. `inputs` are
    what a finished arm must have been made from.
    """

    arm: Arm
    folder: Path
    pairs: pa.Table
    held_out: pa.Table
    inputs: Mapping[str, str]

    def done(self, lambda_hash: str) -> bool:
        """Whether the arm is finished, unchanged, and made from just these inputs under this λ."""
        return is_current(self.folder / "metrics.json", inputs=self.inputs, lambda_hash=lambda_hash)

    @property
    def in_the_way(self) -> str:
        """What the folder holds was trained on, in words, if these are other inputs; empty if they are not."""
        if not self.folder.is_dir() or not any(self.folder.iterdir()):
            return ""
        noted = noted_inputs(self.folder)
        other = [name for name, value in self.inputs.items() if noted.get(name) != value]
        if not other:
            return ""
        if not self.inputs.keys() <= noted.keys():
            return "inputs that it does not name"
        rows = f"{some(int(noted[_ROWS]), 'row')} of the schedule, not {self.inputs[_ROWS]}"
        return " and ".join(rows if name == _ROWS else f"another {name}" for name in other)

    @property
    def checkpoint(self) -> Path | None:
        """The last whole checkpoint, as far as its files tell; nothing is cleared away."""
        steps = [(int(path.parent.name.rpartition("-")[2]), path.parent) for path in self.folder.glob(_WHOLE)]
        return max(steps)[1] if steps else None


def train_settings(run: Run) -> Train:
    """The section `train` of the process.

    Raises:
        ProcessError: there is none.
    """
    settings = run.process.settings
    if settings.train is None or settings.student is None:
        raise ProcessError("this process has no 'student' and 'train'; add them, or stop at the schedule")
    return settings.train


def plan_arms(run: Run, names: Sequence[str] | None = None, limit: int | None = None) -> list[Planned]:
    """The arms of λ, or those of these names, each with its pairs; `limit`: of the first so many rows of the schedule.

    Raises:
        ScheduleError: a schedule that was changed or does not fit the pairs, or that cannot be split.
        InputError: no such arm.
    """
    train = train_settings(run)
    arms = [train.arm(name) for name in dict.fromkeys(names or train.methods)]
    pairs, schedule = read_pairs(run.pairs, run.command("annotate")), _trusted_schedule(run)
    check_cover(pairs, schedule, read_excluded(run))
    schedule = schedule.slice(0, limit)
    rows, settings = scheduled_pairs(pairs, schedule), run.process.settings.schedule
    rows = rows.append_column("pair_id", schedule["pair_id"])  # by which the trainer names a pair
    out = held_out(rows, train.held_out, settings.random_seed)
    inputs = {
        run.schedule.name: sha256_file(run.schedule),
        run.pairs.name: sha256_file(run.pairs),
        _ROWS: str(rows.num_rows),
    }
    planned = []
    for arm in arms:
        check_arm(schedule, arm, *settings.widest_envelope)
        read = arm if arm.trained else train.arm("dpo")  # a trainer wants a β, though none is trained with
        table = with_arm(rows, arm_columns(schedule, read, held_out=out, seed=settings.random_seed))
        parts = table.filter(pa.array(~out)), table.filter(pa.array(out))
        planned.append(Planned(arm, run.training(arm.name), *parts, inputs))
    return planned


def _trusted_schedule(run: Run) -> pa.Table:
    """The schedule, if it is the one that its manifest describes."""
    schedule = read_schedule(run)
    manifest = read_manifest(run.schedule)
    if manifest is not None and manifest["files"].get(run.schedule.name) != sha256_file(run.schedule):
        raise ScheduleError(
            f"{run.schedule} is not the file that its manifest describes; make it again with sp2dpo schedule, or "
            "delete schedule.manifest.json to train on a schedule of your own"
        )
    return schedule


def noted_inputs(folder: Path) -> dict[str, Any]:
    """What a training noted in its folder when it began; empty if there is no note."""
    note = folder / "inputs.json"
    return dict(json.loads(note.read_text(encoding="utf-8"))) if note.is_file() else {}


def steps_of(pairs: int, config: Any, processes: int) -> int:
    """Optimizer steps of training on so many pairs under a `trl.DPOConfig`, as transformers counts them."""
    if config.max_steps > 0:
        return int(config.max_steps)
    a_batch = config.per_device_train_batch_size * processes
    batches = pairs // a_batch if config.dataloader_drop_last else math.ceil(pairs / a_batch)
    an_epoch: int = max(math.ceil(batches / config.gradient_accumulation_steps), 1)
    epochs: float = config.num_train_epochs
    return math.ceil(epochs * an_epoch)


def beta_of(table: pa.Table) -> tuple[float, float, float]:
    """Least, mean and largest β of a table of pairs, to the 7 digits that float32 keeps."""
    beta = table["beta"].to_numpy().astype(np.float64)
    low, mean, high = (float(f"{value:.7g}") for value in (beta.min(), beta.mean(), beta.max()))
    return low, mean, high
