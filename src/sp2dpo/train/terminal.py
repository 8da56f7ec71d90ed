"""What a person watches while a student trains: one bar with loss, margin and accuracy, and no other chatter."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import transformers
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from sp2dpo.progress import Progress

__all__ = ["quiet", "watch"]


class _Bar(TrainerCallback):  # type: ignore[misc]
    """TRL's log lines as the notes of a progress bar."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._progress: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.is_world_process_zero:
            self._progress = Progress(self._title, state.max_steps, done=state.global_step).__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self._progress:
            self._progress.advance()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **more: Any) -> None:
        if self._progress and logs and "loss" in logs:
            shown = {"loss": "loss", "margin": "rewards/margins", "accuracy": "rewards/accuracies"}
            self._progress.say(
                "", " ".join(f"{name} {float(logs[key]):.3f}" for name, key in shown.items() if key in logs)
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self._progress:
            self._progress.__exit__(None, None, None)


def watch(trainer: Any, title: str) -> None:
    """Give a trainer this project's bar in place of its own printing."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(_Bar(title))


@contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' own bars, and without deprecations that concern TRL and transformers among themselves."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # TRL's bar over the reference pass
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl)\..*")
            yield
    finally:
        datasets.enable_progress_bars()
        transformers.utils.logging.enable_progress_bar()
