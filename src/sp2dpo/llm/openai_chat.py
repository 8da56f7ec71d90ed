"""Any OpenAI-compatible chat endpoint, through the `openai` package with its own retries off.

No exception of the client leaves this module, because they carry the request's headers and with them the key.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, Final

from sp2dpo.errors import ProcessError
from sp2dpo.llm import Reply, Request, storable
from sp2dpo.reply import KEYS
from sp2dpo.rubric import CATEGORIES
from sp2dpo.settings import Annotator, Decoding

__all__ = ["OpenAIChat", "params_requested", "params_sent"]

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

_NEUTRAL: Final = {"repetition_penalty": 1.0}
"""Table 6 settings that are not part of the protocol and are sent only if they do something."""

_SHORTEST_KEY: Final = 8
"""A shorter one ("none", "EMPTY", "0") is no secret, and blacking it out would alter answers."""

_CLIENT_SIDE: Final = ("timeout", "retry_attempts", "retry_delay_base")


def params_requested(decoding: Decoding) -> dict[str, Any]:
    """All settings of Table 6 that concern the model, null ones too."""
    return {name: value for name, value in decoding.model_dump(mode="json").items() if name not in _CLIENT_SIDE}


def params_sent(annotator: Annotator, decoding: Decoding) -> dict[str, Any]:
    """What goes over the wire: what is requested, less null and neutral settings and `omit`; JSON mode and `extra`."""
    params = {
        name: value
        for name, value in params_requested(decoding).items()
        if value is not None and name not in annotator.omit and _NEUTRAL.get(name) != value
    }
    if annotator.response_format == "json_object":
        params["response_format"] = {"type": "json_object"}
    elif annotator.response_format == "json_schema":
        schema = {"name": "semantic_gap", "strict": True, "schema": GAP_SCHEMA}
        params["response_format"] = {"type": "json_schema", "json_schema": schema}
    return params | annotator.extra


def _key(annotator: Annotator) -> str:
    """The key, from the environment.

    Raises:
        ProcessError: the variable is not set, or holds what no header can carry.
    """
    if annotator.api_key_env is None:
        return "none"
    key = os.environ.get(annotator.api_key_env, "").strip()
    if not key:
        raise ProcessError(
            f"annotator '{annotator.name}' reads its key from {annotator.api_key_env}, which is not set: "
            f"export {annotator.api_key_env}=…"
        )
    if not (key.isascii() and key.isprintable()):
        raise ProcessError(f"{annotator.api_key_env} holds characters that no key has: set it again, on one line")
    return key


class OpenAIChat:
    """A model behind `base_url`. `http_client` replaces the HTTP client, for tests."""

    def __init__(self, annotator: Annotator, decoding: Decoding, http_client: Any = None) -> None:
        import openai

        self.endpoint = annotator.base_url or ""
        self._key = _key(annotator)
        self._model = annotator.model
        self._sent = params_sent(annotator, decoding)
        self._client = openai.AsyncOpenAI(
            api_key=self._key,
            base_url=self.endpoint,
            timeout=decoding.timeout,
            max_retries=0,
            http_client=http_client,
        )

    async def ask(self, request: Request) -> Reply:
        import openai

        body = {"model": self._model, "messages": list(request.messages), **self._sent}
        try:
            raw = await self._client.post("/chat/completions", body=body, cast_to=object)
        except openai.APIStatusError as error:
            return self._status(
                error.status_code, self._clean(str(error.body or error.message)), error.response.headers
            )
        except openai.APITimeoutError:
            return self._failed("timeout", f"no answer within {self._client.timeout} s")
        except openai.APIError as error:
            return self._failed(
                "connection", self._clean(f"{type(error.__cause__ or error).__name__}: {error.message}")
            )
        except (ValueError, RecursionError) as error:  # a body that calls itself JSON and is not
            return self._failed("bad_response", self._clean(f"{type(error).__name__}: {error}"), http_status=200)
        return self._completion(raw)

    async def close(self) -> None:
        await self._client.close()

    def _status(self, status: int, error: str, headers: Mapping[str, str]) -> Reply:
        kinds = {401: "no_access", 403: "no_access", 404: "no_access", 408: "timeout", 429: "rate_limited"}
        kind = kinds.get(status, "server_error" if status >= 500 else "bad_request")
        return self._failed(kind, error, http_status=status, retry_after=_seconds(headers.get("retry-after")))

    def _failed(self, failure: str, error: str, **more: Any) -> Reply:
        return Reply(failure=failure, error=error[:2000], params_sent=self._sent, **more)

    def _completion(self, raw: Any) -> Reply:
        """Read a chat completion without trusting its shape."""
        choice = _first(_get(raw, "choices"))
        message = _get(choice, "message")
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str | None):
            return self._failed("bad_response", self._clean(str(raw)), http_status=200)
        finish, refusal = self._text(_get(choice, "finish_reason")), message.get("refusal")
        failure = {"length": "truncated", "content_filter": "filtered"}.get(finish or "")
        usage = _get(raw, "usage")
        return Reply(
            raw_text=self._text(message.get("content")),
            failure="refused" if refusal else failure,
            error=self._clean(str(refusal))[:2000] if refusal else None,
            http_status=200,
            finish_reason=finish,
            served_model=self._text(_get(raw, "model")),
            prompt_tokens=_count(_get(usage, "prompt_tokens")),
            completion_tokens=_count(_get(usage, "completion_tokens")),
            system_fingerprint=self._text(_get(raw, "system_fingerprint")),
            params_sent=self._sent,
        )

    def _clean(self, text: str) -> str:
        """`text` as it may be kept: without the key, wherever the other side repeats it."""
        return storable(text if len(self._key) < _SHORTEST_KEY else text.replace(self._key, "[key]"))

    def _text(self, value: Any) -> str | None:
        return self._clean(value) if isinstance(value, str) else None


def _get(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, Mapping) else None


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else None


def _count(value: Any) -> int | None:
    """A number of tokens, or None for what is none or more than a database can hold."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63 else None


def _seconds(header: str | None) -> float | None:
    """`retry-after` as seconds, where it is a number."""
    try:
        seconds = float(header or "")
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None
