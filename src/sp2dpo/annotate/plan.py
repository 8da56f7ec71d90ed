"""Which questions are still open: pairs × annotators × variants, less those with a valid answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sp2dpo.calls import Cell
from sp2dpo.hashing import sha256_json
from sp2dpo.llm import Request
from sp2dpo.prompts import PromptPack, render

__all__ = ["Question", "open_questions", "request_hash"]


@dataclass(frozen=True)
class Question:
    """One cell of the panel, and how often it was asked before. Its text is made when it is needed, not kept."""

    pair: Mapping[str, Any]
    annotator: str
    variant: str
    asked: int
    pack: PromptPack

    @property
    def cell(self) -> Cell:
        return self.pair["pair_id"], self.annotator, self.variant

    def request(self) -> Request:
        """The question as it is put to a model."""
        pair = self.pair
        messages = render(self.pack, self.variant, pair["prompt"], pair["chosen"], pair["rejected"])
        return Request(pair["pair_id"], self.variant, messages)


def request_hash(
    endpoint: str, model: str, messages: Sequence[Mapping[str, str]], params_sent: Mapping[str, Any]
) -> str:
    """Identity of a question: equal hashes mean that the same bytes were asked of the same model."""
    return sha256_json([endpoint, model, [dict(message) for message in messages], dict(params_sent)])


def open_questions(
    pairs: Sequence[Mapping[str, Any]],
    pack: PromptPack,
    annotators: Sequence[str],
    *,
    answered: set[Cell],
    asked: Mapping[Cell, int],
) -> Iterator[Question]:
    """Questions without a valid answer, those of one pair together so that a server can cache its prefix.

    A pair whose text stands in the data twice is asked about once.
    """
    seen: set[str] = set()
    for pair in pairs:
        if pair["pair_id"] in seen:
            continue
        seen.add(pair["pair_id"])
        for variant in pack.systems:
            for annotator in annotators:
                cell = (pair["pair_id"], annotator, variant)
                if cell not in answered:
                    yield Question(pair, annotator, variant, asked.get(cell, 0), pack)
