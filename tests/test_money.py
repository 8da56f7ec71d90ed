"""The hard cap on spending, and the most that a call can cost."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sp2dpo.annotate.money import FRAMING_TOKENS, Budget, BudgetReached, most_tokens, worst_case_usd
from sp2dpo.errors import Unfinished

T = TypeVar("T")

usd = st.floats(0, 2, allow_subnormal=False)


@dataclass(frozen=True)
class Price:
    input: float
    output: float


@dataclass(frozen=True)
class Sent:
    """A call of a test: its bound, the share of it that it costs (None: nobody knows), and how long it takes."""

    bound: float
    share: float | None
    turns: int

    @property
    def cost(self) -> float | None:
        return None if self.share is None else self.share * self.bound


def at_once(work: Awaitable[T]) -> T:
    """The result of something that must not wait for ever."""

    async def within() -> T:
        return await asyncio.wait_for(work, 2)

    return asyncio.run(within())


sent = st.builds(Sent, usd, st.none() | st.floats(0, 1), st.integers(0, 5))


async def send_all(budget: Budget, calls: list[Sent], workers: int) -> list[Sent]:
    """Send calls as the engine does, so many at a time; those that went out."""
    waiting, out = list(reversed(calls)), list[Sent]()

    async def work() -> None:
        while waiting:
            call = waiting.pop()
            try:
                reserved = await budget.reserve(call.bound)
            except BudgetReached:
                continue
            out.append(call)
            for _ in range(call.turns):
                await asyncio.sleep(0)
            budget.settle(reserved, call.cost)

    await asyncio.gather(*(work() for _ in range(workers)))
    return out


@given(usd, usd, st.lists(sent, max_size=30), st.integers(1, 8))
@example(1e-13, 0.0, [Sent(5e-13, 1.0, 0)], 1)
@example(0.3, 0.0, [Sent(0.1, 1.0, 0)] * 4, 4)
@example(1.0, 0.9, [Sent(0.1, None, 3)] * 3, 3)
def test_what_calls_cost_never_exceeds_the_cap_whatever_their_order(
    cap: float, before: float, calls: list[Sent], workers: int
) -> None:
    budget = Budget(cap, before)
    out = at_once(send_all(budget, calls, workers))
    cost = sum((Fraction(c.bound if c.cost is None else c.cost) for c in out), Fraction(before))
    assert not out or cost <= Fraction(cap)
    assert budget.spent_usd == pytest.approx(float(cost), abs=1e-9)


@given(usd, st.lists(sent, max_size=30), st.integers(1, 8))
def test_a_call_that_did_not_go_out_would_not_have_fitted(cap: float, calls: list[Sent], workers: int) -> None:
    budget = Budget(cap)
    out = at_once(send_all(budget, calls, workers))
    left_out = min((c.bound for c in calls if c not in out), default=math.inf)
    assert budget.spent_usd + left_out > cap - 1e-9


@given(st.lists(sent, max_size=30), st.integers(1, 8))
def test_the_mark_is_the_most_that_calls_in_flight_could_cost(calls: list[Sent], workers: int) -> None:
    budget = Budget()
    at_once(send_all(budget, calls, workers))
    assert budget.high_water_usd >= max((c.bound for c in calls), default=0.0)
    assert budget.high_water_usd <= sum(sorted((c.bound for c in calls), reverse=True)[:workers]) + 1e-9


def test_a_known_cost_replaces_what_was_set_aside() -> None:
    budget = Budget(1.0)
    budget.settle(at_once(budget.reserve(0.9)), 0.25)
    assert budget.spent_usd == 0.25
    assert at_once(budget.reserve(0.75)) == 0.75


def test_an_unknown_cost_counts_as_the_whole_bound() -> None:
    budget = Budget(1.0)
    budget.settle(at_once(budget.reserve(0.75)), None)
    assert budget.spent_usd == 0.75
    with pytest.raises(BudgetReached):
        at_once(budget.reserve(0.5))


def test_a_call_that_was_not_billed_frees_all_of_it() -> None:
    budget = Budget(1.0)
    budget.settle(at_once(budget.reserve(1.0)), 0.0)
    assert budget.spent_usd == 0
    assert at_once(budget.reserve(1.0)) == 1.0


def test_a_call_that_does_not_fit_waits_for_one_in_flight() -> None:
    async def two() -> bool:
        budget = Budget(1.0)
        first = await budget.reserve(0.75)
        second = asyncio.create_task(budget.reserve(0.75))
        await asyncio.sleep(0)
        waited = not second.done()
        budget.settle(first, 0.125)
        await second
        return waited

    assert asyncio.run(asyncio.wait_for(two(), 5))


def test_a_call_that_cannot_fit_whatever_calls_in_flight_cost_is_refused_at_once() -> None:
    async def second() -> None:
        budget = Budget(1.0, spent_usd=0.5)
        await budget.reserve(0.25)
        await budget.reserve(0.75)

    with pytest.raises(
        BudgetReached, match=r"\$1 is reached: \$0\.5000 is spent, \$0\.2500 set aside.*\$0\.750000;.*--budget-usd"
    ):
        at_once(second())


def test_a_call_that_gives_up_waiting_holds_nothing_and_keeps_nobody_back() -> None:
    async def three() -> float:
        budget = Budget(1.0)
        first = await budget.reserve(0.75)
        second = asyncio.create_task(budget.reserve(0.75))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        budget.settle(first, 0.0)
        return await budget.reserve(1.0)

    assert asyncio.run(asyncio.wait_for(three(), 5)) == 1.0


def test_a_batch_sets_aside_without_waiting_and_without_a_mark() -> None:
    budget = Budget(1.0)
    budget.reserve_now(0.75)
    with pytest.raises(BudgetReached):
        budget.reserve_now(0.5)
    budget.settle(0.75, 0.25)
    budget.reserve_now(0.5)
    assert budget.high_water_usd == 0


def test_a_call_that_costs_more_than_its_bound_is_counted_in_full() -> None:
    budget = Budget(1.0)
    budget.settle(at_once(budget.reserve(0.25)), 0.75)
    assert budget.spent_usd == 0.75
    with pytest.raises(BudgetReached):
        at_once(budget.reserve(0.5))


def test_without_a_cap_nothing_is_refused_and_all_is_counted() -> None:
    budget = Budget()
    budget.settle(at_once(budget.reserve(1e6)), 5e5)
    assert not budget.capped
    assert budget.spent_usd == 5e5


def test_a_reached_budget_leaves_the_run_unfinished_rather_than_wrong() -> None:
    assert issubclass(BudgetReached, Unfinished)
    assert BudgetReached.exit_code == 1


# The worst case -------------------------------------------------------------------------------------------------------


def test_the_worst_case_worked_out_by_hand() -> None:
    """(5,000 + 512 tokens in)·0.25 + 64 out·2.00, per million."""
    assert FRAMING_TOKENS == 512
    assert worst_case_usd(Price(0.25, 2.00), 5000, 64) == pytest.approx((5512 * 0.25 + 64 * 2.00) / 1e6)


def test_a_text_has_at_most_one_token_for_each_of_its_bytes() -> None:
    assert most_tokens("judge") == 5
    assert most_tokens("größer") == 8
    assert most_tokens("") == 0


@pytest.mark.parametrize(("text", "tokens"), [("\ufdfa", 33), ("\U0001d160", 12), ("e\u0301", 3)])
def test_a_text_that_grows_when_it_is_normalised_counts_at_its_longest(text: str, tokens: int) -> None:
    """U+FDFA is 18 letters in NFKC; U+1D160 is three code points in NFC; a composed é is shorter."""
    assert most_tokens(text) == tokens


@given(st.text(st.characters(codec="utf-8")))
def test_no_text_can_have_fewer_tokens_at_most_than_bytes(text: str) -> None:
    assert most_tokens(text) >= len(text.encode())


def test_half_of_a_surrogate_pair_has_a_worst_case_too() -> None:
    assert most_tokens("\ud83d") >= 3
