"""How an endpoint is doing, told from the outcomes of its calls: crowded, silent, or not to be asked again.

Outcomes in, decisions out; asks nothing itself.
"""

from __future__ import annotations

import random
import time
from collections import Counter, deque
from typing import Final

__all__ = ["CROWD", "FIRST_PROBES", "PROBES", "SILENT", "Crowding", "Health", "delay_s"]

SILENT: Final = ("server_error", "timeout", "connection")
"""Failures without an answer: asked again after a delay."""

CROWD: Final = 8
"""So many failures of one kind in a row, or as many as calls in flight, and a line asks one at a time."""

PROBES: Final = 6
FIRST_PROBES: Final = 3
"""So many single calls in a row without an answer, each after a longer wait, and the line stops; fewer if the endpoint
never answered in this start."""

LONGEST_WAIT_S: Final = 60.0
ONLY_429_FOR_S: Final = 300.0
"""No limit a minute keeps all calls out for so long; a quota does."""


class Crowding:
    """Whether 429s come of asking too fast; a few among many answers do not, and slow only their own questions down."""

    def __init__(self) -> None:
        self._recent: deque[bool] = deque(maxlen=100)
        self._crowded = False

    def note(self, limited: bool) -> bool:
        """Take in an outcome; true from the first time on that half of ten, or a sixth of a hundred, were 429s."""
        self._recent.append(limited)
        if limited and not self._crowded:
            recent = list(self._recent)
            self._crowded = sum(recent[-10:]) >= 5 or sum(recent) >= 16
        return self._crowded


class Health:
    """Whether an endpoint answers: failures in a row, and single probes while it is in doubt."""

    def __init__(self, crowd: int) -> None:
        self._crowd = crowd
        self._row: Counter[str] = Counter()
        self._probes = 0
        self._answered = False
        self._limited_since: float | None = None
        self.alone = True
        self.until = 0.0

    def note(self, kind: str, base: float, retry_after: float | None) -> str | None:
        """Take in the outcome of a call; the reason to stop, if there is one."""
        group = "silent" if kind in SILENT else kind
        if kind == "rate_limited":
            self.alone = False
            return self._only_limited()
        self._limited_since = None
        if group not in ("silent", "quota", "bad_request"):
            self._row.clear()
            self._probes, self._answered, self.alone = 0, True, False
            return None
        self._row[group] += 1
        if group == "bad_request":
            return self._bad_requests()
        if not (self.alone or group == "quota" or self._row[group] >= self._crowd):
            return None
        now = time.monotonic()
        if self.alone or self._probes == 0:
            if now < self.until:
                return None  # sent before the line was slowed down
            self._probes += 1
            self.until = now + min(LONGEST_WAIT_S, delay_s(base, self._probes - 1, retry_after))
        self.alone = True
        if self._probes >= (PROBES if self._answered and group == "silent" else FIRST_PROBES):
            return f"{self._row.total()} attempts in a row without an answer"
        return None

    def _only_limited(self) -> str | None:
        now = time.monotonic()
        if self._limited_since is None:
            self._limited_since = now
        if now - self._limited_since < ONLY_429_FOR_S:
            return None
        return f"nothing but 429 for {(now - self._limited_since) / 60:.0f} minutes"

    def _bad_requests(self) -> str | None:
        enough = self._crowd if self._answered else FIRST_PROBES
        if self._row["bad_request"] >= enough:
            return f"{self._row['bad_request']} requests in a row were not taken"
        return None


def delay_s(base: float, retry: int, retry_after: float | None) -> float:
    """Exponential, with jitter so that calls do not come back in step; never less than the server asks for."""
    return max(base * 2.0**retry * random.uniform(0.75, 1.25), retry_after or 0.0)
