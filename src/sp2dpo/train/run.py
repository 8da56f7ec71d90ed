"""Training runs of a process: one folder for each arm, complete when its manifest is there.

Every process of a launcher runs all of this; only the main one changes folders. What is decided before a model is
loaded is in `sp2dpo.train.plan`.
"""

from __future__ import annotations

import gc
import itertools
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback
from transformers.integrations.fsdp import is_fsdp_enabled

from sp2dpo.errors import ProcessError, Sp2dpoError, TrainingError
from sp2dpo.hashing import canonical_json, sha256_file
from sp2dpo.numbers import some
from sp2dpo.pairs import read_pairs
from sp2dpo.rubric import CATEGORIES
from sp2dpo.runs import Run
from sp2dpo.tables import write_atomic, write_manifest, write_table
from sp2dpo.train.config import PairwiseDPOConfig
from sp2dpo.train.held_out import measure, measure_reference
from sp2dpo.train.interrupt import interruptible, last_complete
from sp2dpo.train.keys import check_settings, keys_of
from sp2dpo.train.plan import Planned, noted_inputs, plan_arms, train_settings
from sp2dpo.train.preview import Preview
from sp2dpo.train.results import Training, extent, hashes, keep, of_all_legs
from sp2dpo.train.student import load_student
from sp2dpo.train.terminal import quiet, watch
from sp2dpo.train.toy import make_toy
from sp2dpo.train.trainer import PairwiseDPOTrainer, margins_table

