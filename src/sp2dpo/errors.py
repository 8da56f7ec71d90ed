"""The error tree. The command line prints these as one line; anything else is a bug and keeps its traceback.

Sp2dpoError
├── InputError          bad input or configuration, found before money or GPU time is spent (exit 2)
│   ├── ProcessError    the process file: a key, a value, a file it points to
│   ├── DataError       a preference dataset or pairs.parquet
│   ├── ScheduleError   a schedule that training cannot trust
│   ├── RunDirError     a run directory that belongs to another process, or is incomplete
│   └── MissingExtra    an optional dependency that is not installed
├── TrainingError       a loss or gradient that no weights should be updated with (exit 1)
└── Unfinished          a check failed or answers are missing; what is missing is listed (exit 1)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "DataError",
    "InputError",
    "MissingExtra",
    "ProcessError",
    "RunDirError",
    "ScheduleError",
    "Sp2dpoError",
    "TrainingError",
    "Unfinished",
    "nearest",
]


class Sp2dpoError(Exception):
    """Root of the tree; `exit_code` is what the command line returns."""

    exit_code = 2


class InputError(Sp2dpoError, ValueError):
    """Bad input or configuration."""


class ProcessError(InputError):
    """The process file (λ) or a file that it points to."""


class DataError(InputError):
    """A preference dataset, or pairs made from one."""


class ScheduleError(InputError):
    """A schedule that does not fit the pairs, or a β that no loss can use."""


class RunDirError(InputError):
    """A run directory made by another process, or without the file that a stage needs."""


class MissingExtra(InputError):
    """An optional dependency is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs packages that are not installed: pip install 'sp2dpo[{extra}]'")


class TrainingError(Sp2dpoError):
    """A loss or gradient that is not a number, or a loss that exploded; before the weights were updated with it."""

    exit_code = 1


class Unfinished(Sp2dpoError):
    """A check failed, or a stage could not be completed."""

    exit_code = 1


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the known name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""
