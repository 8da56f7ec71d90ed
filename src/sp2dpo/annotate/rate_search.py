"""The rate that a server accepts, found from its 429s: what was accepted between pauses, over the time that it took.

That holds for a token bucket, a fixed window and a sliding one alike, if it is counted from the end of one pause to the
end of another. Knows times and amounts; an amount is one call, or the seconds that a call takes of a known limit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

__all__ = ["RateSearch"]

BELOW: Final = 0.995
"""Share of what was accepted that is sent next."""

FIRST_PAUSE_S: Final = 0.25
DOUBLINGS: Final = 7
"""Pause after a 429 at least: doubled, so often at most, while nothing is accepted after it or 429s follow closely."""

MEMORY_S: Final = 60.0
"""What was accepted is averaged over so much time at least, because a sliding window repeats what was sent into it."""

FULL_BUCKET_S: Final = 60.0
"""What a server may have saved up before the first 429, in seconds of its rate: limits are given per minute."""

LONGEST_HOLD_S: Final = 300.0
"""A rate that was found again and again is exceeded, to see whether there is more, about as rarely as this."""

SETTLED_S: Final = 30.0
"""A rate that held for so long is not given up for a cycle that is much shorter."""

GROWTH: Final = 1.03


@dataclass(frozen=True)
class _Found:
    """What is known, as amounts a second, and how the rate rises from there.

    `rate` was accepted on average of the last `seconds` (0: of a time that says little). What is sent goes from `low`
    to `high` in `rise_s`, and on by `growth` in `hold_s`, first slowly and then ever faster.
    """

    rate: float
    seconds: float
    low: float
    high: float
    rise_s: float
    growth: float
    hold_s: float

    def at(self, elapsed: float) -> float:
        if elapsed < self.rise_s:
            return self.low * math.pow(self.high / self.low, elapsed / self.rise_s)
        return self.high * math.pow(self.growth, min(100.0, ((elapsed - self.rise_s) / self.hold_s) ** 2))


@dataclass
class _Spell:
    """Calls between two pauses. It ends with a call that meets a 429, sent at the rate `peak` (None: at no limit)."""

    started: float
    calls: int = 0
    amount: float = 0.0
    refused: int = 0
    idle_s: float = 0.0
    peak: float | None = None

    @property
    def accepted(self) -> float:
        return self.amount * (1 - self.refused / self.calls) if self.calls > self.refused else 0.0


@dataclass
class _Cycle:
    """Spells, and the pauses after them, that are judged together; `prior` is what was known before."""

    prior: _Found | None = None
    spells: list[_Spell] = field(default_factory=list)

    @property
    def accepted(self) -> float:
        return sum(spell.accepted for spell in self.spells)

    def is_short(self, resume: float) -> bool:
        """Whether it is too short to replace what is known."""
        if self.prior is None or min(self.prior.seconds, self.prior.hold_s) < SETTLED_S:
            return False
        return resume - self.spells[0].started < 0.2 * self.prior.hold_s

    def found(self, resume: float, lag: float) -> _Found:
        """What the cycle teaches."""
        prior, peak = self.prior, self.spells[-1].peak
        length = resume - self.spells[0].started - sum(spell.idle_s for spell in self.spells)
        rate = self.accepted / length
        if peak is None:
            return self._first(rate, length, lag)
        if prior is not None and self.is_short(resume):
            return self._lowered(prior, resume)
        seconds, mean = length, rate
        if prior is not None and (kept := min(prior.seconds, MEMORY_S - length)) > 0:
            seconds, mean = length + kept, (self.accepted + prior.rate * kept) / (length + kept)
        hold = min(MEMORY_S, seconds / 2)
        if prior is not None and abs(rate / prior.rate - 1) < 0.05:
            hold = min(LONGEST_HOLD_S, 2 * max(length, prior.hold_s))
        low = BELOW * min(mean, peak)
        step = min(2.0, math.sqrt(max(1.0, peak / low)))
        return _Found(mean, seconds, low, step * low, hold, max(GROWTH, step), hold)

    def _first(self, rate: float, length: float, lag: float) -> _Found:
        """A bucket may have been full at the start, or have run over in the pause: the limit may be lower or higher."""
        low = max(self.accepted / (length + FULL_BUCKET_S), min(rate, 1.0))
        rise = max(0.5, 2 * lag) * (1 + math.log2(rate / low))
        return _Found(rate, 0.0, low, rate, rise, 2.0, max(rise, length))

    def _lowered(self, prior: _Found, resume: float) -> _Found:
        """By little, by more each time, and back to the rate before, if that was a hiccup."""
        last, top = self.spells[-1], max(prior.low, min(prior.high, self.spells[0].peak or 0.0))
        times = sum(spell.accepted > 0 for spell in self.spells)
        least = 0.9 * last.accepted / (resume - last.started) / top
        low, high = (max(least, math.pow(0.97, 2 ** min(n, 8) - 1)) for n in (times, times - 1))
        low, high = min(0.97, low), min(1.0, high)
        rise = 0.2 * prior.hold_s
        growth = min(2.0, max(GROWTH, 1 / high))
        hold = prior.hold_s if times == 1 else max(SETTLED_S, rise)
        return _Found(prior.rate, prior.seconds, low * top, high * top, rise, growth, hold)


class RateSearch:
    """Spells of calls and what they taught.

    Args:
        started: calls sent before are of no concern.
        known: the rate that a first 429 speaks against; None to begin without any.
    """

    def __init__(self, started: float = -math.inf, known: float | None = None) -> None:
        self._spell = _Spell(started)
        self._cycle = self._before = _Cycle()
        self._known = known
        self._found: _Found | None = None
        self._barren = 0
        self._probe_s = 0.0

    def takes_s(self, now: float, amount: float) -> float:
        """Seconds from a call of that amount to the next one; 0 if nothing was found that limits it.

        After a pause in vain one call goes ahead, and the next when that one would have been heard of.
        """
        rate, probe_s = self._rate(now), self._probe_s if self._spell.calls == 0 else 0.0
        return probe_s if rate is None else max(probe_s, amount / rate)

    def _rate(self, now: float) -> float | None:
        spell = self._spell
        return None if self._found is None else self._found.at(max(0.0, now - spell.started - spell.idle_s))

    def sent(self, now: float, amount: float, idle_s: float) -> None:
        """A call goes out. It could have gone `idle_s` before: time in which the rate was not tried."""
        if self._spell.started == -math.inf:
            self._spell.started = now
        self._spell.calls += 1
        self._spell.amount += amount
        if self._found is not None:
            self._spell.idle_s += idle_s

    def refused(self, now: float, sent_at: float, retry_after: float | None) -> float:
        """A call met a 429; when to go on.

        It ends the spell in which it was sent, or tells more of the last one. Of older ones only the wait counts.
        """
        if sent_at >= self._spell.started:
            self._end(sent_at)
        elif not self._cycle.spells or sent_at < self._cycle.spells[-1].started:
            return now + (retry_after or 0.0)
        last, lag = self._cycle.spells[-1], now - sent_at
        last.refused += 1
        in_vain = 0 if last.accepted else self._barren + 1
        again = len(self._cycle.spells) - 1
        self._probe_s = 2 * lag if in_vain else 0.0
        resume = now + max(retry_after or 0.0, FIRST_PAUSE_S * 2.0 ** min(DOUBLINGS, max(in_vain, again)), lag)
        if self._spell.calls == 0:
            self._spell.started = resume = max(resume, self._spell.started)
        whole = self._cycle if self._cycle.accepted else self._before
        if whole.accepted:
            self._found = whole.found(self._spell.started, lag)
        return resume

    def _end(self, sent_at: float) -> None:
        ended, cycle = self._spell, self._cycle
        if self._found is None and self._known is not None:
            long = 2 * LONGEST_HOLD_S
            self._found = _Found(self._known, long, self._known, self._known, 0.0, GROWTH, long)
        ended.peak = self._rate(sent_at)
        self._barren = self._barren + 1 if cycle.spells and not cycle.spells[-1].accepted else 0
        if cycle.accepted and cycle.is_short(ended.started):
            cycle.spells.append(ended)
        else:
            self._before = cycle if cycle.accepted else self._before
            self._cycle = _Cycle(self._found, [ended])
        self._spell = _Spell(-math.inf)
