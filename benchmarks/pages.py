"""The page of benchmarks: tables as Markdown, date and versions, put between the marks of a measurement."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from sp2dpo import __version__

__all__ = ["ROOT", "Row", "table", "where", "write"]

ROOT: Final = Path(__file__).resolve().parents[1]

Row = dict[str, Any]


def table(rows: Sequence[Row]) -> str:
    """As Markdown."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *([str(row.get(name, "")) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def where(*packages: str) -> str:
    """Date, versions of this project and of packages, and machine."""
    names = " ".join(f"{name} {_version(name)}," for name in ("sp2dpo", *packages))
    load = f"load {os.getloadavg()[0]:.1f} before"
    python = f"Python {platform.python_version()}"
    return f"{date.today()}, {names} {python}, {os.cpu_count()} cores ({platform.machine()}), {load}"


def _version(package: str) -> str:
    try:
        return __version__ if package == "sp2dpo" else version(package)
    except PackageNotFoundError:
        return "(not installed)"


def write(page: Path, name: str, text: str) -> None:
    """Put the result of a measurement between its marks."""
    mark = f"<!-- {name} -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(mark)
    _, _, after = rest.partition(mark)
    page.write_text(f"{before}{mark}\n{text}\n{mark}{after}", encoding="utf-8")
