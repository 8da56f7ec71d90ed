"""The command that sets runs side by side."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from sp2dpo.cli.terminal import AsJson, app, give, say
from sp2dpo.errors import InputError, MissingExtra

RunDirs = Annotated[list[Path], typer.Argument(metavar="RUN_DIR", help="run directories; the first is the base")]
Page = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE.html", help="also write one self-contained HTML page")
]


@app.command("compare", epilog="sp2dpo compare runs/one runs/other -o compare.html")
def compare_runs(run_dirs: RunDirs, out: Page = None, as_json: AsJson = False) -> None:
    """Runs, schedules and trained arms side by side."""
    if out and out.suffix.lower() != ".html":
        raise InputError(f"{out}: the page is HTML; give --output a name that ends in .html")
    try:
        from sp2dpo.cli.compare_tables import print_comparison
        from sp2dpo.compare import compare
        from sp2dpo.compare.page import write_page
    except ModuleNotFoundError as error:
        raise MissingExtra(f"sp2dpo compare (no module '{error.name}')", "report") from error

    compared = write_page(run_dirs, out) if out else compare(run_dirs)
    if out:
        say(f"compare   {out}")
    if as_json:
        give(dataclasses.asdict(compared), True)
    else:
        print_comparison(compared)
