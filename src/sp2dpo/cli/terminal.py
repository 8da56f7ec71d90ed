"""What all commands share: the app, the options that several of them take, and the two ways to speak."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from sp2dpo.runs import Run

__all__ = [
    "ARGUMENTS",
    "AsJson",
    "Limit",
    "ProcessPath",
    "RunDir",
    "RunDirPath",
    "app",
    "give",
    "open_run",
    "say",
    "show",
]

ARGUMENTS: list[str] = []
"""What this command line was given, for messages that repeat it."""

app = typer.Typer(
    name="sp2dpo",
    help="Per-pair temperatures for DPO: decided before training, kept as data.",
    epilog="The whole path in one command: sp2dpo run examples/quickstart/process.yaml",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

ProcessPath = Annotated[Path, typer.Argument(metavar="PROCESS.yaml", help="the process file (λ)")]
RunDirPath = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="a run directory")]
RunDir = Annotated[Path | None, typer.Option("--run-dir", help="where the run lives; default runs/<name>")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="only the first N pairs; the rest can follow later")]
AsJson = Annotated[bool, typer.Option("--json", help="the result as one JSON object on stdout")]


def say(text: str) -> None:
    """Talk: one line on stderr."""
    print(text, file=sys.stderr)


def give(data: Mapping[str, Any], as_json: bool, title: str = "") -> None:
    """Data: one JSON object, or a table of names and values, on stdout."""
    if as_json:
        print(json.dumps(data, ensure_ascii=False))
        return
    if title:
        print(title)
    table = Table("what", "value", box=SIMPLE_HEAD, show_header=False)
    for name, value in data.items():
        table.add_row(name, _shown(value))
    show(table)


def show(table: Table) -> None:
    """A table on stdout."""
    Console(markup=False).print(table)


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def open_run(process_path: Path, run_dir: Path | None) -> Run:
    from sp2dpo.process import load_process
    from sp2dpo.runs import open_run as open_run_dir

    run = open_run_dir(load_process(process_path), run_dir)
    say(f"λ {run.process.lambda_hash[:12]}  run directory {run.path}")
    return run
