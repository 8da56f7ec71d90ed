"""Stopping a training and going on from it: signals, and which checkpoint is whole.

A checkpoint is written in place, `margins.parquet` last, so one that has it is whole, whenever its process was killed.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Final

import torch
from accelerate import PartialState
from accelerate.utils import gather
from transformers import TrainerCallback

__all__ = ["Interrupt", "interruptible", "last_complete"]

SEAL: Final = "margins.parquet"
"""The file of a checkpoint that is written last."""

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


class Interrupt(TrainerCallback):  # type: ignore[misc]
    """Ends training after the step in which a signal came, in all processes at the same step, with a checkpoint."""

    def __init__(self) -> None:
        self.asked = False
        self._stopping = False
        self._process = os.getpid()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler: the first signal lets the step end, a second one does not.

        Differs among several processes: a launcher passes on to them what they have had from the terminal already, so
        there only the launcher ends them at once.
        """
        if os.getpid() != self._process:  # a worker of the loader, which ends with its parent
            if number == signal.SIGTERM:
                _die_of(number)
            return
        here = PartialState()
        alone = here.num_processes == 1
        if not self.asked:
            self.asked = True
            words = "this step ends and a checkpoint is saved; the same command goes on from it"
            if here.is_main_process:  # not print: the signal may have come in the middle of another
                os.write(2, f"\nsp2dpo: {words}{'; again to leave at once' if alone else ''}\n".encode())
        elif alone:
            if number == signal.SIGTERM:
                _die_of(number)
            raise KeyboardInterrupt

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._stopping = _any_process(self.asked)
        if self._stopping:
            control.should_save = control.should_training_stop = True
            control.should_log = True  # a checkpoint does not have the losses since the last line of the log

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self._stopping:
            state.best_model_checkpoint = None  # at the end of training others than the best may be removed

    def on_epoch_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """What is due at the end of an epoch is not due in its middle; if it is, its checkpoint comes after it."""
        if self._stopping:
            whole = float(state.epoch).is_integer()
            control.should_save = whole and (control.should_save or control.should_evaluate)
            control.should_evaluate = whole and control.should_evaluate
            control.should_log = whole and control.should_log


def _die_of(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _any_process(flag: bool) -> bool:
    here = PartialState()
    if here.num_processes == 1:
        return flag
    return bool(gather(torch.tensor([flag], dtype=torch.int32, device=here.device)).any().item())


@contextmanager
def interruptible(trainer: Any) -> Iterator[Interrupt]:
    """Within it, Ctrl-C and SIGTERM end the trainer's training after its step, with a checkpoint.

    A training whose last step is done is no longer interrupted: then `asked` says, in all processes, that the caller is
    to end when it has written what was trained. Outside the main thread no signal is handled.

    Raises:
        KeyboardInterrupt: after a training that was ended before its last step.
    """
    interrupt = Interrupt()
    trainer.add_callback(interrupt)
    before: dict[int, Any] = {}
    with suppress(ValueError):  # not the main thread
        before |= {number: signal.signal(number, interrupt) for number in SIGNALS}
    try:
        yield interrupt
    finally:
        trainer.remove_callback(interrupt)
        for number, handler in before.items():
            signal.signal(number, handler)
    interrupt.asked = _any_process(interrupt.asked)
    if interrupt.asked and trainer.state.global_step < trainer.state.max_steps:
        raise KeyboardInterrupt


def last_complete(folder: Path) -> Path | None:
    """The last checkpoint below a training folder that training can go on from; those that were cut off are removed.

    One without the state of the random numbers (`save_only_model`) stays, but is never gone on from.
    """
    named = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*")}
    steps = {int(match[1]): path for path, match in named.items() if match}
    cut_off = [path for path in steps.values() if not (path / SEAL).is_file()]
    whole = [n for n, path in steps.items() if path not in cut_off and any(path.glob("rng_state*.pth"))]
    if os.environ.get("RANK", "0") == "0":
        for path in cut_off:
            shutil.rmtree(path, ignore_errors=True)
    return steps[max(whole)] if whole else None
