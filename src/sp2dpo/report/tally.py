"""The call log, counted: how each question ended, what was asked and sent, who answered, tokens and money. J.4."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from sp2dpo.annotate.teacher import same_model
from sp2dpo.calls import Call, CallLog
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
        return not same_model(self.requested, self.served, self.served_as)

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
    reasoning_tokens: int = 0
    cost_usd: float = 0.0
    failed_usd: float = 0.0
    bound_usd: float = 0.0

    def note(self, call: Call) -> None:
        self.attempts += 1
        self.valid += call.valid
        self.uncounted += call.prompt_tokens is None
        self.prompt_tokens += call.prompt_tokens or 0
        self.completion_tokens += call.completion_tokens or 0
        self.reasoning_tokens += call.reasoning_tokens or 0
        self.cost_usd += call.cost_usd or 0.0
        self.failed_usd += 0.0 if call.valid else call.cost_usd or 0.0
        self.bound_usd += call.cost_bound_usd or 0.0 if call.cost_usd is None else 0.0


@dataclass
class Tally:
    """What a pass over the log finds. `first_time` to `not_asked` count questions and make up all of them."""

    served_as: Mapping[str, str | None] = field(default_factory=dict)
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
        self.served.setdefault(who, Served(*who, self.served_as.get(call.annotator))).note(call)
        self.used.setdefault(who[:2], Used(*who[:2])).note(call)
        self.params[call.annotator, call.params_requested, call.params_sent] += 1

    def settle(self, end: Call) -> None:
        """How one question ended: its first valid attempt, else its last one."""
        self.not_asked -= 1
        if not end.valid:
            self.failed[end.outcome] += 1
        elif end.outcome == "repaired":
            self.repaired += 1
            self.mends.update(json.loads(end.mends))
        elif end.attempt == 1:
            self.first_time += 1
        else:
            self.later += 1


def tally_calls(log: CallLog, evidence: Evidence) -> Tally:
    """Count attempts and questions; questions are the different pairs × annotators × variants."""
    pairs, annotators, variants = (set(x) for x in (evidence.pair_ids, evidence.annotators, evidence.variants))
    served_as = {one.name: one.served_as for one in evidence.run.process.settings.panel.annotators}
    tally = Tally(served_as, not_asked=len(pairs) * len(annotators) * len(variants))
    for call in log:
        tally.note(call)
    for end in chain(log.answers(), log.failures()):
        if end.pair_id in pairs and end.annotator in annotators and end.variant in variants:
            tally.settle(end)
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
