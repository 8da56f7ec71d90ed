"""The annotation engine: asks every open question of the panel and keeps every attempt. Algorithm 2, phase 1.

An answered question is never asked again; a failure is a row, not a crash. This file joins the parts: what is open
(`plan`), who is asked (`teacher`), how (`engine`, `batch`, `on_ray`), for how much (`money`), and the account of it.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

from sp2dpo.annotate.account import INTERRUPTED, Account, Book, write_account
from sp2dpo.annotate.engine import Line, Poster, run_lines
from sp2dpo.annotate.estimate import ESTIMATE, estimate
from sp2dpo.annotate.jobs import UPLOAD_S, refuse_other_jobs, run_jobs
from sp2dpo.annotate.money import Budget
from sp2dpo.annotate.pace import Pace
from sp2dpo.annotate.plan import Plan
from sp2dpo.annotate.replay import Replay, take_over
from sp2dpo.annotate.teacher import Teacher
from sp2dpo.calls import Call, Ledger, open_ledger
from sp2dpo.errors import ProcessError, Sp2dpoError, nearest
from sp2dpo.llm import FAILURES
from sp2dpo.llm.http import Endpoint, read_key
from sp2dpo.pairs import check_pairs
from sp2dpo.progress import Progress
from sp2dpo.providers import refuse_ended
from sp2dpo.reply import INVALID
from sp2dpo.runs import Run
from sp2dpo.settings import Annotator

__all__ = ["Transport", "annotate"]

Transport = Literal["sync", "batch", "ray"]

ALL: Final = ""
"""In a mapping of limits: of every annotator that has none of its own."""


@dataclass
class _Way:
    """How the questions are asked: what flags say. Nothing here changes an answer."""

    concurrency: int = 8
    transport: Transport = "sync"
    budget_usd: float | None = None
    rpm: Mapping[str, float] = field(default_factory=dict)
    tpm: Mapping[str, float] = field(default_factory=dict)
    forget_batches: bool = False
    connector: Callable[[], Any] | None = None


def annotate(
    run: Run,
    *,
    limit: int | None = None,
    sample: int | None = None,
    concurrency: int = 8,
    transport: Transport = "sync",
    reuse: Path | None = None,
    retry: Collection[str] = (),
    budget_usd: float | None = None,
    rpm: Mapping[str, float] | None = None,
    tpm: Mapping[str, float] | None = None,
    forget_batches: bool = False,
    connector: Callable[[], Any] | None = None,
) -> Account:
    """Ask what is open, log every attempt, and account for it.

    Args:
        limit: only the first so many pairs.
        sample: only so many pairs, spread evenly over the file.
        concurrency: calls in flight for each annotator.
        transport: single calls, batch jobs, or a Ray cluster.
        reuse: another run directory; its valid answers to the same questions are taken over, at no cost.
        retry: only questions whose last attempt ended in one of these kinds of failure.
        budget_usd: never spend more than this in the run directory, what was spent before included.
        rpm, tpm: requests and tokens a minute by annotator, or under the empty name for all.
        forget_batches: give up batch jobs of earlier starts that were not collected.
        connector: makes the aiohttp connector of an endpoint, for tests.

    Raises:
        ProcessError: a key or a recording is missing, a flag names an unknown annotator or failure, or the budget
            cannot be held because a price or an output cap is missing; before anything is asked.
        RunDirError: another process writes the same call log.
        Unfinished: the call log could not be written.
    """
    way = _Way(concurrency, transport, budget_usd, rpm or {}, tpm or {}, forget_batches, connector)
    _check_flags(run, retry, way)
    panel = run.process.settings.panel
    check_pairs(run.pairs, "sp2dpo annotate PROCESS.yaml")
    keys = {a.name: read_key(a.api_key_env, f"annotator '{a.name}'") for a in _live(run)}
    replays = [Replay(run, annotator) for annotator in panel.annotators if annotator.kind == "recorded"]
    account = Account()
    with open_ledger(run.calls) as ledger:
        names = [annotator.name for annotator in panel.annotators]
        plan = Plan(run.pairs, ledger, names, panel.variants, limit=limit, sample=sample, retry=retry)
        teachers = [Teacher(run, annotator, ledger.served(annotator.name)) for annotator in _live(run)]
        _check_budget(teachers, way)
        if transport != "batch":
            refuse_other_jobs(ledger, names, forget=forget_batches)
        try:
            with _interruptible() as interrupt:
                if reuse is not None:
                    take_over(plan, reuse / "calls.sqlite", teachers, _keeper(ledger, account))
                standing = plan.standing()
                open_now = standing.open.total()
                with Progress("annotate", standing.questions, done=standing.questions - open_now) as progress:
                    book = Book(ledger, account, progress)
                    for replay in replays:
                        _replay(replay, plan, book)
                    asked = [teacher for teacher in teachers if standing.open[teacher.name]]
                    if asked:
                        _prepare_to_spend(run)
                        asyncio.run(_Asking(run, plan, keys, way, book, ledger).run(asked, interrupt))
        except BaseException as error:  # noqa: BLE001 (raised again)
            with suppress(OSError, Sp2dpoError):
                _close(run, plan, ledger, teachers, account)
            if isinstance(error, KeyboardInterrupt):
                print(*account.lines(), sep="\n", file=sys.stderr, flush=True)
            raise _own(error) from None
        _close(run, plan, ledger, teachers, account)
    return account


def _prepare_to_spend(run: Run) -> None:
    """What has to be known before the first call.

    Raises:
        ProcessError: a model of the panel is no more.
    """
    refuse_ended(run.process.settings.panel.annotators, datetime.now(UTC).date())
    if not (run.path / ESTIMATE).is_file():
        made = estimate(run.process, run_dir=run.path)
        made.write(run.path)
        usd = (
            "an unknown amount (no price)"
            if made.usd is None
            else f"about ${made.usd:,.2f}"
            if made.usd >= 0.01
            else "less than a cent"
        )
        print(f"estimate  {made.calls:,} calls in all, {usd}; sp2dpo cost tells more", file=sys.stderr, flush=True)


def _close(run: Run, plan: Plan, ledger: Ledger, teachers: Sequence[Teacher], account: Account) -> None:
    account.settle(plan.standing())
    account.spent_usd, account.unknown_usd = _money(ledger, teachers)
    write_account(run, ledger, account)


def _own(error: BaseException) -> BaseException:
    """Of errors that several tasks met at once, this project's own; else what there is."""
    while isinstance(error, BaseExceptionGroup):
        own, rest = error.split(Sp2dpoError)
        error = (own or rest or error).exceptions[0]
    return error


