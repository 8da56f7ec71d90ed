"""Reading the call log. Nothing here holds all rows: questions are asked of SQLite, answers come as streams."""

from __future__ import annotations

import sqlite3
from collections.abc import Generator, Iterator, Sequence
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, Final

from sp2dpo.calls.rows import COLUMNS, VALID, Asked, Attempts, BatchEvent, Call, Cell, CellState, Count, Usage, line_of
from sp2dpo.errors import RunDirError

__all__ = ["CallLog"]

_NAMES: Final = ", ".join(COLUMNS)
_CELL: Final = "pair_id, annotator, variant"
_IS_VALID: Final = f"outcome IN ({', '.join(repr(outcome) for outcome in VALID)})"
_OF_SAME_CELL: Final = (
    "SELECT 1 FROM calls AS other WHERE other.pair_id = calls.pair_id "
    "AND other.annotator = calls.annotator AND other.variant = calls.variant AND other."
)


class CallLog:
    """An open call log.

    Raises (every method):
        RunDirError: the file is damaged.
    """

    def __init__(self, path: Path, db: sqlite3.Connection) -> None:
        self._path = path
        self._db = db

    def _rows(self, sql: str, values: Sequence[Any] = ()) -> Iterator[Any]:
        try:
            yield from self._db.execute(sql, values)
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            raise RunDirError(f"{self._path} cannot be read: {error}") from error

    def __iter__(self) -> Iterator[Call]:
        return (Call(*row) for row in self._rows(f"SELECT {_NAMES} FROM calls ORDER BY id"))

    def __len__(self) -> int:
        return int(next(self._rows("SELECT count(*) FROM calls"))[0])

    def content_hash(self) -> str:
        """The head of the chain: one hash of all rows and their order (`schema` says how it is made)."""
        return self._chain_value() or self.recomputed_hash()

    def _chain_value(self) -> str | None:
        """Of the last row."""
        last: tuple[str | None] = next(self._rows("SELECT chain FROM calls ORDER BY id DESC LIMIT 1"), (None,))
        return last[0]

    def recomputed_hash(self) -> str:
        """The same made again from every row; another one than `content_hash` if a row was changed or lost."""
        head, stretch, open_rows = "", sha256(), False
        for chain, *row in self._rows(f"SELECT chain, {_NAMES} FROM calls ORDER BY id"):
            stretch.update(line_of(row).encode())
            open_rows = chain is None
            if chain is not None:
                head = stretch.hexdigest()
                stretch = sha256(head.encode())
        return stretch.hexdigest() if open_rows or not head else head

    @property
    def linked(self) -> bool:
        """Whether every row should have a link of the chain; those of a version 1 file have one together."""
        first: tuple[str | None] = next(self._rows("SELECT chain FROM calls ORDER BY id LIMIT 1"), ("",))
        return first[0] is not None

    def last_id(self) -> int:
        """The number of the last row; they count from 1."""
        return int(next(self._rows("SELECT ifnull(max(id), 0) FROM calls"))[0])

    def stretch(self, first: int, last: int) -> Generator[tuple[int, str | None, tuple[Any, ...]]]:
        """Number, link of the chain and columns of the rows with these numbers, as they are in the file."""
        sql = f"SELECT id, chain, {_NAMES} FROM calls WHERE id BETWEEN ? AND ? ORDER BY id"
        return ((number, chain, tuple(row)) for number, chain, *row in self._rows(sql, (first, last)))

    def link_before(self, first: int) -> str:
        """The link of the chain that the row with this number is bound to."""
        sql = "SELECT chain FROM calls WHERE id < ? ORDER BY id DESC LIMIT 1"
        before: tuple[str | None] = next(self._rows(sql, (first,)), ("",))
        return before[0] or ""

    def answers(self, pair_ids: Sequence[str] | None = None) -> Iterator[Call]:
        """The first valid answer of each question, in the order of the questions; of all pairs, or of a few."""
        chosen, values = "", tuple(pair_ids or ())
        if pair_ids is not None:
            chosen = f"AND pair_id IN ({', '.join('?' * len(values))})"
        sql = (
            f"SELECT {_NAMES} FROM calls WHERE {_IS_VALID} {chosen} "
            f"AND NOT EXISTS ({_OF_SAME_CELL}{_IS_VALID} AND other.id < calls.id) ORDER BY {_CELL}"
        )
        return (Call(*row) for row in self._rows(sql, values))

    def valid(self, columns: Sequence[str], at_once: int = 10_000) -> Iterator[list[tuple[Any, ...]]]:
        """Some columns of every valid answer, also of a second one to a question; in the order of the log."""
        rows = self._rows(f"SELECT {', '.join(columns)} FROM calls WHERE {_IS_VALID} ORDER BY id")
        return iter(lambda: list(islice(rows, at_once)), [])

    def failures(self) -> Iterator[Call]:
        """The last attempt at each question that has no valid answer, in the order of the questions."""
        sql = (
            f"SELECT {_NAMES} FROM calls WHERE NOT EXISTS ({_OF_SAME_CELL}{_IS_VALID}) "
            f"AND NOT EXISTS ({_OF_SAME_CELL}id > calls.id) ORDER BY {_CELL}"
        )
        return (Call(*row) for row in self._rows(sql))

    def state(self, pair_ids: Sequence[str]) -> dict[Cell, CellState]:
        """How the questions about these pairs (some hundreds) stand; those never asked are not there."""
        sql = (
            f"SELECT {_CELL}, count(*), sum({_IS_VALID}), outcome, max(id) FROM calls "
            f"WHERE pair_id IN ({', '.join('?' * len(pair_ids))}) GROUP BY {_CELL}"
        )
        return {
            (pair, annotator, variant): CellState(asked, valid > 0, outcome)
            for pair, annotator, variant, asked, valid, outcome, _ in self._rows(sql, pair_ids)
        }

    def complete(self, annotators: Sequence[str], variants: Sequence[str]) -> set[str]:
        """Pairs of which every question of this panel has a valid answer."""
        marks = [", ".join("?" * len(names)) for names in (annotators, variants)]
        sql = (
            f"SELECT pair_id FROM (SELECT DISTINCT {_CELL} FROM calls WHERE {_IS_VALID} "
            f"AND annotator IN ({marks[0]}) AND variant IN ({marks[1]})) GROUP BY pair_id HAVING count(*) = ?"
        )
        return {pair for (pair,) in self._rows(sql, (*annotators, *variants, len(annotators) * len(variants)))}

    def counts(self) -> list[Count]:
        """Attempts, money and tokens by annotator, outcome and origin."""
        sql = (
            "SELECT annotator, outcome, origin, count(*), total(cost_usd), "
            "total(CASE WHEN cost_usd IS NULL THEN cost_bound_usd END), ifnull(sum(prompt_tokens), 0), "
            "ifnull(sum(completion_tokens), 0), ifnull(sum(reasoning_tokens), 0) "
            "FROM calls GROUP BY 1, 2, 3 ORDER BY 1, 2, 3"
        )
        return [Count(*row) for row in self._rows(sql)]

    def attempts(self) -> list[Attempts]:
        """Attempts by annotator, variant, model and outcome."""
        sql = (
            "SELECT annotator, variant, kind, origin, requested_model, served_model, outcome, count(*), "
            "min(started_at), max(started_at) FROM calls GROUP BY 1, 2, 3, 4, 5, 6, 7 ORDER BY 1, 2, 3, 4, 5, 6, 7"
        )
        return [Attempts(*row) for row in self._rows(sql)]

    def asked(self) -> list[Asked]:
        """Attempts by the settings that they were asked for and sent with."""
        names = "annotator, params_requested, params_sent, params_ignored"
        first = f"SELECT {names} FROM calls WHERE id IN (SELECT min(id) FROM calls GROUP BY annotator)"
        usual: list[tuple[str, str, str, str]] = sorted(self._rows(first))
        is_one = " AND ".join(f"{name} IS ?" for name in names.split(", "))
        sums = ", ".join(["count(*)", *[f"ifnull(sum({is_one}), 0)" for _ in usual]])
        attempts, *counts = next(self._rows(f"SELECT {sums} FROM calls", [text for row in usual for text in row]))
        if sum(counts) == attempts:
            return [Asked(*row, count) for row, count in zip(usual, counts, strict=True)]
        grouped = f"SELECT {names}, count(*) FROM calls GROUP BY {names} ORDER BY {names}"  # sorts all that text
        return [Asked(*row) for row in self._rows(grouped)]

    def spent(self, annotators: Sequence[str]) -> float:
        """USD of the live calls of these annotators; at its bound where a cost is unknown."""
        sql = (
            "SELECT total(coalesce(cost_usd, cost_bound_usd)) FROM calls "
            f"WHERE origin = 'live' AND annotator IN ({', '.join('?' * len(annotators))})"
        )
        return float(next(self._rows(sql, annotators))[0])

    def usage(self, annotator: str) -> Usage:
        """What the live calls of an annotator used, for an estimate of what is to come."""
        sql = (
            f"SELECT count(*), ifnull(sum({_IS_VALID}), 0), count(prompt_tokens), ifnull(sum(prompt_tokens), 0), "
            "ifnull(sum(completion_tokens), 0), ifnull(sum(reasoning_tokens), 0) "
            "FROM calls WHERE origin = 'live' AND annotator = ?"
        )
        return Usage(*next(self._rows(sql, (annotator,))))

    def served(self, annotator: str) -> str | None:
        """The model that gave an annotator's first valid answer, wherever that is from, as its endpoint named it."""
        sql = (
            f"SELECT served_model FROM calls WHERE annotator = ? AND {_IS_VALID} "
            "AND served_model IS NOT NULL ORDER BY id LIMIT 1"
        )
        first: tuple[str | None] = next(self._rows(sql, (annotator,)), (None,))
        return first[0]

    def batch_events(self, annotator: str) -> list[BatchEvent]:
        """What happened to the batch jobs of an annotator, in order."""
        sql = "SELECT annotator, event, shard, at, batch_id, detail FROM batches WHERE annotator = ? ORDER BY id"
        return [BatchEvent(*row) for row in self._rows(sql, (annotator,))]
