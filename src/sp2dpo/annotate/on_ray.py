"""Calls that workers on the nodes of a Ray cluster post, through Ray Data; to the engine an endpoint like any other.

    post ─▶ Feed ─▶ pull ─▶ Ask, as many as nodes ─▶ post returns
    driver  actor   Ray Data; a row is a bundle of requests

No request is posted twice behind the engine's back: a worker begins a bundle only if the feed knows of no earlier
beginning, so when Ray runs one again because a worker or a node was lost, its requests fail as connections that were
cut. This is the side of the driver; `ray_nodes` is what runs in the cluster. Knows nothing of the call log, of what an
answer means, or of asking again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import count
from typing import Any, Final, NamedTuple

from sp2dpo import __version__
from sp2dpo.annotate.ray_nodes import LONGEST_PAUSE_S, LOOK_S, Ask, Feed, look_from_here, pull
from sp2dpo.errors import MissingExtra, ProcessError
from sp2dpo.llm import Limits, Raw

__all__ = ["NODE", "RayEndpoint"]

NODE: Final = "{node}"
"""Stands in a `base_url` for the address of a node: each node has a server of its own there."""

AHEAD: Final = 2
"""Requests under way for each call in flight, so that none waits for Ray Data, which takes tenths of a second."""

BUNDLE: Final = 16
GATHER_S: Final = 0.02
KNOCK_S: Final = 5.0


class RayEndpoint:
    """An endpoint, or one on each node, that is asked from the nodes of the cluster.

    Args:
        base_url: as `http.Endpoint` takes it; `{node}` in it is the address of each node in turn.
        timeout: seconds for one exchange between a worker and the server.
        key_env: a worker takes the key from this variable on its node, if it is set there.
        key: else this one.
        concurrency: calls in flight from each worker.
        say: is told, a line each, which nodes take no part and why.

    Raises:
        MissingExtra: Ray is not installed.
        ProcessError: there is no cluster, or no node of it can take part.
    """

    def __init__(
        self,
        base_url: str,
        timeout: float,
        *,
        key_env: str | None,
        key: str | None,
        concurrency: int,
        say: Callable[[str], None],
    ) -> None:
        self.base_url = base_url
        self._timeout, self._concurrency, self._say = timeout, concurrency, say
        self._key_env, self._key = key_env, key
        self._ray = join_cluster()
        self._servers: Mapping[str, str] = self._look()
        self._pass: _Pass | None = None
        self._starting = asyncio.Lock()

    def __repr__(self) -> str:
        return f"RayEndpoint({self.base_url!r})"

    @property
    def under_way(self) -> int:
        """So many posts at once keep all workers busy."""
        return len(self._servers) * self._concurrency * AHEAD

    async def post(self, path: str, body: Mapping[str, Any]) -> Raw:
        """Have a worker send `body` as JSON."""
        try:
            running = await self._running()
        except ProcessError as error:
            return Raw(failure="connection", error=str(error), sent=False)
        patience = (AHEAD + 1) * (self._timeout + LONGEST_PAUSE_S)
        try:
            return await asyncio.wait_for(running.ask(path, body), patience)
        except TimeoutError:
            why = f"nothing came back through Ray within {patience:g} s"
            running.fail(why)
            return Raw(failure="timeout", error=why)

    async def close(self) -> None:
        """End the workers."""
        if self._pass is not None:
            await self._pass.close()
            self._pass = None

    async def _running(self) -> _Pass:
        """The pass that takes requests; a new one, over the nodes that are there now, if it broke."""
        async with self._starting:
            if self._pass is not None and self._pass.broken:
                await self.close()
                self._servers = await asyncio.to_thread(self._look)
            if self._pass is None:
                self._pass = _Pass(self._ray, self._servers, self._timeout, self._key_env, self._key, self._concurrency)
            return self._pass

    def _look(self) -> dict[str, str]:
        """Node id → the server that is asked from there, for the nodes that can take part."""
        found = _look_round(self._ray, self.base_url, self._key_env, self._key is not None)
        out = "; ".join(f"{node.address}: {node.problem}" for node in found if node.problem)
        servers = {node.id: node.base_url for node in found if not node.problem}
        if not servers:
            raise ProcessError(f"no node of the Ray cluster can ask {self.base_url} ({out})")
        if out:
            self._say(f"Ray nodes that take no part: {out}")
        return servers


def join_cluster() -> Any:
    """The `ray` module, connected to the cluster that RAY_ADDRESS names, else to the one that runs on this machine."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"  # Ray would copy the working directory to the nodes
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingExtra("--transport ray", "ray") from error
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "auto")
        try:
            _knock(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError, RuntimeError) as error:
            raise ProcessError(
                f"no Ray cluster answers at '{address}': start one with `ray start --head`, run this on one of its "
                f"nodes, or name it in RAY_ADDRESS as HOST:PORT ({_last_line(error)})"
            ) from None
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it reports comes back as failures
    warnings.filterwarnings("ignore", "The minimum number of concurrent actors", UserWarning)
    return ray