__all__ = ["Trained", "check_settings", "preview_run", "train_run"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class Trained:
    """What became of one arm; `problem` says why it has no result."""

    method: str
    folder: Path
    metrics: Mapping[str, float]
    already_done: bool = False
    set_aside: Path | None = None
    problem: str | None = None


def train_run(
    run: Run, names: Sequence[str] | None = None, *, limit: int | None = None, say: Say = lambda text: None
) -> list[Trained]:
    """Train the arms of λ, or those of these names, that are not finished yet; an interrupted one goes on from its last
    checkpoint, and one that fails leaves the others to go on.

    Args:
        limit: train on the first so many pairs of the schedule only.
        say: takes one line at a time, about the sweep and about each arm.

    Raises:
        ScheduleError: a schedule that was changed or does not fit the pairs; before any model is loaded.
        ProcessError: the process has no student, or settings that TRL or PEFT refuse.
        InputError: no such arm.
        KeyboardInterrupt: it was asked to end; what is done is kept.
    """
    preview = preview_run(run, names, limit)
    keys, state = keys_of(train_settings(run)), PartialState()
    done = [planned for planned in preview.sweep if planned.done(run.process.lambda_hash)]
    for planned in preview.sweep:
        _check_processes(planned, state.num_processes)
    state.wait_for_everyone()  # before a folder changes that another process still reads
    trained = []
    with quiet():
        student = _student_folder(run)
        say(f"train     {preview.line(done)}")
        for note in keys.notes:
            say(f"          {note}")
        left, begun = [planned for planned in preview.sweep if planned not in done], time.monotonic()
        for planned in preview.sweep:
            one = Training(run, keys, student, planned)
            trained.append(_already(planned) if planned in done else _one(one, say))
            say(_in_words(trained[-1]))
            if planned in left[1:-1]:  # the first may have been quick: it may have been the untuned one
                n = left.index(planned) + 1
                minutes = (time.monotonic() - begun) / n * (len(left) - n) / 60
                say(f"          {some(len(left) - n, 'arm')} left, about {minutes:.1f} min")
    return trained


def preview_run(run: Run, names: Sequence[str] | None = None, limit: int | None = None) -> Preview:
    """What `train_run` would do; loads no model and writes nothing.

    Raises:
        Sp2dpoError: as `train_run`.
    """
    train = train_settings(run)
    student = run.process.settings.student
    assert student is not None
    config = check_settings(train, student, names)
    return Preview(run, plan_arms(run, names, limit), config, _student_at(run))


def _in_words(trained: Trained) -> str:
    """One line about an arm that ended."""
    if trained.problem:
        return f"train     {trained.method} FAILED: {trained.problem}"
    shown = {"loss": "train_loss", "held-out loss": "held_out_loss"}
    if "train_loss" in trained.metrics:  # the untuned student has no margins to be right about
        shown["held-out accuracy"] = "held_out_accuracy"
    numbers = [f"{words} {trained.metrics[key]:.4f}" for words, key in shown.items() if key in trained.metrics]
    if trained.already_done:
        numbers.insert(0, "already done")
    elif "train_runtime" in trained.metrics:
        numbers.insert(0, f"{trained.metrics['train_runtime']:.0f} s")
    return f"train     {trained.method}: {', '.join(numbers)}  {trained.folder}"


def _student_at(run: Run) -> str:
    """The folder or hub id that the student is loaded from; that of the toy may not be there yet."""
    student = run.process.settings.student
    assert student is not None
    if student.model == "toy":
        return str(run.path / "student")
    local = run.process.base / student.model
    return str(local) if local.is_dir() else student.model


def _student_folder(run: Run) -> str:
    """Where the student is; the toy is made here, once for all arms."""
    student, folder = run.process.settings.student, Path(_student_at(run))
    is_toy = student is not None and student.model == "toy"
    if is_toy and PartialState().is_main_process and not folder.is_dir():
        rows, partial = read_pairs(run.pairs, run.command("annotate")).to_pylist(), run.path / "student.partial"
        make_toy(partial, [row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")])
        inputs = {run.pairs.name: sha256_file(run.pairs)}
        write_manifest(partial / "toy", files=hashes(partial), inputs=inputs, lambda_hash=run.process.lambda_hash)
        partial.rename(folder)
    PartialState().wait_for_everyone()
    return _student_at(run)


def _already(planned: Planned) -> Trained:
    metrics = json.loads((planned.folder / "metrics.json").read_text(encoding="utf-8"))
    return Trained(planned.arm.name, planned.folder, metrics, already_done=True)


def _one(training: Training, say: Say) -> Trained:
    state, planned = PartialState(), training.planned
    say(f"train     {training.arm.name}: {training.arm.says}")
    set_aside = _claim(planned, state.num_processes, say) if state.is_main_process else None
    state.wait_for_everyone()
    metrics, problem = {}, None
    try:
        metrics = _train(training) if training.arm.trained else _measure_only(training)
    except TrainingError as error:
        problem = str(error)
    state.wait_for_everyone()
    _end_trackers()
    _free()
    return Trained(training.arm.name, planned.folder, metrics, set_aside=set_aside, problem=problem)


def _check_processes(planned: Planned, processes: int) -> None:
    """Refuse to go on from a checkpoint with another number of processes: each step would have another batch.

    Raises:
        ProcessError: names both numbers.
    """
    folder, begun = planned.folder, noted_inputs(planned.folder).get("processes", processes)
    finished = (folder / "metrics.manifest.json").is_file()
    if begun != processes and planned.checkpoint and not finished and not planned.in_the_way:
        raise ProcessError(
            f"{folder} was begun with {begun} processes, and these are {processes}: a step would have other pairs; "
            "go on with as many as before, or remove the folder to begin anew"
        )


def _claim(planned: Planned, processes: int, say: Say) -> Path | None:
    """Note in a folder what is trained there; what was trained on other inputs is moved away, never gone on from.

    Returns:
        where the earlier training is now, if there was one.
    """
    folder, set_aside = planned.folder, None
    if words := planned.in_the_way:
        names = (folder.with_name(f"{folder.name}.{n}") for n in itertools.count(1))
        set_aside = folder.rename(next(name for name in names if not name.exists()))
        say(f"          {folder.name} had been trained on {words}; that is now {set_aside}")
    text = canonical_json({**planned.inputs, "processes": processes})
    write_atomic(folder / "inputs.json", lambda partial: partial.write_text(text, encoding="utf-8"))
    return set_aside


class _LastLine(TrainerCallback):  # type: ignore[misc]
    """Logs the last step, so that no steps are missing from the end of the curves."""

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True


def _train(training: Training) -> dict[str, float]:
    trainer = _trainer(training, training.planned.pairs)
    trainer.add_callback(_LastLine())
    checkpoint = last_complete(training.folder)
    with watch(trainer, f"train {training.arm.name}"), interruptible(trainer) as interrupt:
        metrics = dict(trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).metrics)
    if checkpoint:
        metrics = of_all_legs(metrics, trainer.state.log_history)
    trainer.save_model(str(training.folder))
    trainer.save_state()
    table = measure(trainer) if training.planned.held_out.num_rows else None
    trainer.accelerator.wait_for_everyone()  # each process has files of its own in the checkpoints
    if trainer.is_world_process_zero():
        if trainer.args.save_strategy == "no":  # an interrupt has saved one all the same
            for left in training.folder.glob("checkpoint-*"):
                shutil.rmtree(left)
        write_table(training.folder / "margins.parquet", margins_table(trainer.margins))
        metrics = keep(training, metrics | extent(trainer), table, trainer.state.global_step)
    if interrupt.asked:  # in the last step: this arm is whole, and the sweep ends
        raise KeyboardInterrupt
    return metrics


def _measure_only(training: Training) -> dict[str, float]:
    trainer = _trainer(training, training.planned.held_out, precompute_ref_log_probs=True, report_to="none")
    if not trainer.is_world_process_zero():
        return {}
    return keep(training, extent(trainer), measure_reference(trainer), 0)


def _trainer(training: Training, table: pa.Table, **more: Any) -> PairwiseDPOTrainer:
    """Settings first, then the model: they choose the device, and how much of the weights each process reads."""
    arm, keys, student = training.arm, training.keys, training.run.process.settings.student
    assert student is not None
    defaults = {"report_to": "none", "logging_steps": 10, "dataloader_pin_memory": torch.cuda.is_available()}
    own = {"method": arm.loss, "knobs": dict(arm.knobs), "run_name": f"{training.run.process.settings.name} {arm.name}"}
    given = {**defaults, **keys.dpo, **own, **more, "model_init_kwargs": None}
    try:
        config = PairwiseDPOConfig(output_dir=str(training.folder), disable_tqdm=True, **given)
    except (ValueError, TypeError) as error:
        raise ProcessError(f"train: arm '{arm.name}' cannot have these settings: {error}") from error

    def load() -> Any:
        init = keys.dpo.get("model_init_kwargs")
        return load_student(training.student, student.revision, quantization=student.quantization, init=init)

    # Differs: TRL would load a reference that it needs itself, and not at the revision of the student
    of_its_own = not keys.lora and (not config.precompute_ref_log_probs or is_fsdp_enabled())
    out, at = training.planned.held_out, {"revision": student.revision} if student.revision else {}
    model, reference = load(), load() if of_its_own else None
    try:
        trainer = PairwiseDPOTrainer(
            model,
            ref_model=reference,
            args=config,
            train_dataset=Dataset(table),
            eval_dataset=Dataset(out) if out.num_rows else None,
            categories=CATEGORIES,
            processing_class=AutoTokenizer.from_pretrained(training.student, revision=student.revision),
            peft_config=LoraConfig(**{"task_type": "CAUSAL_LM", **at, **keys.lora}) if keys.lora else None,
        )
    except Sp2dpoError:
        raise
    except (ValueError, NotImplementedError) as error:
        raise ProcessError(f"train: these settings do not go together with this student: {error}") from error
    if config.precompute_ref_log_probs:
        trainer.ref_model = None
    return trainer


def _end_trackers() -> None:
    """Close the run of W&B; otherwise the next arm of this process would log into it."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()


def _free() -> None:
    """Give the memory of one arm back before the next is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
