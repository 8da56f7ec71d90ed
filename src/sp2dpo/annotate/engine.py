"""Single calls: one line of work for each annotator, all lines at once. Algorithm 2, phase 1.

A line keeps so many calls in flight, waits for the pace and the budget, has each attempt logged before it goes on, and
decides whether to ask again. A retry that waits holds no place. Bounds are the paper's (B.6): so many retries, with
delays that double, and jitter.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Protocol

from sp2dpo.annotate.account import Book
from sp2dpo.annotate.health import CROWD, SILENT, Crowding, Health, delay_s
from sp2dpo.annotate.money import Budget, BudgetReached
from sp2dpo.annotate.pace import Pace
from sp2dpo.annotate.plan import Question
from sp2dpo.annotate.teacher import Teacher
from sp2dpo.calls import Call
from sp2dpo.llm import Raw, Request
from sp2dpo.settings import Decoding

__all__ = ["Line", "Poster", "run_lines"]

NO_RETRY: Final = ("bad_request",)
"""Failures that the same request would meet again; the next start asks once more."""

LONGEST_RETRY_AFTER_S: Final = 900.0

RATE_LIMITED_AT_MOST: Final = 20
"""A question that meets 429 so often is left for the next start; they do not count as retries."""

_END: Final = object()


@dataclass(order=True)
class Job:
    """A question on its way: when it may be asked, and how often it failed."""

    due: float
    number: int
    question: Question = field(compare=False)
    attempts: int = field(compare=False, default=0)
    retries: int = field(compare=False, default=0)
    limited: int = field(compare=False, default=0)


class Poster(Protocol):
    """What a line asks: an endpoint, or one that workers on other machines ask."""

    async def post(self, path: str, body: Mapping[str, Any]) -> Raw: ...

    async def close(self) -> None: ...


class Line:
    """The calls of one annotator.

    Args:
        questions: the open ones, read as they are needed; None for a pause in which others have their turn.
        concurrency: calls in flight.
        stop_all: called with a reason when no annotator should go on.
    """

    def __init__(
        self,
        teacher: Teacher,
        endpoint: Poster,
        questions: Iterator[Question | None],
        *,
        decoding: Decoding,
        concurrency: int,
        transport: str,
        pace: Pace,
        budget: Budget,
        book: Book,
        stop_all: Callable[[str], None],
    ) -> None:
        self.teacher, self.endpoint, self.pace = teacher, endpoint, pace
        self._decoding, self._concurrency, self._transport = decoding, concurrency, transport
        self._budget, self._book, self._stop_all = budget, book, stop_all
        self._source = questions
        self._later: list[Job] = []
        self._numbers = itertools.count()
        self._busy = 0
        self._changed = asyncio.Event()
        self._solo = asyncio.Lock()
        self._alone = True
        self._crowding = Crowding()
        self._health = Health(max(CROWD, concurrency))
        self._workers: list[asyncio.Task[None]] = []
        self._calling: set[asyncio.Task[None]] = set()
        self.stopped: str | None = None

    @property
    def waiting(self) -> str:
        """What the line waits for, if it is worth a word."""
        silent = self._health.until - time.monotonic() if self._alone else 0.0
        return f"silent, next try in {silent:.0f} s" if silent >= 1 else self.pace.waiting or ""

    async def run(self) -> None:
        """Ask until nothing is open, or the line is stopped."""
        try:
            async with asyncio.TaskGroup() as group:
                self._workers = [group.create_task(self._work()) for _ in range(self._concurrency)]
        finally:
            await self.endpoint.close()

    def stop(self, why: str) -> None:
        """Ask nothing more; calls in flight are awaited and logged."""
        if self.stopped is None:
            self.stopped = why
            for worker in self._workers:
                if worker not in self._calling:
                    worker.cancel()
            self._changed.set()

    async def _work(self) -> None:
        with suppress(asyncio.CancelledError):  # by `stop`; a cancelled task group raises by itself
            while (job := await self._next()) is not None:
                try:
                    await self._place(job)
                finally:
                    self._busy -= 1
                    self._changed.set()
        if self.stopped is None and (task := asyncio.current_task()) is not None and task.cancelling():
            raise asyncio.CancelledError

    async def _next(self) -> Job | None:
        """The job that is due, else a new question, else wait for one that is not due yet."""
        while self.stopped is None:
            now = time.monotonic()
            if self._later and self._later[0].due <= now:
                self._busy += 1
                return heapq.heappop(self._later)
            question = next(self._source, _END)
            if isinstance(question, Question):
                self._busy += 1
                return Job(0.0, next(self._numbers), question)
            if question is None:
                await asyncio.sleep(0)
                continue
            if not self._later and not self._busy:
                return None
            self._changed.clear()
            wait = self._later[0].due - now if self._later else None
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), wait)
        return None

    async def _place(self, job: Job) -> None:
        """Ask, alone if the line is in doubt about its endpoint."""
        if not self._alone:
            await self._ask(job)
            return
        async with self._solo:
            if self._alone and (wait := self._health.until - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            if self._alone:
                await self._ask(job)
                return
        await self._ask(job)

    async def _ask(self, job: Job) -> None:
        if self.stopped is not None:
            return
        request = self.teacher.request(job.question)
        bound = self.teacher.bound_usd(request.body)
        try:
            reservation = await self._budget.reserve(bound)
        except BudgetReached as reached:
            self._book.account.over_budget = True
            self._stop_all(str(reached))
            return
        tokens = self._book.tokens_of(self.teacher, request) if self.pace.counts_tokens else 0.0
        try:
            await self._book.reserved(self._budget.high_water_usd)
            sent_at = await self.pace.acquire(tokens)
        except asyncio.CancelledError:
            self._budget.settle(reservation, 0.0)
            raise
        task = asyncio.current_task()
        assert task is not None
        self._calling.add(task)
        try:
            await self._call(job, request, reservation, tokens, sent_at)
        finally:
            self._calling.discard(task)

    async def _call(self, job: Job, request: Request, reservation: float, tokens: float, sent_at: float) -> None:
        started = datetime.now(UTC)
        raw = await self.endpoint.post(request.path, request.body)
        job.attempts += 1
        rows = self.teacher.rows(
            request, raw, attempt=request.asked + job.attempts, started=started, transport=self._transport
        )
        costs = [row.cost_usd if row.cost_usd is not None else row.cost_bound_usd or 0.0 for row in rows]
        self._learn(request, raw, rows, tokens, sent_at)
        await self._book.keep(rows)
        self._budget.settle(reservation, sum(costs))
        self._judge(job, raw, rows)

    def _learn(self, request: Request, raw: Raw, rows: Sequence[Call], tokens: float, sent_at: float) -> None:
        if raw.limits is not None:
            self.pace.learn(raw.limits)
        used = sum((row.prompt_tokens or 0) + (row.completion_tokens or 0) for row in rows)
        limited = rows[0].outcome == "rate_limited"
        if self._crowding.note(limited) and limited:
            self.pace.limited(raw.retry_after, sent_at)
        elif used:
            self.pace.settle(tokens, used)
            self._book.counted(self.teacher, request, sum(row.prompt_tokens or 0 for row in rows))

    def _judge(self, job: Job, raw: Raw, rows: Sequence[Call]) -> None:
        """What an attempt means for the line and for its question."""
        failed = {row.variant: row.outcome for row in rows if not row.valid}
        kind = next(iter(failed.values()), "ok")
        self._watch(kind, raw, rows[0])
        if not failed:
            self._book.done(len(job.question.variants))
        elif self.stopped is None:
            self._book.done(len(job.question.variants) - len(failed))
            job.question = job.question.only(failed)
            if not self._again(job, kind, raw):
                self._book.done(len(failed))

    def _again(self, job: Job, kind: str, raw: Raw) -> bool:
        """Put a question back if it may be asked once more."""
        base, now = self._decoding.retry_delay_base, time.monotonic()
        if kind == "rate_limited":
            job.limited += 1
            again = job.limited < RATE_LIMITED_AT_MOST
            job.due = now + delay_s(base, min(job.limited - 1, 3), raw.retry_after)
        else:
            job.retries += 1
            again = kind not in NO_RETRY and job.retries <= self._decoding.retry_attempts
            job.due = now + (delay_s(base, job.retries - 1, raw.retry_after) if kind in SILENT else 0.0)
        if again:
            heapq.heappush(self._later, job)
        return again

    def _watch(self, kind: str, raw: Raw, row: Call) -> None:
        """Stop the line where going on is pointless, and ask one at a time where it may be."""
        what = f"HTTP {row.http_status}: {row.error}" if row.http_status not in (None, 200) else f"{kind}: {row.error}"
        if kind == "other_model":
            self._stop_all(self.teacher.swapped(row))
        elif kind == "no_access":
            self.stop(what)
        elif raw.retry_after is not None and raw.retry_after > LONGEST_RETRY_AFTER_S:
            self.stop(f"{what} (it asks to wait for {raw.retry_after / 60:,.0f} minutes)")
        else:
            doubt = self._health.note(kind, self._decoding.retry_delay_base, raw.retry_after)
            if doubt is not None:
                self.stop(f"{doubt}; the last: {what}")
            self._alone = self._health.alone


async def run_lines(lines: Sequence[Line]) -> None:
    """Run all lines at once."""
    async with asyncio.TaskGroup() as group:
        for line in lines:
            group.create_task(line.run())