def _knock(address: str) -> None:
    """Fail at once where nobody listens; Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=KNOCK_S).close()


# Which nodes take part --------------------------------------------------------------------------------------------


class _Node(NamedTuple):
    id: str
    address: str
    base_url: str
    problem: str | None


def _look_round(ray: Any, base_url: str, key_env: str | None, has_key: bool) -> list[_Node]:
    """Every living node, with what keeps it from taking part."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(num_cpus=0, max_retries=0)(look_from_here)
    alive = [(node["NodeID"], node["NodeManagerAddress"]) for node in ray.nodes() if node["Alive"]]
    urls = [base_url.replace(NODE, f"[{address}]" if ":" in address else address) for _, address in alive]
    answers = [
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(url, key_env, has_key)
        for (node, _), url in zip(alive, urls, strict=True)
    ]
    ray.wait(answers, num_returns=len(answers), timeout=2 * LOOK_S)
    nodes = []
    for (node, address), url, answer in zip(alive, urls, answers, strict=True):
        try:
            version, problem = ray.get(answer, timeout=1)
        except ray.exceptions.RayError as error:
            version, problem = __version__, f"sp2dpo does not run there ({_last_line(error)})"
        if version != __version__:
            problem = f"it has sp2dpo {version}, this is {__version__}"
        nodes.append(_Node(node, address, url, problem))
    return nodes


# One run of Ray Data ----------------------------------------------------------------------------------------------


class _Pass:
    """Requests into Ray Data and answers out of it, until it is closed or breaks."""

    def __init__(
        self,
        ray: Any,
        servers: Mapping[str, str],
        timeout: float,
        key_env: str | None,
        key: str | None,
        concurrency: int,
    ) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = ray.get_runtime_context().get_node_id()
        on_this_node = NodeAffinitySchedulingStrategy(here, soft=False)
        self._ray = ray
        self._feed = ray.remote(num_cpus=0)(Feed).options(scheduling_strategy=on_this_node).remote(dict(servers))
        self._feed.hold.remote(key)
        bundles = ray.data.from_items([None], override_num_blocks=1).map_batches(
            pull, fn_kwargs={"feed": self._feed}, num_cpus=0, label_selector={"ray.io/node-id": here}
        )
        answers = bundles.map_batches(
            Ask,
            batch_size=1,
            batch_format="pyarrow",
            fn_constructor_kwargs={
                "feed": self._feed,
                "timeout": timeout,
                "key_env": key_env,
                "concurrency": concurrency,
            },
            compute=ray.data.ActorPoolStrategy(
                size=len(servers),
                max_tasks_in_flight_per_actor=AHEAD * concurrency,
                max_concurrent_calls_per_actor=AHEAD * concurrency,
            ),
            num_cpus=0,
            memory=1,  # one byte: Ray spreads what needs something, and places at random what needs nothing
            label_selector={"ray.io/node-id": f"in({','.join(servers)})"},
        )
        answers.context.target_max_block_size = 1  # a row is a block, and a task
        answers.context.enable_progress_bars = False
        answers.context.print_on_execution_start = False
        answers.context.execution_no_progress_timeout_s = -1
        self._answers = answers
        self._loop = asyncio.get_running_loop()
        self._bundle = max(1, min(concurrency // 4, BUNDLE))  # small, so that workers share the work evenly
        self._numbers = count()
        self._gathered: list[_Waiting] = []
        self._away: dict[int, list[_Waiting]] = {}
        self.broken = False
        self._reader = threading.Thread(target=self._read, name="ray answers", daemon=True)
        self._reader.start()

    def ask(self, path: str, body: Mapping[str, Any]) -> asyncio.Future[Raw]:
        """Send a request with those of the next moment."""
        if not self._gathered:
            self._loop.call_later(GATHER_S, self._send)
        waiting = _Waiting(path, body, self._loop.create_future())
        self._gathered.append(waiting)
        return waiting.answer

    def _send(self) -> None:
        gathered, self._gathered = self._gathered, []
        for start in range(0, len(gathered), self._bundle):
            bundle, number = gathered[start : start + self._bundle], next(self._numbers)
            self._away[number] = bundle
            self._feed.give.remote(number, json.dumps([[waiting.path, waiting.body] for waiting in bundle]))

    def _read(self) -> None:
        """Hand over what comes back; in a thread, because Ray Data blocks."""
        why = "it ended"
        try:
            for block in self._answers.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for row in block.to_pylist():
                    self._loop.call_soon_threadsafe(self._deliver, row["number"], row["raws"])
        except (self._ray.exceptions.RayError, self._ray.data.exceptions.SystemException) as error:
            why = _last_line(error)
        finally:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self.fail, f"Ray stopped ({why})")

    def _deliver(self, number: int, raws: str) -> None:
        for waiting, fields in zip(self._away.pop(number, []), json.loads(raws), strict=False):
            if not waiting.answer.done():
                waiting.answer.set_result(_raw(fields))

    def fail(self, why: str) -> None:
        """Take no more, and give up what is under way."""
        self.broken = True
        for waiting in (*self._gathered, *(waiting for bundle in self._away.values() for waiting in bundle)):
            if not waiting.answer.done():
                waiting.answer.set_result(Raw(failure="connection", error=why))
        self._gathered, self._away = [], {}

    async def close(self) -> None:
        """End the workers; if requests are under way, at once."""
        if self.broken or self._away or self._gathered:
            with suppress(self._ray.exceptions.RayError):
                for worker in await self._feed.workers.remote():
                    self._ray.kill(worker)
        else:
            self._feed.give.remote(None, "")
            await asyncio.to_thread(self._reader.join, LOOK_S)
        self._ray.kill(self._feed)
        await asyncio.to_thread(self._reader.join, LOOK_S)


class _Waiting(NamedTuple):
    path: str
    body: Mapping[str, Any]
    answer: asyncio.Future[Raw]


def _raw(fields: Mapping[str, Any]) -> Raw:
    limits = fields["limits"]
    return Raw(**{**fields, "limits": None if limits is None else Limits(**limits)})


def _last_line(error: BaseException) -> str:
    """What an error of Ray says; before it stands the traceback of another machine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
