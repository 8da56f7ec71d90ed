"""What a person watches while a student trains: how its rows are laid out, and one bar with loss, margin and accuracy.

On the main process only, and no other chatter.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final

import datasets
import pyarrow.compute as pc
import transformers
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from sp2dpo.numbers import dec, signed, some
from sp2dpo.progress import Progress
from sp2dpo.rubric import CATEGORIES

__all__ = ["Watch", "by_category", "layout_line", "overall", "quiet", "watch"]

_OVERALL: Final = {
    "loss": ("loss", 3),
    "accuracy": ("rewards/accuracies", 2),
    "margin": ("rewards/margins", 3),
    "grad norm": ("grad_norm", 2),
}
"""What is shown of a log line, under which key it is there, and its decimal places."""


class Watch(TrainerCallback):  # type: ignore[misc]
    """TRL's log lines as the notes of a progress bar; as a context it closes the bar when training fails, too."""

    def __init__(self, trainer: Any, title: str) -> None:
        self._trainer, self._title = trainer, title
        self._progress: Progress | None = None
        self._said: list[str] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.is_world_process_zero:
            print(f"          {_extent(self._trainer, state)}; {layout_line(self._trainer)}", file=sys.stderr)
            self._progress = Progress(self._title, state.max_steps, done=state.global_step).__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self._progress:
            self._progress.advance()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **more: Any) -> None:
        if self._progress and logs and "loss" in logs:
            self._said = [said for said in (overall(logs), by_category(logs)) if said]
            self._progress.say("", " | ".join(self._said))

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self._progress and self._said and not sys.stderr.isatty():
            print(f"{self._title}: {' | '.join(self._said)}", file=sys.stderr, flush=True)
        self._close()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close()

    def _close(self) -> None:
        if self._progress:
            self._progress.__exit__(None, None, None)
            self._progress = None


def watch(trainer: Any, title: str) -> Watch:
    """Give a trainer this project's bar in place of its own printing; `with` it, the bar ends with the block."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    watching = Watch(trainer, title)
    trainer.add_callback(watching)
    return watching


def _extent(trainer: Any, state: Any) -> str:
    begun = f" (from step {state.global_step:,} on)" if state.global_step else ""
    return f"{some(len(trainer.train_dataset), 'pair')}, {some(state.max_steps, 'step')}{begun}"


def layout_line(trainer: Any) -> str:
    """The layout of a `PairwiseDPOTrainer`, with what it saves, or why it is not the shared one."""
    if trainer.layout != "shared":
        return f"padded layout: {trainer.layout_reason}"
    shared, twice = _tokens(trainer)
    return f"shared layout: {shared:,} tokens an epoch; {twice:,} with each prompt twice, and padding besides"


def _tokens(trainer: Any) -> tuple[int, int]:
    """Tokens of the training pairs with each prompt once, and with each prompt twice."""
    column, longest = trainer.args.length_column_name, trainer.args.max_length
    shared = prompts = 0
    for batch in trainer.train_dataset.select_columns([column, "prompt_ids"]).with_format("arrow").iter(1000):
        shared += pc.sum(batch[column]).as_py()
        length = pc.list_value_length(batch["prompt_ids"])
        prompts += pc.sum(length if longest is None else pc.min_element_wise(length, longest)).as_py()
    return shared, shared + prompts


def overall(logs: Mapping[str, Any]) -> str:
    """A line of the trainer's log, over all pairs since the last one."""
    shown = ((name, logs.get(key), places) for name, (key, places) in _OVERALL.items())
    return " ".join(f"{name} {dec(float(value), places)}" for name, value, places in shown if value is not None)


def by_category(logs: Mapping[str, Any]) -> str:
    """Accuracy and reward margin (βΔ) of each category that occurred; empty if the trainer knows no categories."""
    prefix = "rewards/margins/"
    there = sorted((key.removeprefix(prefix) for key in logs if key.startswith(prefix)), key=_priority)
    return " · ".join(
        f"{name} {dec(float(logs[f'rewards/accuracies/{name}']), 2)} {signed(float(logs[prefix + name]), 2)}"
        for name in there
    )


def _priority(name: str) -> tuple[int, str]:
    return [*CATEGORIES, name].index(name), name


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
