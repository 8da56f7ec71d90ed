"""A sweep in words, before it begins: its arms, their steps, what is there already, and the disk that it will take."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sp2dpo.numbers import some
from sp2dpo.runs import Run
from sp2dpo.train.estimate import bytes_of_arm, in_words, parameters_of
from sp2dpo.train.plan import Planned, beta_of, steps_of, train_settings

__all__ = ["Preview"]


@dataclass(frozen=True)
class Preview:
    """A sweep with the `trl.DPOConfig` of its arms, and the folder or hub id of its student."""

    run: Run
    sweep: Sequence[Planned]
    config: Any
    student: str

    @property
    def steps(self) -> int:
        """Of one arm; all arms have the same."""
        return steps_of(self.sweep[0].pairs.num_rows, self.config, self.config.world_size)

    @property
    def pairs_per_step(self) -> int:
        a_process = self.config.per_device_train_batch_size * self.config.gradient_accumulation_steps
        return int(a_process * self.config.world_size)

    @property
    def disk(self) -> int | None:
        """Bytes of one arm; None where the student is not here yet."""
        train, student = train_settings(self.run), self.run.process.settings.student
        size = parameters_of(self.student, student.revision if student else None)
        lora = "r" in (train.model_extra or {})
        return size and bytes_of_arm(*size, self.config, self.steps, lora=lora, merge=train.merge)

    def line(self, done: Sequence[Planned]) -> str:
        """One line before a sweep: how much is to be trained, and what it takes."""
        first, left = self.sweep[0], [one for one in self.sweep if one not in done and one.arm.trained]
        if not left:
            return "no arm is left to train"
        out = f", {first.held_out.num_rows:,} held out" if first.held_out.num_rows else ""
        parts = [
            f"{some(len(left), 'arm')} to train, {some(self.steps, 'step')} of {some(self.pairs_per_step, 'pair')} "
            f"({some(first.pairs.num_rows, 'pair')}{out})"
        ]
        if self.disk:
            free = shutil.disk_usage(self.run.path).free
            few = "" if free > self.disk * len(left) else ", which is too little"
            parts.append(f"about {in_words(self.disk)} of disk each, {in_words(free)} free{few}")
        took = [minutes for one in done if one.arm.trained and (minutes := _minutes(one.folder)) is not None]
        if took:
            parts.append(f"about {sum(took) / len(took):.1f} min each, as those that are done")
        return "; ".join(parts)

    def rows(self, lambda_hash: str) -> list[dict[str, Any]]:
        """One row for each arm."""
        return [
            {
                "method": one.arm.name,
                "what": one.arm.says,
                **dict(zip(("beta_min", "beta_mean", "beta_max"), _beta(one), strict=True)),
                "pairs": one.pairs.num_rows if one.arm.trained else 0,
                "held_out": one.held_out.num_rows,
                "steps": self.steps if one.arm.trained else 0,
                "state": _state(one, lambda_hash),
            }
            for one in self.sweep
        ]

    def how(self) -> dict[str, str]:
        """Layout and reference, as far as they are known without the model."""
        layout = {
            "auto": "shared where the student's attention allows it, else padded; which, and why, is said at the start",
            "shared": "shared, or an error that says why not",
            "padded": "padded, as TRL",
        }[train_settings(self.run).layout]
        once = self.config.precompute_ref_log_probs
        return {"layout": layout, "reference": "precomputed once for all arms, and kept" if once else "at every step"}


def _beta(one: Planned) -> tuple[float | None, ...]:
    return beta_of(one.pairs) if one.arm.trained else (None, None, None)


def _state(one: Planned, lambda_hash: str) -> str:
    if one.done(lambda_hash):
        return "done"
    if one.in_the_way:
        return "another training is there, and will be moved aside"
    return f"goes on from {one.checkpoint.name}" if one.checkpoint else "not begun"


def _minutes(folder: Path) -> float | None:
    """How long a finished arm took; None if it went on from a checkpoint."""
    runtime = json.loads((folder / "metrics.json").read_text(encoding="utf-8")).get("train_runtime")
    return None if runtime is None else float(runtime) / 60
