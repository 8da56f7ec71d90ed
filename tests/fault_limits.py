"""Rate limits of the fault server: requests and tokens a minute, told in headers as OpenAI does."""

from __future__ import annotations

import time

__all__ = ["Limit", "Limits"]


class Limit:
    """So many a minute: a bucket that fills evenly and holds so many seconds of it, or fixed windows of so many."""

    def __init__(self, per_minute: float, fixed: bool, seconds: float) -> None:
        self.per_minute, self.fixed, self.seconds = per_minute, fixed, seconds
        self.capacity = self.level = max(1.0, per_minute * seconds / 60)
        self.at = time.monotonic()

    def fill(self) -> None:
        """Bring the level up to now."""
        now = time.monotonic()
        if self.fixed:
            windows = (now - self.at) // self.seconds
            self.at += windows * self.seconds
            self.level = self.capacity if windows else self.level
        else:
            self.level, self.at = min(self.capacity, self.level + (now - self.at) * self.per_minute / 60), now

    def wait(self, amount: float) -> float:
        """Seconds until so much may be taken off the level; 0.0 for now."""
        self.fill()
        lacking = min(amount, self.capacity) - self.level
        if lacking <= 0:
            return 0.0
        return self.at + self.seconds - time.monotonic() if self.fixed else lacking * 60 / self.per_minute

    def headers(self, name: str) -> dict[str, str]:
        """As OpenAI tells a limit."""
        full = self.at + self.seconds - time.monotonic() if self.fixed else self.wait(self.capacity)
        texts = {"limit": f"{self.per_minute:.0f}", "remaining": f"{max(0.0, self.level):.0f}", "reset": f"{full:.3f}s"}
        return {f"x-ratelimit-{what}-{name}": text for what, text in texts.items()}


class Limits:
    """The limits of a server; 0 a minute is none."""

    def __init__(self, rpm: float, tpm: float, fixed: bool, seconds: float) -> None:
        told = {"requests": rpm, "tokens": tpm}
        self.limits = {name: Limit(per_minute, fixed, seconds) for name, per_minute in told.items() if per_minute}

    def take(self, tokens: int) -> float:
        """Count a request against all limits, or say in how many seconds all of them will let it pass."""
        amounts = {"requests": 1, "tokens": tokens}
        wait = max((limit.wait(amounts[name]) for name, limit in self.limits.items()), default=0.0)
        if wait <= 0.0:
            for name, limit in self.limits.items():
                limit.level -= amounts[name]
        return wait

    def headers(self) -> dict[str, str]:
        """The limits and what is left of them."""
        return {name: text for what, limit in self.limits.items() for name, text in limit.headers(what).items()}
