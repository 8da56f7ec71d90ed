"""From a typed decision to a semantic gap: probabilities instead of a text. Appendix A.1.

The text of such an answer is one object: `category`, the probability of each category; `magnitude`, the probability of
each level of an ordered scale, `"0"` the lowest; `confidence`, the probability that the preference is justified.
Nothing is mended. Knows nothing of HTTP, ledgers or the words of a question.

Differs: the paper's annotators write numbers; here they are read from probabilities. A panel says which kind each is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from sp2dpo.reply import Parsed
from sp2dpo.rubric import CATEGORIES, SemanticGap

__all__ = ["DECISION_KEYS", "LEVELS", "SUM_TOLERANCE", "category_distribution", "parse_decision"]

DECISION_KEYS: Final = ("category", "magnitude", "confidence")

LEVELS: Final = ("0", "1", "2", "3", "4")
"""The scale of the magnitude, lowest first."""

SUM_TOLERANCE: Final = 0.03
"""How far from 1 the sum of a distribution may be: six probabilities, each rounded to two decimals, are off by less."""


class _InvalidDecision(Exception):
    """Carries a key of `reply.INVALID`; never leaves this module."""


def parse_decision(raw_text: str | None) -> Parsed:
    """Read the answer of an annotator of kind `decisions`.

    The category is the most probable one; a tie goes to the first in the order of priority. The magnitude is the mean
    level, from 0 for the lowest to 1 for the highest. The confidence is its probability.

    Args:
        raw_text: the object described above, as JSON; None counts as empty.

    Returns:
        the gap, or the problem (a key of `reply.INVALID`); never raises for any text.
    """
    try:
        category, levels, confidence = _parts(raw_text)
    except _InvalidDecision as problem:
        return Parsed(None, problem=str(problem))
    return Parsed(SemanticGap(max(CATEGORIES, key=category.__getitem__), _mean_level(levels), confidence))


def category_distribution(raw_text: str | None) -> dict[str, float] | None:
    """The probability of each category as it came, in the order of priority; None if the answer is invalid."""
    try:
        return _parts(raw_text)[0]
    except _InvalidDecision:
        return None


def _mean_level(probabilities: Mapping[str, float]) -> float:
    """Σ l·p_l / Σ p_l over the levels l, divided by the highest level; in [0, 1] for any rounding of the p_l."""
    weighted = math.fsum(level * probabilities[name] for level, name in enumerate(LEVELS))
    return weighted / ((len(LEVELS) - 1) * math.fsum(probabilities.values()))


def _parts(text: str | None) -> tuple[dict[str, float], dict[str, float], float]:
    value = _object(text or "")
    if not any(key in value for key in DECISION_KEYS):
        raise _InvalidDecision("no_object")
    if not all(key in value for key in DECISION_KEYS):
        raise _InvalidDecision("missing_key")
    if len(value) > len(DECISION_KEYS):
        raise _InvalidDecision("no_object")
    category, magnitude, confidence = (value[key] for key in DECISION_KEYS)
    if isinstance(category, dict) and not category.keys() <= set(CATEGORIES):
        raise _InvalidDecision("unknown_category")
    return _distribution(category, CATEGORIES), _distribution(magnitude, LEVELS), _probability(confidence)


def _object(text: str) -> dict[str, Any]:
    if not text.strip():
        raise _InvalidDecision("empty")
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise _InvalidDecision("no_object") from None
    if not isinstance(value, dict):
        raise _InvalidDecision("no_object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _InvalidDecision("duplicate_key")
    return value


def _distribution(value: Any, options: Sequence[str]) -> dict[str, float]:
    """The probability of just these options, in their order."""
    if not isinstance(value, dict) or value.keys() != set(options):
        raise _InvalidDecision("no_distribution")
    probabilities = {option: _probability(value[option]) for option in options}
    if abs(math.fsum(probabilities.values()) - 1.0) > SUM_TOLERANCE:
        raise _InvalidDecision("no_distribution")
    return probabilities


def _probability(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _InvalidDecision("not_a_number")
    if isinstance(value, float) and not math.isfinite(value):
        raise _InvalidDecision("not_a_number")
    if not 0.0 <= value <= 1.0:
        raise _InvalidDecision("out_of_range")
    return abs(float(value))
