"""The tables of the call log, their versions, and the way from each version to the next.

Version 1: `calls`. Version 2: more columns, the chain of hashes, `batches` and `starts`.

`chain` makes the rows tamper-evident. A row with a chain value closes a stretch of rows, from the one after the last
row that has such a value up to itself, and the value is

    sha256( the chain value before ‖ the lines of these rows )      in hexadecimal, UTF-8, `line_of` of each row

where the value before the first is the empty text. Every row that is added now has its own value. The rows of a
version 1 file make one stretch together, so that its hash is what version 1 said it was: sha256 over all lines.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from typing import Final

from sp2dpo.calls.rows import COLUMNS

__all__ = ["AS_NOW", "SCHEMA_VERSION", "create", "migrate", "version_of"]

SCHEMA_VERSION: Final = 2

_SQL_TYPES: Final = {"str": "TEXT", "int": "INTEGER", "float": "REAL"}

_OF_2: Final = {
    "kind": "'chat_json'",
    "transport": "NULL",
    "params_ignored": "'[]'",
    "reasoning_tokens": "NULL",
    "cost_bound_usd": "NULL",
    "request_id": "NULL",
}
"""Columns that came with version 2, with what they are in older rows."""


def version_of(db: sqlite3.Connection) -> int:
    """The version that the file says it has; 0 if it says none."""
    version: int = db.execute("PRAGMA user_version").fetchone()[0]
    return version


def create(db: sqlite3.Connection) -> None:
    """The tables of version 1; `migrate` brings them up to date. To be called inside a transaction."""
    columns = ", ".join(f"{name} {_SQL_TYPES[kind]}" for name, kind in COLUMNS.items() if name not in _OF_2)
    db.execute(f"CREATE TABLE calls (id INTEGER PRIMARY KEY, {columns}) STRICT")
    db.execute("CREATE INDEX calls_by_cell ON calls (pair_id, annotator, variant)")
    _refuse_change(db, "calls")
    db.execute("PRAGMA user_version = 1")


def migrate(db: sqlite3.Connection, content_hash: str) -> None:
    """Bring the tables to the version of today, step by step. To be called inside a transaction.

    Args:
        content_hash: that of the log as it is.
    """
    for version in range(version_of(db), SCHEMA_VERSION):
        _STEPS[version](db, content_hash)
        db.execute(f"PRAGMA user_version = {version + 1}")


def _from_1_to_2(db: sqlite3.Connection, content_hash: str) -> None:
    for name, old in _OF_2.items():
        db.execute(f"ALTER TABLE calls ADD COLUMN {name} {_SQL_TYPES[COLUMNS[name]]} DEFAULT {old}")
    db.execute("ALTER TABLE calls ADD COLUMN chain TEXT")
    db.execute("DROP TRIGGER calls_no_update")
    db.execute("UPDATE calls SET chain = ? WHERE id = (SELECT max(id) FROM calls)", (content_hash,))
    db.execute("DROP TRIGGER calls_no_delete")
    _refuse_change(db, "calls")
    db.execute("DROP INDEX calls_by_cell")
    db.execute("CREATE INDEX calls_by_cell ON calls (pair_id, annotator, variant, outcome)")
    db.execute(
        "CREATE TABLE batches (id INTEGER PRIMARY KEY, "
        "annotator TEXT, event TEXT, shard TEXT, at TEXT, batch_id TEXT, detail TEXT) STRICT"
    )
    _refuse_change(db, "batches")
    db.execute(
        "CREATE TABLE starts (id INTEGER PRIMARY KEY, "
        "started_at TEXT, pid INTEGER, host TEXT, reserved_usd REAL, ended_at TEXT) STRICT"
    )


def _refuse_change(db: sqlite3.Connection, table: str) -> None:
    for event in ("UPDATE", "DELETE"):
        db.execute(
            f"CREATE TRIGGER {table}_no_{event.lower()} BEFORE {event} ON {table} "
            "BEGIN SELECT RAISE(ABORT, 'the call log is append-only'); END"
        )


_STEPS: Final[Mapping[int, Callable[[sqlite3.Connection, str], None]]] = {1: _from_1_to_2}
"""Version → the step to the next one."""

_NAMES_1: Final = ", ".join(name for name in COLUMNS if name not in _OF_2)
_NAMES_2: Final = ", ".join(f"{old} AS {name}" for name, old in _OF_2.items())

AS_NOW: Final[Mapping[int, tuple[str, ...]]] = {
    1: (
        f"CREATE TEMP VIEW calls AS SELECT id, {_NAMES_1}, {_NAMES_2}, NULL AS chain FROM main.calls",
        "CREATE TEMP TABLE batches (id, annotator, event, shard, at, batch_id, detail)",
        "CREATE TEMP TABLE starts (id, started_at, pid, host, reserved_usd, ended_at)",
    ),
    2: (),
}
"""Version → what makes a connection see an older file as one of today, while the file stays as it is."""
