"""The annotation engine: asks every open question of the panel and keeps every attempt. Algorithm 2, phase 1.

An answered question is never asked again; a failure is a row, not a crash. Bounds are the paper's (B.6): so many
retries, with delays that double, and jitter.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sp2dpo.annotate.judge import call_row
from sp2dpo.annotate.plan import Question, open_questions, request_hash
from sp2dpo.calls import Call, CallLog, open_calls
from sp2dpo.llm import Answerer, Reply, Request
from sp2dpo.llm.openai_chat import OpenAIChat, params_requested, params_sent
from sp2dpo.llm.recorded import Recording, read_recording
from sp2dpo.pairs import read_pairs
from sp2dpo.progress import Progress
from sp2dpo.runs import Run
from sp2dpo.settings import Annotator
from sp2dpo.tables import write_manifest

__all__ = ["Account", "annotate"]

BREAKER = 20
"""So many attempts in a row without any answer from an endpoint, or four for each call in flight if that is more, and
it is asked no more in this run."""


@dataclass
class Account:
    """What one run of the engine did, and how the whole stands."""

    questions: int = 0
    valid: int = 0
    attempts: int = 0
    reused: int = 0
    recorded: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    mends: Counter[str] = field(default_factory=Counter)
    cost_usd: float = 0.0
    stopped: dict[str, str] = field(default_factory=dict)
    swapped: set[str] = field(default_factory=set)

    @property
    def missing(self) -> int:
        return self.questions - self.valid


def annotate(
    run: Run, *, limit: int | None = None, concurrency: int = 8, reuse: Path | None = None, http_client: Any = None
) -> Account:
    """Ask what is open, log every attempt, and account for it.

    Args:
        limit: only the first so many pairs.
        concurrency: calls in flight for each annotator.
        reuse: another run directory; its valid answers to the same questions are taken over, at no cost.
        http_client: replaces the HTTP client of the endpoints, for tests.

    Raises:
        ProcessError: a key or a recording is missing; before anything is asked.
    """
    settings = run.process.settings
    pairs = read_pairs(run.pairs, "sp2dpo annotate PROCESS.yaml").slice(0, limit).to_pylist()
    engines = [
        _Engine(run, annotator, http_client, max(BREAKER, 4 * concurrency)) for annotator in settings.panel.annotators
    ]
    names = [annotator.name for annotator in settings.panel.annotators]
    wanted = {(pair["pair_id"], name, v) for pair in pairs for name in names for v in settings.panel.variants}
    account = Account(questions=len(wanted))
    with open_calls(run.calls, create=True) as log:
        if reuse is not None:
            account.reused = _take_over(log, reuse / "calls.sqlite", _open(run, pairs, engines, log), engines)
        questions = list(_open(run, pairs, engines, log))
        try:
            with Progress("annotate", len(questions)) as progress:
                asyncio.run(_ask_all(engines, questions, log, account, progress, concurrency))
        finally:
            account.valid = len(wanted & log.valid_cells())
            _write_manifest(run, log, account)
    return account


def _open(run: Run, pairs: Sequence[Mapping[str, Any]], engines: Sequence[_Engine], log: CallLog) -> Iterable[Question]:
    names = [engine.annotator.name for engine in engines]
    return open_questions(pairs, run.process.pack, names, answered=log.valid_cells(), asked=log.attempts())


class _Engine:
    """One annotator of the panel, with the state of its breaker."""

    def __init__(self, run: Run, annotator: Annotator, http_client: Any, breaker: int) -> None:
        self.breaker = breaker
        self.annotator = annotator
        self.decoding = run.process.settings.panel.decoding
        self.silent = 0
        self.stopped: str | None = None
        self.recording: Recording | None = None
        self.answerer: Answerer | None = None
        if annotator.calls:
            self.recording = read_recording(run.process.base / annotator.calls, annotator.name)
        else:
            self.answerer = OpenAIChat(annotator, self.decoding, http_client)

    @property
    def endpoint(self) -> str:
        return self.answerer.endpoint if self.answerer else f"recorded:{Path(self.annotator.calls or '').name}"

    def question_hash(self, question: Question) -> str:
        sent = params_sent(self.annotator, self.decoding) if self.answerer else {}
        return request_hash(self.endpoint, self.annotator.model, question.request().messages, sent)

    def note(self, reply: Reply) -> None:
        """Stop the annotator where going on is pointless."""
        silent = reply.failure in ("connection", "timeout", "server_error", "rate_limited")
        self.silent = self.silent + 1 if silent else 0
        if reply.failure == "no_access":
            self.stopped = f"HTTP {reply.http_status}: {reply.error}"
        elif self.silent >= self.breaker:
            self.stopped = (
                f"{self.silent} attempts in a row without an answer; the last: {reply.failure}, {reply.error}"
            )


async def _ask_all(
    engines: Sequence[_Engine],
    questions: Sequence[Question],
    log: CallLog,
    account: Account,
    progress: Progress,
    concurrency: int,
) -> None:
    def keep(engine: _Engine, call: Call) -> None:
        log.append(call)
        _count(account, engine, call)
        progress.note(call.outcome, account.cost_usd)

    async def work(engine: _Engine, queue: asyncio.Queue[Question]) -> None:
        while not queue.empty() and engine.stopped is None:
            question = queue.get_nowait()
            if engine.recording is not None:
                keep(engine, _replay(engine, question))
            else:
                await _ask(engine, question, keep)
            progress.advance()

    workers = []
    for engine in engines:
        queue: asyncio.Queue[Question] = asyncio.Queue()
        for question in questions:
            if question.annotator == engine.annotator.name:
                queue.put_nowait(question)
        workers += [work(engine, queue) for _ in range(1 if engine.recording is not None else concurrency)]
    try:
        async with asyncio.TaskGroup() as group:
            for worker in workers:
                group.create_task(worker)
    finally:
        for engine in engines:
            if engine.answerer:
                await engine.answerer.close()
            if engine.stopped:
                account.stopped[engine.annotator.name] = engine.stopped


async def _ask(engine: _Engine, question: Question, keep: Any) -> None:
    """One question with its retries; every attempt is kept before the next step."""
    assert engine.answerer is not None
    decoding, request = engine.decoding, question.request()
    for retry in range(decoding.retry_attempts + 1):
        started, clock = datetime.now(UTC), time.monotonic()
        reply = await engine.answerer.ask(request)
        engine.note(reply)
        call = call_row(
            request,
            reply,
            engine.annotator,
            attempt=question.asked + retry + 1,
            endpoint=engine.endpoint,
            origin="live",
            requested=params_requested(decoding),
            started=started,
            latency_s=time.monotonic() - clock,
        )
        keep(engine, call)
        if call.valid or engine.stopped or retry == decoding.retry_attempts:
            return
        if reply.failure in ("rate_limited", "server_error", "timeout", "connection"):
            await asyncio.sleep(_delay(decoding.retry_delay_base, retry, reply.retry_after))


def _delay(base: float, retry: int, retry_after: float | None) -> float:
    """Exponential, with jitter so that calls do not come back in step; never less than the server asks for."""
    return max(base * 2.0**retry * random.uniform(0.75, 1.25), retry_after or 0.0)


def _replay(engine: _Engine, question: Question) -> Call:
    """The recorded answer to a question, or the reason why there is none."""
    assert engine.recording is not None
    request = question.request()
    row = engine.recording.get((request.pair_id, request.variant))
    if row is None:
        reply, origin = Reply(failure="not_recorded"), {}
    else:
        names = (
            "raw_text",
            "finish_reason",
            "served_model",
            "prompt_tokens",
            "completion_tokens",
            "system_fingerprint",
        )
        fields: dict[str, Any] = {name: row.get(name) for name in names}
        reply, origin = Reply(**fields, http_status=row.get("http_status")), dict(row)
    call = call_row(
        request,
        reply,
        engine.annotator,
        attempt=question.asked + 1,
        endpoint=engine.endpoint,
        origin="recorded",
        requested={},
        started=datetime.now(UTC),
        latency_s=0.0,
    )
    return _as_recorded(call, request, origin) if "request_hash" in origin else call


def _as_recorded(call: Call, request: Request, row: Mapping[str, Any]) -> Call:
    """A call of another log: as it was logged there, if it was given to this question."""
    asked = request_hash(row["endpoint"], row["requested_model"], request.messages, json.loads(row["params_sent"]))
    if asked != row["request_hash"]:
        return replace(
            call, outcome="other_question", mends="[]", category=None, magnitude=None, confidence=None, raw_text=None
        )
    return replace(Call(**row), attempt=call.attempt, origin="recorded", annotator=call.annotator)


def _take_over(log: CallLog, path: Path, questions: Iterable[Question], engines: Sequence[_Engine]) -> int:
    """Copy valid answers to the same questions from another log."""
    by_name = {engine.annotator.name: engine for engine in engines}
    with open_calls(path) as other:
        known = {(cell, call.request_hash): call for cell, call in other.answers().items()}
    taken = 0
    for question in questions:
        call = known.get((question.cell, by_name[question.annotator].question_hash(question)))
        if call is not None:
            log.append(replace(call, origin="reused", attempt=question.asked + 1))
            taken += 1
    return taken


def _count(account: Account, engine: _Engine, call: Call) -> None:
    account.attempts += 1
    account.outcomes[call.outcome] += 1
    account.mends.update(json.loads(call.mends))
    if call.origin == "recorded":
        account.recorded += 1
    if call.origin == "live":
        account.cost_usd += call.cost_usd or 0.0
        if call.served_model and call.served_model != call.requested_model:
            account.swapped.add(f"{engine.annotator.name}: asked {call.requested_model}, served {call.served_model}")


def _write_manifest(run: Run, log: CallLog, account: Account) -> None:
    write_manifest(
        run.calls,
        files={},
        inputs={},
        lambda_hash=run.process.lambda_hash,
        content=log.content_hash(),
        attempts=len(log),
        questions=account.questions,
        valid=account.valid,
    )
