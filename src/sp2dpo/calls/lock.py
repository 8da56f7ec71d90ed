"""One process at a time writes a file. The lock is the operating system's and ends with the process, in every case."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

from sp2dpo.calls.writer import not_written
from sp2dpo.errors import RunDirError

__all__ = ["locked"]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `<path>.lock`, which names the process that holds it, and is empty after a clean end.

    Raises:
        RunDirError: another process holds it.
        Unfinished: the lock cannot be written.
    """
    file = path.with_name(path.name + ".lock")
    lock = filelock.FileLock(file)
    try:
        lock.acquire(timeout=0)
        file.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
    except filelock.Timeout:
        holder = _holder(file)
        raise RunDirError(
            f"{path} is being written by {holder}: wait until that has ended, or end it, and run the same command "
            "again; reading it meanwhile is safe"
        ) from None
    except OSError as error:
        lock.release()
        raise not_written(path, error) from error
    try:
        yield
    finally:
        with suppress(OSError):
            file.write_text("", encoding="utf-8")
        lock.release()


def _holder(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip() or "another process"
    except OSError:
        return "another process"
