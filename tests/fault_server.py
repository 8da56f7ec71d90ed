"""An OpenAI-compatible server whose faults are known beforehand, for tests and for the benchmark.

It answers with a judgement made from a hash of the question, or passes the question on to another server and spoils
what comes back. The n-th request for a question meets the fault that the seed, or a script, has for it: so the number
of requests that an ideal client sends is known, and `stats()` tells it. No streams.

In a test: `with fault_server(fault_rate=0.4) as server: ...`. By hand, until Ctrl-C:

    python tests/fault_server.py --port 8713 --fault-rate 0.4
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

import aiohttp
from aiohttp import web

from fault_batches import BATCH_FAULTS, Batches
from fault_limits import Limits
from faults import (
    CATEGORY,
    FAULTS,
    SPOILT,
    as_judgement,
    broken_off,
    close,
    cures,
    error,
    instance,
    judgement,
    question_key,
    unit,
)

__all__ = ["BATCH_FAULTS", "FAULTS", "FaultServer", "Options", "cures", "fault_server", "question_key"]

COMPLETION_TOKENS: Final = 40
START_SECONDS: Final = 30.0


def option(default: Any, text: str) -> Any:
    """A field of `Options` with its help text."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Options:
    """What the server is like. Each field is a flag of the command line and an argument of `fault_server`."""

    port: int = option(0, "0: any free port")
    seed: int = option(0, "of the faults")
    latency_ms: float = option(0.0, "before each answer")
    fault_rate: float = option(0.0, "share of the attempts that meet a fault")
    faults: tuple[str, ...] = option(cures("retry", "mend"), "kinds to choose from")
    faults_per_question: int = option(3, "later attempts meet none")
    retry_after: float = option(1.0, "seconds, of the fault 429")
    rpm: float = option(0.0, "requests a minute, 0 for no limit")
    tpm: float = option(0.0, "tokens a minute, as the usage of the answers counts them; 0 for no limit")
    window: str = option("bucket", "bucket: fills evenly; fixed: windows of --window-seconds")
    window_seconds: float = option(60.0, "of a fixed window")
    burst_seconds: float = option(1.0, "the bucket holds so many seconds of the limit")
    limit_headers: bool = option(True, "x-ratelimit-* with each answer")
    limit_retry_after: bool = option(True, "Retry-After with a 429 of the limits")
    key: str = option("", "the bearer token to ask for")
    models: tuple[str, ...] = option((), "the only models that there are; none given: any")
    shutdown_date: str = option("", "of each model")
    json_mode: str = option("ignored", "response_format is enforced, ignored or refused")
    refuse: tuple[str, ...] = option((), "parameters that get an HTTP 400")
    reasoning_tokens: int = option(0, "hidden tokens in each answer's usage")
    upstream: str = option("", "base URL of the server that answers in place of this one")
    max_file_requests: int = option(50_000, "lines of a batch file")
    max_file_bytes: int = option(200 * 2**20, "size of a batch file")
    batch_seconds: float = option(0.0, "from the creation of a batch to its end")
    batch_faults: tuple[str, ...] = option((), "of the first batch, the second, …; `-` for none")

    def __post_init__(self) -> None:
        unknown = {*self.faults} - {*FAULTS} | {*self.batch_faults} - {*BATCH_FAULTS, "-"}
        if (
            unknown
            or self.window not in ("bucket", "fixed")
            or self.json_mode not in ("enforced", "ignored", "refused")
        ):
            raise ValueError(f"no such choice: {', '.join(unknown) or f'{self.window}, {self.json_mode}'}")

    def flags(self) -> list[str]:
        """The command line that gives these options."""
        line = []
        for each in fields(self):
            value, name = getattr(self, each.name), each.name.replace("_", "-")
            if isinstance(value, bool):
                line.append(f"--{name}" if value else f"--no-{name}")
            else:
                line.append(f"--{name}={','.join(value) if isinstance(value, tuple) else value}")
        return line


@dataclass
class Question:
    """One question, and what became of the requests for it: `kinds` has a fault or `valid` for each."""

    key: str
    text: str
    kinds: list[str] = field(default_factory=list)
    answered: str | None = None

    def note_answered(self, kind: str) -> None:
        """An answer left that a client can use."""
        cure = "valid" if kind == "valid" else FAULTS[kind][0]
        if cure in ("valid", "mend") and self.answered is None:
            self.answered = cure


