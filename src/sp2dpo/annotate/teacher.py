"""One annotator of the panel: from a question to its request, and from a response to rows of the call log.

Asks nothing and keeps nothing; the same for every transport.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from sp2dpo.annotate.money import FRAMING_TOKENS, most_tokens, worst_case_usd
from sp2dpo.annotate.plan import Question
from sp2dpo.calls import Call
from sp2dpo.cost import cost_usd
from sp2dpo.decision import parse_decision
from sp2dpo.hashing import canonical_json, sha256_json
from sp2dpo.llm import Raw, Reply, Request
from sp2dpo.llm.chat import CHAT_PATH, chat_body, read_chat
from sp2dpo.llm.decisions import DECISION_PATHS, Api, decision_body, read_decisions, texts_read
from sp2dpo.prompts import PromptPack, render, render_input
from sp2dpo.providers import Batch, params_requested, profile_of
from sp2dpo.reply import Parsed, parse_reply
from sp2dpo.runs import Run
from sp2dpo.settings import Annotator

__all__ = ["Teacher", "body_of", "request_hash", "same_model"]

_SNAPSHOT = re.compile(r"-(?:\d{4}-?\d{2}-?\d{2}|\d{2}-\d{2}|\d{3,4})|:latest|@.*")
"""What a provider adds to the name that was asked for when it says which snapshot answered."""


def request_hash(endpoint: str, body: Mapping[str, Any]) -> str:
    """Identity of a question: equal hashes mean that the same was asked of the same model."""
    rest = {name: value for name, value in body.items() if name not in ("model", "messages")}
    return sha256_json([endpoint, body["model"], body.get("messages"), rest])


def body_of(
    kind: str,
    model: str,
    pack: PromptPack,
    pair: Mapping[str, Any],
    variants: Sequence[str],
    params: Mapping[str, Any],
) -> tuple[str, dict[str, Any]]:
    """Path and body of the call that asks about a pair under some variants; a predictor is asked under none."""
    texts = pair["prompt"], pair["chosen"], pair["rejected"]
    if kind == "distilled":
        return "", {"model": model, "pair": texts, **params}
    if kind != "decisions":
        return CHAT_PATH, chat_body(model, render(pack, variants[0], *texts), params)
    assert pack.decisions is not None
    extra = {name: value for name, value in params.items() if name not in ("api", "variants")}
    api: Api = params["api"]
    return DECISION_PATHS[api], decision_body(
        api, model, render_input(pack.decisions, *texts), pack.decisions, variants, extra
    )


def same_model(requested: str, served: str | None, served_as: str | None) -> bool:
    """Whether the model that answered is the one asked for: the same name, or a dated snapshot of it."""
    if served is None:
        return True
    one, other = (name.removeprefix("models/").casefold() for name in (served_as or requested, served))
    return one == other or (
        served_as is None and other.startswith(one) and bool(_SNAPSHOT.fullmatch(other[len(one) :]))
    )


class Teacher:
    """An annotator that is asked over the network.

    Args:
        served: the name under which its model has answered before in this run; another one is another model.
    """

    def __init__(self, run: Run, annotator: Annotator, served: str | None = None) -> None:
        self.annotator = annotator
        self.name, self.endpoint = annotator.name, annotator.base_url or ""
        self._profile = profile_of(annotator)
        self._pack = run.process.pack
        sent = run.process.sent(annotator.name)
        self._params: dict[str, Any] = dict(sent["params"])
        self._served = served
        self._requested = canonical_json(params_requested(run.process.settings.panel.decoding))
        self._params_json = canonical_json(self._params)
        self._ignored_json = json.dumps(sent["ignored"])
        self.cap: int | None = 0 if self.decides else next((self._params[n] for n in _CAPS if n in self._params), None)

    @property
    def batch(self) -> Batch | None:
        """Limits and discount of the provider's batches."""
        return self._profile.batch

    @property
    def decides(self) -> bool:
        """Whether one call asks all variants of a pair."""
        return self.annotator.kind == "decisions"

    @property
    def unbounded(self) -> str | None:
        """Why nobody can say what a call costs at most; None if its output has a cap."""
        if self.cap is None:
            return (
                "sends no output cap; set one under decoding.max_tokens, or under extra by the endpoint's name for it"
            )
        if not self.decides and not self._profile.cap_covers_reasoning and self._profile.hidden != "none":
            return "may bill hidden reasoning beyond its output cap"
        return None

    def request(self, question: Question) -> Request:
        """The call that asks a question."""
        annotator = self.annotator
        path, body = body_of(
            annotator.kind, annotator.model, self._pack, question.pair, question.variants, self._params
        )
        hashed = request_hash(self.endpoint, body)
        return Request(question.pair["pair_id"], question.variants, path, body, hashed, question.asked)

    def bound_usd(self, body: Mapping[str, Any]) -> float:
        """The most that a call can cost; 0 without a price."""
        price = self.annotator.price
        if price is None:
            return 0.0
        return worst_case_usd(price, _most_tokens_in(body), self.cap or 0)

    def swapped(self, call: Call) -> str:
        """What to say of an answer by another model."""
        before = f", and {self._served} before" if self._served and self._served != call.served_model else ""
        return (
            f"annotator '{self.name}' was asked as {call.requested_model}, and {call.served_model} answered{before}: "
            f"another teacher. If it is the one you mean, say served_as: {call.served_model} in the process file, and "
            "take a new --run-dir"
        )

    def rows(
        self, request: Request, raw: Raw, *, attempt: int, started: datetime, transport: str, origin: str = "live"
    ) -> list[Call]:
        """The rows of one attempt, one for each variant that it asked."""
        if self.decides:
            replies = read_decisions(self._params["api"], raw, request.variants)
        else:
            replies = {request.variants[0]: read_chat(raw)}
        return self.rows_of(request, replies, raw, attempt=attempt, started=started, transport=transport, origin=origin)

    def rows_of(
        self,
        request: Request,
        replies: Mapping[str, Reply],
        raw: Raw,
        *,
        attempt: int,
        started: datetime,
        transport: str,
        origin: str,
    ) -> list[Call]:
        """The same for replies that were read already."""
        return [
            self._row(request, variant, reply, raw, n, attempt, started, transport, origin)
            for n, (variant, reply) in enumerate(replies.items())
        ]

    def _row(
        self,
        request: Request,
        variant: str,
        reply: Reply,
        raw: Raw,
        n: int,
        attempt: int,
        started: datetime,
        transport: str,
        origin: str,
    ) -> Call:
        parsed = self._parsed(reply)
        gap = parsed.gap
        cost = self._cost(reply, transport) if origin == "live" else None
        unknown = n == 0 and origin == "live" and _unknown(cost, raw)
        params = self._params_json
        if self.decides:
            params = canonical_json({**self._params, "variants": list(request.variants)})
        return Call(
            pair_id=request.pair_id,
            annotator=self.name,
            variant=variant,
            attempt=attempt,
            origin=origin,
            requested_model=self.annotator.model,
            served_model=reply.served_model,
            endpoint=self.endpoint,
            request_hash=request.hash,
            params_requested=self._requested,
            params_sent=params,
            started_at=started.astimezone(UTC).isoformat(timespec="milliseconds"),
            latency_s=round(raw.latency_s, 4),
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
            cost_usd=cost,
            system_fingerprint=reply.system_fingerprint,
            error=reply.error,
            kind=self.annotator.kind,
            transport=transport,
            params_ignored=self._ignored_json,
            reasoning_tokens=reply.reasoning_tokens,
            cost_bound_usd=self.bound_usd(request.body) if unknown else None,
            request_id=reply.request_id,
        )

    def _parsed(self, reply: Reply) -> Parsed:
        if reply.failure:
            return Parsed(None, problem=reply.failure)
        if not self.is_same(reply.served_model):
            return Parsed(None, problem="other_model")
        return parse_decision(reply.raw_text) if self.decides else parse_reply(reply.raw_text)

    def is_same(self, served: str | None) -> bool:
        """Whether an answer is by the model of this annotator, and by the same snapshot as those before."""
        if served is None:
            return True
        if not same_model(self.annotator.model, served, self.annotator.served_as):
            return False
        if self._served is None:
            self._served = served
        return served == self._served

    def _cost(self, reply: Reply, transport: str) -> float | None:
        price = self.annotator.price
        if price is None:
            return None
        discount = self.batch.discount if transport == "batch" and self.batch else 0.0
        cost = cost_usd(price, reply.prompt_tokens, reply.completion_tokens)
        return None if cost is None else cost * (1 - discount)


_CAPS: Final = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_NOT_BILLED: Final = range(300, 600)


def _most_tokens_in(body: Mapping[str, Any]) -> int:
    """Of all that is asked; the JSON schema of the answer is part of the framing."""
    if "messages" in body:
        return sum(most_tokens(message["content"]) for message in body["messages"])
    return sum(most_tokens(text) + FRAMING_TOKENS for text in texts_read(body))


def _unknown(cost: float | None, raw: Raw) -> bool:
    """Whether a call may have been billed although nothing says how much."""
    return cost is None and raw.sent and raw.status not in _NOT_BILLED
