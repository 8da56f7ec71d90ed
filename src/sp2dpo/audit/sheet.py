"""The sheet that people fill in: a blind CSV, and how it is read back from whatever program saved it.

It shows two responses as A and B. What the source prefers, β and all judgements are not in it; which side is which
follows from the seed in its last column. Knows nothing of figures.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import pyarrow as pa

from sp2dpo.audit.cells import beginning, end, plain, safe_cell
from sp2dpo.audit.sample import chosen_is_a, digest
from sp2dpo.errors import DataError, InputError
from sp2dpo.evidence import Evidence
from sp2dpo.hashing import sha256_file, sha256_json
from sp2dpo.rubric import category_of
from sp2dpo.tables import write_atomic

__all__ = ["COLUMNS", "Sheet", "Verdict", "VerdictRow", "read_sheet", "write_sheet"]

COLUMNS: Final = (
    "row",
    "pair_id",
    "prompt",
    "response_a",
    "response_b",
    "verdict",
    "category",
    "notes",
    "sheet",
)
_NEEDED: Final = ("pair_id", "verdict", "sheet")

Verdict = Literal["right", "wrong", "tie"]
"""Of a label: the person prefers the chosen response, the rejected one, or neither."""

_TIES: Final = {"tie", "ties", "tied", "equal", "same", "draw"}
_SIDE: Final = re.compile(r"(?:response|answer)?[\s_-]*([ab])")
_TOKEN: Final = re.compile(r"seed (\d+), n (\d+), draw ([0-9a-f]{16}), check ([0-9a-f]{8})")


@dataclass(frozen=True)
class VerdictRow:
    """One filled row; `category` is the person's own, None if it was left empty or is none of the six."""

    pair_id: str
    verdict: Verdict
    category: str | None