class Server:
    """The state of a running server, and its handlers."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.questions: dict[str, Question] = {}
        self.rules: list[tuple[str, Sequence[str | None]]] = []
        self.kinds: Counter[str] = Counter()
        self.again: Counter[str] = Counter()
        self.in_flight = self.most_in_flight = self.admitted_tokens = 0
        fixed = options.window == "fixed"
        seconds = options.window_seconds if fixed else options.burst_seconds
        self.limits = Limits(options.rpm, options.tpm, fixed, seconds)
        self.batches = Batches(
            self.answer_line,
            options.max_file_requests,
            options.max_file_bytes,
            options.batch_seconds,
            options.batch_faults,
        )

    def app(self) -> web.Application:
        """The routes."""
        app = web.Application(middlewares=[self.guard], client_max_size=2**31)
        app.add_routes(
            [
                web.post("/v1/chat/completions", self.chat),
                web.get("/v1/models", self.list_models),
                web.get("/v1/models/{id:.+}", self.get_model),
                *self.batches.routes(),
                web.get("/control/stats", self.stats),
                web.get("/control/questions", self.list_questions),
                web.post("/control/script", self.script),
            ]
        )
        return app

    @web.middleware
    async def guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """Ask for the key."""
        key = self.options.key
        if key and request.path.startswith("/v1/") and request.headers.get("Authorization") != f"Bearer {key}":
            self.kinds["unauthorised"] += 1
            return error(401, "This is not the key.", "invalid_api_key")
        response: web.StreamResponse = await handler(request)
        return response

    # Chat completions ------------------------------------------------------------------------------------------------

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """One chat completion, or what the options make of it."""
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self.answer(request, json.loads(await request.read()))
        finally:
            self.in_flight -= 1

    async def answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        """Turned away by a limit or a parameter; else the fault or the answer that is due."""
        question = self.question(body)
        turned_away = self.unfit(body) or self.beyond_limits(self.usage(question)["total_tokens"])
        if turned_away is not None:
            return turned_away
        kind = self.next_kind(question)
        await asyncio.sleep(self.options.latency_ms / 1000)
        response = await self.as_fault(request, kind) or await self.as_body(request, body, question, kind)
        if not response.prepared:
            response.headers.update(self.limit_headers())
        return response

    def question(self, body: Mapping[str, Any]) -> Question:
        """The question of a request, known already or new."""
        key = question_key(body)
        if key not in self.questions:
            text = "\n".join(str(message.get("content")) for message in body.get("messages", ()))
            self.questions[key] = Question(key, text)
        return self.questions[key]

    def usage(self, question: Question) -> dict[str, Any]:
        """Tokens that an answer costs."""
        hidden = self.options.reasoning_tokens
        prompt, completion = len(question.text) // 4 + 1, COMPLETION_TOKENS + hidden
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        return usage | ({"completion_tokens_details": {"reasoning_tokens": hidden}} if hidden else {})

    def beyond_limits(self, tokens: int) -> web.Response | None:
        """A 429 if a limit is reached; else the request counts against the limits."""
        wait = self.limits.take(tokens)
        if wait <= 0.0:
            self.admitted_tokens += tokens
            return None
        self.kinds["limit"] += 1
        response = error(429, "Too many requests.", "rate_limit_exceeded")
        if self.options.limit_retry_after:
            response.headers["Retry-After"] = f"{math.ceil(wait)}"
        response.headers.update(self.limit_headers())
        return response

    def limit_headers(self) -> dict[str, str]:
        """The limits, if they are told."""
        return self.limits.headers() if self.options.limit_headers else {}

    def unfit(self, body: Mapping[str, Any]) -> web.Response | None:
        """A 400 or 404 for what this server does not take."""
        refused = (*self.options.refuse, *(("response_format",) if self.options.json_mode == "refused" else ()))
        param = next((name for name in refused if name in body), None)
        if param is not None:
            self.kinds["bad_parameter"] += 1
            return error(400, f"Unsupported parameter: '{param}'.", "unsupported_parameter", param)
        if self.options.models and body.get("model") not in self.options.models:
            self.kinds["no_model"] += 1
            return error(404, f"There is no model '{body.get('model')}'.", "model_not_found")
        return None

    def next_kind(self, question: Question) -> str:
        """What the next request for a question meets; it is counted."""
        kind = self.planned(question, len(question.kinds))
        question.kinds.append(kind)
        self.kinds[kind] += 1
        if question.answered is not None:
            self.again[question.answered] += 1
        return kind

    def planned(self, question: Question, n: int) -> str:
        """What the n-th request for a question meets, from 0: by the first script that fits, else by the seed."""
        for match, scripted in self.rules:
            if match in question.text:
                return (scripted[n] if n < len(scripted) else None) or "valid"
        options = self.options
        if n >= options.faults_per_question or unit(options.seed, question.key, n) >= options.fault_rate:
            return "valid"
        return options.faults[int(unit(options.seed, question.key, n, "kind") * len(options.faults))]

    async def as_fault(self, request: web.Request, kind: str) -> web.StreamResponse | None:
        """The faults that have no completion."""
        if kind in ("429", "429_silent"):
            response = error(429, "Too many requests.", "rate_limit_exceeded")
            if kind == "429":
                response.headers["Retry-After"] = f"{self.options.retry_after:g}"
            return response
        if kind in ("500", "503"):
            return error(int(kind), "Something went wrong here.")
        if kind == "quota":
            return error(429, "The quota is used up.", "insufficient_quota")
        if kind == "html":
            return web.Response(text="<html><body>Please log in.</body></html>", content_type="text/html")
        if kind == "garbage_gzip":
            return web.Response(body=b"no gzip", headers={"Content-Encoding": "gzip"}, content_type="application/json")
        if kind == "timeout":
            await asyncio.sleep(3600)
        if kind in ("timeout", "cut"):
            close(request)
            return web.Response()
        return None

    async def as_body(
        self, request: web.Request, body: Mapping[str, Any], question: Question, kind: str
    ) -> web.StreamResponse:
        """The completion, perhaps spoilt."""
        status, completion = await self.completion(body, question, kind)
        data = json.dumps(completion).encode()
        if kind == "cut_body":
            return await broken_off(request, data)
        headers = {"x-request-id": f"req_{question.key}_{len(question.kinds)}"}
        return web.Response(body=data, status=status, content_type="application/json", headers=headers)

    async def completion(self, body: Mapping[str, Any], question: Question, kind: str) -> tuple[int, dict[str, Any]]:
        """Status and body of a completion, with the fault in it if it is of that sort."""
        if self.options.upstream:
            status, whole = await self.from_upstream(body)
            if status != 200:
                return status, whole
        else:
            message = {"role": "assistant", "content": self.content(body, question)}
            whole = {"id": f"chatcmpl-{question.key}", "object": "chat.completion", "created": int(time.time())}
            whole |= {"model": body.get("model"), "usage": self.usage(question)}
            whole |= {"choices": [{"index": 0, "finish_reason": "stop", "message": message}]}
        choice = whole["choices"][0]
        if kind in SPOILT:
            choice["message"]["content"] = SPOILT[kind](as_judgement(choice["message"]["content"], question.key))
        choice["finish_reason"] = {"truncated": "length", "filtered": "content_filter"}.get(kind, "stop")
        if kind == "refused":
            choice["message"] |= {"content": None, "refusal": "I do not judge this."}
        if kind == "other_model":
            whole["model"] = f"{whole['model']}-of-another-day"
        question.note_answered(kind)
        return 200, whole

    async def from_upstream(self, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        """Ask the other server."""
        url = f"{self.options.upstream}/chat/completions"
        async with aiohttp.ClientSession() as session, session.post(url, json=body) as response:
            return response.status, await response.json()

    def content(self, body: Mapping[str, Any], question: Question) -> str:
        """The text of an answer of this server."""
        form = body.get("response_format") if self.options.json_mode == "enforced" else None
        if form and form.get("type") == "json_schema":
            return json.dumps(instance(form["json_schema"]["schema"], question.key))
        if form or CATEGORY in question.text:
            return json.dumps(judgement(question.key))
        return "With pleasure. What would you like to know about it?"

    async def answer_line(self, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        """A line of a batch. Of all faults only those of the text occur there."""
        question = self.question(body)
        kind = self.next_kind(question)
        return await self.completion(body, question, kind)

    # Models ----------------------------------------------------------------------------------------------------------

    def model(self, name: str) -> dict[str, Any]:
        """A model as OpenAI describes one."""
        ends = {"shutdown_date": self.options.shutdown_date} if self.options.shutdown_date else {}
        return {"id": name, "object": "model", "created": 0, "owned_by": "tests"} | ends

    async def list_models(self, request: web.Request) -> web.Response:
        """All models; one if any goes."""
        return web.json_response({"object": "list", "data": [self.model(m) for m in self.options.models or ("any",)]})

    async def get_model(self, request: web.Request) -> web.Response:
        """One model."""
        name = request.match_info["id"]
        if self.options.models and name not in self.options.models:
            return error(404, f"There is no model '{name}'.", "model_not_found")
        return web.json_response(self.model(name))

    # Control ---------------------------------------------------------------------------------------------------------

    async def stats(self, request: web.Request) -> web.Response:
        """Counts. `ideal_requests`: what a client needs that mends what can be mended and repeats nothing in vain."""
        asked = [len(question.kinds) for question in self.questions.values()]
        numbers = {
            "requests": sum(asked),
            "questions": sum(n > 0 for n in asked),
            "answered": sum(question.answered is not None for question in self.questions.values()),
            "ideal_requests": sum(self.ideal(question) for question in self.questions.values() if question.kinds),
            "most_asked": max(asked, default=0),
            "in_flight": self.in_flight,
            "most_in_flight": self.most_in_flight,
            "admitted_tokens": self.admitted_tokens,
        }
        return web.json_response(numbers | {"by_kind": self.kinds, "asked_again": {"valid": 0, "mend": 0} | self.again})

    def ideal(self, question: Question) -> int:
        """Requests that a question needs."""
        n = 0
        while (kind := self.planned(question, n)) != "valid" and FAULTS[kind][0] == "retry":
            n += 1
        return n + 1

    async def list_questions(self, request: web.Request) -> web.Response:
        """Each question's key → what its requests met."""
        return web.json_response({key: question.kinds for key, question in self.questions.items()})

    async def script(self, request: web.Request) -> web.Response:
        """Faults, request by request, for the questions whose messages hold a text; the latest script counts."""
        rule = await request.json()
        self.rules.insert(0, (rule["match"], rule["faults"]))
        return web.json_response({})


