"""Numbers as the pages and the terminal print them: − for minus, – for what is missing."""

from __future__ import annotations

__all__ = ["count", "dec", "percent", "signed", "some"]


def count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def dec(value: float | None, places: int = 4) -> str:
    """No sign where it rounds to zero."""
    return "–" if value is None else f"{value:z,.{places}f}".replace("-", "−")


def signed(value: float | None, places: int = 4) -> str:
    """With + or −; no sign where it rounds to zero."""
    if value is None:
        return "–"
    text = f"{value:+.{places}f}"
    return text.replace("-", "−") if float(text) else text[1:]


def percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"


def some(n: int, what: str) -> str:
    """1 pair, 2 pairs."""
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"
