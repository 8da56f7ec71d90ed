"""One thread that writes to the call log: what is queued together is committed together, and then reported durable.

After the first failure nothing more is written, and everything that waits or comes later is told so.
"""

from __future__ import annotations

import errno
import queue
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sp2dpo.errors import Unfinished

__all__ = ["Work", "Writer", "not_written"]

Work = Callable[[sqlite3.Connection], object]
"""Statements for a transaction that someone else begins and commits."""

_SPACE: Final = "free some space"
_RIGHTS: Final = "make it and its folder writable"
_REMEDIES: Final = {
    "SQLITE_FULL": _SPACE,
    "SQLITE_IOERR": "see that the disk is well and has space",
    "SQLITE_READONLY": _RIGHTS,
    "SQLITE_CANTOPEN": _RIGHTS,
    "ENOSPC": _SPACE,
    "EDQUOT": _SPACE,
    "EROFS": _RIGHTS,
    "EACCES": _RIGHTS,
}


def not_written(path: Path, error: sqlite3.Error | OSError) -> Unfinished:
    """What to tell the user if a call log could not be written."""
    name = error.sqlite_errorname if isinstance(error, sqlite3.Error) else errno.errorcode.get(error.errno or 0, "")
    remedy = next((text for start, text in _REMEDIES.items() if name.startswith(start)), "mend that")
    return Unfinished(
        f"{path} could not be written: {error}; what was answered before is safe; "
        f"{remedy} and run the same command again"
    )


@dataclass
class _Job:
    work: Work
    done: Future[None] = field(default_factory=Future)


class Writer:
    """The only one to use the connection `db` until it is stopped; `submit` from any thread."""

    def __init__(self, path: Path, db: sqlite3.Connection) -> None:
        self._path = path
        self._db = db
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._door = threading.Lock()
        self._open = True
        self.failure: str | None = None
        self._thread = threading.Thread(target=self._run, name=f"writes {path.name}", daemon=True)
        self._thread.start()

    def submit(self, work: Work) -> Future[None]:
        """Queue `work`; the future is done when it is on disk, and cannot be cancelled.

        Raises:
            Unfinished: an earlier write failed, or the writer was stopped.
        """
        job = _Job(work)
        job.done.set_running_or_notify_cancel()
        with self._door:
            if not self._open:
                raise Unfinished(self.failure or f"{self._path} was closed")
            self._queue.put(job)
        return job.done

    def stop(self) -> None:
        """Write what is queued, then end."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        group: list[_Job] = []
        try:
            more = True
            while more:
                group, more = self._next_group()
                self._commit(group)
                written, group = group, []
                for job in written:
                    job.done.set_result(None)
        except sqlite3.Error as error:
            self.failure = str(not_written(self._path, error))
        finally:
            self._close(group)

    def _next_group(self) -> tuple[list[_Job], bool]:
        jobs = [self._queue.get()]
        while not self._queue.empty():
            jobs.append(self._queue.get())
        group = [job for job in jobs if job is not None]
        return group, len(group) == len(jobs)

    def _commit(self, group: list[_Job]) -> None:
        if group:
            self._db.execute("BEGIN IMMEDIATE")
            for job in group:
                job.work(self._db)
            self._db.execute("COMMIT")

    def _close(self, waiting: list[_Job]) -> None:
        with self._door:
            self._open = False
        while not self._queue.empty():
            job = self._queue.get()
            waiting += [job] if job is not None else []
        for job in waiting:
            job.done.set_exception(Unfinished(self.failure or f"{self._path} was closed"))
