"""Progress of long work: a bar with an ETA on a terminal, one plain line every half minute elsewhere. On stderr."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

__all__ = ["Progress"]

PLAIN_EVERY_S = 30.0
REDRAW_EVERY_S = 0.1


class _Bar(RichProgress):
    """With the notes below the bar; on a narrow terminal the bar itself shrinks, so that count and times are whole."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            if task.fields["notes"]:
                yield Text(task.fields["notes"])


class Progress:
    """Counts steps, `done` of them from before, and notes what became of each attempt."""

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self._what, self._total, self._done, self._before = what, total, done, done
        self._started = self._said = time.monotonic()
        self._drawn = 0.0
        self._words: dict[str, str] = {}
        self._failures: Counter[str] = Counter()
        self._cost = 0.0
        self._bar = self._rich() if sys.stderr.isatty() and total else None

    def _rich(self) -> RichProgress:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            TextColumn("eta"),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
        )
        bar = _Bar(*columns, console=Console(stderr=True), transient=False)
        bar.add_task(self._what, total=self._total, completed=self._done, notes="")
        return bar

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar:
            self._draw(self._bar)
            self._bar.stop()

    def note(self, outcome: str, cost_usd: float) -> None:
        """One more attempt, and what has been spent so far."""
        self._cost = cost_usd
        if outcome not in ("ok", "repaired"):
            self._failures[outcome] += 1

    def say(self, about: str, words: str) -> None:
        """Words to stand below the bar; empty words take them away."""
        self._words[about] = words
        self.tick()

    def advance(self, steps: int = 1) -> None:
        """So many more steps are done."""
        self._done += steps
        self.tick()

    def tick(self) -> None:
        """Show how it stands, if it is time to."""
        now = time.monotonic()
        if self._bar:
            if now - self._drawn >= REDRAW_EVERY_S:
                self._drawn = now
                self._draw(self._bar)
        elif now - self._said >= PLAIN_EVERY_S:
            self._said = now
            print(f"{self._what}: {self._plain(now)} {self._notes()}".rstrip(), file=sys.stderr, flush=True)

    def _draw(self, bar: RichProgress) -> None:
        bar.update(bar.task_ids[0], completed=self._done, notes=self._notes())

    def _plain(self, now: float) -> str:
        rate = (self._done - self._before) / (now - self._started)
        eta = _duration((self._total - self._done) / rate) if rate else "unknown"
        return f"{self._done:,}/{self._total:,}, {rate:.1f}/s, eta {eta}"

    def _notes(self) -> str:
        spend = [f"${self._cost:.2f}"] if self._cost else []
        failures = [f"{kind}:{n}" for kind, n in self._failures.most_common(4)]
        words = [f"{about}: {said}" if about else said for about, said in self._words.items() if said]
        return " ".join(spend + failures + words)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
