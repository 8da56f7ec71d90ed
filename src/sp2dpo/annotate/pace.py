"""Pace: when the next call of an annotator may be sent, so that its rate limit is used and hardly ever met.

Calls are spaced evenly at `CLOSE` of the limit, on a schedule that does not drift, because that passes a token bucket,
a fixed window and a sliding one alike. A limit is told, read from headers, or searched for after a 429.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from sp2dpo.annotate.rate_search import RateSearch
from sp2dpo.llm import Limits

__all__ = ["Pace"]

CLOSE: Final = 0.99
"""Share of a known limit that is used."""

CATCH_UP_S: Final = 0.1
"""So much lateness is made up for by sending sooner; more of it is lost. A window of a minute has room for 0.6 s."""

LONGEST_GAP_S: Final = 60.0
"""What was found never puts more than this between two calls; what was told, or `Retry-After`, may."""


@dataclass
class _Schedule:
    """One limit: when the next call is due."""

    due: float = -math.inf

    def take(self, asked: float, now: float, cost_s: float) -> float:
        """A call that was asked for is sent and uses the limit up for `cost_s`; for how long nobody asked before."""
        late = now - max(self.due, asked)
        idle = max(0.0, asked - self.due)
        self.due = now - min(CATCH_UP_S, max(0.0, late)) + cost_s
        return idle


class Pace:
    """The pace of one annotator. Without a limit nothing waits.

    A limit on requests or tokens a minute is told or read, and the lower one holds; a search that a 429 begins runs in
    seconds of these limits. Without any it runs in requests, so that a limit on tokens is found less exactly the more
    the calls differ in size. A server with windows has no room for a large call at the end of one: some share stays
    unused, up to the size of the largest call.

    Args:
        rpm, tpm: requests and tokens a minute that are never exceeded; None if nobody said.
        clock, sleep: seconds, and how to wait for some; for tests.
    """

    def __init__(
        self,
        rpm: float | None = None,
        tpm: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._told = {"requests": rpm, "tokens": tpm}
        self._limits = {what: limit for what, limit in self._told.items() if limit is not None}
        self._clock, self._sleep = clock, sleep
        self._requests, self._tokens, self._found = _Schedule(), _Schedule(), _Schedule()
        self._search = RateSearch(known=1.0 if self._limits else None)
        self._turn = asyncio.Lock()

    @property
    def counts_tokens(self) -> bool:
        """Whether a limit on tokens is known, so that `acquire` needs their number."""
        return "tokens" in self._limits

    @property
    def waiting(self) -> str | None:
        """What to say if the next call has to wait for a second or more."""
        left = self._due() - self._clock()
        return f"waiting {math.ceil(left)} s for the rate limit" if left >= 1 else None

    async def acquire(self, tokens: float = 0.0) -> float:
        """Wait until a call of so many tokens may be sent, first come, first served; the time at which that is."""
        asked = self._clock()
        async with self._turn:
            while (left := self._due() - self._clock()) > 0:
                await self._sleep(left)
            now = self._clock()
            request_s, tokens_s = self._cost_s("requests", 1.0), self._cost_s("tokens", tokens)
            amount = max(request_s, tokens_s) if self._limits else 1.0
            self._requests.take(asked, now, request_s)
            self._tokens.take(asked, now, tokens_s)
            idle = self._found.take(asked, now, min(LONGEST_GAP_S, self._search.takes_s(now, amount)))
            self._search.sent(now, amount, idle)
            return now

    def settle(self, reserved_tokens: float, actual_tokens: float) -> None:
        """A call for which so many tokens were reserved used another number."""
        self._tokens.due += self._cost_s("tokens", actual_tokens - reserved_tokens)

    def learn(self, limits: Limits) -> None:
        """Take over the limits that a response names; as requests and tokens a minute."""
        known = bool(self._limits)
        for what, limit in (("requests", limits.requests), ("tokens", limits.tokens)):
            if limit is not None and limit > 0:
                self._limits[what] = min(limit, self._told[what] or limit)
        if self._limits and not known:
            self._search = RateSearch(self._clock(), known=1.0)

    def limited(self, retry_after: float | None, sent_at: float) -> None:
        """A call met a 429: all wait, and go on at the rate that was accepted.

        Args:
            retry_after: seconds that the server asks to wait, and all wait at least; None if it names none.
            sent_at: what `acquire` returned for the call.
        """
        resume = self._search.refused(self._clock(), sent_at, retry_after)
        self._found.due = max(self._found.due, resume)

    def _cost_s(self, what: str, amount: float) -> float:
        """Seconds of the known limit; 0 if there is none."""
        return amount * 60 / (CLOSE * self._limits[what]) if what in self._limits else 0.0

    def _due(self) -> float:
        return max(self._requests.due, self._tokens.due, self._found.due)
