"""The faults of the fault server, each by name: what an ideal client does about it, and how it spoils an answer.

Knows nothing of routes, limits or batches.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final

from aiohttp import web

__all__ = [
    "CATEGORY",
    "CONFIDENCE",
    "FAULTS",
    "KEYS",
    "MAGNITUDE",
    "SPOILT",
    "as_judgement",
    "broken_off",
    "close",
    "cures",
    "error",
    "instance",
    "judgement",
    "question_key",
    "unit",
]

CATEGORY, MAGNITUDE, CONFIDENCE = KEYS = tuple(f"semantic_gap_{w}" for w in ("category", "magnitude", "confidence"))
ALIASES: Final = {
    "Safety": "harmlessness",
    "Factuality": "truthfulness",
    "Instruction": "instruction following",
    "Reasoning": "REASONING",
    "Helpfulness": "utility",
    "Style": "tone",
}
"""The six categories, each with another spelling."""

FAULTS: Final = {
    "429": ("retry", "HTTP 429 with Retry-After"),
    "429_silent": ("retry", "HTTP 429 without Retry-After"),
    "500": ("retry", "HTTP 500"),
    "503": ("retry", "HTTP 503"),
    "timeout": ("retry", "no answer ever; the connection stays open"),
    "cut": ("retry", "the connection is closed before an answer"),
    "cut_body": ("retry", "the connection is closed in mid-body"),
    "html": ("retry", "a web page with HTTP 200"),
    "garbage_gzip": ("retry", "a body that says it is gzip and is not"),
    "empty": ("retry", "an empty text"),
    "truncated": ("retry", "half of the text, finish_reason length"),
    "refused": ("retry", "no text but message.refusal"),
    "filtered": ("retry", "no text, finish_reason content_filter"),
    "malformed": ("retry", "JSON without some of its quotes"),
    "out_of_range": ("retry", "a magnitude of 7.5"),
    "nan": ("retry", "a magnitude of NaN"),
    "unknown_category": ("retry", "a category that there is not"),
    "two_objects": ("retry", "two judgements that differ"),
    "missing_key": ("retry", "no confidence"),
    "fenced": ("mend", "a Markdown fence around the object"),
    "chatty": ("mend", "prose around the object"),
    "array_of_one": ("mend", "the object in an array"),
    "trailing_comma": ("mend", "a comma before the closing brace"),
    "extra_keys": ("mend", "a fourth key"),
    "numeric_string": ("mend", "a magnitude in quotes"),
    "alias": ("mend", "another spelling of the category"),
    "other_model": ("stop", "a valid answer of another model"),
    "quota": ("stop", "HTTP 429 insufficient_quota"),
}
"""Name → (what an ideal client does about it, what happens). A mend needs no second request."""


def cures(*wanted: str) -> tuple[str, ...]:
    """The faults that an ideal client cures in one of these ways."""
    return tuple(name for name, (cure, _) in FAULTS.items() if cure in wanted)


def unit(*parts: object) -> float:
    """A number in [0, 1) that follows from the parts."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def judgement(key: str) -> dict[str, Any]:
    """A valid answer to the question with this key."""
    n = int(key, 16)
    return {CATEGORY: tuple(ALIASES)[n % 6], MAGNITUDE: n // 6 % 101 / 100, CONFIDENCE: n // 606 % 101 / 100}


SPOILT: Final[dict[str, Callable[[dict[str, Any]], str]]] = {
    "fenced": lambda gap: f"```json\n{json.dumps(gap)}\n```",
    "chatty": lambda gap: f"I compared the two responses.\n{json.dumps(gap)}\nTell me if you need more.",
    "array_of_one": lambda gap: json.dumps([gap]),
    "trailing_comma": lambda gap: json.dumps(gap)[:-1] + ",}",
    "extra_keys": lambda gap: json.dumps(gap | {"explanation": "The first one is better."}),
    "numeric_string": lambda gap: json.dumps(gap | {MAGNITUDE: str(gap[MAGNITUDE])}),
    "alias": lambda gap: json.dumps(gap | {CATEGORY: ALIASES[gap[CATEGORY]]}),
    "malformed": lambda gap: json.dumps(gap).replace('"', "", 3),
    "out_of_range": lambda gap: json.dumps(gap | {MAGNITUDE: 7.5}),
    "nan": lambda gap: json.dumps(gap | {MAGNITUDE: math.nan}),
    "unknown_category": lambda gap: json.dumps(gap | {CATEGORY: "Vibes"}),
    "two_objects": lambda gap: f"{json.dumps(gap)}\n{json.dumps(gap | {MAGNITUDE: (gap[MAGNITUDE] + 0.5) % 1})}",
    "missing_key": lambda gap: json.dumps({CATEGORY: gap[CATEGORY], MAGNITUDE: gap[MAGNITUDE]}),
    "empty": lambda gap: "",
    "truncated": lambda gap: json.dumps(gap)[:30],
    "filtered": lambda gap: "",
}
"""How a fault writes a judgement."""


def question_key(body: Mapping[str, Any]) -> str:
    """What tells one question from another: the model and the messages of a request."""
    text = json.dumps([body.get("model"), body.get("messages")])
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def instance(schema: Mapping[str, Any], key: str) -> Any:
    """A value that a JSON schema allows, chosen by the key."""
    if "enum" in schema:
        return schema["enum"][int(unit(key, len(schema["enum"])) * len(schema["enum"]))]
    if "const" in schema:
        return schema["const"]
    if schema.get("type") == "object":
        properties = schema.get("properties", {})
        return {
            name: instance(part, hashlib.md5((key + name).encode()).hexdigest()) for name, part in properties.items()
        }
    return {"number": schema.get("minimum", 0), "integer": schema.get("minimum", 0), "boolean": True, "array": []}.get(
        str(schema.get("type")), "text"
    )


def as_judgement(content: str | None, key: str) -> dict[str, Any]:
    """The judgement in a text, or one made from the key if it holds none."""
    with suppress(ValueError, TypeError):
        value = json.loads(content or "")
        if isinstance(value, dict) and {*KEYS} <= {*value}:
            return value
    return judgement(key)


def error(status: int, message: str, code: str | None = None, param: str | None = None) -> web.Response:
    """An error as OpenAI words its shape."""
    kind = "insufficient_quota" if code == "insufficient_quota" else "invalid_request_error"
    return web.json_response({"error": {"message": message, "type": kind, "param": param, "code": code}}, status=status)


def close(request: web.Request) -> None:
    """Close the connection under a request."""
    if request.transport is not None:
        request.transport.close()


async def broken_off(request: web.Request, body: bytes) -> web.StreamResponse:
    """Half of a body that was promised whole."""
    response = web.StreamResponse(headers={"Content-Length": str(len(body))})
    await response.prepare(request)
    await response.write(body[: len(body) // 2])
    close(request)
    return response
