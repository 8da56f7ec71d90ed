"""From the text of an answer to a semantic gap, or to the reason why it is none. Appendix A.1, E.3.

An answer counts only if exactly one object with the three keys can be read from it without guessing. The mends that are
allowed are named in the result; whatever needs another one is invalid. Knows nothing of HTTP, ledgers or prompts.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any, Final

from sp2dpo.rubric import CATEGORIES, SemanticGap, category_of

__all__ = ["INVALID", "KEYS", "MENDS", "Parsed", "parse_reply"]

KEYS: Final = ("semantic_gap_category", "semantic_gap_magnitude", "semantic_gap_confidence")

MENDS: Final = {
    "code_fence": "a Markdown code fence around the object",
    "prose": "text before or after the object",
    "array_of_one": "the object alone in an array",
    "extra_keys": "keys beyond the three, dropped",
    "numeric_string": "a number written as a string",
    "trailing_comma": "a comma before a closing bracket",
    "category_alias": "another spelling of a category, from the alias table",
}

INVALID: Final = {
    "empty": "no text",
    "no_object": "no JSON object with the three keys",
    "several_objects": "more than one object, or braces or keys of one outside it or inside a value",
    "missing_key": "one of the three keys is absent",
    "duplicate_key": "a key is given twice",
    "unknown_category": "a category that is neither one of the six nor an alias",
    "not_a_number": "magnitude or confidence is not a finite number",
    "out_of_range": "magnitude or confidence lies outside [0, 1]",
    "no_distribution": "typed decisions: the probabilities are not one for each option, or do not sum to 1",
}

_SQUEEZED_KEYS: Final = {key.replace("_", "") for key in KEYS}
_WHITE: Final = " \t\r\n"
_STRING_OR_COMMA = re.compile(r'"(?:[^"\\]|\\.)*+"?|,(?=\s*[}\]])', re.DOTALL)
_KEY_GIVEN = re.compile(
    r"semantic[\W_]*gap[\W_]*(?:category|magnitude|confidence)[\W_]*"
    rf"(?:(?<=[:=：>|→])|(?:is\W+)?(?=\d|{'|'.join(CATEGORIES)}))",
    re.IGNORECASE,
)
"""A key in any dress, followed by the sign of a value, or by a number or a category."""

_FENCE_BEFORE = re.compile(r"```[A-Za-z0-9_-]*\Z")
_PLAIN = re.compile(r"[\t\n\r -~]*")
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Parsed:
    """What was read: `gap` with the `mends` that it took, or None with the `problem` (a key of `INVALID`)."""

    gap: SemanticGap | None
    mends: tuple[str, ...] = ()
    problem: str | None = None


@dataclass
class _Reading:
    mends: list[str] = field(default_factory=list)

    def mend(self, name: str) -> None:
        if name not in self.mends:
            self.mends.append(name)


class _InvalidReply(Exception):
    """Carries a key of `INVALID`; never leaves this module."""


def parse_reply(text: str | None) -> Parsed:
    """Read the answer of an annotator.

    Args:
        text: the raw text of the answer; None counts as empty.

    Returns:
        the gap and the mends used, or the problem; never raises for any text.
    """
    reading = _Reading()
    try:
        return Parsed(_gap(_only_object(text or "", reading), reading), tuple(reading.mends))
    except _InvalidReply as problem:
        return Parsed(None, problem=str(problem))


def _only_object(text: str, reading: _Reading) -> dict[str, Any]:
    if not text.strip():
        raise _InvalidReply("empty")
    start = text.find("{")
    if start < 0:
        raise _InvalidReply("no_object")
    value, end = _decode(text, start, reading)
    before, after = text[:start].strip(), text[end:].strip()
    before, after = _out_of_array(before, after, reading)
    if any(mark in before + after for mark in "{}") or _KEY_GIVEN.search(before + "\n" + after):
        raise _InvalidReply("several_objects")
    if before.endswith(("[", ",")) or after.startswith((",", "]")):
        raise _InvalidReply("no_object")
    before, after = _out_of_fence(before, after, reading)
    if before or after:
        reading.mend("prose")
    return value


def _out_of_array(before: str, after: str, reading: _Reading) -> tuple[str, str]:
    closing = re.match(r"(,?)\s*\]", after)
    if not (before.endswith("[") and closing):
        return before, after
    reading.mend("array_of_one")
    if closing.group(1):
        reading.mend("trailing_comma")
    return before[:-1].strip(), after[closing.end() :].strip()


def _out_of_fence(before: str, after: str, reading: _Reading) -> tuple[str, str]:
    opening = _FENCE_BEFORE.search(before)
    if not (opening and after.startswith("```")):
        return before, after
    reading.mend("code_fence")
    return before[: opening.start()].strip(), after[3:].strip()


def _decode(text: str, start: int, reading: _Reading) -> tuple[dict[str, Any], int]:
    decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)
    try:
        value, end = decoder.raw_decode(text, start)
    except (ValueError, RecursionError):
        mended = text[:start] + _STRING_OR_COMMA.sub(lambda m: " " if m.group() == "," else m.group(), text[start:])
        try:
            value, end = decoder.raw_decode(mended, start)
        except (ValueError, RecursionError):
            raise _InvalidReply("no_object") from None
        reading.mend("trailing_comma")
    return value, end


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _InvalidReply("duplicate_key")
    return value


def _refuse_constant(name: str) -> float:
    raise _InvalidReply("not_a_number")


def _gap(value: dict[str, Any], reading: _Reading) -> SemanticGap:
    if not any(key in value for key in KEYS):
        raise _InvalidReply("no_object")
    if not all(key in value for key in KEYS):
        raise _InvalidReply("missing_key")
    if len(value) > len(KEYS):
        extras = {key: extra for key, extra in value.items() if key not in KEYS}
        if any(_names_a_key(key) for key in extras):
            raise _InvalidReply("duplicate_key")
        if _judges(extras):
            raise _InvalidReply("several_objects")
        reading.mend("extra_keys")
    category, magnitude, confidence = (value[key] for key in KEYS)
    return SemanticGap(_category(category, reading), _number(magnitude, reading), _number(confidence, reading))


def _names_a_key(name: str) -> bool:
    """Whether a name is a key of an answer, perhaps in another case or with other marks."""
    return re.sub(r"[\W_]", "", name).casefold() in _SQUEEZED_KEYS


def _judges(value: Any) -> bool:
    """Whether a key of an answer is anywhere in `value`, or is given a value in a text: a second judgement."""
    left = [value]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            if any(_names_a_key(name) for name in part):
                return True
            left += [*part, *part.values()]
        elif isinstance(part, list):
            left += part
        elif isinstance(part, str) and _KEY_GIVEN.search(part):
            return True
    return False


def _category(name: Any, reading: _Reading) -> str:
    known = category_of(name) if isinstance(name, str) and _PLAIN.fullmatch(name) else None
    if known is None:
        raise _InvalidReply("unknown_category")
    if name not in CATEGORIES:
        reading.mend("category_alias")
    return known


def _number(value: Any, reading: _Reading) -> float:
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip(_WHITE)):
        reading.mend("numeric_string")
        value = value.strip(_WHITE)
    elif isinstance(value, (bool, str)) or not isinstance(value, (int, float)):
        raise _InvalidReply("not_a_number")
    try:
        number = float(value)
    except OverflowError:
        raise _InvalidReply("out_of_range") from None
    if math.isnan(number):
        raise _InvalidReply("not_a_number")
    if not 0.0 <= number <= 1.0:
        raise _InvalidReply("out_of_range")
    return abs(number)
