"""Calls through Ray Data on a local cluster of two nodes, against real servers on loopback.

The nodes have the addresses 127.0.0.2 and 127.0.0.3, no CPUs for Ray, as if model servers had taken them, and a model
server each, on the same port.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from aiohttp import web

from conftest import GOOD, KEY, NewRun, rows, teacher
from sp2dpo.annotate.on_ray import AHEAD, RayEndpoint
from sp2dpo.annotate.run import annotate
from sp2dpo.calls import open_calls
from sp2dpo.errors import ProcessError
from sp2dpo.llm import Raw

ray = pytest.importorskip("ray")

pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*")

HOSTS = ("127.0.0.2", "127.0.0.3")
CONCURRENCY = 8
NODE = {"num_cpus": 0, "object_store_memory": 80 * 2**20, "include_dashboard": False}
NODES_KEY = "sk-of-the-second-node-0123456789"


class Call(NamedTuple):
    """One request as a server saw it: the process that sent it, and the process that started that one."""

    text: str
    variant: str
    host: str
    authorization: str | None
    pid: int
    parent: int


class Servers:
    """A server at the address of each node, which answers what it was asked and remembers by whom."""

    def __init__(self) -> None:
        self.asked: list[Call] = []
        self.serving: Counter[int] = Counter()
        self.delay_s = 0.02
        self.down: set[str] = set()
        self.port = 0
        self._processes: dict[Any, int] = {}

    @property
    def each(self) -> str:
        """A server on each node."""
        return f"http://{{node}}:{self.port}/v1"

    async def start(self) -> web.AppRunner:
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._chat)
        runner = web.AppRunner(app, shutdown_timeout=0)
        await runner.setup()
        for host in HOSTS:
            listening = socket.create_server((host, self.port))
            self.port = listening.getsockname()[1]
            await web.SockSite(runner, listening).start()
        return runner

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": []})

    async def _chat(self, request: web.Request) -> web.Response:
        assert request.transport is not None
        question = await request.json()
        here, there = (request.transport.get_extra_info(end) for end in ("sockname", "peername"))
        pid, host = self._pid(there, here), here[0]
        text = question["messages"][-1]["content"]
        variant = question.get("variant", question["messages"][0]["content"])
        header = request.headers.get("authorization")
        self.asked.append(Call(text, variant, host, header, pid, psutil.Process(pid).ppid()))
        self.serving[pid] += 1
        await asyncio.sleep(self.delay_s)
        self.serving[pid] -= 1
        if host in self.down:
            request.transport.abort()
        return web.Response(text=said(text))

    def _pid(self, peer: Any, here: Any) -> int:
        """The process at the other end of a connection; connections to two servers may share that end's port."""
        if (peer, here) not in self._processes:
            connections = [one for one in psutil.net_connections("tcp4") if one.raddr and one.pid]
            self._processes.update({(tuple(one.laddr), tuple(one.raddr)): one.pid for one in connections})
        return self._processes[peer, here]


def said(text: str) -> str:
    """The whole body of an answer."""
    return json.dumps({"model": "m", "choices": [{"message": {"content": GOOD}}], "asked": text})


@contextmanager
def running() -> Iterator[Servers]:
    servers, loop = Servers(), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    runner = asyncio.run_coroutine_threadsafe(servers.start(), loop).result()
    yield servers
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture
def servers() -> Iterator[Servers]:
    with running() as servers:
        yield servers


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={**NODE, "node_ip_address": HOSTS[0]})
        cluster.add_node(**NODE, node_ip_address=HOSTS[1], env_vars={"KEY_OF_NODE": NODES_KEY})
        environment.setenv("RAY_ADDRESS", cluster.address)
        yield cluster
        ray.shutdown()
        cluster.shutdown()


Prompt = tuple[str, str]


def body(text: str, variant: str = "v1") -> dict[str, Any]:
    return {"model": "m", "variant": variant, "messages": [{"role": "user", "content": text}]}


def ask(base_url: str, do: Callable[[RayEndpoint], Awaitable[Any]], **options: Any) -> Any:
    """What `do` makes of an endpoint on the cluster."""

    async def run() -> Any:
        settings = {"timeout": 20.0, "key_env": None, "key": None, "concurrency": CONCURRENCY, "say": print}
        endpoint = RayEndpoint(base_url, **(settings | options))
        try:
            return await do(endpoint)
        finally:
            await endpoint.close()

    return asyncio.run(run())


