"""The call log, counted: how each question ended, what was asked and sent, who answered, tokens and money. J.4."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

from sp2dpo.annotate.teacher import same_model
from sp2dpo.calls import VALID, CallLog, Cell
from sp2dpo.calls.rows import Attempts, Count
from sp2dpo.evidence import Evidence
from sp2dpo.settings import Annotator

__all__ = ["Served", "Spent", "Tally", "spend", "tally_calls"]


@dataclass
class Served:
    """Which model answered under which name, and when; `served_as` is the name that the process file accepts for it."""

    annotator: str
    origin: str
    requested: str
    served: str | None
    served_as: str | None = None
    n: int = 0
    first: str = ""
    last: str = ""

    @property
    def swapped(self) -> bool:
        """Never of a predictor: λ pins its hash."""
        return self.origin != "predicted" and not same_model(self.requested, self.served, self.served_as)

    def note(self, some: Attempts) -> None:
        self.n += some.attempts
        self.first = min(self.first or some.first, some.first)
        self.last = max(self.last, some.last)


@dataclass
class Used:
    """Attempts, tokens and USD of one annotator by origin of the answers.

    `uncounted` attempts came without a token count; those that failed and were not live always do.
    """

    annotator: str
    origin: str
    attempts: int = 0
    valid: int = 0
    uncounted: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    cost_usd: float = 0.0
    failed_usd: float = 0.0
    bound_usd: float = 0.0

    def note(self, some: Count) -> None:
        valid = some.outcome in VALID
        self.attempts += some.attempts
        self.valid += some.attempts if valid else 0
        self.prompt_tokens += some.prompt_tokens
        self.completion_tokens += some.completion_tokens
        self.reasoning_tokens += some.reasoning_tokens
        self.cost_usd += some.cost_usd
        self.failed_usd += 0.0 if valid else some.cost_usd
        self.bound_usd += some.cost_bound_usd


@dataclass
class Tally:
    """What the log holds. `first_time` to `not_asked` count questions and make up all of them.

    `odd` says of a question what came before its answer, if it was not simply answered.
    """

    attempts: int = 0
    first_time: int = 0
    later: int = 0
    repaired: int = 0
    not_asked: int = 0
    mends: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    served: dict[tuple[str, str, str, str | None], Served] = field(default_factory=dict)
    used: dict[tuple[str, str], Used] = field(default_factory=dict)
    params: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    odd: dict[Cell, str] = field(default_factory=dict)

    def settle(self, cell: Cell, attempt: int, outcome: str, mends: str) -> None:
        """How one question ended: its first valid attempt, else its last one."""
        self.not_asked -= 1
        if outcome not in VALID:
            self.failed[outcome] += 1
            self.odd[cell] = f"{outcome}, attempt {attempt}"
            return
        told = [f"attempt {attempt}"] if attempt > 1 else []
        if outcome == "repaired":
            self.repaired += 1
            self.mends.update(named := json.loads(mends))
            told.append(f"mended: {', '.join(named)}")
        elif attempt == 1:
            self.first_time += 1
        else:
            self.later += 1
        if told:
            self.odd[cell] = "; ".join(told)


def tally_calls(log: CallLog, evidence: Evidence) -> Tally:
    """Count attempts and questions; questions are the different pairs × annotators × variants."""
    pairs, annotators, variants = (set(x) for x in (evidence.pair_ids, evidence.annotators, evidence.variants))
    tally = Tally(not_asked=len(pairs) * len(annotators) * len(variants))
    _attempts(tally, log, evidence)
    seen: set[Cell] = set()
    columns = ("pair_id", "annotator", "variant", "origin", "prompt_tokens", "attempt", "outcome", "mends")
    for pair_id, annotator, variant, origin, tokens, attempt, outcome, mends in chain.from_iterable(log.valid(columns)):
        tally.used[annotator, origin].uncounted += tokens is None and origin != "live"
        cell = (pair_id, annotator, variant)
        if cell not in seen and pair_id in pairs and annotator in annotators and variant in variants:
            seen.add(cell)
            tally.settle(cell, attempt, outcome, mends)
    for end in log.failures():
        if end.pair_id in pairs and end.annotator in annotators and end.variant in variants:
            tally.settle(end.cell, end.attempt, end.outcome, end.mends)
    return tally


def _attempts(tally: Tally, log: CallLog, evidence: Evidence) -> None:
    """What SQLite counts by itself."""
    served_as = {one.name: one.served_as for one in evidence.run.process.settings.panel.annotators}
    for some in log.attempts():
        tally.attempts += some.attempts
        tally.outcomes[some.outcome] += some.attempts
        who = (some.annotator, some.origin, some.requested_model, some.served_model)
        tally.served.setdefault(who, Served(*who, served_as.get(some.annotator))).note(some)
    for count in log.counts():
        tally.used.setdefault((count.annotator, count.origin), Used(count.annotator, count.origin)).note(count)
        if count.origin != "live" and count.outcome not in VALID:
            tally.used[count.annotator, count.origin].uncounted += count.attempts
    for used in tally.used.values():
        if used.origin == "live":
            usage = log.usage(used.annotator)
            used.uncounted = usage.attempts - usage.counted
    for asked in log.asked():
        tally.params[asked.annotator, asked.params_requested, asked.params_sent] += asked.attempts


@dataclass(frozen=True)
class Spent:
    """USD of the live calls of this run; None if an annotator that was asked has no price."""

    usd: float | None
    live: int
    uncounted: int
    unpriced: tuple[str, ...]


def spend(tally: Tally, annotators: Sequence[Annotator]) -> Spent:
    """What the live calls cost, from the tokens that the endpoints reported."""
    live = [used for used in tally.used.values() if used.origin == "live"]
    priced = {annotator.name for annotator in annotators if annotator.price is not None}
    unpriced = tuple(sorted({used.annotator for used in live} - priced))
    usd = None if unpriced else sum(used.cost_usd for used in live)
    return Spent(usd, sum(used.attempts for used in live), sum(used.uncounted for used in live), unpriced)
