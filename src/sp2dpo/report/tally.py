"""The call log, read once: how each question ended, what was asked and sent, who answered, tokens and money. J.4."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product

from sp2dpo.calls import Call, Cell
from sp2dpo.report.data import Evidence
from sp2dpo.settings import Annotator

__all__ = ["Served", "Spent", "Tally", "spend", "tally_calls"]


@dataclass
class Served:
    """Which model answered under which name, and when."""

    annotator: str
    origin: str
    requested: str
    served: str | None
    n: int = 0
    first: str = ""
    last: str = ""

    @property
    def swapped(self) -> bool:
        return self.served is not None and self.served != self.requested

    def note(self, call: Call) -> None:
        self.n += 1
        self.first = min(self.first or call.started_at, call.started_at)
        self.last = max(self.last, call.started_at)


@dataclass
class Used:
    """Attempts, tokens and USD of one annotator by origin of the answers."""

    annotator: str
    origin: str
    attempts: int = 0
    valid: int = 0
    uncounted: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0

    def note(self, call: Call) -> None:
        self.attempts += 1
        self.valid += call.valid
        self.uncounted += call.prompt_tokens is None
        self.prompt_tokens += call.prompt_tokens or 0
        self.completion_tokens += call.completion_tokens or 0
        self.cost_usd += call.cost_usd or 0.0


@dataclass
class Tally:
    """What a pass over the log finds. `first_time` to `not_asked` count questions and make up all of them."""

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

    def note(self, call: Call) -> None:
        """One attempt, whatever came of it."""
        self.attempts += 1
        self.outcomes[call.outcome] += 1
        who = (call.annotator, call.origin, call.requested_model, call.served_model)
        self.served.setdefault(who, Served(*who)).note(call)
        self.used.setdefault(who[:2], Used(*who[:2])).note(call)
        self.params[call.annotator, call.params_requested, call.params_sent] += 1

    def settle(self, end: tuple[bool, int, str, str] | None) -> None:
        """How one question ended: its first valid attempt, else its last one."""
        if end is None:
            self.not_asked += 1
            return
        valid, attempt, outcome, mends = end
        if not valid:
            self.failed[outcome] += 1
        elif outcome == "repaired":
            self.repaired += 1
            self.mends.update(json.loads(mends))
        elif attempt == 1:
            self.first_time += 1
        else:
            self.later += 1


def tally_calls(log: Iterable[Call], evidence: Evidence) -> Tally:
    """Read the log once; questions are the different pairs × annotators × variants."""
    tally = Tally()
    ends: dict[Cell, tuple[bool, int, str, str]] = {}
    for call in log:
        tally.note(call)
        if not ends.get(call.cell, (False,))[0]:
            ends[call.cell] = (call.valid, call.attempt, call.outcome, call.mends)
    for cell in product(dict.fromkeys(evidence.pair_ids), evidence.annotators, evidence.variants):
        tally.settle(ends.get(cell))
    return tally


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
