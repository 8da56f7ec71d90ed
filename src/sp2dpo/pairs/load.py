"""Rows from a source: a file, a folder, or a dataset of the hub. Knows nothing of what the columns mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sp2dpo.errors import DataError
from sp2dpo.pairs.choose import choose, patterns
from sp2dpo.pairs.formats import Row, is_readable, read_file
from sp2dpo.pairs.hub import download, file_names, is_hub_id

if TYPE_CHECKING:
    from sp2dpo.settings import DataSettings

__all__ = ["Rows", "read_source"]


@dataclass(frozen=True)
class Rows:
    """What a source holds: its rows in order, and the names of the files that they came from."""

    rows: list[Row]
    files: tuple[str, ...]


def read_source(data: DataSettings, base: Path) -> Rows:
    """All rows of `data.source`; relative paths start at `base`. A file named itself is read whatever the split is.

    Raises:
        DataError: no such source, nothing in it that fits, a damaged file, or no rows at all.
    """
    path = base / Path(data.source).expanduser()
    if path.is_file():
        return _read(path.parent, [path.name], "")
    if path.is_dir():
        return _read(path, choose(_below(path), data.split, data.files, str(path)), "")
    if is_hub_id(data.source) and not is_readable(data.source):
        return _read_hub(data)
    raise DataError(f"data.source '{data.source}' is not there (looked for {path}); give a file, a folder or a hub id")


def _below(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _read_hub(data: DataSettings) -> Rows:
    repo, revision = data.source, data.revision
    folder = download(repo, revision, patterns(data.split, data.files))
    where = f"{repo}@{folder.name}"  # a snapshot's folder is named for its commit
    try:
        names = choose(_below(folder), data.split, data.files, where)
    except DataError:
        choose(file_names(repo, folder.name, folder), data.split, data.files, where)  # the same, knowing every file
        raise
    return _read(folder, names, where + "/")


def _read(folder: Path, names: Sequence[str], prefix: str) -> Rows:
    rows = [row for name in names for row in read_file(folder / name)]
    if not rows:
        raise DataError(f"{', '.join(str(folder / name) for name in names)}: no rows; the source is empty")
    return Rows(rows, tuple(prefix + name for name in names))