def all_of(prompts: list[Prompt]) -> Callable[[RayEndpoint], Awaitable[dict[Prompt, Raw]]]:
    """Ask everything, with as many under way as the endpoint takes."""

    async def do(endpoint: RayEndpoint) -> dict[Prompt, Raw]:
        places = asyncio.Semaphore(endpoint.under_way)

        async def one(prompt: Prompt) -> Raw:
            async with places:
                return await endpoint.post("/chat/completions", body(*prompt))

        return dict(zip(prompts, await asyncio.gather(*map(one, prompts)), strict=True))

    return do


def prompts(pairs: int) -> list[Prompt]:
    return [(f"pair {i}", variant) for i in range(pairs) for variant in ("v1", "v2", "v3")]


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(120):
        while not true():
            await asyncio.sleep(0.02)


def workers(name: str) -> list[psutil.Process]:
    """Processes of Ray that do this."""
    return [one for one in psutil.process_iter(["cmdline"]) if name in " ".join(one.info["cmdline"] or ())]


class Ran(NamedTuple):
    raws: dict[Prompt, Raw]
    asked: list[Call]


@pytest.fixture(scope="module")
def ran(cluster: Any) -> Ran:
    """A run without faults. One node has the key in its environment."""
    with running() as servers, warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"ray\.")
        raws = ask(servers.each, all_of([*prompts(100), (KEY, "v1")]), key=KEY, key_env="KEY_OF_NODE")
        return Ran(raws, servers.asked)


def test_every_request_is_posted_once_and_its_answer_comes_back(ran: Ran) -> None:
    assert {prompt: ran.raws[prompt].body for prompt in prompts(100)} == {p: said(p[0]) for p in prompts(100)}
    assert Counter((call.text, call.variant) for call in ran.asked) == dict.fromkeys(ran.raws, 1)


def test_a_worker_on_each_node_asks_the_server_of_its_node(cluster: Any, ran: Ran) -> None:
    nodes = {node.all_processes["raylet"][0].process.pid: node.node_ip_address for node in cluster.list_all_nodes()}
    assert {(nodes[call.parent], call.host) for call in ran.asked} == {(host, host) for host in HOSTS}


def test_a_worker_takes_the_key_of_its_node_and_else_the_one_of_the_driver(ran: Ran) -> None:
    keys = dict(zip(HOSTS, (KEY, NODES_KEY), strict=True))
    assert {(call.host, call.authorization) for call in ran.asked} == {(h, f"Bearer {key}") for h, key in keys.items()}


def test_no_key_is_in_an_answer_or_in_a_file_of_ray(cluster: Any, ran: Ran) -> None:
    [host] = [call.host for call in ran.asked if call.text == KEY]
    assert ran.raws[(KEY, "v1")].body == said("[key]" if host == HOSTS[0] else KEY)
    files = [path.read_bytes() for path in Path(cluster.head_node.get_session_dir_path()).rglob("*") if path.is_file()]
    assert any(b"MapBatches(Ask)" in file for file in files), "these are the files of this run"
    assert not [key for key in (KEY, NODES_KEY) for file in files if key.encode() in file]


def test_a_killed_worker_costs_annotate_no_answer(cluster: Any, servers: Servers, new_run: NewRun) -> None:
    one = teacher(base_url=servers.each, model="m", provider="vllm")
    run = new_run(pairs=rows(60), panel={"variants": ["v1", "v2", "v3"], "annotators": [one]})
    servers.delay_s = 0.2

    async def kill() -> None:
        await until(lambda: len(servers.asked) > 50 and servers.serving.total() > 0)
        os.kill(servers.serving.most_common(1)[0][0], signal.SIGKILL)

    killer = threading.Thread(target=lambda: asyncio.run(kill()))
    killer.start()
    account = annotate(run, transport="ray", concurrency=CONCURRENCY)
    killer.join()
    with open_calls(run.calls) as log:
        calls = list(log)
    assert (account.questions, account.valid) == (180, 180)
    assert {call.transport for call in calls} == {"ray"}
    assert Counter(call.outcome for call in calls).keys() == {"ok", "connection"}
    assert 180 < len(calls) <= 180 + CONCURRENCY * AHEAD, "only what the worker had in hand was lost"
    assert len(servers.asked) <= len(calls), "every request that was posted has a row"


