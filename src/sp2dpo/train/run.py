"""Training runs of a process: one folder for each method, complete when its manifest is there."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint

from sp2dpo.errors import ProcessError, ScheduleError
from sp2dpo.hashing import canonical_json, sha256_file
from sp2dpo.pairs import read_pairs
from sp2dpo.runs import Run
from sp2dpo.settings import Train, train_keys
from sp2dpo.stages import read_excluded, read_schedule
from sp2dpo.tables import is_current, read_manifest, write_atomic, write_manifest, write_table
from sp2dpo.train.data import check_cover, training_table
from sp2dpo.train.terminal import quiet, watch
from sp2dpo.train.toy import make_toy
from sp2dpo.train.trainer import PairwiseDPOConfig, PairwiseDPOTrainer, margins_table

__all__ = ["Trained", "check_settings", "train_run"]


@dataclass(frozen=True)
class Trained:
    """One finished training run."""

    method: str
    folder: Path
    metrics: Mapping[str, float]
    already_done: bool
    set_aside: Path | None = None


def check_settings(train: Train) -> None:
    """Let TRL and PEFT check their keys, before anything is paid for that they would refuse later.

    Raises:
        ProcessError: with their message.
    """
    args = _arguments(train)
    try:
        with quiet():
            PairwiseDPOConfig(output_dir="unused", **args["dpo"])
            if args["lora"]:
                LoraConfig(**args["lora"])
    except (ValueError, TypeError, ImportError) as error:
        raise ProcessError(f"train: TRL or PEFT refuses these settings: {error}") from error


def train_run(run: Run, *, limit: int | None = None) -> list[Trained]:
    """Train every method of the process that is not finished yet; an interrupted one goes on from its last checkpoint.

    Raises:
        ScheduleError: a schedule that was changed or does not fit the pairs; before any model is loaded.
        ProcessError: the process has no student.
    """
    settings = run.process.settings
    if settings.train is None or settings.student is None:
        raise ProcessError("this process has no 'student' and 'train'; add them, or stop at the schedule")
    pairs, schedule = read_pairs(run.pairs, run.command("annotate")), _trusted_schedule(run)
    check_cover(pairs, schedule, read_excluded(run))
    tables = {method: _table(run, pairs, schedule, method).slice(0, limit) for method in settings.train.methods}
    args = _arguments(settings.train)
    with quiet():
        model = _student_folder(run, pairs)
        return [_train_one(run, method, table, args, model) for method, table in tables.items()]


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


def _table(run: Run, pairs: pa.Table, schedule: pa.Table, method: str) -> pa.Table:
    low, high = run.process.settings.schedule.widest_envelope
    beta = run.process.settings.train.beta if run.process.settings.train else 0.0
    return training_table(pairs, schedule, method, beta=beta, beta_min=low, beta_max=high)


def _arguments(train: Train) -> dict[str, dict[str, Any]]:
    """The keys of `train`, split by whose they are."""
    given = train.model_extra or {}
    dpo = {name: value for name, value in given.items() if name in train_keys("dpo")}
    lora = {name: value for name, value in given.items() if name in train_keys("lora")}
    return {"dpo": dpo | {"beta": train.beta, "max_prompt_length": train.max_prompt_length}, "lora": lora}


def _student_folder(run: Run, pairs: pa.Table) -> str:
    """Where the student is loaded from; the toy is made here, once for all methods."""
    student = run.process.settings.student
    assert student is not None
    local = run.process.base / student.model
    if student.model != "toy":
        return str(local) if local.is_dir() else student.model
    folder, partial = run.path / "student", run.path / "student.partial"
    if not folder.is_dir():
        make_toy(partial, [row["prompt"] + row[side] for row in pairs.to_pylist() for side in ("chosen", "rejected")])
        inputs = {run.pairs.name: sha256_file(run.pairs)}
        write_manifest(partial / "toy", files=_hashes(partial), inputs=inputs, lambda_hash=run.process.lambda_hash)
        partial.rename(folder)
    return str(folder)


def _train_one(run: Run, method: str, table: pa.Table, args: dict[str, dict[str, Any]], model: str) -> Trained:
    folder = run.training(method)
    inputs = {
        run.schedule.name: sha256_file(run.schedule),
        run.pairs.name: sha256_file(run.pairs),
        "rows": str(table.num_rows),
    }
    done = folder / "metrics.json"
    if is_current(done, inputs=inputs, lambda_hash=run.process.lambda_hash):
        return Trained(method, folder, json.loads(done.read_text(encoding="utf-8")), already_done=True)
    set_aside = _claim(folder, inputs)
    trainer = _trainer(run, table, args, model, folder)
    watch(trainer, f"train {method}")
    checkpoint = get_last_checkpoint(str(folder))
    if checkpoint:
        trainer.resume_margins(Path(checkpoint))
    metrics: dict[str, float] = trainer.train(resume_from_checkpoint=checkpoint).metrics
    trainer.save_model(str(folder))
    trainer.save_state()
    if trainer.is_world_process_zero():
        _keep(run, trainer, folder, metrics, inputs)
    return Trained(method, folder, metrics, already_done=False, set_aside=set_aside)


def _claim(folder: Path, inputs: Mapping[str, str]) -> Path | None:
    """Note in a folder what is trained there; what was trained on other inputs is moved away, never gone on from.

    Returns:
        where the earlier training is now, if there was one.
    """
    note, text = folder / "inputs.json", canonical_json(dict(inputs))
    if note.is_file() and note.read_text(encoding="utf-8") == text:
        return None
    set_aside = None
    if folder.is_dir() and any(folder.iterdir()):
        names = (folder.with_name(f"{folder.name}.{n}") for n in itertools.count(1))
        set_aside = folder.rename(next(name for name in names if not name.exists()))
    write_atomic(note, lambda partial: partial.write_text(text, encoding="utf-8"))
    return set_aside


def _trainer(
    run: Run, table: pa.Table, args: dict[str, dict[str, Any]], model: str, folder: Path
) -> PairwiseDPOTrainer:
    student = run.process.settings.student
    revision = student.revision if student else None
    defaults = {"report_to": "none", "logging_steps": 10, "dataloader_pin_memory": torch.cuda.is_available()}
    config = PairwiseDPOConfig(output_dir=str(folder), disable_tqdm=True, **{**defaults, **args["dpo"]})
    init = config.model_init_kwargs or {}
    return PairwiseDPOTrainer(
        AutoModelForCausalLM.from_pretrained(model, revision=revision, **init),
        args=config,
        train_dataset=Dataset(table),
        processing_class=AutoTokenizer.from_pretrained(model, revision=revision),
        peft_config=LoraConfig(**{"task_type": "CAUSAL_LM", **args["lora"]}) if args["lora"] else None,
    )


def _hashes(folder: Path) -> dict[str, str]:
    """Of every file below a folder, those of checkpoints too."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.endswith(".manifest.json")]
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}


def _keep(
    run: Run, trainer: PairwiseDPOTrainer, folder: Path, metrics: dict[str, float], inputs: dict[str, str]
) -> None:
    write_table(folder / "margins.parquet", margins_table(trainer.margins))
    text = json.dumps(metrics, indent=1)
    write_atomic(folder / "metrics.json", lambda partial: partial.write_text(text, encoding="utf-8"))
    write_manifest(
        folder / "metrics.json",
        files=_hashes(folder),
        inputs=inputs,
        lambda_hash=run.process.lambda_hash,
    )
