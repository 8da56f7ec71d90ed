"""The batch jobs of all annotators of a panel: what they may cost, and the rows that they come to."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sp2dpo.annotate.account import Book
from sp2dpo.annotate.batch import batch_calls
from sp2dpo.annotate.batch_api import BatchClient
from sp2dpo.annotate.batch_shard import Job, jobs_in_flight
from sp2dpo.annotate.money import Budget, BudgetReached
from sp2dpo.annotate.plan import Plan
from sp2dpo.annotate.teacher import Teacher, request_hash
from sp2dpo.calls import BatchEvent, Ledger
from sp2dpo.errors import ProcessError, Unfinished
from sp2dpo.llm import Raw, Request
from sp2dpo.llm.http import Endpoint

__all__ = ["give_up_jobs", "refuse_jobs", "run_jobs"]

UPLOAD_S = 900.0
LIMITS = (50_000, 200_000_000)
"""Calls and bytes of a file where the provider is not known to have others: those of OpenAI."""


async def run_jobs(
    asked: Sequence[tuple[Teacher, Endpoint]], plan: Plan, book: Book, ledger: Ledger, budget: Budget, folder: Path
) -> None:
    """Ask all open questions in batch jobs, all annotators at once; returns when every job was collected.

    An annotator whose provider refuses is stopped, and named in the account; what the others do goes on.
    """
    await asyncio.gather(*(_Jobs(*one, plan, book, ledger, budget, folder).run() for one in asked))


def refuse_jobs(ledger: Ledger, names: Sequence[str]) -> None:
    """Before questions are asked in another way: none may be in a batch job of an earlier start, which is paid for.

    Raises:
        ProcessError: there are such jobs.
    """
    jobs = [(name, job) for name in names for job in jobs_in_flight(ledger, name)]
    if jobs:
        listed = ", ".join(f"{job.batch_id or 'one that may have been created'} of {name}" for name, job in jobs)
        calls = sum(job.calls for _, job in jobs)
        raise ProcessError(
            f"{calls:,} calls are in batch jobs of an earlier start ({listed}). Collect them with --transport batch; "
            "--forget-batches gives them up, and asks and pays for their questions again"
        )


def give_up_jobs(ledger: Ledger, teachers: Sequence[Teacher], folder: Path) -> None:
    """Leave the batch jobs of earlier starts uncollected; the most that they may cost counts as spent from now on."""
    for teacher in teachers:
        for job in jobs_in_flight(ledger, teacher.name):
            ledger.write_off(sum(_bound_usd(teacher, body) for body in _bodies(folder / teacher.name, job)))
            at = datetime.now(UTC).isoformat(timespec="milliseconds")
            ledger.note_batch(BatchEvent(teacher.name, "gone", job.shard, at, job.batch_id, '{"why":"given up"}'))
            _say(f"{teacher.name}: {job} with {job.calls:,} calls is given up; the provider bills what it comes to")


def _bodies(folder: Path, job: Job) -> Iterator[Mapping[str, Any]]:
    """The requests of a job, from its file; none if that is lost."""
    file = folder / f"{job.shard}.jsonl"
    for line in file.open("rb") if file.is_file() else ():
        yield json.loads(line)["body"]


def _bound_usd(teacher: Teacher, body: Mapping[str, Any]) -> float:
    """The most that a call can cost in a batch job."""
    return teacher.bound_usd(body) * (1 - (teacher.batch.discount if teacher.batch else 0.0))


class _Jobs:
    """The jobs of one annotator."""

    def __init__(
        self,
        teacher: Teacher,
        endpoint: Endpoint,
        plan: Plan,
        book: Book,
        ledger: Ledger,
        budget: Budget,
        folder: Path,
    ) -> None:
        self._teacher, self._endpoint, self._plan = teacher, endpoint, plan
        self._book, self._ledger, self._budget = book, ledger, budget
        self._folder = folder / teacher.name
        self._reserved: dict[str, float] = {}
        self._over: str | None = None

    async def run(self) -> None:
        teacher, batch = self._teacher, self._teacher.batch
        limits = (batch.max_requests, batch.max_bytes) if batch else LIMITS
        try:
            await asyncio.to_thread(self._count_earlier)
            pieces = batch_calls(
                self._affordable(),
                BatchClient(self._endpoint),
                self._ledger,
                teacher.name,
                folder=self._folder,
                limits=limits,
                hash_of=lambda body: request_hash(teacher.endpoint, body),
                say=_say,
                show=lambda words: self._book.say(teacher.name, words),
            )
            async with aclosing(pieces):
                async for rows in pieces:
                    await self._keep(rows)
        except Unfinished as refusal:
            self._book.account.stopped[teacher.name] = str(refusal)
        finally:
            await self._endpoint.close()
            self._book.say(teacher.name, "")
        if self._over:
            self._book.account.stopped_all, self._book.account.over_budget = self._over, True

    def _affordable(self) -> Iterator[Request]:
        """Open questions, until their worst case would not fit into the budget."""
        for question in self._plan.open(self._teacher.name, together=self._teacher.decides):
            request = self._teacher.request(question)
            bound = _bound_usd(self._teacher, request.body) if self._budget.capped else 0.0
            if not self._set_aside(request.hash, bound):
                return
            yield request

    def _count_earlier(self) -> None:
        """Set the worst case of jobs of an earlier start aside; they will be billed."""
        for job in jobs_in_flight(self._ledger, self._teacher.name) if self._budget.capped else ():
            for body in _bodies(self._folder, job):
                self._set_aside(request_hash(self._teacher.endpoint, body), _bound_usd(self._teacher, body))

    def _set_aside(self, hashed: str, bound_usd: float) -> bool:
        """False if it does not fit into the budget any more."""
        if self._budget.capped:
            try:
                self._budget.reserve_now(bound_usd)
            except BudgetReached as reached:
                self._over = str(reached)
                return False
            self._reserved[hashed] = bound_usd
        return True

    async def _keep(self, rows: Sequence[tuple[Request, Raw]]) -> None:
        calls = []
        for request, raw in rows:
            made = self._teacher.rows(
                request, raw, attempt=request.asked + 1, started=datetime.now(UTC), transport="batch"
            )
            cost = sum(row.cost_usd if row.cost_usd is not None else row.cost_bound_usd or 0.0 for row in made)
            self._budget.settle(self._reserved.pop(request.hash, 0.0), cost)
            self._book.done(sum(row.valid for row in made))
            calls += made
        await self._book.keep(calls, len(rows))
        other = next((row for row in calls if row.outcome == "other_model"), None)
        if other is not None and self._book.account.stopped_all is None:
            self._book.account.stopped_all = self._teacher.swapped(other)


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)
