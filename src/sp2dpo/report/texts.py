"""Lengths, overlap and diversity of the texts of a run, and the scores that its source brought. E.2, figures 3 to 15.

Lengths are in tokens of the student where its tokenizer is on this machine, else in words; nothing is downloaded, and
nothing is kept on disk. Knows nothing of charts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from huggingface_hub import try_to_load_from_cache
from numpy.typing import NDArray

from sp2dpo.evidence import Array, Evidence

__all__ = ["SCORES", "Texts", "read_texts", "words"]

SIDES: Final = ("prompt", "chosen", "rejected")
RESPONSES: Final = SIDES[1:]

SCORES: Final = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_rating", "rejected_rating"),
)
"""Names under which sources keep a number for each response; the first two that are there are taken."""

MOST_CHARACTERS: Final = {"tokens": 40_000_000, "words": 250_000_000}
"""Of a run with more text every n-th pair is read, so that a report takes seconds for its texts, not minutes."""

AT_ONCE: Final = 1000

_CJK: Final = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_ASCII: Final = "".join(chr(n).lower() if chr(n).isalnum() or chr(n) == "_" else " " for n in range(128))
_WORD: Final = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")

Count = Callable[[Sequence[str]], Sequence[int]]


@dataclass(frozen=True, eq=False)
class Texts:
    """Features of pairs of the schedule; NaN where there is no word or no score.

    `row_i` are the rows of the schedule that were read; all arrays are over them. `unit` is "tokens" or "words", and
    `counted` says in a sentence by what. Keys of `length` and `diversity` are prompt, chosen and rejected; those of
    `overlap` and `score` are chosen and rejected. `score` is empty if the source has none;
    `scored_by` names its columns.
    """

    unit: str
    counted: str
    row_i: NDArray[np.int64]
    of: int
    length: Mapping[str, Array]
    overlap: Mapping[str, Array]
    diversity: Mapping[str, Array]
    score: Mapping[str, Array]
    scored_by: tuple[str, str] | None

    @property
    def delta_i(self) -> Array:
        """Length of the chosen response less that of the rejected."""
        return self.length["chosen"] - self.length["rejected"]

    @property
    def score_gap_i(self) -> Array | None:
        """Score of the chosen response less that of the rejected."""
        return self.score["chosen"] - self.score["rejected"] if self.score else None

    def total(self, side: str) -> Array:
        """Length of the prompt with one of its responses."""
        return self.length["prompt"] + self.length[side]


def words(text: str) -> list[str]:
    """The words of a text, without regard to case; each sign of Chinese and Japanese is one."""
    return text.translate(_ASCII).split() if text.isascii() else _WORD.findall(text.casefold())


def read_texts(evidence: Evidence) -> Texts:
    """The features of the scheduled pairs, or of every n-th of them if there is very much text."""
    tokenizer, counted = _tokenizer(evidence)
    unit = "tokens" if tokenizer else "words"
    every = -(-_characters(evidence) // MOST_CHARACTERS[unit]) or 1
    row_i = np.arange(0, evidence.n, every)
    table = np.full((len(row_i), 8), np.nan)
    for rows, batch in _batches(evidence, row_i):
        table[rows] = _features(batch, tokenizer)
    length, diversity, overlap = table[:, :3].T, table[:, 3:6].T, table[:, 6:].T
    scored_by, score = _scores(evidence, row_i)
    return Texts(
        unit=unit,
        counted=counted,
        row_i=row_i,
        of=evidence.n,
        length=dict(zip(SIDES, length, strict=True)),
        overlap=dict(zip(RESPONSES, overlap, strict=True)),
        diversity=dict(zip(SIDES, diversity, strict=True)),
        score=score,
        scored_by=scored_by,
    )


def _scores(evidence: Evidence, row_i: NDArray[np.int64]) -> tuple[tuple[str, str] | None, dict[str, Array]]:
    """The names of the source's scores of both responses, and the scores; nothing if no pair has both."""
    pairs = evidence.pairs
    names = next((names for names in SCORES if all(_is_number(pairs, name) for name in names)), None)
    if names is None:
        return None, {}
    columns = (np.asarray(pc.cast(pairs[name], pa.float64()).to_numpy())[evidence.at_i[row_i]] for name in names)
    score = {s: np.where(np.isfinite(of), of, np.nan) for s, of in zip(RESPONSES, columns, strict=True)}
    both = np.isfinite(score["chosen"]) & np.isfinite(score["rejected"])
    return (names, score) if both.any() else (None, {})


