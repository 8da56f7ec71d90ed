"""The pace against simulated servers, in simulated time: how much of a limit is used, and how many 429s that costs."""

from __future__ import annotations

import asyncio
import math
import random
import selectors
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest

from sp2dpo.annotate.pace import CATCH_UP_S, CLOSE, Pace
from sp2dpo.llm import Limits

T = TypeVar("T")


# Simulated time -------------------------------------------------------------------------------------------------------


class _NoWaiting(selectors.SelectSelector):
    """Instead of waiting it moves the clock."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "nothing will ever happen"
        self.now += max(0.0, timeout)
        return []


class SimulatedLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes at once."""

    def __init__(self) -> None:
        self.selector = _NoWaiting()
        super().__init__(self.selector)

    def time(self) -> float:
        return self.selector.now


def now() -> float:
    return asyncio.get_running_loop().time()


def simulated(work: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        return runner.run(work)


def pace(rpm: float | None = None, tpm: float | None = None) -> Pace:
    return Pace(rpm, tpm, clock=now)


# Simulated servers: seconds until a call of that size would be accepted, 0 if it is -----------------------------------

Server = Callable[[float, float], float]


def token_bucket(limit: float, capacity: float, *, full: bool = True) -> Server:
    level, at = capacity if full else 0.0, 0.0

    def serve(when: float, size: float) -> float:
        nonlocal level, at
        level, at = min(capacity, level + (when - at) * limit / 60), when
        if level + 1e-9 < size:
            return (size - level) * 60 / limit
        level -= size
        return 0.0

    return serve


def fixed_window(limit: float, *, phase: float = 37.0, used: float = 0.0) -> Server:
    window = phase // 60

    def serve(when: float, size: float) -> float:
        nonlocal window, used
        this, into = divmod(when + phase, 60)
        if this != window:
            window, used = this, 0.0
        if used + size > limit:
            return 60 - into
        used += size
        return 0.0

    return serve


def sliding_window(limit: float) -> Server:
    held = deque[tuple[float, float]]()
    used = 0.0

    def serve(when: float, size: float) -> float:
        nonlocal used
        while held and held[0][0] <= when - 60:
            used -= held.popleft()[1]
        if used + size > limit:
            too_much = used + size - limit
            return next((at + 60 - when for at, gone in _sums(held) if gone >= too_much), 60.0)
        held.append((when, size))
        used += size
        return 0.0

    return serve


def _sums(held: deque[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    gone = 0.0
    for at, size in held:
        gone += size
        yield at, gone


SERVERS: dict[str, Callable[[float], Server]] = {
    "bucket of 1 s": lambda limit: token_bucket(limit, max(10, limit / 60)),
    "bucket of 10 s": lambda limit: token_bucket(limit, limit / 6),
    "bucket of a minute": lambda limit: token_bucket(limit, limit),
    "fixed window": fixed_window,
    "sliding window": sliding_window,
}


# Simulated clients ----------------------------------------------------------------------------------------------------


def no_answer(wait: float) -> None:
    """A 429 that does not say how long to wait."""


def exactly(wait: float) -> float:
    return wait


def whole_seconds(wait: float) -> float:
    return float(math.ceil(wait))


@dataclass
class Client:
    """So many calls in flight over a line whose `latency` varies by a share of `jitter`; a 429 is back within 0.1 s."""

    pace: Pace
    server: Server
    concurrency: int = 32
    latency: float = 0.3
    jitter: float = 0.5
    headers: Limits | None = None
    retry_after: Callable[[float], float | None] = no_answer
    size: Callable[[random.Random], float] = lambda _: 1.0
    late: float = 0.0
    accepted: list[tuple[float, float]] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    random: random.Random = field(default_factory=lambda: random.Random(20))

    async def work(self, until: float) -> None:
        """The first call goes alone, then all at once."""
        await self._call()
        await asyncio.gather(*(self._calls(until) for _ in range(self.concurrency)))

    async def _calls(self, until: float) -> None:
        while now() < until:
            await self._call()

    async def _call(self) -> None:
        size = self.size(self.random)
        sent_at = await self.pace.acquire(size)
        if self.late:
            await asyncio.sleep(self.random.uniform(0, self.late))
        line = self.latency * self.random.uniform(1 - self.jitter, 1 + self.jitter) / 2
        way = min(line, 0.05)
        await asyncio.sleep(way)
        wait = self.server(now(), size)
        (self.refused if wait else self.accepted).append(now() if wait else (now(), size))  # type: ignore[arg-type]
        await asyncio.sleep(way if wait else 2 * line - way)
        if self.headers is not None:
            self.pace.learn(self.headers)
        if wait:
            self.pace.limited(self.retry_after(wait), sent_at)

    def share(self, limit: float, start: float, end: float) -> float:
        """Of a limit a minute, how much was used."""
        return sum(size for at, size in self.accepted if start <= at < end) / (limit / 60 * (end - start))

    def refused_after(self, start: float) -> int:
        return sum(at >= start for at in self.refused)


def run(client: Client, seconds: float) -> Client:
    simulated(client.work(seconds))
    return client


SECONDS = {60: 1200.0, 500: 600.0, 5000: 130.0, 30000: 70.0}
CLIENTS = {60: (8, 2.0), 500: (64, 2.0), 5000: (256, 0.6), 30000: (128, 0.05)}
"""Calls in flight and seconds that a call takes, enough to meet the limit."""


# A limit that is known ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", SECONDS)
@pytest.mark.parametrize("server", SERVERS)
def test_a_told_limit_is_used_to_98_percent_without_a_429(limit: int, server: str) -> None:
    concurrency, latency = CLIENTS[limit]
    client = run(Client(pace(limit), SERVERS[server](limit), concurrency, latency), SECONDS[limit])
    assert client.share(limit, 30, SECONDS[limit]) >= 0.98
    assert client.refused == []


@pytest.mark.parametrize("limit", [60, 5000])
@pytest.mark.parametrize("server", SERVERS)
def test_a_limit_read_from_the_first_response_is_used_as_well(limit: int, server: str) -> None:
    headers = Limits(requests=limit, tokens=1e9)
    client = run(Client(pace(), SERVERS[server](limit), 64, 0.6, headers=headers), SECONDS[limit])
    assert client.share(limit, 30, SECONDS[limit]) >= 0.98
    assert client.refused == []


@pytest.mark.parametrize("limit", [60, 500, 5000])
def test_a_bucket_that_holds_a_single_call_is_used_as_well_if_the_line_is_even(limit: int) -> None:
    client = run(Client(pace(limit), token_bucket(limit, 1), 64, 0.6, jitter=0), SECONDS[limit])
    assert client.share(limit, 30, SECONDS[limit]) >= 0.98
    assert client.refused == []


def test_lateness_is_made_up_for() -> None:
    client = run(Client(pace(6000), token_bucket(6000, 100), 128, late=CATCH_UP_S), 120)
    assert client.share(6000, 10, 120) >= 0.98
    assert client.refused == []


def sizes(mean: float) -> Callable[[random.Random], float]:
    return lambda rng: mean * min(8.0, 0.3 + rng.lognormvariate(-0.7, 0.8))


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("server", ["bucket of 10 s", "bucket of a minute", "fixed window", "sliding window"])
def test_a_limit_on_tokens_is_used_with_calls_of_any_size(server: str, told: bool) -> None:
    """No call is larger than 1 % of the limit: a window has no room at its end for a call larger than what is left."""
    headers = None if told else Limits(tokens=1_000_000)
    client = Client(pace(tpm=1_000_000) if told else pace(), SERVERS[server](1_000_000), headers=headers)
    client.size = sizes(1000)
    run(client, 420)
    assert client.share(1_000_000, 60, 420) >= 0.98
    assert client.refused_after(60) <= 1


@pytest.mark.parametrize(("rpm", "tpm", "used"), [(500, 1e9, 500), (1e6, 500_000, 500), (500, 600_000, 490)])
def test_of_two_limits_the_one_that_is_met_first_holds(rpm: float, tpm: float, used: float) -> None:
    requests, tokens = token_bucket(rpm, rpm / 6), token_bucket(tpm, tpm / 6)
    client = Client(pace(rpm, tpm), lambda when, size: requests(when, 1) or tokens(when, size), size=sizes(1000))
    run(client, 300)
    mean = sum(size for _, size in client.accepted) / len(client.accepted)
    calls_a_minute = len(client.accepted) / 5
    assert calls_a_minute >= 0.97 * min(rpm, tpm / mean)
    assert client.refused == []


def test_a_told_limit_is_never_exceeded_even_if_headers_allow_more() -> None:
    client = run(Client(pace(600), token_bucket(6000, 6000), headers=Limits(requests=6000)), 120)
    assert client.share(600, 0, 120) <= 1.0


def test_a_lower_limit_in_the_headers_holds_and_is_followed_when_it_changes() -> None:
    client = Client(pace(600), token_bucket(6000, 6000), headers=Limits(requests=60))
    run(client, 120)
    assert client.share(60, 0, 120) == pytest.approx(CLOSE, abs=0.02)

    async def two() -> list[float]:
        paced = pace(600)
        paced.learn(Limits(requests=60))
        times = [await paced.acquire(), await paced.acquire()]
        paced.learn(Limits(requests=0, tokens=None))
        paced.learn(Limits(requests=300))
        return [*times, await paced.acquire(), await paced.acquire()]

    assert simulated(two()) == pytest.approx([0, 1 / CLOSE, 2 / CLOSE, 2.2 / CLOSE])


def test_a_window_that_someone_else_has_half_used_costs_one_429_and_not_the_rate() -> None:
    server = fixed_window(600, phase=0, used=300)
    client = run(Client(pace(600), server, retry_after=whole_seconds), 600)
    assert len(client.refused) == 1
    assert client.share(600, 60, 600) >= 0.97


# A limit that nobody names --------------------------------------------------------------------------------------------

LEARNING = 600.0
"""Seconds until a limit is found from 429s; less where they say how long to wait."""


@pytest.mark.parametrize("retry_after", [no_answer, exactly, whole_seconds])
@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("limit", [60, 300, 1200, pytest.param(5000, marks=pytest.mark.slow)])
def test_a_limit_found_from_429s_is_used_to_98_percent_with_hardly_a_429(
    limit: int, server: str, retry_after: Callable[[float], float | None]
) -> None:
    client = run(Client(pace(), SERVERS[server](limit), 32, 0.3, retry_after=retry_after), 2 * LEARNING)
    assert client.share(limit, LEARNING, 2 * LEARNING) >= 0.98
    few = 12 if retry_after is no_answer else 4
    assert client.refused_after(LEARNING) <= max(few, 0.001 * limit / 60 * LEARNING)
    assert len(client.refused) <= 32 + max(100, 0.01 * len(client.accepted))


@pytest.mark.parametrize(("limit", "capacity", "learning"), [(60, 1, 1200), (500, 1, 1200), (2000, 10, 600)])
def test_a_small_bucket_is_found_too_but_takes_longer(limit: int, capacity: int, learning: float) -> None:
    client = Client(pace(), token_bucket(limit, capacity), 32, 0.3, jitter=0)
    run(client, learning + 600)
    assert client.share(limit, learning, learning + 600) >= 0.97
    assert client.refused_after(learning) <= 4


@pytest.mark.parametrize(("concurrency", "latency"), [(8, 0.05), (64, 2.0), (256, 0.05), (256, 2.0)])
@pytest.mark.parametrize("server", ["bucket of 1 s", "fixed window"])
def test_many_calls_in_flight_meet_hardly_more_429s_than_the_first_time(
    concurrency: int, latency: float, server: str
) -> None:
    client = Client(pace(), SERVERS[server](500), concurrency, latency, retry_after=whole_seconds)
    run(client, 1200)
    assert client.share(500, 600, 1200) >= 0.98
    assert client.refused_after(600) <= 4
    assert len(client.refused) <= concurrency + 30


def test_a_limit_on_tokens_that_nobody_names_is_found_as_the_calls_that_it_lets_through() -> None:
    client = Client(pace(), token_bucket(1_000_000, 1_000_000), size=sizes(1000), retry_after=whole_seconds)
    run(client, 1200)
    assert client.share(1_000_000, 600, 1200) >= 0.9
    assert client.refused_after(600) <= 0.01 * len(client.accepted)


@pytest.mark.parametrize("server", ["bucket of 1 s", "bucket of a minute", "fixed window"])
def test_headers_that_name_another_limit_than_the_one_that_holds_are_not_believed_for_long(server: str) -> None:
    """Some providers give the requests of a day under this name."""
    client = run(Client(pace(), SERVERS[server](500), headers=Limits(requests=10_000)), 1200)
    assert client.share(500, 600, 1200) >= 0.98
    assert client.refused_after(600) <= 10


def changed(at: float, before: Server, after: Server) -> Server:
    return lambda when, size: (before if when < at else after)(when, size)


def test_half_the_limit_is_found_within_minutes() -> None:
    server = changed(600, token_bucket(600, 100), token_bucket(300, 50, full=False))
    client = run(Client(pace(), server, retry_after=whole_seconds), 1500)
    assert client.share(300, 900, 1500) >= 0.98
    assert client.refused_after(600) <= 60


def test_twice_the_limit_is_found_in_time() -> None:
    server = changed(600, token_bucket(120, 20), token_bucket(240, 40))
    client = run(Client(pace(), server, retry_after=whole_seconds), 4200)
    assert client.share(240, 3000, 4200) >= 0.9
    assert client.refused_after(600) <= 60


# What a 429 does ------------------------------------------------------------------------------------------------------


def test_without_a_limit_nothing_waits() -> None:
    async def many() -> float:
        paced = pace()
        await asyncio.gather(*(paced.acquire(1e6) for _ in range(1000)))
        assert paced.waiting is None
        assert not paced.counts_tokens
        return now()

    assert simulated(many()) == 0


def test_after_a_429_all_wait_as_long_as_it_asks() -> None:
    async def all_after() -> list[float]:
        paced = pace()
        sent_at = await paced.acquire()
        await asyncio.sleep(1)
        paced.limited(20.0, sent_at)
        assert paced.waiting == "waiting 20 s for the rate limit"
        return await asyncio.gather(*(paced.acquire() for _ in range(5)))

    assert min(simulated(all_after())) == 21


def test_a_longer_wait_is_taken_from_an_older_429_and_reaches_those_who_wait_already() -> None:
    async def last() -> float:
        paced = pace()
        old = await paced.acquire()
        for _ in range(2):
            new = await paced.acquire()
            paced.limited(5.0, new)
        waiting = asyncio.create_task(paced.acquire())
        await asyncio.sleep(1)
        paced.limited(30.0, old)
        return await waiting

    assert simulated(last()) == 5 + 1 + 30


def test_a_429_of_a_call_sent_before_the_last_adjustment_does_not_lower_the_rate_again() -> None:
    async def times(old_429s: int) -> list[float]:
        paced = pace(600)
        old = [await paced.acquire() for _ in range(40)]
        for _ in range(2):
            sent_at = await paced.acquire()
            await asyncio.sleep(0.1)
            paced.limited(None, sent_at)
        for sent_at in old[:old_429s]:
            paced.limited(None, sent_at)
        return [await paced.acquire() for _ in range(20)]

    assert simulated(times(40)) == simulated(times(0))


def test_pauses_grow_while_429s_follow_each_other_closely() -> None:
    """A window that is full up to the last call frees its places one by one."""

    async def pauses() -> list[float]:
        paced, found = pace(600), list[float]()
        for _ in range(3):
            for _ in range(5):
                sent_at = await paced.acquire()
            await asyncio.sleep(0.05)
            at = now()
            paced.limited(0.01, sent_at)
            found.append(await paced.acquire() - at)
        return found

    assert simulated(pauses()) == pytest.approx([0.25, 0.5, 1.0])


def test_a_rate_that_is_not_used_neither_rises_nor_falls() -> None:
    client = Client(pace(), token_bucket(600, 100))

    async def busy_quiet_busy() -> float:
        await client.work(600)
        while now() < 4200:
            await asyncio.sleep(5)
            await client._call()
        again = now()
        await client.work(again + 900)
        return again

    again = simulated(busy_quiet_busy())
    assert client.share(600, again + 10, again + 900) >= 0.98
    assert client.refused_after(600) <= 8


def test_a_server_that_accepts_nothing_is_asked_less_and_less_for_as_long_as_it_takes() -> None:
    day = 24 * 3600
    client = run(Client(pace(), lambda when, size: 1.0, concurrency=8), day)
    pauses = [later - sooner for sooner, later in zip(client.refused, client.refused[1:], strict=False)]
    assert client.accepted == []
    assert sum(at < 600 for at in client.refused) <= 40
    assert all(32 <= pause < 33 for pause in pauses[40:-8])


def test_a_server_that_comes_back_is_used_again_within_minutes() -> None:
    inner = token_bucket(600, 100)
    client = run(Client(pace(), lambda when, size: 1.0 if 300 <= when < 600 else inner(when, size)), 1200)
    assert client.share(600, 660, 1200) >= 0.9


# The schedule ---------------------------------------------------------------------------------------------------------


def test_calls_go_out_in_the_order_in_which_they_ask_and_evenly() -> None:
    async def order() -> list[tuple[int, float]]:
        paced, went = pace(60), list[tuple[int, float]]()

        async def call(number: int) -> None:
            went.append((number, await paced.acquire()))

        await asyncio.gather(*(call(number) for number in range(10)))
        return went

    assert simulated(order()) == [(n, pytest.approx(n / CLOSE)) for n in range(10)]


def test_a_call_that_gives_up_waiting_takes_nothing() -> None:
    async def second() -> float:
        paced = pace(60)
        await paced.acquire()
        waiting = asyncio.create_task(paced.acquire())
        await asyncio.sleep(0.1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        return await paced.acquire()

    assert simulated(second()) == pytest.approx(1 / CLOSE)


@pytest.mark.parametrize(("used", "next_at"), [(1000, 1.0), (500, 0.5), (2000, 2.0)])
def test_tokens_that_were_not_used_are_given_back_and_others_are_made_up_for(used: float, next_at: float) -> None:
    async def second() -> float:
        paced = pace(tpm=60_000)
        await paced.acquire(1000)
        paced.settle(1000, used)
        return await paced.acquire(1000)

    assert simulated(second()) == pytest.approx(next_at / CLOSE)


def test_a_call_larger_than_the_limit_goes_out_and_the_next_one_waits_for_it() -> None:
    async def two() -> tuple[float, str | None, float]:
        paced = pace(tpm=6000)
        first = await paced.acquire(12_000)
        return first, paced.waiting, await paced.acquire(1)

    assert simulated(two()) == (0, "waiting 122 s for the rate limit", pytest.approx(120 / CLOSE))


def test_tokens_count_as_soon_as_a_limit_on_them_is_known() -> None:
    paced = pace(600)
    assert not paced.counts_tokens
    paced.learn(Limits(tokens=1000))
    assert paced.counts_tokens
    assert pace(tpm=1000).counts_tokens


def test_time_passes_by_the_clock_of_the_machine() -> None:
    async def fifty() -> float:
        paced, began = Pace(60_000), time.monotonic()
        for _ in range(50):
            await paced.acquire()
        return time.monotonic() - began

    assert asyncio.run(fifty()) >= 49 / 1000
