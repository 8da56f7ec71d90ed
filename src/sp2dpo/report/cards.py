"""Single pairs as the report shows them: the texts, all judgements, and how they became β. Knows nothing of HTML.

The text of a pair comes from strangers: characters that are invisible or reorder a line are made visible here; escaping
is the template's work.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from sp2dpo.evidence import Evidence
from sp2dpo.report.pipeline import number

__all__ = ["LONGEST", "Card", "Judgement", "Message", "card", "visible"]

LONGEST: Final = 4000
"""Characters of one message that are shown; the rest is counted."""

FOLDED: Final = 1200
"""A message longer than this is closed at first."""

_HIDDEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufffe\uffff]"
)


def visible(text: str) -> str:
    """Control, zero-width and reordering characters by their code point; new lines and tabs stay."""
    return _HIDDEN.sub(lambda match: f"⟦U+{ord(match[0]):04X}⟧", text.replace("\r\n", "\n"))


@dataclass(frozen=True)
class Message:
    """One turn: what is shown of it, and how much is left out."""

    role: str
    text: str
    length: int

    @property
    def left_out(self) -> int:
        return max(self.length - LONGEST, 0)

    @property
    def folded(self) -> bool:
        return self.length > FOLDED

    @property
    def opening(self) -> str:
        return self.text[:160].rstrip() + "…"


@dataclass(frozen=True)
class Judgement:
    """One call: eq. 29. Without a valid answer the category is None and the numbers are NaN."""

    annotator: str
    variant: str
    category: str | None
    magnitude: float
    confidence: float
    gap: float


@dataclass(frozen=True)
class Card:
    """A pair with everything that made its β."""

    pair_id: str
    prompt_id: str
    category: str
    beta: float
    gap: float
    spread: float
    reversed: bool
    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    judgements: tuple[Judgement, ...]
    gaps: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        """The source's id, or the start of the pair's own where the source has none."""
        return self.pair_id[:12] if self.prompt_id == self.pair_id else visible(self.prompt_id)[:60]


def card(evidence: Evidence, i: int, *, reversed: bool = False) -> Card:
    """The pair in row `i` of the schedule."""
    pair = evidence.pairs.slice(int(evidence.at_i[i]), 1).to_pylist()[0]
    gaps = evidence.gap_ijk[i]
    return Card(
        pair_id=pair["pair_id"],
        prompt_id=pair["prompt_id"],
        category=str(evidence.category_i[i]),
        beta=float(evidence.beta_i[i]),
        gap=float(evidence.gap_i[i]),
        spread=float(np.ptp(gaps[~np.isnan(gaps)])),
        reversed=reversed,
        prompt=_messages(pair["prompt"]),
        chosen=_messages(pair["chosen"]),
        rejected=_messages(pair["rejected"]),
        judgements=tuple(_judgements(evidence, i)),
        gaps=tuple(zip(evidence.annotators, map(number, evidence.gap_ij[i]), strict=True)),
    )


def _messages(messages: Sequence[Mapping[str, str]]) -> tuple[Message, ...]:
    return tuple(Message(m["role"], visible(m["content"][:LONGEST]), len(m["content"])) for m in messages)


def _judgements(evidence: Evidence, i: int) -> list[Judgement]:
    return [
        Judgement(
            annotator,
            variant,
            evidence.category_ijk[i, j, k],
            float(evidence.magnitude_ijk[i, j, k]),
            float(evidence.confidence_ijk[i, j, k]),
            float(evidence.gap_ijk[i, j, k]),
        )
        for j, annotator in enumerate(evidence.annotators)
        for k, variant in enumerate(evidence.variants)
    ]
