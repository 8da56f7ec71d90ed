"""A server that answers as a test says: one function from what was asked to the answer, in a thread of the test.

For single cases; the fault server has many faults at once. A connector that takes every host to it makes it stand in
for any address.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult

from faults import broken_off, close

__all__ = ["Answer", "Asked", "Handler", "TeacherServer", "teacher_server", "to_port"]


@dataclass(frozen=True)
class Asked:
    """A request as it came in."""

    method: str
    host: str
    path: str
    headers: Mapping[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)


@dataclass(frozen=True)
class Answer:
    """What goes back: text or bytes as they are, anything else as JSON; whole, cut in mid-body, or nothing at all."""

    body: Any = ""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    how: Literal["whole", "cut", "closed", "never"] = "whole"

    @property
    def data(self) -> bytes:
        if isinstance(self.body, bytes):
            return self.body
        return (self.body if isinstance(self.body, str) else json.dumps(self.body)).encode()


Handler = Callable[[Asked], Answer]


class _Everywhere(AbstractResolver):
    """Finds every host at one port of the loopback address."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        return [ResolveResult(hostname=host, host="127.0.0.1", port=self._port, family=family, proto=0, flags=0)]

    async def close(self) -> None:
        pass


def to_port(port: int) -> Callable[[], aiohttp.TCPConnector]:
    """Makes connectors to that port, whatever the host."""
    return lambda: aiohttp.TCPConnector(limit=0, resolver=_Everywhere(port), family=socket.AF_INET)


class TeacherServer:
    """A running server; `asked` is all that came in so far."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self.asked: list[Asked] = []
        self.failed: list[Exception] = []
        self.port = 0

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def connector(self) -> Callable[[], aiohttp.TCPConnector]:
        return to_port(self.port)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        text = (await request.read()).decode("utf-8", "replace")
        asked = Asked(request.method, request.host, request.path_qs, request.headers, text)
        self.asked.append(asked)
        try:
            answer = self._handler(asked)
        except Exception as error:  # noqa: BLE001 (a test's own failure, raised again in its thread)
            self.failed.append(error)
            answer = Answer(status=500)
        if answer.how == "never":
            await asyncio.Event().wait()
        if answer.how == "closed":
            close(request)
        if answer.how == "cut":
            return await broken_off(request, answer.data)
        return web.Response(body=answer.data, status=answer.status, headers=answer.headers)


@contextmanager
def teacher_server(handler: Handler) -> Iterator[TeacherServer]:
    """Serve on the loopback address; in the end, raise what the handler raised."""
    server = TeacherServer(handler)
    app = web.Application(client_max_size=2**28)
    app.router.add_route("*", "/{path:.*}", server.answer)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(runner.setup())
    loop.run_until_complete(web.TCPSite(runner, "127.0.0.1", 0).start())
    server.port = runner.addresses[0][1]
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(runner.cleanup())
        loop.close()
        if server.failed:
            raise server.failed[0]
