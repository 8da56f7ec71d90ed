"""One file to a list of rows: Parquet, JSONL, JSON and CSV, the text formats also gzipped.

A damaged file is a `DataError` that names it and the place. Knows nothing of what the columns mean.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from sp2dpo.errors import DataError

__all__ = ["SUFFIXES", "Row", "is_readable", "read_file"]

Row = dict[str, Any]

NUMBERS: Final = ("score_chosen", "score_rejected", "chosen-rating", "rejected-rating", "overall_preference")
"""Columns that are numbers wherever they occur; CSV has no types, so its other cells stay text."""


@contextmanager
def _bytes_of(path: Path) -> Iterator[IO[bytes]]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield file  # type: ignore[misc]
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read to its end ({error}); download or copy it again") from error


def _read_parquet(path: Path) -> list[Row]:
    try:
        return pq.ParquetFile(path).read().to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file ({error}); download or copy it again") from error


def _parse_json(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}); repair or remove it") from error


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where} is a {type(value).__name__}, not an object with columns; repair or remove it")
    return value


def _read_jsonl(path: Path) -> list[Row]:
    rows: list[Row] = []
    with _bytes_of(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}, line {number},"
                rows.append(_object(_parse_json(line, where), where))
    return rows


def _read_json(path: Path) -> list[Row]:
    with _bytes_of(path) as file:
        value = _parse_json(file.read(), f"{path} (one JSON list of objects; name it .jsonl if it has one per line)")
    if not isinstance(value, list):
        raise DataError(f"{path} holds a {type(value).__name__}, not a list of objects; write one list, or JSONL")
    return [_object(item, f"{path}, item {number},") for number, item in enumerate(value, 1)]


def _messages_or_text(cell: str) -> Any:
    """The messages that a cell spells as JSON, else the cell itself."""
    if not cell.lstrip().startswith("["):
        return cell
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return cell
    spelled = value and all(isinstance(item, dict) and ({"role", "from"} & item.keys()) for item in value)
    return value if spelled else cell


def _number_or_text(cell: str) -> Any:
    try:
        return float(cell) if cell.strip() else None
    except ValueError:
        return cell


def _csv_row(cells: Row, where: str) -> Row:
    if None in cells or None in cells.values():
        raise DataError(f"{where} has not as many cells as the header; quote cells that hold commas or line breaks")
    return {name: (_number_or_text if name in NUMBERS else _messages_or_text)(cell) for name, cell in cells.items()}


def _read_csv(path: Path) -> list[Row]:
    csv.field_size_limit(sys.maxsize)
    with _bytes_of(path) as file:
        reader = csv.DictReader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), strict=True)
        try:
            return [_csv_row(row, f"{path}, line {reader.line_num},") for row in reader]
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}, after line {reader.line_num}, is not CSV ({error}); repair it") from error


READERS: Final[Mapping[str, Callable[[Path], list[Row]]]] = {
    ".parquet": _read_parquet,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".jsonl.gz": _read_jsonl,
    ".json.gz": _read_json,
    ".csv.gz": _read_csv,
}
SUFFIXES: Final = tuple(READERS)


def is_readable(name: str) -> bool:
    return name.endswith(SUFFIXES)


def read_file(path: Path) -> list[Row]:
    """All rows of one file, by its suffix.

    Raises:
        DataError: an unknown suffix, or a file that is damaged; the line is named.
    """
    reader = next((READERS[suffix] for suffix in SUFFIXES if path.name.endswith(suffix)), None)
    if reader is None:
        raise DataError(f"{path} has no suffix that is known here; they are {', '.join(SUFFIXES)}")
    return reader(path)
