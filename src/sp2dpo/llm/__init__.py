"""How to get a completion. Nothing here knows what is asked, or keeps anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = ["FAILURES", "Answerer", "Reply", "Request", "storable"]

FAILURES = {
    "rate_limited": "429: too many requests, or the quota is used up",
    "server_error": "5xx from the endpoint",
    "timeout": "no answer within the time limit",
    "connection": "no connection, or it was cut",
    "bad_request": "4xx: the endpoint does not take the request",
    "no_access": "401, 403 or 404: key, permission or model name; asking again is pointless",
    "bad_response": "the endpoint's own JSON is not a chat completion",
    "truncated": "cut at the output cap",
    "filtered": "withheld by the provider's content filter",
    "refused": "the model declined",
    "other_question": "recorded under another prompt, model or setting",
    "not_recorded": "the recording has no answer to this question",
}


@dataclass(frozen=True)
class Request:
    """One question to one model."""

    pair_id: str
    variant: str
    messages: Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Reply:
    """What came back. `failure` is None if there is a text to read, else a key of `FAILURES`."""

    raw_text: str | None = None
    failure: str | None = None
    error: str | None = None
    http_status: int | None = None
    finish_reason: str | None = None
    served_model: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    system_fingerprint: str | None = None
    retry_after: float | None = None
    params_sent: Mapping[str, Any] = field(default_factory=dict)


def storable(text: str) -> str:
    """`text` as a file can hold it: half of a surrogate pair is written as its escape."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class Answerer(Protocol):
    """Something that answers requests; it never raises for what the other side does."""

    endpoint: str

    async def ask(self, request: Request) -> Reply: ...

    async def close(self) -> None: ...
