"""The call log: one SQLite row for every attempt of every call, failed ones too. J.4.

Append-only (the file itself refuses UPDATE and DELETE), with a chain of hashes over the rows. Knows nothing of how an
answer is got or what is made of it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from sp2dpo.calls import schema
from sp2dpo.calls.ledger import Ledger
from sp2dpo.calls.lock import locked
from sp2dpo.calls.log import CallLog
from sp2dpo.calls.rows import VALID, Asked, Attempts, BatchEvent, Call, Cell, CellState, Count, Usage
from sp2dpo.calls.writer import not_written
from sp2dpo.errors import RunDirError, Unfinished
from sp2dpo.hashing import sha256_file
from sp2dpo.tables import amend_manifest, read_manifest

__all__ = [
    "VALID",
    "Asked",
    "Attempts",
    "BatchEvent",
    "Call",
    "CallLog",
    "Cell",
    "CellState",
    "Count",
    "Ledger",
    "Usage",
    "open_calls",
    "open_ledger",
    "open_sealed",
    "unwritten",
]


@contextmanager
def open_calls(path: Path) -> Iterator[CallLog]:
    """Open a call log to read it, of this version or an older one, as it is at the first question to it.

    Rows that are added meanwhile are not seen. Nothing is written, no writer is waited for, and none has to wait.

    Raises:
        RunDirError: it is not there, or is no call log, or is of a newer version.
    """
    _check_there(path)
    with closing(_reader(path)) as db:
        db.execute("BEGIN")
        yield CallLog(path, db)


@contextmanager
def open_sealed(path: Path) -> Iterator[CallLog]:
    """Open a call log that nobody writes, to read it without a trace: no byte in its folder changes.

    Raises:
        RunDirError: as `open_calls`, or a writer has not ended.
    """
    _check_there(path)
    problem = unwritten(path)
    if problem:
        raise RunDirError(problem)
    try:
        db = _opened_to_read(path, "immutable=1")
    except sqlite3.DatabaseError as error:
        raise RunDirError(f"{path} is no call log: {error}") from error
    with closing(db):
        db.execute("BEGIN")
        yield CallLog(path, db)


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise RunDirError(f"{path} is missing; make it with: sp2dpo annotate PROCESS.yaml")


def unwritten(path: Path) -> str | None:
    """What to say of a log whose writer did not end: it is at work, or was killed."""
    left = next((end for end in ("-wal", "-journal", ".lock") if _left(path, end)), None)
    if left is None:
        return None
    return (
        f"{path.name}{left} is not empty: {path.name} is being written, or what wrote it was killed; when nothing "
        "writes it, sp2dpo annotate PROCESS.yaml brings it in order"
    )


def _left(path: Path, end: str) -> bool:
    """Whether there is something in the file beside a call log that has its name and this end."""
    file = path.with_name(path.name + end)
    return file.is_file() and file.stat().st_size > 0


@contextmanager
def open_ledger(path: Path) -> Iterator[Ledger]:
    """Open a call log to add to it: made if it is not there, brought to this version if it is older.

    At a clean end its manifest, if it has one that is about these rows, gets the hash of the file.

    Raises:
        RunDirError: another process is writing it, or it is no call log, or of a newer version.
        Unfinished: it cannot be written.
    """
    path = path.resolve()
    with locked(path):
        content = None
        try:
            with closing(_opened_to_write(path)) as writing, closing(_reader(path)) as reading:
                ledger = Ledger(path, reading, writing)
                try:
                    yield ledger
                finally:
                    failure = ledger.close()
                    content = _content(ledger)
        finally:
            if content is not None:
                _seal(path, content)
        if failure:
            raise Unfinished(failure)


def _content(ledger: Ledger) -> str | None:
    with suppress(RunDirError):
        return ledger.content_hash()
    return None


def _seal(path: Path, content: str) -> None:
    """Note in the manifest what the file is as a whole, indexes and free pages too; not while a reader keeps rows out
    of it."""
    with suppress(OSError, RunDirError):
        manifest = read_manifest(path)
        if manifest is not None and manifest.get("content") == content:
            whole = not _left(path, "-wal")
            amend_manifest(path, manifest | {"files": {path.name: sha256_file(path)} if whole else {}})


def _reader(path: Path) -> sqlite3.Connection:
    try:
        return _opened_to_read(path, "mode=rw")
    except sqlite3.OperationalError as error:
        if not _in_read_only_place(path, error):
            raise RunDirError(f"{path} cannot be read: {error}") from error
        return _opened_to_read(path, "immutable=1")
    except sqlite3.DatabaseError as error:
        raise RunDirError(f"{path} is no call log: {error}") from error


def _in_read_only_place(path: Path, error: sqlite3.Error) -> bool:
    """Whether SQLite could not make the files that it keeps beside this one, and there are no rows in them."""
    return not _left(path, "-wal") and error.sqlite_errorname.startswith(("SQLITE_CANTOPEN", "SQLITE_READONLY"))


def _opened_to_read(path: Path, how: str) -> sqlite3.Connection:
    db = _connect(path, how)
    try:
        for statement in schema.AS_NOW[_known_version(path, db)]:
            db.execute(statement)
        db.execute("PRAGMA query_only = ON")
    except BaseException:
        db.close()
        raise
    return db


def _opened_to_write(path: Path) -> sqlite3.Connection:
    db = _connect(path, "mode=rwc")
    try:
        _bring_up_to_date(path, db)
    except sqlite3.OperationalError as error:
        db.close()
        raise not_written(path, error) from error
    except sqlite3.DatabaseError as error:
        db.close()
        raise RunDirError(f"{path} is no call log: {error}") from error
    except BaseException:
        db.close()
        raise
    return db


def _bring_up_to_date(path: Path, db: sqlite3.Connection) -> None:
    new = not db.execute("SELECT 1 FROM sqlite_master").fetchone()
    version = None if new else _known_version(path, db)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    if version == schema.SCHEMA_VERSION:
        return
    content = ""
    if version is not None:
        with open_calls(path) as old:
            content = old.content_hash()
    db.execute("BEGIN IMMEDIATE")
    if version is None:
        schema.create(db)
    schema.migrate(db, content)
    db.execute("COMMIT")


def _connect(path: Path, how: str) -> sqlite3.Connection:
    """A connection without transactions of its own, which any thread may use."""
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?{how}", uri=True, isolation_level=None, timeout=30, check_same_thread=False
    )


def _known_version(path: Path, db: sqlite3.Connection) -> int:
    version = schema.version_of(db)
    if version > schema.SCHEMA_VERSION:
        raise RunDirError(
            f"{path} is a call log of version {version}, and this sp2dpo knows none above {schema.SCHEMA_VERSION}; "
            "get a newer one: pip install --upgrade sp2dpo"
        )
    if version not in schema.AS_NOW:
        raise RunDirError(
            f"{path} is no call log: its version is {version}; if it is empty, go on with: sp2dpo annotate PROCESS.yaml"
        )
    return version
