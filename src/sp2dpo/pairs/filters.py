"""Named reasons to leave a pair out. Sec. E.2 uses the first two; the others are counted, and drop only if named.

A filter sees all pairs at once and marks those that it would drop. Knows nothing of files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sp2dpo.errors import DataError, nearest
from sp2dpo.pairs.messages import Message

__all__ = ["FILTERS", "REASONS", "STRUCTURAL", "Pair", "check_filters"]

STRUCTURAL: Final = {
    "unreadable": "a prompt and two responses cannot be made out",
    "tie": "the source prefers neither response",
    "prompts_differ": "the two responses do not answer one conversation",
}
"""Reasons why a row is no pair at all; they drop whatever `data.filters` says."""

REASONS: Final = STRUCTURAL | {
    "duplicate_prompt_id": "an earlier row has the same prompt_id",
    "empty_field": "prompt, chosen or rejected is empty or white space",
    "identical_responses": "chosen and rejected are the same",
    "equal_scores": "the source gives both responses one score",
    "reversed_scores": "the source scores the rejected response higher",
    "duplicate_pair": "an earlier row has the same texts under another prompt_id",
}
"""Every reason for which a row of the source is left out, or noted, and what it means."""

SCORES: Final = (("score_chosen", "score_rejected"), ("chosen-rating", "rejected-rating"))


@dataclass(frozen=True, slots=True)
class Pair:
    """A canonical pair with its identity; `source_row` counts from 0."""

    pair_id: str
    prompt_id: str
    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    source_row: int
    extra: dict[str, Any]


Filter = Callable[[Sequence[Pair]], list[bool]]


def _each(applies: Callable[[Pair], bool]) -> Filter:
    return lambda pairs: [applies(pair) for pair in pairs]


def _duplicate_prompt_id(pairs: Sequence[Pair]) -> list[bool]:
    first: dict[str, int] = {}
    return [first.setdefault(pair.prompt_id, pair.source_row) != pair.source_row for pair in pairs]


def _duplicate_pair(pairs: Sequence[Pair]) -> list[bool]:
    """The same texts as an earlier pair, under another prompt_id."""
    first: dict[str, str] = {}
    return [first.setdefault(pair.pair_id, pair.prompt_id) != pair.prompt_id for pair in pairs]


def _is_blank(messages: Sequence[Message]) -> bool:
    return all(not message["content"].strip() for message in messages)


def _has_empty_field(pair: Pair) -> bool:
    return any(_is_blank(side) for side in (pair.prompt, pair.chosen, pair.rejected))


def _number(value: Any) -> float:
    """`value`, or NaN, which no comparison is true of."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def _margin(pair: Pair) -> float:
    """Score of chosen minus score of rejected; NaN if the source does not have both as numbers."""
    chosen, rejected = next((names for names in SCORES if names[0] in pair.extra), SCORES[0])
    return _number(pair.extra.get(chosen)) - _number(pair.extra.get(rejected))


FILTERS: Final[Mapping[str, Filter]] = {
    "duplicate_prompt_id": _duplicate_prompt_id,
    "empty_field": _each(_has_empty_field),
    "identical_responses": _each(lambda pair: pair.chosen == pair.rejected),
    "equal_scores": _each(lambda pair: _margin(pair) == 0),
    "reversed_scores": _each(lambda pair: _margin(pair) < 0),
    "duplicate_pair": _duplicate_pair,
}


def check_filters(names: Sequence[str]) -> None:
    """Raises:
    DataError: a name that is no filter, or one that is there twice.
    """
    for name in names:
        if name not in FILTERS:
            raise DataError(f"data.filters: '{name}' is no filter{nearest(name, FILTERS)}: {', '.join(FILTERS)}")
    if len(set(names)) < len(names):
        raise DataError(f"data.filters names a filter twice: {', '.join(names)}")
