"""One start of the engine while it asks: jobs or single calls of all annotators, a common budget, and Ctrl-C."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final, Literal

from sp2dpo.annotate.account import INTERRUPTED, Book
from sp2dpo.annotate.engine import Line, Poster, run_lines
from sp2dpo.annotate.jobs import UPLOAD_S, run_jobs
from sp2dpo.annotate.money import Budget
from sp2dpo.annotate.pace import Pace
from sp2dpo.annotate.plan import Plan
from sp2dpo.annotate.teacher import Teacher
from sp2dpo.calls import Ledger
from sp2dpo.llm.http import Endpoint
from sp2dpo.runs import Run

__all__ = ["ALL", "Asking", "Transport", "Way", "interruptible"]

Transport = Literal["sync", "batch", "ray"]

ALL: Final = ""
"""In a mapping of limits: of every annotator that has none of its own."""


@dataclass(frozen=True)
class Way:
    """How the questions are asked: what the flags of `annotate` say. Nothing here changes an answer."""

    concurrency: int
    transport: Transport
    budget_usd: float | None
    rpm: Mapping[str, float]
    tpm: Mapping[str, float]
    connector: Callable[[], Any] | None


class Interrupt:
    """Ctrl-C: the first lets calls in flight end, because they are paid for; the second does not."""

    def __init__(self) -> None:
        self.pressed = False
        self.words = ""
        self.stop: Callable[[], None] | None = None

    def __call__(self, *_: Any) -> None:
        if self.pressed or self.stop is None:
            raise KeyboardInterrupt
        self.pressed = True
        print(f"\nsp2dpo: {self.words}; Ctrl-C again to leave at once", file=sys.stderr, flush=True)
        self.stop()


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Within it, Ctrl-C is an `Interrupt`; after it, KeyboardInterrupt if there was one."""
    interrupt = Interrupt()
    try:
        before = signal.signal(signal.SIGINT, interrupt)
    except ValueError:  # not the main thread
        yield interrupt
        return
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupt.pressed:
        raise KeyboardInterrupt


class Asking:
    """One start of the engine: what all annotators share."""

    def __init__(
        self, run: Run, plan: Plan, keys: Mapping[str, str | None], way: Way, book: Book, ledger: Ledger
    ) -> None:
        self._run, self._plan, self._keys = run, plan, keys
        self._way, self._book, self._ledger = way, book, ledger
        self._decoding = run.process.settings.panel.decoding
        self._budget = Budget(way.budget_usd, ledger.spent(list(keys)) + ledger.unaccounted_usd())
        self._lines: list[Line] = []
        self._jobs: asyncio.Task[None] | None = None

    async def run(self, teachers: Sequence[Teacher], interrupt: Interrupt) -> None:
        """Batch jobs first if they are wanted; then single calls for what is open."""
        loop, account = asyncio.get_running_loop(), self._book.account
        jobs = self._way.transport == "batch"
        interrupt.words = "leaving the jobs with the provider" if jobs else "waiting for the calls in flight"
        interrupt.stop = lambda: _soon(loop, self.stop, INTERRUPTED)
        ticker = asyncio.create_task(self._tick())
        try:
            if self._way.transport == "batch":
                self._jobs = asyncio.create_task(self._run_jobs(teachers))
                with suppress(asyncio.CancelledError):
                    await self._jobs
                teachers = [teacher for teacher in teachers if teacher.name not in account.stopped]
                teachers = self._left_by_jobs(teachers)
            if account.stopped_all is None and teachers:
                self._ledger.start()
                await self._run_lines(teachers)
                self._ledger.end()
        finally:
            interrupt.stop = None
            ticker.cancel()

    def _left_by_jobs(self, teachers: Sequence[Teacher]) -> list[Teacher]:
        """Those with questions that no job answered; it is said, because they now cost the full price."""
        left = self._plan.standing().open
        for teacher in teachers:
            if left[teacher.name] and self._book.account.stopped_all is None:
                print(
                    f"{teacher.name}: {left[teacher.name]:,} questions are left by the batch jobs; "
                    "they are asked one by one, at the full price",
                    file=sys.stderr,
                    flush=True,
                )
        return [teacher for teacher in teachers if left[teacher.name]]

    def stop(self, why: str) -> None:
        """No annotator goes on; calls in flight are awaited, batch jobs are left to the provider."""
        account = self._book.account
        account.stopped_all = account.stopped_all or why
        if self._jobs is not None:
            self._jobs.cancel()
        for line in self._lines:
            line.stop(why)

    async def _run_jobs(self, teachers: Sequence[Teacher]) -> None:
        asked = [(teacher, self._endpoint(teacher, max(UPLOAD_S, self._decoding.timeout))) for teacher in teachers]
        folder = self._run.path / "batches"
        await run_jobs(asked, self._plan, self._book, self._ledger, self._budget, folder)

    async def _run_lines(self, teachers: Sequence[Teacher]) -> None:
        self._lines = [self._line(teacher) for teacher in teachers]
        try:
            await run_lines(self._lines)
        finally:
            for line in self._lines:
                if line.stopped and not self._book.account.stopped_all:
                    self._book.account.stopped[line.teacher.name] = line.stopped

    def _line(self, teacher: Teacher) -> Line:
        way, name = self._way, teacher.name
        endpoint, concurrency = self._poster(teacher)
        return Line(
            teacher,
            endpoint,
            self._plan.stream(name, together=teacher.decides),
            decoding=self._decoding,
            concurrency=concurrency,
            transport="ray" if way.transport == "ray" else "sync",
            pace=Pace(way.rpm.get(name, way.rpm.get(ALL)), way.tpm.get(name, way.tpm.get(ALL))),
            budget=self._budget,
            book=self._book,
            stop_all=self.stop,
        )

    def _poster(self, teacher: Teacher) -> tuple[Poster, int]:
        """What a line asks, and how many calls it has under way."""
        if self._way.transport != "ray":
            return self._endpoint(teacher, self._decoding.timeout), self._way.concurrency
        from sp2dpo.annotate.on_ray import RayEndpoint

        ray = RayEndpoint(
            teacher.endpoint,
            self._decoding.timeout,
            key_env=teacher.annotator.api_key_env,
            key=self._keys[teacher.name],
            concurrency=self._way.concurrency,
            say=lambda words: print(words, file=sys.stderr, flush=True),
        )
        return ray, ray.under_way

    def _endpoint(self, teacher: Teacher, timeout: float) -> Endpoint:
        connector = self._way.connector() if self._way.connector else None
        return Endpoint(teacher.endpoint, self._keys[teacher.name], timeout, connector)

    async def _tick(self) -> None:
        """Show how it stands also while nothing comes back."""
        while True:
            await asyncio.sleep(1)
            self._book.tick()
            for line in self._lines:
                self._book.say(line.teacher.name, line.waiting)


def _soon(loop: asyncio.AbstractEventLoop, call: Callable[[str], None], why: str) -> None:
    loop.call_soon_threadsafe(call, why)
