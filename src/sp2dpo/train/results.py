"""What an arm leaves in its folder beside the model that the trainer saves."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from sp2dpo.arms import Arm
from sp2dpo.hashing import sha256_file
from sp2dpo.runs import Run
from sp2dpo.tables import write_atomic, write_manifest, write_table
from sp2dpo.train.card import Form, write_card
from sp2dpo.train.held_out import held_out_metrics
from sp2dpo.train.keys import Keys
from sp2dpo.train.merged import merge
from sp2dpo.train.plan import Planned, train_settings

__all__ = ["Training", "extent", "hashes", "keep", "of_all_legs"]


@dataclass(frozen=True)
class Training:
    """One arm about to be trained, and what it is trained with; `student` is a folder or hub id."""

    run: Run
    keys: Keys
    student: str
    planned: Planned

    @property
    def arm(self) -> Arm:
        return self.planned.arm

    @property
    def folder(self) -> Path:
        return self.planned.folder


def extent(trainer: Any) -> dict[str, float]:
    """What λ does not say, for it has the batch of one process."""
    args = trainer.args
    a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {"processes": args.world_size, "pairs_per_step": a_step}


_OF_THE_LAST_LEG: Final = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
"""Of a training that went on from a checkpoint; nothing keeps how long the legs before took."""


def of_all_legs(metrics: Mapping[str, float], history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metrics of a training that went on from a checkpoint, without what transformers knows of the last leg only."""
    kept = {name: value for name, value in metrics.items() if name not in _OF_THE_LAST_LEG}
    return {**kept, "train_loss": _logged_loss(history)}


def _logged_loss(history: Sequence[Mapping[str, float]]) -> float:
    """Mean loss of all steps, from the means that were logged; transformers counts only those since it went on."""
    logged = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    steps = [now - before for (before, _), (now, _) in itertools.pairwise([(0, 0.0), *logged])]
    return sum(n * loss for n, (_, loss) in zip(steps, logged, strict=True)) / max(sum(steps), 1)


def keep(training: Training, metrics: dict[str, float], table: pa.Table | None, steps: int) -> dict[str, float]:
    """Write metrics, held-out table, merged model and cards; the manifest last. Returns all metrics of the arm.

    In the main process alone.

    Raises:
        TrainingError: a held-out log-probability is not finite.
    """
    run, folder, train = training.run, training.folder, train_settings(training.run)
    if table is not None:
        write_table(folder / "held_out.parquet", table)
        metrics = metrics | held_out_metrics(table, train.beta)
    text = json.dumps(metrics, indent=1)
    write_atomic(folder / "metrics.json", lambda partial: partial.write_text(text, encoding="utf-8"))
    if training.arm.trained:
        _write_cards(training, metrics, steps)
    write_manifest(
        folder / "metrics.json",
        files=hashes(folder),
        inputs=training.planned.inputs,
        lambda_hash=run.process.lambda_hash,
    )
    return metrics


def _write_cards(training: Training, metrics: dict[str, float], steps: int) -> None:
    run, folder, student = training.run, training.folder, training.run.process.settings.student
    assert student is not None
    forms: dict[Path, Form] = {folder: "adapter" if training.keys.lora else "model"}
    if training.keys.lora and train_settings(run).merge:
        init = training.keys.dpo.get("model_init_kwargs") or {}
        merge(folder, folder / "merged", training.student, student.revision, init)
        forms[folder / "merged"] = "merged"
    for place, form in forms.items():
        write_card(run, training.planned, place, form, metrics, steps)


def hashes(folder: Path) -> dict[str, str]:
    """Of every file below a folder, those of checkpoints too."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.endswith(".manifest.json")]
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}
