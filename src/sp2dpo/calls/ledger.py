"""Writing the call log: one process at a time, and a row is on disk before the engine goes on. J.4."""

from __future__ import annotations

import asyncio
import os
import socket
import sqlite3
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import astuple
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from sp2dpo.calls.log import CallLog
from sp2dpo.calls.rows import COLUMNS, BatchEvent, Call, line_of, row_of
from sp2dpo.calls.writer import Writer

__all__ = ["Ledger"]

_INSERT: Final = f"INSERT INTO calls ({', '.join(COLUMNS)}, chain) VALUES ({', '.join('?' * (len(COLUMNS) + 1))})"


class Ledger(CallLog):
    """A call log that is open to be added to. Reading it sees every row that was reported durable.

    Raises (every method that writes):
        Unfinished: the file could not be written; no further rows are taken.
    """

    def __init__(self, path: Path, reading: sqlite3.Connection, writing: sqlite3.Connection) -> None:
        super().__init__(path, reading)
        self._head = self._chain_value() or ""
        self._start: int | None = None
        self._reserved_usd = 0.0
        self._writer = Writer(path, writing)

    def append(self, *calls: Call) -> None:
        """Add rows in one transaction; they are on disk when it returns."""
        if calls:
            self._queue(calls).result()

    async def add(self, *calls: Call) -> None:
        """The same without blocking the event loop; rows added at about the same time share a commit.

        The rows are written even if the task that waits for them is cancelled.
        """
        if calls:
            await asyncio.wrap_future(self._queue(calls))

    def _queue(self, calls: Sequence[Call]) -> Future[None]:
        rows = [row_of(call) for call in calls]
        lines = [line_of(row) for row in rows]

        def insert(db: sqlite3.Connection) -> None:
            db.executemany(_INSERT, [(*row, self._next_link(line)) for row, line in zip(rows, lines, strict=True)])

        return self._writer.submit(insert)

    def _next_link(self, line: str) -> str:
        self._head = sha256((self._head + line).encode()).hexdigest()
        return self._head

    def note_batch(self, event: BatchEvent) -> None:
        """Add a step of a batch job; it is on disk when it returns."""
        sql = "INSERT INTO batches (annotator, event, shard, at, batch_id, detail) VALUES (?, ?, ?, ?, ?, ?)"
        self._write(sql, astuple(event))

    def start(self) -> None:
        """Note that an engine begins to spend. Without `end` it counts as having ended uncleanly."""
        sql = "INSERT INTO starts (started_at, pid, host, reserved_usd) VALUES (?, ?, ?, 0.0)"
        self._write(sql, (_now(), os.getpid(), socket.gethostname()))
        self._start, self._reserved_usd = next(self._rows("SELECT max(id) FROM starts"))[0], 0.0

    async def reserve(self, usd: float) -> None:
        """Note that up to so much is in flight at once; on disk when it returns, at once if it was that much before."""
        assert self._start is not None
        if usd > self._reserved_usd:
            sql = "UPDATE starts SET reserved_usd = max(reserved_usd, ?) WHERE id = ?"
            await asyncio.wrap_future(self._submit(sql, (usd, self._start)))
            self._reserved_usd = max(usd, self._reserved_usd)

    def end(self) -> None:
        """Note that every call of this start is a row."""
        self._write("UPDATE starts SET ended_at = ? WHERE id = ?", (_now(), self._start))

    def write_off(self, usd: float) -> None:
        """Note that up to so much may be billed for what will never be a row."""
        sql = "INSERT INTO starts (started_at, pid, host, reserved_usd) VALUES (?, ?, ?, ?)"
        self._write(sql, (_now(), os.getpid(), socket.gethostname(), usd))

    def unaccounted_usd(self) -> float:
        """What earlier starts that ended uncleanly had in flight at most, and what was written off: it may have been
        billed, and is no row."""
        sql = "SELECT total(reserved_usd) FROM starts WHERE ended_at IS NULL AND id IS NOT ?"
        return float(next(self._rows(sql, (self._start,)))[0])

    def close(self) -> str | None:
        """Write what is queued, and stop; returns what went wrong with the writing, or None."""
        self._writer.stop()
        return self._writer.failure

    def _write(self, sql: str, values: Sequence[Any]) -> None:
        self._submit(sql, values).result()

    def _submit(self, sql: str, values: Sequence[Any]) -> Future[None]:
        def execute(db: sqlite3.Connection) -> None:
            db.execute(sql, values)

        return self._writer.submit(execute)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
