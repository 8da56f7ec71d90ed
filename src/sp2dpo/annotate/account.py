"""What a run of the engine did and how the whole stands: every attempt counted, every missing answer with its cause."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sp2dpo.annotate.plan import NEVER_ASKED, Plan, Standing
from sp2dpo.annotate.teacher import Teacher
from sp2dpo.calls import VALID, Call, Ledger, open_calls
from sp2dpo.llm import Request
from sp2dpo.numbers import some
from sp2dpo.progress import Progress
from sp2dpo.runs import Run
from sp2dpo.tables import write_manifest

__all__ = ["INTERRUPTED", "Account", "Book", "keep_rows", "write_account"]

INTERRUPTED: Final = "interrupted"
"""Why a run stopped, if Ctrl-C did it; the command says so by itself."""

CHARACTERS_PER_TOKEN = 3.5
"""For the pace of tokens, until an endpoint has counted some."""


@dataclass
class Account:
    """One start of the engine, and the run directory after it.

    `questions`, `valid` and `missing_by_cause` are of the pairs within `--limit`; a cause is what came of the last
    attempt. `lacking` are those of them, by annotator, that a recording has no valid answer to, so that asking cannot
    help. `spent_usd` is all that the log knows to be spent in this run directory, `unknown_usd` what calls whose
    bill is not known may have cost at most; both None if an annotator that was asked has no price.
    """

    questions: int = 0
    valid: int = 0
    missing_by_cause: Counter[str] = field(default_factory=Counter)
    lacking: dict[str, Counter[str]] = field(default_factory=dict)
    attempts: int = 0
    live: int = 0
    calls: int = 0
    recorded: int = 0
    reused: int = 0
    imported: int = 0
    predicted: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    mends: Counter[str] = field(default_factory=Counter)
    cost_usd: float = 0.0
    spent_usd: float | None = None
    unknown_usd: float | None = None
    notes: list[str] = field(default_factory=list)
    stopped: dict[str, str] = field(default_factory=dict)
    stopped_all: str | None = None
    over_budget: bool = False

    @property
    def missing(self) -> int:
        return self.questions - self.valid

    @property
    def missing_of_asked(self) -> Counter[str]:
        """By cause, what is missing and may still come."""
        return self.missing_by_cause - sum(self.lacking.values(), Counter[str]())

    def note(self, call: Call) -> None:
        """One more attempt."""
        self.attempts += 1
        self.outcomes[call.outcome] += 1
        self.mends.update(json.loads(call.mends))
        self.live += call.origin == "live"
        self.recorded += call.origin == "recorded"
        self.reused += call.origin == "reused"
        self.imported += call.origin == "imported"
        self.predicted += call.origin == "predicted"
        if call.origin == "live":
            self.cost_usd += call.cost_usd or 0.0

    def settle(self, standing: Standing) -> None:
        """How the whole stands in the end."""
        self.questions, self.valid, self.missing_by_cause = standing.questions, standing.valid, standing.missing

    def settle_recordings(self, run: Run, *, limit: int | None = None, sample: int | None = None) -> None:
        """What recordings lack; of no interest, and slow in a long log, while nothing is missing."""
        panel = run.process.settings.panel
        offline = [annotator.name for annotator in panel.annotators if not annotator.asked]
        with open_calls(run.calls) as log:
            for name in offline:
                missing = Plan(run.pairs, log, [name], panel.variants, limit=limit, sample=sample).standing().missing
                read = Counter({cause: n for cause, n in missing.items() if cause != NEVER_ASKED})
                if read:
                    self.lacking[name] = read

    def retry_flags(self) -> list[str]:
        """Flags that ask again for failures only; none if some question was never asked."""
        missing = self.missing_of_asked
        if NEVER_ASKED in missing:
            return []
        return [word for kind in sorted(missing) for word in ("--retry", kind)]

    def lines(self) -> Iterator[str]:
        """What there is to say, a line for each."""
        if self.live:
            spent = "" if self.spent_usd is None else f", ${self.cost_usd:,.4f} (${self.spent_usd:,.4f} in all)"
            yield f"{some(self.calls, 'call')} made{spent}"
        taken = {
            "recorded answers read": self.recorded,
            "answers taken over": self.reused,
            "imported": self.imported,
            "predicted": self.predicted,
        }
        if any(taken.values()):
            yield ", ".join(f"{n:,} {what}" for what, n in taken.items() if n)
        yield from self.notes
        if self.unknown_usd:
            yield f"calls whose bill is not known may have cost up to ${self.unknown_usd:,.4f} more"
        if self.outcomes["repaired"]:
            yield f"repaired {self.outcomes['repaired']:,}: {_list(self.mends)}"
        failed = Counter({kind: n for kind, n in self.outcomes.items() if kind not in VALID})
        if failed:
            yield f"failed attempts {failed.total():,}: {_list(failed)}"
        if self.missing:
            yield f"missing {self.missing:,}: {_list(self.missing_by_cause)}"
        yield from (f"annotator '{name}' was stopped: {why}" for name, why in self.stopped.items())
        if self.stopped_all and self.stopped_all != INTERRUPTED:
            yield f"stopped: {self.stopped_all}"

    def as_json(self) -> dict[str, Any]:
        """All of it, for `--json`."""
        return {**vars(self), "missing": self.missing}


def _list(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {n:,}" for name, n in counts.most_common())


def keep_rows(ledger: Ledger, account: Account, rows: Sequence[Call]) -> None:
    """Rows that nobody was asked for now."""
    ledger.append(*rows)
    for row in rows:
        account.note(row)


def write_account(run: Run, ledger: Ledger, account: Account) -> None:
    """The manifest of the call log."""
    write_manifest(
        run.calls,
        files={},
        inputs={},
        lambda_hash=run.process.lambda_hash,
        content=ledger.content_hash(),
        attempts=len(ledger),
        questions=account.questions,
        valid=account.valid,
    )


class Book:
    """Where every attempt goes: the log first, then the account and the progress line."""

    def __init__(self, ledger: Ledger, account: Account, progress: Progress) -> None:
        self._ledger, self.account, self._progress = ledger, account, progress
        self._characters: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._noted_usd = 0.0

    async def keep(self, rows: Sequence[Call], calls: int = 1) -> None:
        """The rows of some calls; returns when they are on disk."""
        await self._ledger.add(*rows)
        self.account.calls += calls
        self._note(rows)

    def keep_now(self, rows: Sequence[Call]) -> None:
        """The same for many rows at once, outside of an event loop."""
        self._ledger.append(*rows)
        self._note(rows)

    def _note(self, rows: Iterable[Call]) -> None:
        for row in rows:
            self.account.note(row)
            self._progress.note(row.outcome, self.account.cost_usd)

    async def reserved(self, usd: float) -> None:
        """Note in the log how much calls in flight may cost, so that a kill does not hide it."""
        if usd > self._noted_usd:
            noted = 1.25 * usd
            await self._ledger.reserve(noted)
            self._noted_usd = max(self._noted_usd, noted)

    def done(self, questions: int) -> None:
        """So many questions need no more attempts in this start."""
        self._progress.advance(questions)

    def tick(self) -> None:
        """Show how it stands, if it is time to."""
        self._progress.tick()

    def say(self, name: str, text: str) -> None:
        """A word about one annotator, below the progress."""
        self._progress.say(name, text)

    def tokens_of(self, teacher: Teacher, request: Request) -> float:
        """Tokens that a call will count for, its output cap included; by what this endpoint counted so far."""
        characters = _characters(request)
        seen = self._characters[teacher.name]
        ratio = self._tokens[teacher.name] / seen if seen else 1 / CHARACTERS_PER_TOKEN
        return characters * ratio + (teacher.cap or 0)

    def counted(self, teacher: Teacher, request: Request, prompt_tokens: int | None) -> None:
        """What the endpoint counted for a call."""
        if prompt_tokens:
            self._characters[teacher.name] += _characters(request)
            self._tokens[teacher.name] += prompt_tokens


def _characters(request: Request) -> int:
    """How long the text of a request is."""
    messages = request.body.get("messages")
    return len(str(request.body)) if messages is None else sum(len(message["content"]) for message in messages)
