"""Texts from strangers in the cells of a spreadsheet: as they are, and harmless. Knows nothing of pairs or files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

__all__ = ["LONGEST", "beginning", "end", "plain", "safe_cell"]

LONGEST: Final = 32_000
"""UTF-16 units of a text in a cell. Excel takes 32,767 and spills what is more into other rows.

Source: https://support.microsoft.com/en-us/office/excel-specifications-and-limits-1672b34d-7043-467e-8e27-269d656771c3
"""

_PICTURES: Final = {n: 0x2400 + n for n in range(32) if chr(n) not in "\t\n"}
_FORMULA: Final = ("=", "+", "-", "@", "＝", "＋", "－", "＠")


def plain(messages: Sequence[Mapping[str, str]]) -> str:
    """A conversation as text: each message after its role, an empty line between two.

    Line ends are of one kind. Other control characters become pictures of them: neither a spreadsheet nor the database
    of Argilla holds a NUL.
    """
    text = "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
    return text.replace("\r\n", "\n").replace("\r", "\n").translate(_PICTURES)


def beginning(text: str) -> str:
    """As much of a text as fits into a cell, and how much does not."""
    kept = text.encode("utf-16-le")[: 2 * LONGEST].decode("utf-16-le", "ignore")
    return text if kept == text else f"{kept}\n[the last {len(text) - len(kept):,} characters do not fit into a cell]"


def end(text: str) -> str:
    """As much of the end of a text as fits into a cell, and how much does not."""
    kept = text.encode("utf-16-le")[-2 * LONGEST :].decode("utf-16-le", "ignore")
    return text if kept == text else f"[the first {len(text) - len(kept):,} characters do not fit into a cell]\n{kept}"


def safe_cell(value: Any) -> Any:
    """A value that no spreadsheet takes for a formula.

    Text that opens with a tab or a line break, or, after spaces, with = + - @ or their full-width forms, gets an
    apostrophe in front, which spreadsheets read as: this is text. Numbers are left as they are.

    Source: https://owasp.org/www-community/attacks/CSV_Injection
    """
    if not isinstance(value, str):
        return value
    return f"'{value}" if value.startswith(("\t", "\r", "\n")) or value.lstrip().startswith(_FORMULA) else value