@pytest.mark.slow
def test_a_lost_node_loses_only_what_it_had_in_hand(cluster: Any, servers: Servers) -> None:
    third = cluster.add_node(**NODE, node_ip_address="127.0.0.4")
    raylet = third.all_processes["raylet"][0].process.pid
    servers.delay_s = 0.2

    async def do(endpoint: RayEndpoint) -> dict[Prompt, Raw]:
        asking = asyncio.create_task(all_of(prompts(100))(endpoint))
        await until(lambda: any(call.parent == raylet and servers.serving[call.pid] for call in servers.asked[50:]))
        cluster.remove_node(third, allow_graceful=False)
        return await asking

    raws = ask(f"http://{HOSTS[0]}:{servers.port}/v1", do)
    lost = {prompt for prompt, raw in raws.items() if raw.failure == "connection"}
    assert len(lost) <= CONCURRENCY * AHEAD
    assert all(raw.body == said(prompt[0]) for prompt, raw in raws.items() if prompt not in lost)
    assert max(Counter((call.text, call.variant) for call in servers.asked).values()) == 1


def test_a_server_that_dies_does_not_eat_the_work_of_the_other(cluster: Any, servers: Servers) -> None:
    async def do(endpoint: RayEndpoint) -> dict[Prompt, Raw]:
        async with asyncio.timeout(120):
            while {call.host for call in servers.asked} != set(HOSTS):
                await all_of(prompts(4))(endpoint)
        servers.down.add(HOSTS[1])
        return await all_of(prompts(30))(endpoint)

    failures = Counter(raw.failure for raw in ask(servers.each, do, concurrency=2).values())
    assert failures.keys() == {None, "connection"}
    assert failures["connection"] < 30


def test_a_pass_that_breaks_fails_what_is_under_way_and_the_next_call_starts_anew(
    cluster: Any, servers: Servers
) -> None:
    servers.delay_s = 0.1

    async def do(endpoint: RayEndpoint) -> tuple[dict[Prompt, Raw], Raw]:
        asking = asyncio.create_task(all_of(prompts(80))(endpoint))
        await until(lambda: len(servers.asked) > 50)
        [reader] = workers("ray::MapBatches(pull)")
        reader.kill()
        return await asking, await endpoint.post("/chat/completions", body("at last"))

    raws, last = ask(servers.each, do)
    lost = [raw for raw in raws.values() if raw.failure is not None]
    assert 0 < len(lost) <= 3 * CONCURRENCY * AHEAD
    assert {(raw.failure, str(raw.error).startswith("Ray stopped")) for raw in lost} == {("connection", True)}
    assert last.body == said("at last")


def test_closing_in_the_middle_ends_the_workers(cluster: Any, servers: Servers) -> None:
    servers.delay_s = 3

    async def do(endpoint: RayEndpoint) -> Raw:
        asking = asyncio.create_task(endpoint.post("/chat/completions", body("one")))
        await until(lambda: bool(servers.asked))
        await endpoint.close()
        await until(lambda: not workers("ray::MapWorker(MapBatches(Ask))"))
        return await asking

    assert ask(servers.each, do).failure == "connection"


def test_a_node_that_cannot_ask_takes_no_part(cluster: Any, servers: Servers) -> None:
    told: list[str] = []

    async def do(endpoint: RayEndpoint) -> int:
        return endpoint.under_way

    assert ask(servers.each, do, key_env="KEY_OF_NODE", say=told.append) == CONCURRENCY * AHEAD
    assert told == [f"Ray nodes that take no part: {HOSTS[0]}: KEY_OF_NODE is set neither here nor there"]


def test_an_address_where_nobody_answers_is_refused_before_anything_is_asked(cluster: Any) -> None:
    with pytest.raises(ProcessError, match=r"no node of the Ray cluster can ask .*127\.0\.0\.2: .* does not answer"):
        ask("http://{node}:9/v1", all_of(prompts(1)))


def test_without_a_cluster_the_message_says_how_to_start_one() -> None:
    code = (
        "from sp2dpo.annotate.on_ray import RayEndpoint;"
        "RayEndpoint('http://127.0.0.1:9', 9, key_env=None, key=None, concurrency=1, say=print)"
    )
    nobody = {**os.environ, "RAY_ADDRESS": "127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", code], env=nobody, capture_output=True, text=True, check=False)
    assert "ProcessError: no Ray cluster answers at '127.0.0.1:9': start one with `ray start --head`" in done.stderr
