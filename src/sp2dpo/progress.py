"""Progress of long work: a bar with an ETA on a terminal, one plain line every half minute elsewhere. On stderr."""

from __future__ import annotations

import sys
import time
from collections import Counter
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

__all__ = ["Progress"]

PLAIN_EVERY_S = 30.0


class Progress:
    """Counts steps, `done` of them from before, and notes what became of each attempt."""

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self._what, self._total, self._done, self._before = what, total, done, done
        self._started = self._said = time.monotonic()
        self._shown = ""
        self._failures: Counter[str] = Counter()
        self._cost = 0.0
        self._bar = self._rich() if sys.stderr.isatty() and total else None

    def _rich(self) -> RichProgress:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[notes]}"),
        )
        bar = RichProgress(*columns, console=Console(stderr=True), transient=False)
        bar.add_task(self._what, total=self._total, notes="")
        return bar

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def note(self, outcome: str, cost_usd: float) -> None:
        """One more attempt, and what has been spent so far."""
        self._cost = cost_usd
        if outcome not in ("ok", "repaired"):
            self._failures[outcome] += 1

    def show(self, notes: str) -> None:
        """Words to stand beside the bar."""
        self._shown = notes

    def advance(self) -> None:
        """One more step is done."""
        self._done += 1
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=self._done, notes=self._notes())
        elif time.monotonic() - self._said >= PLAIN_EVERY_S:
            self._said = time.monotonic()
            rate = (self._done - self._before) / (self._said - self._started)
            left = (self._total - self._done) / rate
            print(
                f"{self._what}: {self._done}/{self._total}, {rate:.1f}/s, eta {left:.0f} s {self._notes()}",
                file=sys.stderr,
            )

    def _notes(self) -> str:
        spend = f"${self._cost:.2f} " if self._cost else ""
        return self._shown + spend + " ".join(f"{kind}:{n}" for kind, n in self._failures.most_common(4))
