"""The charts of a report as files: SVG that stands alone, in the light colours of the page on white."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Final
from xml.sax.saxutils import escape

from sp2dpo.report.charts import Chart
from sp2dpo.runs import Run
from sp2dpo.tables import write_atomic

__all__ = ["FONT", "standalone", "write_figures"]

FONT: Final = "system-ui, 'Segoe UI', Roboto, Arial, sans-serif"
_NAMESPACES: Final = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'


def write_figures(run: Run, charts: Sequence[Chart]) -> list[Path]:
    """Write RUN/figures/NN-name.svg for each chart, in this order, and remove the SVG of an earlier report.

    The same charts give the same bytes. Returns the paths.
    """
    folder = run.path / "figures"
    folder.mkdir(exist_ok=True)
    made = {folder / f"{n:02}-{_slug(chart.name)}.svg": chart for n, chart in enumerate(charts, start=1)}
    for path, chart in made.items():
        write_atomic(path, partial(Path.write_text, data=standalone(chart), encoding="utf-8"))
    for stale in set(folder.glob("[0-9]*-*.svg")) - set(made):
        stale.unlink()
    return list(made)


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)


def standalone(chart: Chart) -> str:
    """The chart as an XML document with title and description."""
    text = str(chart.svg)
    box = re.search(r'viewBox="([^"]*)"', text)
    assert box, "every chart has a view box"
    width, height = box[1].split()[2:]
    colours = _colours()
    text = re.sub(r"var\((--[\w-]+)\)", lambda match: colours.get(match[1], match[0]), text)
    text = re.sub(r"font-family: [^;\"]*", f"font-family: {FONT}", text)
    start = (
        f'<svg {_NAMESPACES} viewBox="{box[1]}" width="{width}pt" height="{height}pt" role="img" '
        'aria-labelledby="title desc">\n'
        f'<title id="title">{escape(chart.caption)}</title>\n<desc id="desc">{escape(chart.alt)}</desc>\n'
        '<rect width="100%" height="100%" fill="#ffffff"/>'
    )
    return '<?xml version="1.0" encoding="utf-8"?>\n' + start + text[text.index(">") + 1 :].rstrip() + "\n"


def _colours() -> dict[str, str]:
    """The light colours of the page; the dark ones come later in its style sheet."""
    style = resources.files("sp2dpo.report").joinpath("style.css").read_text(encoding="utf-8")
    light = style[: style.index("@media")]
    return dict(re.findall(r"(--[\w-]+):\s*(#[0-9a-fA-F]+)", light))