async def serve(options: Options, until_eof: bool) -> None:
    """Serve on the loopback address, print the base URL as a line of JSON, then wait for the end of stdin or Ctrl-C."""
    app = Server(options).app()
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", options.port, backlog=4096)
    await site.start()
    host, port = runner.addresses[0][:2]
    print(json.dumps({"base_url": f"http://{host}:{port}/v1"}), flush=True)
    try:
        await (asyncio.to_thread(sys.stdin.read) if until_eof else asyncio.Event().wait())
    finally:
        await runner.cleanup()


@dataclass(frozen=True)
class FaultServer:
    """A running server, as a test sees it."""

    base_url: str

    def control(self, what: str, body: Any = None) -> Any:
        """Read a page of the control URL, or write to it."""
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(self.base_url.removesuffix("v1") + f"control/{what}", data, timeout=30) as response:
            return json.loads(response.read())

    def stats(self) -> dict[str, Any]:
        """What was asked so far."""
        return dict(self.control("stats"))

    def questions(self) -> dict[str, list[str]]:
        """What the requests for each question met, by `question_key`."""
        return dict(self.control("questions"))

    def script(self, match: str, *faults: str | None) -> None:
        """From now on, questions that hold this text meet these faults, request by request, then none."""
        self.control("script", {"match": match, "faults": faults})