@dataclass(frozen=True)
class Sheet:
    """A sheet as it came back.

    Attributes:
        path: as it was given.
        sha256: of the file.
        seed: that the sample was drawn with.
        asked: pairs that were asked for.
        draw: `digest` of the sample.
        rows: those with a verdict.
        unanswered: pair_ids of those without.
        odd_categories: what stands in the column category and is none of the six.
    """

    path: Path
    sha256: str
    seed: int
    asked: int
    draw: str
    rows: tuple[VerdictRow, ...]
    unanswered: tuple[str, ...]
    odd_categories: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of the file; stands for the person who filled it in."""
        return self.path.name


def write_sheet(path: Path, evidence: Evidence, drawn: pa.Table, n: int, seed: int) -> None:
    """Write a sample as a sheet: UTF-8 with a mark that Excel needs, every cell quoted, no cell a formula.

    Args:
        drawn: what `sample.draw(evidence, n, seed)` gave.

    Raises:
        InputError: the name does not end in .csv, or the file is there already; it may hold verdicts.
    """
    if path.suffix.lower() != ".csv":
        raise InputError(f"{path}: a sheet is CSV, which any spreadsheet opens; give a name that ends in .csv")
    if path.exists():
        raise InputError(f"{path} is there already and may hold verdicts; choose another name, or delete it first")
    token = _token(seed, n, digest(drawn))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, restval="", quoting=csv.QUOTE_ALL)
    writer.writeheader()
    at = evidence.at_i[drawn["at"].to_numpy()]
    pairs = evidence.pairs.select(["pair_id", "prompt", "chosen", "rejected"]).take(at).to_pylist()
    for row, pair in zip(drawn["row"].to_pylist(), pairs, strict=True):
        writer.writerow({"row": row, **_shown(pair, seed), "sheet": token})
    write_atomic(path, lambda partial: partial.write_bytes(text.getvalue().encode("utf-8-sig")))


def _token(seed: int, n: int, drawn: str) -> str:
    """What scoring needs of a sample, and a check without which a changed seed would mix up A and B unseen."""
    return f"seed {seed}, n {n}, draw {drawn}, check {sha256_json([seed, n, drawn])[:8]}"


def _shown(pair: Mapping[str, Any], seed: int) -> dict[str, str]:
    a, b = ("chosen", "rejected") if chosen_is_a(seed, pair["pair_id"]) else ("rejected", "chosen")
    texts = {
        "prompt": end(plain(pair["prompt"])),
        "response_a": beginning(plain(pair[a])),
        "response_b": beginning(plain(pair[b])),
    }
    return {"pair_id": pair["pair_id"], **{name: safe_cell(text) for name, text in texts.items()}}


def read_sheet(path: Path) -> Sheet:
    """A sheet with commas, semicolons or tabs, rows in any order, columns of your own, blank rows.

    Raises:
        DataError: no CSV, not one of these sheets, or a verdict that is none; rows are named as a spreadsheet does.
    """
    if not path.is_file():
        raise DataError(f"{path} is {_instead(path)}; give a sheet that `sp2dpo audit sample` wrote")
    rows = list(_records(path))
    wrong = [f"row {n}: {value[:40]!r}" for n, row in rows if (value := row["verdict"]) and _verdict_of(value) is None]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise DataError(f"{path}: a verdict is A, B or tie; not understood: {', '.join(wrong[:5])}{more}")
    tokens = {row["sheet"] for _, row in rows if row["sheet"]}
    token = _TOKEN.fullmatch(tokens.pop()) if len(tokens) == 1 else None
    if token is None:
        raise DataError(
            f"{path}: the column 'sheet' must say the same in every row, as `sp2dpo audit sample` wrote it; "
            "give two sheets as two files, and put back what was changed"
        )
    seed = int(token[1])
    if token[0] != _token(seed, int(token[2]), token[3]):
        raise DataError(
            f"{path}: the column 'sheet' was changed: its check does not fit '{token[0].rpartition(',')[0]}', and with "
            "another seed A and B are other responses; put back what `sp2dpo audit sample` wrote there"
        )
    lost = next((n for n, row in rows if not row["pair_id"]), None)
    if lost is not None:
        raise DataError(f"{path}, row {lost}: no pair_id; put back what `sp2dpo audit sample` wrote there")
    filled = [row for _, row in rows if row["verdict"]]
    given = {row["category"] for row in filled if row["category"]}
    return Sheet(
        path=path,
        sha256=sha256_file(path),
        seed=seed,
        asked=int(token[2]),
        draw=token[3],
        rows=tuple(_once(path, [_verdict_row(row, seed) for row in filled])),
        unanswered=tuple(row["pair_id"] for _, row in rows if not row["verdict"]),
        odd_categories=tuple(sorted(name for name in given if category_of(name) is None)),
    )


def _instead(path: Path) -> str:
    """What is there where a file should be."""
    return "a folder" if path.is_dir() else "no file but a device or pipe" if path.exists() else "not there"


def _verdict_row(row: Mapping[str, str], seed: int) -> VerdictRow:
    side, pair_id = _verdict_of(row["verdict"]), row["pair_id"]
    verdict: Verdict = "tie" if side == "tie" else "right" if (side == "a") == chosen_is_a(seed, pair_id) else "wrong"
    return VerdictRow(pair_id, verdict, category_of(row["category"]))


def _once(path: Path, rows: Sequence[VerdictRow]) -> Iterator[VerdictRow]:
    seen: dict[str, Verdict] = {}
    for row in rows:
        if seen.setdefault(row.pair_id, row.verdict) != row.verdict:
            raise DataError(
                f"{path}: pair {row.pair_id} is there twice with different verdicts; delete one of the rows"
            )
    first = {row.pair_id: row for row in reversed(rows)}
    yield from (first[pair_id] for pair_id in seen)


def _verdict_of(value: str) -> str | None:
    """`a`, `b`, `tie`, or None."""
    word = value.casefold().strip(" \t\n.'\"()")
    side = _SIDE.fullmatch(word)
    return side[1] if side else "tie" if word in _TIES else None


def _records(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows that are not blank: the number that a spreadsheet gives them, and what they hold by column."""
    content = path.read_bytes()
    if content[:2] == b"PK":
        raise DataError(f"{path} is a workbook, not CSV; save it as CSV (UTF-8) and give that file")
    lines = _text_of(content)
    try:
        table = next((table for mark in ",;\t" if _head(table := _split(lines, mark)) is not None), None)
    except csv.Error as error:
        raise DataError(f"{path} is not readable CSV ({error}); save it as CSV (UTF-8)") from error
    if table is None:
        raise DataError(
            f"{path} has no row with the headings {', '.join(_NEEDED)}; give a sheet that `sp2dpo audit sample` wrote"
        )
    head = _head(table)
    assert head is not None
    names = [_heading(name) for name in table[head]]
    for n, cells in enumerate(table[head + 1 :], start=head + 2):
        row = dict(zip(names, (cell.strip() for cell in cells), strict=False))
        if row.get("pair_id") or row.get("verdict"):
            yield n, {name: row.get(name, "") for name in COLUMNS}


def _text_of(content: bytes) -> str:
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16", "replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", "replace")


def _split(text: str, mark: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text, newline=""), delimiter=mark))


def _head(table: Sequence[Sequence[str]]) -> int | None:
    """Place of the row with the headings, among the first ones."""
    return next((n for n, row in enumerate(table[:5]) if {*_NEEDED} <= {_heading(name) for name in row}), None)


def _heading(name: str) -> str:
    return "_".join(name.casefold().split())