def _live(run: Run) -> list[Annotator]:
    return [annotator for annotator in run.process.settings.panel.annotators if annotator.kind != "recorded"]


def _check_flags(run: Run, retry: Collection[str], way: _Way) -> None:
    kinds = {**FAILURES, **INVALID}
    for kind in retry:
        if kind not in kinds:
            raise ProcessError(
                f"--retry {kind}: no such kind of failure{nearest(kind, kinds)}; one of {', '.join(kinds)}"
            )
    for annotator in _live(run):
        if "{node}" in str(annotator.base_url) and way.transport != "ray":
            raise ProcessError(
                f"annotator '{annotator.name}': {{node}} in its base_url stands for each node of a Ray cluster; "
                "it needs --transport ray"
            )
    names = [annotator.name for annotator in _live(run)]
    for flag, limits in (("--rpm", way.rpm), ("--tpm", way.tpm)):
        for name in limits:
            if name != ALL and name not in names:
                raise ProcessError(f"{flag} {name}=…: no annotator of that name is asked{nearest(name, names)}")


def _check_budget(teachers: Sequence[Teacher], way: _Way) -> None:
    if way.budget_usd is None:
        return
    for teacher in teachers:
        if teacher.annotator.price is None:
            raise ProcessError(
                f"--budget-usd cannot be held: annotator '{teacher.name}' has no price; "
                "add price: {input: …, output: …, as_of: …} in USD per million tokens (0 for a server of your own)"
            )
        problem = teacher.unbounded
        if problem:
            raise ProcessError(f"--budget-usd cannot be held: annotator '{teacher.name}' {problem}")


def _keeper(ledger: Ledger, account: Account) -> Callable[[list[Call]], None]:
    def keep(rows: list[Call]) -> None:
        ledger.append(*rows)
        for row in rows:
            account.note(row)

    return keep


def _replay(replay: Replay, plan: Plan, book: Book) -> None:
    for rows in replay.rows(plan):
        book.keep_now(rows)
        book.done(len(rows))


def _money(ledger: Ledger, teachers: Sequence[Teacher]) -> tuple[float | None, float | None]:
    """USD that the log knows to be spent, and what calls without a known bill may have cost at most."""
    if not teachers or any(teacher.annotator.price is None for teacher in teachers):
        return None, None
    counts = [count for count in ledger.counts() if count.origin == "live"]
    return sum(c.cost_usd for c in counts), sum(c.cost_bound_usd for c in counts) + ledger.unaccounted_usd()


# Asking -------------------------------------------------------------------------------------------------------------


class _Interrupt:
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
def _interruptible() -> Iterator[_Interrupt]:
    interrupt = _Interrupt()
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


class _Asking:
    """One start of the engine: what all annotators share."""

    def __init__(
        self, run: Run, plan: Plan, keys: Mapping[str, str | None], way: _Way, book: Book, ledger: Ledger
    ) -> None:
        self._run, self._plan, self._keys = run, plan, keys
        self._way, self._book, self._ledger = way, book, ledger
        self._decoding = run.process.settings.panel.decoding
        names = [annotator.name for annotator in _live(run)]
        self._budget = Budget(way.budget_usd, ledger.spent(names) + ledger.unaccounted_usd())
        self._lines: list[Line] = []
        self._jobs: asyncio.Task[None] | None = None

    async def run(self, teachers: Sequence[Teacher], interrupt: _Interrupt) -> None:
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
