"""Before money is spent: is each annotator there, is it the model that was asked for, and does it take what is sent?

One list of models (free) and one paid call for each annotator. The call asks for a word in plain prose under the JSON
mode of the panel: what comes back tells whether that mode is enforced or ignored. Nothing goes into a call log.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final, Literal
from urllib.parse import quote

from sp2dpo.annotate.teacher import body_of, same_model
from sp2dpo.cost import cost_usd
from sp2dpo.decision import parse_decision
from sp2dpo.errors import ProcessError
from sp2dpo.llm import Raw, Reply
from sp2dpo.llm.chat import CHAT_PATH, chat_body, failed, json_of, read_chat
from sp2dpo.llm.decisions import read_decisions
from sp2dpo.llm.http import Endpoint, read_key
from sp2dpo.process import Process
from sp2dpo.providers import profile_of
from sp2dpo.providers.profiles import CAPS
from sp2dpo.settings import Annotator, Decoding

__all__ = ["Check", "preflight"]

State = Literal["ok", "warn", "fail"]

SOON: Final = timedelta(days=60)
OLD_PRICE: Final = timedelta(days=180)

_WORD: Final = (
    {"role": "system", "content": "Answer with one English word, in lower case. Write no JSON and nothing else."},
    {"role": "user", "content": "Which colour has the sky at noon when there are no clouds?"},
)
_PAIR: Final = {
    "pair_id": "",
    "prompt": [{"role": "user", "content": "How many legs does an ant have?"}],
    "chosen": [{"role": "assistant", "content": "Six."}],
    "rejected": [{"role": "assistant", "content": "Eight."}],
}


@dataclass(frozen=True)
class Check:
    """What was looked at, for which annotator, and what was found."""

    annotator: str
    what: str
    state: State
    found: str

    def as_json(self) -> dict[str, str]:
        return asdict(self)


def preflight(
    process: Process, *, today: date | None = None, connector: Callable[[], Any] | None = None
) -> list[Check]:
    """Check every annotator that is asked over the network; one paid call each.

    Args:
        connector: makes the aiohttp connector of an endpoint, for tests.
    """
    return asyncio.run(_all(process, process.settings.panel.asked, today or datetime.now(UTC).date(), connector))


async def _all(
    process: Process, asked: Sequence[Annotator], today: date, connector: Callable[[], Any] | None
) -> list[Check]:
    several = await asyncio.gather(*(_one(process, annotator, today, connector) for annotator in asked))
    return [check for checks in several for check in checks]


async def _one(process: Process, annotator: Annotator, today: date, connector: Callable[[], Any] | None) -> list[Check]:
    def check(what: str, state: State, found: str) -> Check:
        return Check(annotator.name, what, state, found)

    checks = list(_on_paper(process, annotator, today))
    try:
        key = read_key(annotator.api_key_env, f"annotator '{annotator.name}'")
    except ProcessError as error:
        return [check("key", "fail", str(error)), *checks]
    if "{node}" in str(annotator.base_url):
        return [
            check("address", "fail", "{node} stands for the nodes of a Ray cluster; give one address"),
            *checks,
        ]
    checks.insert(0, check("key", "ok", f"{annotator.api_key_env} is set" if key else "none is needed"))
    timeout = min(60.0, process.settings.panel.decoding.timeout)

    def endpoint() -> Endpoint:
        return Endpoint(annotator.base_url or "", key, timeout, connector() if connector else None)

    async with endpoint() as one:
        checks.append(check("model", *await _alive(one, annotator, today)))
    async with endpoint() as another:  # some servers break a connection on which they met an error
        checks += [check(*found) for found in await _call(process, another, annotator)]
    return checks


def _on_paper(process: Process, annotator: Annotator, today: date) -> Iterator[Check]:
    """What can be known without asking."""
    problems = profile_of(annotator).problems(process.settings.panel.decoding, today, annotator)
    for state, text in problems:
        if state != "note":
            yield Check(annotator.name, "settings", "fail" if state == "error" else "warn", text)
    notes = [text.removeprefix("not verified: ") for state, text in problems if state == "note"]
    if notes:
        yield Check(annotator.name, "not verified", "ok", "; ".join(notes))
    price = annotator.price
    if price is None:
        yield Check(annotator.name, "price", "warn", "none given: cost and --budget-usd are not available")
    elif today - price.as_of > OLD_PRICE:
        yield Check(annotator.name, "price", "warn", f"as of {price.as_of}: look it up again")


async def _alive(endpoint: Endpoint, annotator: Annotator, today: date) -> tuple[State, str]:
    """Whether the endpoint knows the model, and until when."""
    body = json_of(raw) if (raw := await endpoint.get(f"/models/{quote(annotator.model)}")).status == 200 else None
    if not isinstance(body, dict) or body.get("id") is None:
        raw = await endpoint.get("/models")
        if raw.failure is not None:
            return "fail", f"{annotator.base_url} does not answer: {raw.error}"
        if raw.status in (401, 403):
            return "fail", f"the key is not taken (HTTP {raw.status}): {raw.body[:200]}"
        models = _models(json_of(raw))
        if not models:
            return "warn", f"the endpoint has no list of models (HTTP {raw.status})"
        body = next((model for model in models if same_model(annotator.model, model.get("id"), None)), None)
        if body is None:
            known = ", ".join(sorted(str(model.get("id")) for model in models)[:8])
            return ("warn", f"not in the list of models; there are: {known}")
    return _lifetime(body, today)


def _models(body: Any) -> list[dict[str, Any]]:
    data = body.get("data") if isinstance(body, dict) else None
    models = [model for model in data if isinstance(model, dict)] if isinstance(data, list) else []
    return [model for model in models if isinstance(model.get("id"), str)]


def _lifetime(model: Mapping[str, Any], today: date) -> tuple[State, str]:
    ends = _day(model.get("shutdown_date"))
    if ends is None:
        return "ok", "there; the endpoint names no day on which it ends"
    if ends <= today:
        return "fail", f"shut down on {ends}"
    return ("warn" if ends - today < SOON else "ok"), f"there until {ends}"


def _day(value: Any) -> date | None:
    """A day, as ISO text or as seconds since 1970."""
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return datetime.fromtimestamp(value, UTC).date()
        return date.fromisoformat(str(value)[:10])
    except (ValueError, OverflowError, OSError):
        return None


Found = tuple[str, State, str]


async def _call(process: Process, endpoint: Endpoint, annotator: Annotator) -> list[Found]:
    """The one paid call."""
    sent = process.sent(annotator.name)
    params: dict[str, Any] = dict(sent["params"])
    if annotator.kind == "decisions":
        path, body = body_of("decisions", annotator.model, process.pack, _PAIR, process.settings.panel.variants, params)
    else:
        path, body = CHAT_PATH, chat_body(annotator.model, _WORD, params)
    raw = await endpoint.post(path, body)
    problem = failed(raw)
    if problem is None and annotator.kind == "chat_json" and read_chat(raw).failure == "bad_response":
        problem = read_chat(raw)
    if problem is not None:
        return [("call", "fail", f"{problem.failure}: {problem.error}{_advice(raw, annotator, params)}")]
    taken = f"taken: {', '.join(params) or 'none'}"
    if sent["refused"]:
        taken += f"; not sent, because the model refuses them: {', '.join(sent['refused'])}"
    if sent["ignored"]:
        taken += f"; without effect: {', '.join(sent['ignored'])}"
    found: list[Found] = [("parameters", "ok", taken)]
    if annotator.kind == "decisions":
        replies = read_decisions(params["api"], raw, process.settings.panel.variants)
        found += _decided(replies)
    else:
        replies = {"": read_chat(raw)}
        found += _chatted(replies[""], params)
    return [*found, *_answered(annotator, raw, next(iter(replies.values()))), *_limits(raw)]


def _advice(raw: Raw, annotator: Annotator, params: Mapping[str, Any]) -> str:
    """What to do about refused parameters, as the process file takes it."""
    if raw.status not in (400, 422):
        return ""
    named = {*re.findall(r"[a-z_]+", raw.body)}
    blamed = [name for name in params if name in named]
    settings = ["max_tokens" if name in CAPS else name for name in blamed if name not in annotator.extra]
    omit = [name for name in settings if name in Decoding.model_fields]
    ways = [f"put what it refuses under omit: [{', '.join(omit)}]"] if omit else []
    ways += ["set response_format: none"] if "response_format" in settings else []
    other = [name for name in blamed if name in annotator.extra or name in profile_of(annotator).reasoning]
    ways += [f"give another value to {', '.join(other)} under extra, or take it out"] if other else []
    return f" What to do: {'; '.join(ways)}." if ways else ""


def _chatted(reply: Reply, params: Mapping[str, Any]) -> Iterator[Found]:
    text, mode = (reply.raw_text or "").strip(), params.get("response_format", {}).get("type")
    hidden = reply.reasoning_tokens or 0
    if hidden:
        yield (
            "reasoning",
            "warn",
            f"{hidden} hidden tokens were spent; they are billed as output",
        )
    if not text:
        yield "answer", "fail", f"empty (finish_reason {reply.finish_reason}): raise max_tokens or switch reasoning off"
    elif mode is None:
        yield "JSON mode", "warn", "none is asked for: answers are read, and mended where that is safe"
    elif _is_object(text):
        yield "JSON mode", "ok", f"{mode} is enforced: asked for a word, JSON came"
    elif reply.finish_reason == "length" and text.startswith("{"):
        yield "JSON mode", "ok", f"{mode} is enforced: asked for a word, JSON came, and was cut"
    else:
        yield "JSON mode", "fail", f"{mode} is ignored: asked for a word, {text[:40]!r} came; set response_format: none"


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _decided(replies: Mapping[str, Reply]) -> Iterator[Found]:
    problems = {variant: reply.failure or parse_decision(reply.raw_text).problem for variant, reply in replies.items()}
    for variant, problem in problems.items():
        if problem:
            yield f"decision {variant}", "fail", f"{problem}: {replies[variant].error or replies[variant].raw_text}"
    if not any(problems.values()):
        yield "decisions", "ok", f"{len(replies)} variants in one call"


def _answered(annotator: Annotator, raw: Raw, reply: Reply) -> Iterator[Found]:
    body = json_of(raw)
    served = body.get("model") if isinstance(body, dict) else None
    if not isinstance(served, str):
        yield "served model", "warn", "the endpoint does not say which model answered"
    elif same_model(annotator.model, served, annotator.served_as):
        yield "served model", "ok", served
    else:
        yield (
            "served model",
            "fail",
            f"asked for {annotator.model}, {served} answered; if that is the one you mean: served_as: {served}",
        )
    cost = cost_usd(annotator.price, reply.prompt_tokens, reply.completion_tokens)
    if cost is not None:
        yield "cost of this call", "ok", f"${cost:.6f}"
    elif annotator.kind == "chat_json" and reply.prompt_tokens is None:
        yield "tokens", "warn", "the endpoint does not count tokens: cost cannot be known"


def _limits(raw: Raw) -> Iterator[Found]:
    limits = raw.limits
    if limits is not None and (limits.requests or limits.tokens):
        parts = [f"{n:,.0f} {what}" for n, what in ((limits.requests, "requests"), (limits.tokens, "tokens")) if n]
        yield "rate limit", "ok", f"{' and '.join(parts)} a minute, as the endpoint says; they are kept to"
