"""A hard cap on spending: the worst case of a call is set aside before it is sent, its cost is counted afterwards.

Knows amounts, not what they pay for. Amounts are counted in whole 10⁻¹² USD, costs rounded up and the cap down, so that
no sum of rounding errors passes the cap.
"""

from __future__ import annotations

import asyncio
import math
import unicodedata
from fractions import Fraction
from typing import Final

from sp2dpo.cost import PricePerMillion, cost_usd
from sp2dpo.errors import Unfinished

__all__ = ["FRAMING_TOKENS", "Budget", "BudgetReached", "most_tokens", "worst_case_usd"]

UNITS_PER_USD: Final = 10**12

FRAMING_TOKENS: Final = 512
"""Input tokens of a call beyond its messages, at most: the chat template around two messages, a default system prompt
that the template brings, and the JSON schema of the answer as the provider words it."""


class BudgetReached(Unfinished):
    """The next call might cost more than is left."""


class Budget:
    """What was spent and what calls in flight may still cost never exceed the cap.

    If no call costs more than its bound, what all calls cost together stays within the cap, whatever the order in which
    they end. One that does cost more is counted in full, and the next ones find less.

    Args:
        cap_usd: None for no cap.
        spent_usd: what was spent before, of which the cap is the limit too.
    """

    def __init__(self, cap_usd: float | None = None, spent_usd: float = 0.0) -> None:
        self._cap = None if cap_usd is None else math.floor(_units(cap_usd))
        self._spent = math.ceil(_units(spent_usd))
        self._reserved = self._highest = 0
        self._turn = asyncio.Lock()
        self._settled = asyncio.Event()

    @property
    def capped(self) -> bool:
        """Whether there is a cap."""
        return self._cap is not None

    @property
    def spent_usd(self) -> float:
        """What settled calls cost, with what was spent before."""
        return self._spent / UNITS_PER_USD

    @property
    def high_water_usd(self) -> float:
        """The most that was set aside at one time: what calls in flight may have cost if the process is killed."""
        return self._highest / UNITS_PER_USD

    async def reserve(self, bound_usd: float) -> float:
        """Set the most that a call can cost aside, and return that amount for `settle`.

        Calls are served in the order in which they ask. One that does not fit now waits for calls in flight, which may
        cost less than their bounds.

        Raises:
            BudgetReached: it cannot fit any more; nothing is set aside.
        """
        bound = math.ceil(_units(bound_usd))
        async with self._turn:
            while not self._fits(bound + self._reserved):
                if not self._fits(bound):
                    raise BudgetReached(self._reached(bound))
                self._settled.clear()
                await self._settled.wait()
            self._reserved += bound
            self._highest = max(self._highest, self._reserved)
        return bound_usd

    def reserve_now(self, bound_usd: float) -> None:
        """The same without waiting, for calls of a batch job: the ledger knows of it, so that no mark is needed.

        Raises:
            BudgetReached: it does not fit beside what is set aside.
        """
        bound = math.ceil(_units(bound_usd))
        if not self._fits(bound + self._reserved):
            raise BudgetReached(self._reached(bound))
        self._reserved += bound

    def settle(self, reserved_usd: float, cost_usd: float | None) -> None:
        """The call that `reserved_usd` was set aside for has ended.

        Args:
            cost_usd: what it cost; 0 if it was surely not billed; None if nobody knows but it may have been billed, as
                after a timeout: then its bound counts as spent.
        """
        bound = math.ceil(_units(reserved_usd))
        self._reserved -= bound
        self._spent += bound if cost_usd is None else math.ceil(_units(cost_usd))
        self._settled.set()

    def _fits(self, more: int) -> bool:
        return self._cap is None or self._spent + more <= self._cap

    def _reached(self, bound: int) -> str:
        cap, spent = (self._cap or 0) / UNITS_PER_USD, self.spent_usd
        aside = f", ${self._reserved / UNITS_PER_USD:,.4f} set aside for calls under way" if self._reserved else ""
        return (
            f"the budget of ${cap:,g} is reached: ${spent:,.4f} is spent{aside}, and the next call may cost up to"
            f" ${bound / UNITS_PER_USD:,.6f}; a larger --budget-usd goes on"
        )


def _units(usd: float) -> Fraction:
    return Fraction(usd) * UNITS_PER_USD


def most_tokens(text: str) -> int:
    """The most tokens that a text can have: its length in UTF-8 bytes.

    A token of a byte-level BPE, or of SentencePiece with byte fallback, stands for at least one byte of the text that
    the tokenizer sees. Some bring the text to NFC or NFKC first, which can make it longer; the longest form counts.
    """
    if text.isascii():
        return len(text)
    forms = (text, unicodedata.normalize("NFC", text), unicodedata.normalize("NFKC", text))
    return max(len(form.encode("utf-8", "backslashreplace")) for form in forms)


def worst_case_usd(price: PricePerMillion, messages_bytes: int, cap_tokens: int) -> float:
    """USD that a call can cost at most.

    A byte-level tokenizer makes at most one token of a byte (`most_tokens`), and `FRAMING_TOKENS` covers what the
    provider adds. This is about four times what English text costs.

    Args:
        messages_bytes: UTF-8 bytes of the messages, as `most_tokens` counts them.
        cap_tokens: the most output tokens that can be billed; hidden reasoning too, or there is no worst case.
    """
    worst = cost_usd(price, messages_bytes + FRAMING_TOKENS, cap_tokens)
    assert worst is not None
    return worst
