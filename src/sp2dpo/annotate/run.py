"""The annotation engine: asks every open question of the panel and keeps every attempt. Algorithm 2, phase 1.

An answered question is never asked again; a failure is a row, not a crash. This file joins the parts: what is open
(`plan`), who is asked (`teacher`), what needs no asking (`replay`, `predict`), the asking itself, and the account.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

from sp2dpo.annotate.account import Account, Book, keep_rows, write_account
from sp2dpo.annotate.asking import ALL, Asking, Transport, Way, interruptible
from sp2dpo.annotate.estimate import ESTIMATE, estimate
from sp2dpo.annotate.jobs import give_up_jobs, refuse_jobs
from sp2dpo.annotate.plan import Plan
from sp2dpo.annotate.predict import Predictions
from sp2dpo.annotate.replay import Replay, take_over
from sp2dpo.annotate.teacher import Teacher
from sp2dpo.calls import Call, Ledger, open_ledger
from sp2dpo.errors import ProcessError, Sp2dpoError, nearest
from sp2dpo.llm import FAILURES
from sp2dpo.llm.http import read_key
from sp2dpo.pairs import check_pairs
from sp2dpo.progress import Progress
from sp2dpo.providers import refuse_ended
from sp2dpo.reply import INVALID
from sp2dpo.runs import Run
from sp2dpo.settings import Annotator

__all__ = ["Transport", "annotate"]


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
        ProcessError: a key, a recording or a predictor is missing, a flag names an unknown annotator or failure, or the
            budget cannot be held because a price or an output cap is missing; before anything is asked.
        RunDirError: another process writes the same call log.
        Unfinished: the call log could not be written.
    """
    way = Way(concurrency, transport, budget_usd, rpm or {}, tpm or {}, connector)
    _check_flags(run, retry, way)
    panel = run.process.settings.panel
    check_pairs(run.pairs, run.command("annotate"))
    keys = {a.name: read_key(a.api_key_env, f"annotator '{a.name}'") for a in panel.asked}
    offline = [OFFLINE[annotator.kind](run, annotator) for annotator in panel.annotators if not annotator.asked]
    account = Account()
    with open_ledger(run.calls) as ledger:
        names = [annotator.name for annotator in panel.annotators]
        plan = Plan(run.pairs, ledger, names, panel.variants, limit=limit, sample=sample, retry=retry)
        teachers = [Teacher(run, annotator, ledger.served(annotator.name)) for annotator in panel.asked]
        _check_budget(teachers, way)
        if forget_batches:
            give_up_jobs(ledger, teachers, run.path / "batches")
        elif transport != "batch":
            refuse_jobs(ledger, names)
        try:
            with interruptible() as interrupt:
                if reuse is not None:
                    take_over(plan, reuse / "calls.sqlite", teachers, partial(keep_rows, ledger, account))
                standing = plan.standing()
                open_now = standing.open.total()
                with Progress("annotate", standing.questions, done=standing.questions - open_now) as progress:
                    book = Book(ledger, account, progress)
                    for source in offline:
                        _take(source, plan, book)
                        account.notes += [source.note] if source.note else []
                    asked = [teacher for teacher in teachers if standing.open[teacher.name]]
                    if asked:
                        _prepare_to_spend(run)
                        asyncio.run(Asking(run, plan, keys, way, book, ledger).run(asked, interrupt))
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
        made.write(run.path, run.process.lambda_hash)
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


def _check_flags(run: Run, retry: Collection[str], way: Way) -> None:
    kinds = {**FAILURES, **INVALID}
    for kind in retry:
        if kind not in kinds:
            raise ProcessError(
                f"--retry {kind}: no such kind of failure{nearest(kind, kinds)}; one of {', '.join(kinds)}"
            )
    asked = run.process.settings.panel.asked
    for annotator in asked:
        if "{node}" in str(annotator.base_url) and way.transport != "ray":
            raise ProcessError(
                f"annotator '{annotator.name}': {{node}} in its base_url stands for each node of a Ray cluster; "
                "it needs --transport ray"
            )
    names = [annotator.name for annotator in asked]
    for flag, limits in (("--rpm", way.rpm), ("--tpm", way.tpm)):
        for name in limits:
            if name != ALL and name not in names:
                raise ProcessError(f"{flag} {name}=…: no annotator of that name is asked{nearest(name, names)}")


def _check_budget(teachers: Sequence[Teacher], way: Way) -> None:
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


class _Offline(Protocol):
    """An annotator that needs no asking."""

    @property
    def note(self) -> str | None: ...

    def rows(self, plan: Plan) -> Iterator[list[Call]]: ...


OFFLINE: Final[Mapping[str, Callable[[Run, Annotator], _Offline]]] = {"recorded": Replay, "distilled": Predictions}
"""What answers for each kind of annotator that is not asked."""


def _take(source: _Offline, plan: Plan, book: Book) -> None:
    for rows in source.rows(plan):
        book.keep_now(rows)
        book.done(len(rows))


def _money(ledger: Ledger, teachers: Sequence[Teacher]) -> tuple[float | None, float | None]:
    """USD that the log knows to be spent, and what calls without a known bill may have cost at most."""
    if not teachers or any(teacher.annotator.price is None for teacher in teachers):
        return None, None
    counts = [count for count in ledger.counts() if count.origin == "live"]
    return sum(c.cost_usd for c in counts), sum(c.cost_bound_usd for c in counts) + ledger.unaccounted_usd()
