"""Questions that others answer: open ones out to a file, and answers in from one, read as those to a call are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from sp2dpo.annotate.account import Account, keep_rows, write_account
from sp2dpo.annotate.bring import export_requests, open_answers
from sp2dpo.annotate.jobs import refuse_jobs
from sp2dpo.annotate.plan import Plan
from sp2dpo.annotate.teacher import Teacher
from sp2dpo.calls import Call, Ledger, open_ledger
from sp2dpo.errors import InputError, ProcessError, nearest
from sp2dpo.llm import Raw, Request
from sp2dpo.runs import Run
from sp2dpo.settings import names_of

__all__ = ["Imported", "export_open", "import_answers"]

_ROWS_AT_ONCE = 200


@dataclass(frozen=True)
class Imported:
    """What came of a file of answers; `unused` are about nothing that is open, `torn` is a last line cut off."""

    account: Account
    lines: int
    taken: int
    unused: int
    duplicates: int
    torn: int | None


def _teacher(run: Run, name: str | None, ledger: Ledger) -> Teacher:
    """The annotator of that name, or the only one."""
    asked = run.process.settings.panel.asked
    names = [annotator.name for annotator in asked]
    if name is None and len(names) != 1:
        raise ProcessError(f"the panel has {len(names)} annotators that are asked; choose one: --annotator NAME")
    found = next((annotator for annotator in asked if name in (None, annotator.name)), None)
    if found is None:
        raise ProcessError(f"--annotator {name}: no annotator of that name is asked{nearest(str(name), names)}")
    return Teacher(run, found, ledger.served(found.name))


def _plan(run: Run, ledger: Ledger, limit: int | None) -> Plan:
    panel = run.process.settings.panel
    return Plan(run.pairs, ledger, names_of(panel), panel.variants, limit=limit)


def _requests(plan: Plan, teacher: Teacher) -> Iterator[Request]:
    for question in plan.open(teacher.name, together=teacher.decides):
        yield teacher.request(question)


def export_open(run: Run, path: Path, *, annotator: str | None = None, limit: int | None = None) -> int:
    """Write the open questions of one annotator as the input of a batch; returns how many calls they are.

    Raises:
        InputError: something that is no file is in its place.
        ProcessError: no such annotator.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is there and is no file: name a file for the questions")
    with open_ledger(run.calls) as ledger:
        teacher = _teacher(run, annotator, ledger)
        refuse_jobs(ledger, [teacher.name])
        return export_requests(_requests(_plan(run, ledger, limit), teacher), path)


def import_answers(run: Run, path: Path, *, annotator: str | None = None, limit: int | None = None) -> Imported:
    """Log the answers in a file as those to open questions of one annotator. Nothing is asked.

    Raises:
        ProcessError: no such annotator.
        DataError: the file has a line that is no answer, or none of this annotator; then nothing is logged.
    """
    account = Account()
    with open_ledger(run.calls) as ledger:
        teacher, plan = _teacher(run, annotator, ledger), _plan(run, ledger, limit)
        refuse_jobs(ledger, [teacher.name])
        with open_answers(path, teacher.name) as answers:
            taken, waiting = 0, []
            for request in _requests(plan, teacher):
                found = answers.take(request)
                if found is None:
                    continue
                taken += 1
                waiting += _rows(teacher, request, found)
                if len(waiting) >= _ROWS_AT_ONCE:
                    keep_rows(ledger, account, waiting)
                    waiting = []
            keep_rows(ledger, account, waiting)
            account.settle(plan.standing())
            write_account(run, ledger, account)
            return Imported(account, len(answers), taken, answers.unused, answers.duplicates, answers.torn)


def _rows(teacher: Teacher, request: Request, found: object) -> list[Call]:
    raw = found if isinstance(found, Raw) else Raw(status=None)
    how = {"attempt": request.asked + 1, "started": datetime.now(UTC), "transport": "import", "origin": "imported"}
    if isinstance(found, dict):
        return teacher.rows_of(request, found, raw, **how)  # type: ignore[arg-type]
    return teacher.rows(request, raw, **how)  # type: ignore[arg-type]
