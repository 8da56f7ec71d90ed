"""The dialects of typed decisions: all open variants of a pair in one call, and a probability for every option.

`decisions` is what OpenAI calls Decisions; `systemone` is what TypeSafe calls System One, and what llama.cpp, vLLM,
SGLang and `transformers serve` have. (SGLang's own `/v1/decisions` is a third one, and not spoken here.)
Sources: https://developers.openai.com/api/reference/resources/decisions/methods/create ·
https://docs.vllm.ai/en/v0.32.0/serving/online_serving/structured_decisions/ ·
https://docs.sglang.io/docs/supported-models/decision_models

What is judged valid is not decided here: the text that is kept holds what came, and `sp2dpo.decision` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Literal

from sp2dpo.decision import DECISION_KEYS
from sp2dpo.llm import Raw, Reply, storable
from sp2dpo.llm.chat import failed, text_of, tokens_of
from sp2dpo.prompts import DecisionPack, Questions

__all__ = ["DECISION_PATHS", "Api", "decision_body", "read_decisions", "texts_read"]

Api = Literal["decisions", "systemone"]

DECISION_PATHS: Final[Mapping[Api, str]] = {"decisions": "/decisions", "systemone": "/systemone"}

_TYPES: Final[Mapping[Api, Mapping[str, str]]] = {
    "decisions": {"category": "choice", "magnitude": "score", "confidence": "predicate"},
    "systemone": {"category": "choice", "magnitude": "score", "confidence": "noul"},
}
_ERROR_LENGTH: Final = 2000


def decision_body(
    api: Api, model: str, text: str, pack: DecisionPack, variants: Sequence[str], extra: Mapping[str, Any]
) -> dict[str, Any]:
    """The whole body of one call.

    The order of questions and options is part of what is asked, so the body must be sent with its keys in this order.

    Args:
        text: the pair, as `prompts.render_input` shows it.
        extra: further parameters, sent as they are.
    """
    asked = [question for variant in variants for question in _questions(api, variant, pack.variants[variant])]
    if api == "decisions":
        listed = [{**question, "name": name} for name, question in asked]
        return {**extra, "model": model, "input": text, "questions": listed}
    return {**extra, "model": model, "state": text, "questions": dict(asked)}


def texts_read(body: Mapping[str, Any]) -> Iterator[str]:
    """What an endpoint reads, and may count, at most for this body: the pair once with every question.

    SGLang and `transformers serve` say that they count so; OpenAI does not say that it counts the pair only once.
    """
    questions = body["questions"]
    for question in questions.values() if isinstance(questions, Mapping) else questions:
        yield f"{body.get('input', body.get('state'))}\n\n{json.dumps(question, ensure_ascii=False)}"


def _questions(api: Api, variant: str, questions: Questions) -> list[tuple[str, dict[str, Any]]]:
    """Name and body of the three questions of a variant."""
    options, levels = questions.category.options, questions.magnitude.levels
    if api == "decisions":
        choices = [{"value": option, "description": meaning} for option, meaning in options.items()]
        scale = [{"label": str(place), "description": level} for place, level in enumerate(levels)]
        answers: tuple[dict[str, Any], ...] = ({"choices": choices}, {"levels": scale}, {})
    else:
        answers = ({"criteria": dict(options)}, {"criteria": list(levels)}, {})
    asks = (questions.category.question, questions.magnitude.question, questions.confidence.statement)
    return [
        (_name(key, variant), {"type": _TYPES[api][key], "instructions": f"{questions.about}\n\n{ask}", **answer})
        for key, ask, answer in zip(DECISION_KEYS, asks, answers, strict=True)
    ]


def _name(key: str, variant: str) -> str:
    return f"{key}_{variant}"


def read_decisions(api: Api, raw: Raw, variants: Sequence[str]) -> dict[str, Reply]:
    """The reply to each variant, without trusting the shape of the response.

    Tokens belong to the one call: the first variant has them all, the others have 0. A variant with a question that the
    model declined is `refused`; one with a question left out has a text that lacks it.
    """
    whole = failed(raw)
    if whole is not None:
        return _each(variants, {}, whole)
    whole = Reply(http_status=raw.status, request_id=raw.request_id)
    body, parts = _read(api, raw.body, variants)
    if parts is None:
        error = storable(raw.body or "an empty body")[:_ERROR_LENGTH]
        return _each(variants, {}, replace(whole, failure="bad_response", error=error))
    return _each(variants, parts, replace(whole, served_model=text_of(body.get("model")), **_tokens(body.get("usage"))))


def _read(
    api: Api, text: str, variants: Sequence[str]
) -> tuple[dict[str, Any], Mapping[str, Mapping[str, Any]] | None]:
    """The body, and the part of each variant in it; None for one that holds no answers."""
    try:
        body = json.loads(text, object_pairs_hook=_unique_or_pairs)
        answers = _answers(api, body.get("answers")) if isinstance(body, dict) else None
        return body, None if answers is None else {variant: _part(api, variant, answers) for variant in variants}
    except (ValueError, RecursionError):
        return {}, None


def _each(variants: Sequence[str], parts: Mapping[str, Mapping[str, Any]], whole: Reply) -> dict[str, Reply]:
    """`whole` for every variant, with its own part; all but the first cost nothing."""
    other = replace(whole, prompt_tokens=0, completion_tokens=0, reasoning_tokens=0)
    return {
        variant: replace(other if place else whole, **parts.get(variant, {})) for place, variant in enumerate(variants)
    }


def _unique_or_pairs(pairs: list[tuple[str, Any]]) -> Any:
    """An object; if it names a key twice, the pairs as they came, which nothing reads as an answer."""
    value = dict(pairs)
    return value if len(value) == len(pairs) else pairs


def _answers(api: Api, answers: Any) -> dict[str, list[Any]] | None:
    """Answers by the name of their question; None if there are none to read."""
    if api == "systemone":
        return {name: [answer] for name, answer in answers.items()} if isinstance(answers, dict) else None
    if not isinstance(answers, list):
        return None
    named: dict[str, list[Any]] = {}
    for answer in answers:
        if isinstance(answer, dict) and isinstance(answer.get("name"), str):
            named.setdefault(answer["name"], []).append(answer)
    return named


def _part(api: Api, variant: str, answers: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Text, failure and error of one variant."""
    found: dict[str, Any] = {}
    refused, missing = [], []
    for key in DECISION_KEYS:
        given = answers.get(_name(key, variant), [])
        if any(isinstance(answer, dict) and answer.get("type") == "refusal" for answer in given):
            refused.append(_name(key, variant))
        elif given:
            found[key] = _value(_TYPES[api][key], given[0]) if len(given) == 1 else given
        else:
            missing.append(_name(key, variant))
    says = [f"{what}: {', '.join(names)}" for what, names in (("declined", refused), ("no answer", missing)) if names]
    return {
        "raw_text": json.dumps(found, sort_keys=True, separators=(",", ":")) if found else None,
        "failure": "refused" if refused else None,
        "error": "; ".join(says) or None,
    }


