"""The call log: one SQLite row for every attempt of every call, failed ones too. J.4.

Append-only (the file itself refuses UPDATE and DELETE). A row is on disk before the engine goes on.
Knows nothing of how an answer is got or what is made of it.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Final

from sp2dpo.errors import RunDirError
from sp2dpo.hashing import canonical_json

__all__ = ["VALID", "Call", "CallLog", "Cell", "open_calls"]

Cell = tuple[str, str, str]
"""(pair_id, annotator, variant): one question of the panel."""

VALID: Final = ("ok", "repaired")

SCHEMA_VERSION: Final = 1


@dataclass(frozen=True)
class Call:
    """One attempt. `outcome` is `ok`, `repaired` or a kind of failure; `origin` is `live`, `recorded` or `reused`."""

    pair_id: str
    annotator: str
    variant: str
    attempt: int
    origin: str
    requested_model: str
    served_model: str | None
    endpoint: str
    request_hash: str
    params_requested: str
    params_sent: str
    started_at: str
    latency_s: float
    http_status: int | None
    finish_reason: str | None
    outcome: str
    mends: str
    raw_text: str | None
    category: str | None
    magnitude: float | None
    confidence: float | None
    prompt_tokens: int | None
    completion_tokens: int | None
    cost_usd: float | None
    system_fingerprint: str | None
    error: str | None

    @property
    def cell(self) -> Cell:
        return self.pair_id, self.annotator, self.variant

    @property
    def valid(self) -> bool:
        return self.outcome in VALID


_COLUMNS: Final = tuple(field.name for field in fields(Call))
_REAL: Final = ("latency_s", "magnitude", "confidence", "cost_usd")
_INTEGER: Final = ("attempt", "http_status", "prompt_tokens", "completion_tokens")


def _create_sql() -> str:
    kinds = {**dict.fromkeys(_REAL, "REAL"), **dict.fromkeys(_INTEGER, "INTEGER")}
    columns = ", ".join(f"{name} {kinds.get(name, 'TEXT')}" for name in _COLUMNS)
    refuse = "BEGIN SELECT RAISE(ABORT, 'the call log is append-only'); END"
    return f"""
        CREATE TABLE calls (id INTEGER PRIMARY KEY, {columns}) STRICT;
        CREATE INDEX calls_by_cell ON calls (pair_id, annotator, variant);
        CREATE TRIGGER calls_no_update BEFORE UPDATE ON calls {refuse};
        CREATE TRIGGER calls_no_delete BEFORE DELETE ON calls {refuse};
        PRAGMA user_version = {SCHEMA_VERSION};
    """


class CallLog:
    """An open call log. `append` returns after the row is on disk."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def append(self, call: Call) -> None:
        marks = ", ".join("?" * len(_COLUMNS))
        with self._db:
            self._db.execute(f"INSERT INTO calls ({', '.join(_COLUMNS)}) VALUES ({marks})", astuple(call))

    def __iter__(self) -> Iterator[Call]:
        for row in self._db.execute(f"SELECT {', '.join(_COLUMNS)} FROM calls ORDER BY id"):
            yield Call(*row)

    def __len__(self) -> int:
        count: int = self._db.execute("SELECT count(*) FROM calls").fetchone()[0]
        return count

    def valid_cells(self) -> set[Cell]:
        """Questions that have a valid answer."""
        rows = self._db.execute("SELECT DISTINCT pair_id, annotator, variant FROM calls WHERE outcome IN (?, ?)", VALID)
        return set(rows)

    def attempts(self) -> Counter[Cell]:
        """How often each question was asked."""
        rows = self._db.execute("SELECT pair_id, annotator, variant, count(*) FROM calls GROUP BY 1, 2, 3")
        return Counter({(pair, annotator, variant): n for pair, annotator, variant, n in rows})

    def answers(self) -> dict[Cell, Call]:
        """The first valid answer to each question."""
        first: dict[Cell, Call] = {}
        for call in self:
            if call.valid:
                first.setdefault(call.cell, call)
        return first

    def failures(self) -> dict[Cell, Call]:
        """The last attempt at each question that has no valid answer."""
        last: dict[Cell, Call] = {}
        done = self.valid_cells()
        for call in self:
            if call.cell not in done:
                last[call.cell] = call
        return last

    def content_hash(self) -> str:
        """sha256 over all rows in order; the same for equal content, whatever the file looks like inside."""
        digest = sha256()
        for call in self:
            digest.update(canonical_json(vars(call)).encode() + b"\n")
        return digest.hexdigest()


@contextmanager
def open_calls(path: Path, *, create: bool = False) -> Iterator[CallLog]:
    """Open a call log, to read it or (`create`) to add to it; then every commit is synced to disk.

    Raises:
        RunDirError: it is not there (and `create` is false), or is no call log of this version.
    """
    if not path.is_file() and not create:
        raise RunDirError(f"{path} is missing; make it with: sp2dpo annotate PROCESS.yaml")
    with closing(sqlite3.connect(path)) as db:
        try:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if create:
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = FULL")
            if create and version == 0 and not db.execute("SELECT 1 FROM sqlite_master").fetchone():
                db.executescript(_create_sql())
                version = SCHEMA_VERSION
        except sqlite3.DatabaseError as error:
            raise RunDirError(f"{path} is no call log: {error}") from error
        if version != SCHEMA_VERSION:
            raise RunDirError(f"{path} is a call log of version {version}; this sp2dpo reads version {SCHEMA_VERSION}")
        yield CallLog(db)
