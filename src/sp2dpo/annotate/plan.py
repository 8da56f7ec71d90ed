"""Which questions are open: pairs × annotators × variants, less those with a valid answer.

Reads the pairs and the call log in pieces, so that memory grows with neither the texts nor the number of calls.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Final

import pyarrow.parquet

from sp2dpo.calls import CallLog

__all__ = ["Plan", "Question", "Standing"]

NEVER_ASKED: Final = "not asked yet"

_TEXTS_AT_ONCE: Final = 64
_IDS_AT_ONCE: Final = 400


@dataclass(frozen=True)
class Question:
    """What one annotator is asked about one pair, and how often it was asked before. Its text is made when needed."""

    pair: Mapping[str, Any]
    annotator: str
    variants: tuple[str, ...]
    asked: int

    def only(self, variants: Collection[str]) -> Question:
        """The same about some of its variants."""
        return Question(self.pair, self.annotator, tuple(v for v in self.variants if v in variants), self.asked)


@dataclass
class Standing:
    """How a panel stands: questions in all, with a valid answer, and the others by what came of them last."""

    questions: int = 0
    valid: int = 0
    missing: Counter[str] = field(default_factory=Counter)
    open: Counter[str] = field(default_factory=Counter)
    """By annotator, of those that this plan would ask."""


class Plan:
    """The questions of a panel about some pairs.

    Args:
        limit: only the first so many pairs.
        sample: only so many pairs, spread evenly.
        retry: only questions whose last attempt ended in one of these kinds of failure; empty: all open ones.
    """

    def __init__(
        self,
        pairs: Path,
        log: CallLog,
        annotators: Sequence[str],
        variants: Sequence[str],
        *,
        limit: int | None = None,
        sample: int | None = None,
        retry: Collection[str] = (),
    ) -> None:
        self._pairs, self._log = pairs, log
        self.annotators, self.variants = tuple(annotators), tuple(variants)
        self._retry = frozenset(retry)
        with pyarrow.parquet.ParquetFile(pairs) as file:
            ids = [str(pair) for pair in file.read(columns=["pair_id"])["pair_id"].to_pylist()]
        self._rows = _distinct(ids, _chosen(len(ids), limit, sample))
        self._complete: set[str] = set()

    @property
    def pairs(self) -> int:
        """Different pairs."""
        return len(self._rows)

    def standing(self) -> Standing:
        """Count questions by how they stand."""
        cells = len(self.annotators) * len(self.variants)
        self._complete = self._log.complete(self.annotators, self.variants)
        ids = [pair for pair in self._rows.values() if pair not in self._complete]
        standing = Standing(len(self._rows) * cells, valid=(len(self._rows) - len(ids)) * cells)
        for start in range(0, len(ids), _IDS_AT_ONCE):
            some = ids[start : start + _IDS_AT_ONCE]
            state = self._log.state(some)
            for cell in product(some, self.annotators, self.variants):
                known = state.get(cell)
                if known is not None and known.valid:
                    standing.valid += 1
                    continue
                standing.missing[known.last_outcome if known else NEVER_ASKED] += 1
                standing.open[cell[1]] += self._wanted(known)
        return standing

    def open(self, annotator: str, *, together: bool = False) -> Iterator[Question]:
        """Open questions of one annotator, those of one pair after each other, or as one question if `together`."""
        return (question for question in self.stream(annotator, together=together) if question is not None)

    def stream(self, annotator: str, *, together: bool = False) -> Iterator[Question | None]:
        """The same with a None now and then, at which others may have their turn."""
        for some in self._batches():
            yield None
            state = self._log.state([pair["pair_id"] for pair in some])
            for pair in some:
                cells = {v: state.get((pair["pair_id"], annotator, v)) for v in self.variants}
                wanted = [v for v, known in cells.items() if not (known and known.valid) and self._wanted(known)]
                asked = {v: cells[v].asked if cells[v] else 0 for v in wanted}  # type: ignore[union-attr]
                if together and wanted:
                    yield Question(pair, annotator, tuple(wanted), max(asked.values()))
                elif wanted:
                    yield from (Question(pair, annotator, (v,), asked[v]) for v in wanted)

    def _wanted(self, known: Any) -> bool:
        return not self._retry or (known is not None and known.last_outcome in self._retry)

    def _batches(self) -> Iterator[list[dict[str, Any]]]:
        first = 0
        columns = ["pair_id", "prompt", "chosen", "rejected"]
        with pyarrow.parquet.ParquetFile(self._pairs) as file:
            for batch in file.iter_batches(batch_size=_TEXTS_AT_ONCE, columns=columns):
                rows = (self._rows.get(first + n) for n in range(batch.num_rows))
                kept = [n for n, pair in enumerate(rows) if pair is not None and pair not in self._complete]
                first += batch.num_rows
                if kept:
                    yield batch.take(kept).to_pylist()


def _chosen(n: int, limit: int | None, sample: int | None) -> Sequence[int]:
    if sample is not None and sample < n:
        return [k * n // sample for k in range(sample)]
    return range(n if limit is None else min(n, limit))


def _distinct(ids: Sequence[str], rows: Sequence[int]) -> dict[int, str]:
    """Row → pair_id; a pair whose text stands in the data twice counts once."""
    first: dict[str, int] = {}
    for row in rows:
        first.setdefault(ids[row], row)
    return {row: pair for pair, row in first.items()}
