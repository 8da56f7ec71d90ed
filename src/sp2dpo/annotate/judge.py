"""From a reply to a row of the call log. Nothing is asked here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from sp2dpo.annotate.plan import request_hash
from sp2dpo.calls import Call
from sp2dpo.cost import cost_usd
from sp2dpo.hashing import canonical_json
from sp2dpo.llm import Reply, Request
from sp2dpo.reply import Parsed, parse_reply
from sp2dpo.settings import Annotator

__all__ = ["call_row"]


def call_row(
    request: Request,
    reply: Reply,
    annotator: Annotator,
    *,
    attempt: int,
    endpoint: str,
    origin: str,
    requested: Mapping[str, Any],
    started: datetime,
    latency_s: float,
) -> Call:
    """The row of one attempt: what was asked, what came back, and what was read from it."""
    parsed = Parsed(None, problem=reply.failure) if reply.failure else parse_reply(reply.raw_text)
    gap = parsed.gap
    return Call(
        pair_id=request.pair_id,
        annotator=annotator.name,
        variant=request.variant,
        attempt=attempt,
        origin=origin,
        requested_model=annotator.model,
        served_model=reply.served_model,
        endpoint=endpoint,
        request_hash=request_hash(endpoint, annotator.model, request.messages, reply.params_sent),
        params_requested=canonical_json(dict(requested)),
        params_sent=canonical_json(dict(reply.params_sent)),
        started_at=started.astimezone(UTC).isoformat(timespec="milliseconds"),
        latency_s=round(latency_s, 4),
        http_status=reply.http_status,
        finish_reason=reply.finish_reason,
        outcome=parsed.problem or ("repaired" if parsed.mends else "ok"),
        mends=json.dumps(parsed.mends),
        raw_text=reply.raw_text,
        category=gap.category if gap else None,
        magnitude=gap.magnitude if gap else None,
        confidence=gap.confidence if gap else None,
        prompt_tokens=reply.prompt_tokens,
        completion_tokens=reply.completion_tokens,
        cost_usd=cost_usd(annotator.price, reply.prompt_tokens, reply.completion_tokens),
        system_fingerprint=reply.system_fingerprint,
        error=reply.error,
    )
