"""The semantic gap: six categories in strict priority, a magnitude and a confidence. Sec. 4.3.1, appendix A.

Knows nothing of prompts, LLMs or files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from sp2dpo.errors import InputError, nearest

__all__ = ["CATEGORIES", "CATEGORY_ALIASES", "CATEGORY_MEANING", "SemanticGap", "category_of", "priority"]

CATEGORIES: Final = ("Safety", "Factuality", "Instruction", "Reasoning", "Helpfulness", "Style")
"""The category set; its order is the priority.

Eq. 14, 24.
"""

CATEGORY_MEANING: Final = {
    "Safety": "one response is harmful, illegal or unsafe where the other refuses, warns or makes it safe",
    "Factuality": "one response states something false or invented where the other is correct",
    "Instruction": "one response breaks an explicit request or constraint that the other keeps",
    "Reasoning": "one response draws invalid or incoherent inferences where the other's logic holds",
    "Helpfulness": "one response is less useful, clear, complete or actionable than the other",
    "Style": "the content is much the same; tone, length, polish or layout differ",
}

CATEGORY_ALIASES: Final = {
    "harmlessness": "Safety",
    "harm": "Safety",
    "safety/harmlessness": "Safety",
    "truthfulness": "Factuality",
    "factual": "Factuality",
    "factual accuracy": "Factuality",
    "factuality/truthfulness": "Factuality",
    "correctness": "Factuality",
    "accuracy": "Factuality",
    "instruction following": "Instruction",
    "instruction-following": "Instruction",
    "instruction_following": "Instruction",
    "instructions": "Instruction",
    "constraint following": "Instruction",
    "instruction/constraint following": "Instruction",
    "reasoning soundness": "Reasoning",
    "logic": "Reasoning",
    "coherence": "Reasoning",
    "utility": "Helpfulness",
    "usefulness": "Helpfulness",
    "helpfulness/utility": "Helpfulness",
    "tone": "Style",
    "style/tone": "Style",
    "verbosity": "Style",
}
"""Other spellings that an API may return (lower case). A name that is not here is an invalid answer, never a guess."""


def priority(category: str) -> int:
    """Rank of a category, 0 for the one that wins every tie.

    Eq. 25.

    Raises:
        InputError: not one of the six names.
    """
    if category not in CATEGORIES:
        near = nearest(str(category), CATEGORIES)
        raise InputError(f"{category!r} is not a category{near}; they are {', '.join(CATEGORIES)}")
    return CATEGORIES.index(category)


def category_of(name: str) -> str | None:
    """The category that `name` spells, exactly, in another case, or through `CATEGORY_ALIASES`; else None."""
    folded = " ".join(name.split()).casefold()
    exact = {category.casefold(): category for category in CATEGORIES}
    return exact.get(folded) or CATEGORY_ALIASES.get(folded)


@dataclass(frozen=True, slots=True)
class SemanticGap:
    """One annotator's judgement of one pair: dominant category, magnitude and confidence, both in [0, 1].

    Eq. 13, 19, 20, 21, 22, 23.

    Raises:
        InputError: an unknown category, or a number outside [0, 1] or not finite.
    """

    category: str
    magnitude: float
    confidence: float

    def __post_init__(self) -> None:
        priority(self.category)
        for name in ("magnitude", "confidence"):
            value = getattr(self, name)
            if not (math.isfinite(value) and 0.0 <= value <= 1.0):
                raise InputError(f"{name} is {value}; it must be a number in [0, 1]")

    @property
    def effective(self) -> float:
        """Effective gap, magnitude × confidence, in [0, 1].

        Eq. 29.
        """
        return self.magnitude * self.confidence
