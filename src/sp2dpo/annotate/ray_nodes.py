"""What runs on the nodes of a Ray cluster for `on_ray`: the feed beside the driver, and the workers that post.

It is imported there, so sp2dpo of the same version must be installed on every node. Ray itself is not imported before
it is needed, so that this file can be read without it.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any, Final

import pyarrow as pa

from sp2dpo import __version__
from sp2dpo.llm import Raw
from sp2dpo.llm.http import Endpoint

__all__ = ["LONGEST_PAUSE_S", "LOOK_S", "Ask", "Feed", "look_from_here", "pull"]

LOOK_S: Final = 30.0
"""Seconds in which the server must answer, if a node is to take part."""

LONGEST_PAUSE_S: Final = 30.0
"""Seconds for which a place waits at most after a call that reached nobody."""

_LOST: Final = Raw(failure="connection", error="the Ray worker was lost before it brought the answer")
_PULL: Final = -1


def look_from_here(base_url: str, key_env: str | None, has_key: bool) -> tuple[str, str | None]:
    """Run on a node: its version of sp2dpo, and why no call could be made from it."""

    async def look() -> Raw:
        endpoint = Endpoint(base_url, None, LOOK_S)
        try:
            return await endpoint.get("/models")
        finally:
            await endpoint.close()

    if key_env is not None and not has_key and not os.environ.get(key_env):
        return __version__, f"{key_env} is set neither here nor there"
    raw = asyncio.run(look())
    return __version__, f"{base_url} does not answer ({raw.error})" if raw.failure else None


def _exit_with(feed: Any) -> None:
    """End this process when the feed has ended: Ray may miss a worker that was just starting when it ended the rest."""
    import ray

    with suppress(ray.exceptions.RayError):
        ray.get(feed.last.remote())
    os._exit(1)


class Feed:
    """Actor beside the driver: hands out bundles, each once, the servers, and the key."""

    def __init__(self, servers: Mapping[str, str]) -> None:
        self._servers = servers
        self._seats: dict[str, str] = {}
        self._workers: list[Any] = []
        self._key: str | None = None
        self._told = asyncio.Event()
        self._bundles: asyncio.Queue[tuple[int | None, str]] = asyncio.Queue()
        self._begun: set[int] = set()

    async def hold(self, key: str | None) -> None:
        """The key; as a message, because the cluster keeps the arguments of a constructor."""
        self._key = key
        self._told.set()

    async def give(self, number: int | None, requests: str) -> None:
        self._bundles.put_nowait((number, requests))

    async def take(self) -> tuple[int | None, str]:
        return await self._bundles.get()

    async def begin(self, number: int) -> bool:
        """False if it was begun before."""
        first = number not in self._begun
        self._begun.add(number)
        return first

    async def seat(self, worker: Any, name: str, node: str) -> tuple[str, str | None]:
        """The server that a worker asks, and the key: the server of its node, unless another worker has that."""
        await self._told.wait()
        if name not in self._seats:
            free = [one for one in self._servers if one not in self._seats.values()] or list(self._servers)
            self._seats[name] = node if node in free else free[0]
            self._workers.append(worker)
        return self._servers[self._seats[name]], self._key

    async def last(self) -> None:
        """Returns never: who waits for this learns when the feed ends."""
        await asyncio.Event().wait()

    async def workers(self) -> list[Any]:
        """Handles of all workers that took a seat."""
        return self._workers


def pull(_: Any, feed: Any) -> Iterator[pa.Table]:
    """The rows of the data set, as they are given; a second run of this would lose some, so there is none."""
    import ray

    if not ray.get(feed.begin.remote(_PULL)):
        raise RuntimeError("the worker that reads the requests was lost")
    while True:
        number, requests = ray.get(feed.take.remote())
        if number is None:
            return
        yield pa.table({"number": [number], "requests": [requests]})


class Ask:
    """Worker: posts the requests of a bundle, in order, so many at once. It ends with the feed, whatever it does."""

    def __init__(self, feed: Any, timeout: float, key_env: str | None, concurrency: int) -> None:
        import ray

        threading.Thread(target=_exit_with, args=(feed,), daemon=True).start()
        me = ray.get_runtime_context()
        base_url, key = ray.get(feed.seat.remote(me.current_actor, me.get_actor_id(), me.get_node_id()))
        self._endpoint = Endpoint(base_url, os.environ.get(key_env or "", "").strip() or key, timeout)
        self._feed = feed
        self._slots = asyncio.Semaphore(concurrency)
        self._silent = 0

    async def __call__(self, row: pa.Table) -> pa.Table:
        [fields] = row.to_pylist()
        bundle, number = json.loads(fields["requests"]), fields["number"]
        if await self._feed.begin.remote(number):
            raws = await asyncio.gather(*(self._post(path, body) for path, body in bundle))
        else:
            raws = [_LOST] * len(bundle)
        return pa.table({"number": [number], "raws": [json.dumps([asdict(raw) for raw in raws])]})

    async def _post(self, path: str, body: Mapping[str, Any]) -> Raw:
        """One call; where it reaches nobody, its place waits: a dead server must not eat the work of the others."""
        async with self._slots:
            raw = await self._endpoint.post(path, body)
            self._silent = self._silent + 1 if raw.failure == "connection" else 0
            if self._silent:
                await asyncio.sleep(min(self._silent - 1, LONGEST_PAUSE_S))
            return raw
