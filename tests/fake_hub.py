"""A hub for tests, on loopback: the few endpoints that creating a dataset repository and committing to it take.

Small files travel inside the commit, as they do on the real hub; `uploadMode` is always regular.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

SHA = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the hub holds.

    `refuse` is the status with which it answers any attempt to write, `default` the visibility that this owner has set
    for repositories that are created without one.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    private: bool | None = None
    default: str = "public"
    messages: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    refuse: int | None = None

    def commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
            elif line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del self.files[value["path"]]
            else:
                raise AssertionError(line)


def _app(hub: Hub) -> FastAPI:
    app = FastAPI()

    @app.middleware("http")
    async def authorised(request: Request, go_on: Any) -> Response:
        hub.tokens.add(request.headers.get("authorization", ""))
        if hub.refuse and request.method == "POST":
            return JSONResponse({"error": "refused hf_thistokenisechoed"}, hub.refuse)
        answer: Response = await go_on(request)
        return answer

    @app.post("/api/repos/create")
    async def create(request: Request) -> Response:
        if hub.private is not None:
            return JSONResponse({"error": "there already", "url": f"{hub.url}/datasets/me/mine"}, 409)
        hub.private = (await request.json()).get("visibility", hub.default) == "private"
        return JSONResponse({"url": f"{hub.url}/datasets/me/mine"})

    @app.get("/api/datasets/me/mine")
    @app.get("/api/datasets/me/mine/revision/{revision}")
    async def info(revision: str = "main") -> dict[str, Any]:
        siblings = [{"rfilename": name} for name in hub.files]
        return {"id": "me/mine", "sha": SHA, "private": hub.private, "siblings": siblings}

    @app.get("/api/datasets/me/mine/tree/{revision}")
    async def tree(revision: str) -> list[dict[str, Any]]:
        return [{"type": "file", "path": name, "size": len(data), "oid": SHA} for name, data in hub.files.items()]

    @app.post("/api/validate-yaml")
    async def validate() -> dict[str, Any]:
        return {"errors": [], "warnings": []}

    @app.post("/api/datasets/me/mine/preupload/{revision}")
    async def preupload(request: Request) -> dict[str, Any]:
        asked = (await request.json())["files"]
        return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}

    @app.post("/api/datasets/me/mine/commit/{revision}")
    async def commit(request: Request) -> dict[str, Any]:
        hub.commit([json.loads(line) for line in (await request.body()).splitlines() if line])
        return {"commitUrl": f"{hub.url}/datasets/me/mine/commit/{SHA}", "commitOid": SHA, "success": True}

    return app


@contextmanager
def fake_hub() -> Iterator[Hub]:
    """A running hub; its address is `url`."""
    hub = Hub()
    server = uvicorn.Server(uvicorn.Config(_app(hub), host="127.0.0.1", port=0, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    hub.url = f"http://127.0.0.1:{port}"
    try:
        yield hub
    finally:
        server.should_exit = True
        thread.join(10)
