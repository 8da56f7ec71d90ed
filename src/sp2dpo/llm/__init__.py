"""How to get an answer: what is asked, what a transport brings back, and what is read from it. Keeps nothing.

A *dialect* (`chat`, `decisions`) makes the body of a request and reads the response; a *transport* carries one to the
other (`http`, and in `sp2dpo.annotate` batches, Ray, and files of answers). Whatever the transport, the reading is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["FAILURES", "Limits", "Raw", "Reply", "Request", "storable"]

FAILURES: Final = {
    "rate_limited": "429: too many requests",
    "quota": "the quota or the credit is used up; asking again is pointless until that is mended",
    "server_error": "5xx from the endpoint",
    "timeout": "no answer within the time limit",
    "connection": "no connection, or it was cut",
    "bad_request": "4xx: the endpoint does not take the request",
    "no_access": "401, 403, 404 or 501: key, permission, or no such model or path; asking again is pointless",
    "bad_response": "the endpoint's own JSON is not what the protocol says",
    "truncated": "cut at the output cap",
    "filtered": "withheld by the provider's content filter",
    "refused": "the model declined",
    "other_model": "another model answered than the one asked for",
    "batch_failed": "a batch job ended without an answer to it",
    "batch_expired": "a batch job ran out of time before it",
    "other_question": "recorded under another prompt, model or setting",
    "not_recorded": "the recording has no answer to this question",
}


@dataclass(frozen=True)
class Request:
    """One call: all that goes over the wire. `variants` has one name, or for typed decisions several.

    `hash` identifies the question: equal hashes mean that the same was asked of the same model. `asked` counts earlier
    attempts.
    """

    pair_id: str
    variants: tuple[str, ...]
    path: str
    body: Mapping[str, Any]
    hash: str
    asked: int = 0


@dataclass(frozen=True)
class Limits:
    """What `x-ratelimit-limit-…` headers say, taken to be a minute's."""

    requests: float | None = None
    tokens: float | None = None


@dataclass(frozen=True)
class Raw:
    """What a transport brings back, without the key in it. `failure` (of `FAILURES`) if there is no whole response;
    `sent` is false if nothing can have reached the other side, so that nothing can be billed."""

    status: int | None = None
    body: str = ""
    failure: str | None = None
    error: str | None = None
    retry_after: float | None = None
    limits: Limits | None = None
    request_id: str | None = None
    latency_s: float = 0.0
    sent: bool = True


@dataclass(frozen=True)
class Reply:
    """What was read for one variant. `failure` is None if there is a text to read, else a key of `FAILURES`."""

    raw_text: str | None = None
    failure: str | None = None
    error: str | None = None
    http_status: int | None = None
    finish_reason: str | None = None
    served_model: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    reasoning_tokens: int | None = None
    system_fingerprint: str | None = None
    request_id: str | None = None


def storable(text: str) -> str:
    """`text` as a file can hold it: half of a surrogate pair is written as its escape."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
