"""The chat dialect: a question as `/chat/completions` takes it, and its response read without trusting its shape."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from sp2dpo.llm import Raw, Reply, storable
from sp2dpo.reply import KEYS
from sp2dpo.rubric import CATEGORIES

__all__ = ["CHAT_PATH", "GAP_SCHEMA", "chat_body", "failed", "json_of", "read_chat", "text_of", "tokens_of"]

CHAT_PATH: Final = "/chat/completions"

_GRID: Final = [step / 100 for step in range(101)]

GAP_SCHEMA: Final = {
    "type": "object",
    "properties": {
        KEYS[0]: {"type": "string", "enum": list(CATEGORIES)},
        KEYS[1]: {"type": "number", "enum": _GRID},
        KEYS[2]: {"type": "number", "enum": _GRID},
    },
    "required": list(KEYS),
    "additionalProperties": False,
}
"""Two decimals, as all of the paper's published answers have; an enumeration because some servers enforce no bounds."""

_STATUS: Final = {401: "no_access", 402: "quota", 403: "no_access", 404: "no_access", 408: "timeout", 501: "no_access"}
_QUOTA = re.compile(r"insufficient_quota|PerDay|Arrearage|credit balance", re.IGNORECASE)
_ERROR_LENGTH: Final = 2000


def chat_body(model: str, messages: Sequence[Mapping[str, str]], sent: Mapping[str, Any]) -> dict[str, Any]:
    """The whole body of one call."""
    return {"model": model, "messages": [dict(message) for message in messages], **sent}


def failed(raw: Raw) -> Reply | None:
    """The failure that a transport met or a status tells of; None if there is a response to read."""
    if raw.failure is not None:
        return _failure(raw, raw.failure, raw.error)
    status = raw.status or 0
    if status == 200:
        return None
    kind = _STATUS.get(status, "server_error" if status >= 500 else "bad_request")
    if status == 429:
        kind = "quota" if _QUOTA.search(raw.body) else "rate_limited"
    return _failure(raw, kind, raw.body or f"HTTP {status}")


def _failure(raw: Raw, kind: str, error: str | None) -> Reply:
    text = None if error is None else storable(error)[:_ERROR_LENGTH]
    return Reply(failure=kind, error=text, http_status=raw.status, request_id=raw.request_id)


def json_of(raw: Raw) -> Any:
    """The body as JSON; None if it is none, or if a key is in one object twice."""
    try:
        return json.loads(raw.body, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        return None


def read_chat(raw: Raw) -> Reply:
    """Read a chat completion without trusting its shape."""
    problem = failed(raw)
    if problem is not None:
        return problem
    body = json_of(raw)
    choice = _only(_get(body, "choices"))
    message = _get(choice, "message")
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), str | None):
        return _failure(raw, "bad_response", raw.body or "an empty body")
    finish, refusal = text_of(_get(choice, "finish_reason")), message.get("refusal")
    failure = {"length": "truncated", "content_filter": "filtered"}.get(finish or "")
    return Reply(
        raw_text=text_of(message.get("content")),
        failure="refused" if refusal else failure,
        error=(text_of(refusal) or "declined")[:_ERROR_LENGTH] if refusal else None,
        http_status=raw.status,
        finish_reason=finish,
        served_model=text_of(_get(body, "model")),
        system_fingerprint=text_of(_get(body, "system_fingerprint")),
        request_id=raw.request_id,
        **tokens_of(_get(body, "usage")),
    )


def tokens_of(usage: Any) -> dict[str, int | None]:
    """Tokens as an endpoint bills them; `completion_tokens` include the hidden ones of reasoning.

    Some endpoints leave the hidden ones out of `completion_tokens` and only count them in `total_tokens`.
    """
    prompt, completion, total = (_count(_get(usage, f"{what}_tokens")) for what in ("prompt", "completion", "total"))
    hidden = _count(_get(_get(usage, "completion_tokens_details"), "reasoning_tokens"))
    hidden_only = (total or 0) - (prompt or 0) - (completion or 0)
    if prompt is not None and completion is not None and hidden_only > 0:
        hidden, completion = max(hidden or 0, hidden_only), completion + hidden_only
    return {"prompt_tokens": prompt, "completion_tokens": completion, "reasoning_tokens": hidden}


def text_of(value: Any) -> str | None:
    """A text as a file can hold it; None for what is no text."""
    return storable(value) if isinstance(value, str) else None


def _get(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, Mapping) else None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key is given twice")
    return value


def _only(value: Any) -> Any:
    return value[0] if isinstance(value, list) and len(value) == 1 else None


def _count(value: Any) -> int | None:
    """A number of tokens, or None for what is none or more than a database can hold."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63 else None