def _is_number(pairs: pa.Table, name: str) -> bool:
    if name not in pairs.column_names:
        return False
    kind = pairs.schema.field(name).type
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _tokenizer(evidence: Evidence) -> tuple[Count | None, str]:
    """What counts tokens, or nothing; and a sentence that says so."""
    student = evidence.run.process.settings.student
    if student is None:
        return None, "Lengths are in words: the process names no student whose tokens could be counted."
    path = _tokenizer_file(evidence)
    if path is None:
        return None, f"Lengths are in words: the tokenizer of the student ({student.model}) is not on this machine."
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return None, "Lengths are in words: the library that counts tokens comes with pip install 'sp2dpo[train]'."
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception:  # noqa: BLE001 (the library raises no narrower one)
        return None, f"Lengths are in words: {path.name} of the student ({student.model}) cannot be read."
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def count(texts: Sequence[str]) -> list[int]:
        return [len(one) for one in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    return count, f"Lengths are in tokens of the student ({student.model}), without the marks of its chat template."


def _tokenizer_file(evidence: Evidence) -> Path | None:
    """`tokenizer.json` of the student: in the run, in its folder, or in the cache of the Hub."""
    run = evidence.run
    student = run.process.settings.student
    assert student is not None
    folder = run.path / "student" if student.model == "toy" else run.process.base / student.model
    if student.model == "toy" or folder.is_dir():
        path = folder / "tokenizer.json"
        return path if path.is_file() else None
    cached = try_to_load_from_cache(student.model, "tokenizer.json", revision=student.revision)
    return Path(cached) if isinstance(cached, str) else None


def _characters(evidence: Evidence) -> int:
    """About how much text the scheduled pairs have."""
    return sum(evidence.pairs[side].nbytes for side in SIDES) * evidence.n // evidence.pairs.num_rows


def _batches(evidence: Evidence, row_i: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], pa.RecordBatch]]:
    """The texts of those rows, in parts, each with the places in `row_i` that it is of."""
    at = evidence.at_i[row_i]
    order = np.argsort(at, kind="stable")
    at, start = at[order], 0
    for batch in evidence.pairs.select(list(SIDES)).to_batches(max_chunksize=AT_ONCE):
        low, high = np.searchsorted(at, (start, start + batch.num_rows))
        if low < high:
            yield order[low:high], batch.take(at[low:high] - start)
        start += batch.num_rows


def _features(batch: pa.RecordBatch, tokens: Count | None) -> Array:
    """Lengths, diversities and overlaps, one row for each pair."""
    texts = {side: _joined(batch.column(side)) for side in SIDES}
    found = {side: [words(text) for text in of] for side, of in texts.items()}
    known = {side: [set(one) for one in of] for side, of in found.items()}
    lengths = [tokens(texts[side]) if tokens else [len(one) for one in found[side]] for side in SIDES]
    diversity = [[_share(len(a), len(b)) for a, b in zip(known[s], found[s], strict=True)] for s in SIDES]
    overlap = [[_jaccard(a, b) for a, b in zip(known["prompt"], known[s], strict=True)] for s in RESPONSES]
    columns: Array = np.array([*lengths, *diversity, *overlap], np.float64).T
    return columns


def _joined(messages: Any) -> list[str]:
    """The messages of each conversation as one text."""
    content = messages.flatten().field("content").fill_null("")
    offsets = pa.array(np.concatenate([[0], np.cumsum(pc.list_value_length(messages).to_numpy())]), pa.int32())
    joined: Any = pc.binary_join(pa.ListArray.from_arrays(offsets, content), "\n")
    return list(joined.to_pylist())


def _jaccard(one: set[str], other: set[str]) -> float:
    both = len(one & other)
    return _share(both, len(one) + len(other) - both)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