@contextmanager
def fault_server(**options: Any) -> Iterator[FaultServer]:
    """Run the server as a process of its own, with fields of `Options`, and stop it in the end."""
    command = [sys.executable, str(Path(__file__)), *Options(**options).flags(), "--until-eof"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        watchdog = threading.Timer(START_SECONDS, process.kill)
        watchdog.start()
        try:
            line = process.stdout.readline()
            watchdog.cancel()
            if not line:
                raise RuntimeError(f"the fault server did not start (exit {process.wait()})")
            yield FaultServer(json.loads(line)["base_url"])
        finally:
            watchdog.cancel()
            process.kill()


def main() -> None:
    """Parse the command line and serve."""
    parser = argparse.ArgumentParser(description="An OpenAI-compatible server whose faults are known beforehand.")
    for each in fields(Options):
        flag, default = f"--{each.name.replace('_', '-')}", each.default
        text = each.metadata["help"].replace("%", "%%")
        if isinstance(default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=text)
        elif isinstance(default, tuple):
            parser.add_argument(flag, type=lambda v: tuple(filter(None, v.split(","))), default=default, help=text)
        else:
            parser.add_argument(flag, type=type(default), default=default, help=text)
    parser.add_argument("--until-eof", action="store_true", help="stop when stdin closes: no orphan if the parent dies")
    args = vars(parser.parse_args())
    until_eof = args.pop("until_eof")
    with suppress(KeyboardInterrupt):
        asyncio.run(serve(Options(**args), until_eof))


if __name__ == "__main__":
    main()