def _value(kind: str, answer: Any) -> Any:
    """The probability or distribution of an answer of this kind; anything else so that it is read as neither."""
    if isinstance(answer, int | float) or (isinstance(answer, dict) and "type" not in answer):
        return [answer]
    if not isinstance(answer, dict) or answer["type"] != kind:
        return answer
    if kind in ("predicate", "noul"):
        return answer.get("probability" if kind == "predicate" else "noul", answer)
    probabilities = answer.get("probabilities", answer)
    return _by_option(probabilities) if isinstance(probabilities, list) else probabilities


def _by_option(rows: list[Any]) -> Any:
    """A list of probabilities as an object: by value for a choice, by label for a score; else as it came."""
    try:
        found = {str(row["label"] if "label" in row else row["value"]): row["probability"] for row in rows}
    except (KeyError, TypeError):
        return rows
    return found if len(found) == len(rows) else rows


def _tokens(usage: Any) -> dict[str, Any]:
    """Tokens as both dialects count them, under their names of chat."""
    if not isinstance(usage, dict):
        return tokens_of(None)
    return tokens_of(
        {
            "prompt_tokens": usage.get("input_tokens"),
            "completion_tokens": usage.get("output_tokens"),
            "completion_tokens_details": usage.get("output_tokens_details"),
        }
    )
