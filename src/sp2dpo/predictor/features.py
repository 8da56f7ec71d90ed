"""From the texts of a pair to numbers, the same on every machine: hashed words and word pairs, and counts that need no
language.

`text-1` is the name of just these numbers; a change to any of them takes another name. Needs numpy only, so that an
answer can be recomputed where nothing else is installed. Knows nothing of models, runs or gaps.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["DENSE", "EMBEDDINGS", "HASHED", "TEXT", "Features", "Texts", "dense_row", "text_features", "texts_of"]

Array = NDArray[np.float64]

TEXT: Final = "text-1"
"""Words are runs of letters, digits and _ in casefolded text, and single characters of scripts without spaces. A word
hashes to crc32 of its UTF-8, a pair of neighbours to 2654435761·first + second, mod 2³²; the column is the top 16 bits
of 2654435769 times that. Its value is 1 + log(count), the values of a text have the norm `_NORM`."""

EMBEDDINGS: Final = "embeddings-1"
"""Sentence embeddings beside the same counts; `sp2dpo.predictor.embed` makes them."""

_BITS: Final = 16
HASHED: Final = 3 * 2**_BITS
"""Columns of hashed words: of the prompt, the chosen and the rejected response. A linear model of the last two is one
of their difference too."""

_NORM: Final = 8.0
"""Weight of a text beside the counts, which are standardised."""

_UNSPACED: Final = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff"
_WORD: Final = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_MARKS: Final = (tuple("0123456789"), ("\n",), ("```",), ("?", "？"), ("!", "！"), tuple('"“”«»「」'))
"""Digits, lines, code fences, questions, exclamations, quotations."""

_ITEM: Final = re.compile(r"^[ \t]{0,8}(?:[-*•]|\d{1,3}[.)])[ \t]", re.MULTILINE)
_SIDE: Final = len(_MARKS) + 4
DENSE: Final = 4 * _SIDE + 3
"""Columns of counts."""


@dataclass(frozen=True)
class Texts:
    """The texts of a pair, and how many messages its prompt has."""

    prompt: str
    chosen: str
    rejected: str
    messages: int


@dataclass(frozen=True)
class Features:
    """Numbers of N pairs: `dense` (N, D), and hashed words as rows of a sparse matrix, pair n having the columns and
    values from `starts[n]` to `starts[n + 1]`."""

    dense: Array
    columns: NDArray[np.int32]
    values: NDArray[np.float32]
    starts: NDArray[np.int64]


def texts_of(pair: Mapping[str, Any]) -> Texts:
    """The texts of a pair of messages, roles left out."""
    prompt, chosen, rejected = (
        "\n".join(message["content"] for message in pair[side]) for side in ("prompt", "chosen", "rejected")
    )
    return Texts(prompt, chosen, rejected, len(pair["prompt"]))


def text_features(pairs: Iterable[Texts]) -> Features:
    """The numbers of `text-1`, of one pair at least."""
    dense, columns, values = zip(*map(_one, pairs), strict=True)
    starts = np.concatenate([[0], np.cumsum([len(one) for one in columns])])
    return Features(np.array(dense), np.concatenate(columns), np.concatenate(values), starts)


def _one(texts: Texts) -> tuple[Array, NDArray[np.int32], NDArray[np.float32]]:
    words = [_words(text) for text in (texts.prompt, texts.chosen, texts.rejected)]
    hashed = [_hashed(some) for some in words]
    columns = np.concatenate([column + (block << _BITS) for block, (column, _) in enumerate(hashed)])
    return _dense(texts, words), columns, np.concatenate([value for _, value in hashed])


def dense_row(texts: Texts) -> Array:
    """The counts alone, (D,)."""
    return _dense(texts, [_words(text) for text in (texts.prompt, texts.chosen, texts.rejected)])


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


@lru_cache(maxsize=2**18)
def _crc(word: str) -> int:
    return zlib.crc32(word.encode("utf-8", "surrogatepass"))


def _hashed(words: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Columns and values of a text."""
    one = np.fromiter(map(_crc, words), np.uint32, len(words))
    two = one[:-1] * np.uint32(2654435761) + one[1:]
    both = np.concatenate([one, two]) * np.uint32(2654435769) >> np.uint32(32 - _BITS)
    columns, counts = np.unique(both, return_counts=True)
    values = 1.0 + np.log(counts)
    return columns.astype(np.int32), (values * (_NORM / max(float(np.linalg.norm(values)), 1.0))).astype(np.float32)


def _dense(texts: Texts, words: Sequence[Sequence[str]]) -> Array:
    """Of each response: counts and overlap with the prompt; their differences; of both: overlap, and the prompt."""
    prompt, chosen, rejected = (set(some) for some in words)
    one = np.array(list(_side(texts.chosen, words[1], chosen, prompt)))
    two = np.array(list(_side(texts.rejected, words[2], rejected, prompt)))
    rest = [_jaccard(chosen, rejected), math.log1p(len(words[0])), math.log1p(texts.messages)]
    return np.concatenate([one, two, one - two, abs(one - two), rest])


def _side(text: str, words: Sequence[str], distinct: set[str], prompt: set[str]) -> Iterator[float]:
    yield math.log1p(len(words))
    yield len(distinct) / max(len(words), 1)
    yield _jaccard(distinct, prompt)
    yield math.log1p(len(_ITEM.findall(text)))
    for marks in _MARKS:
        yield math.log1p(sum(map(text.count, marks)))


def _jaccard(one: set[str], other: set[str]) -> float:
    return len(one & other) / max(len(one | other), 1)
