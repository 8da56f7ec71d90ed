"""Markdown from templates: how a value becomes text in a table. Knows nothing of what is said."""

from __future__ import annotations

import re

import jinja2

__all__ = ["cell", "templates"]


def templates() -> jinja2.Environment:
    """Markdown templates of this room; values in tables go through the filter `cell`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sp2dpo.publish", "."),
        autoescape=False,  # noqa: S701  Markdown
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"cell": cell, "num": _number, "day": lambda text: str(text)[:10], "python": repr}
    return environment


def cell(value: object) -> str:
    """Text that stays what it is in a Markdown table: one line, no markup."""
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def _number(value: float | None, places: int = 3) -> str:
    return "–" if value is None else f"{value:.{places}f}".replace("-", "−")
