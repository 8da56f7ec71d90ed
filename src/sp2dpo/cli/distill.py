"""`sp2dpo distill`: a local predictor from an annotated run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from sp2dpo.cli.terminal import AsJson, RunDirPath, app, give, say, show
from sp2dpo.errors import InputError, MissingExtra
from sp2dpo.runs import read_run

__all__: list[str] = []

Embedder = Annotated[
    str | None, typer.Option("--embedder", metavar="FOLDER|ID@REVISION", help="encoder of --features embeddings")
]


@app.command(epilog="sp2dpo distill runs/quickstart -o gap-predictor")
def distill(
    run_dir: RunDirPath,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="where the predictor goes")],
    features: Annotated[
        Literal["text", "embeddings"], typer.Option("--features", help="what it reads: hashed words, or embeddings")
    ] = "text",
    embedder: Embedder = None,
    seed: Annotated[int, typer.Option("--seed", help="of the split into fitted and held-out prompts")] = 0,
    as_json: AsJson = False,
) -> None:
    """Fit a local predictor of the gap to the panel's answers."""
    if (features == "embeddings") != (embedder is not None):
        raise InputError("--features embeddings and --embedder go together: give both, or neither to read words")
    try:
        from sp2dpo.distill.make import distill_run
    except ModuleNotFoundError as error:
        raise MissingExtra(f"sp2dpo distill (no module '{error.name}')", "report") from error

    made = distill_run(read_run(run_dir), output, embedder=embedder, seed=seed)
    facts = made.about["held_out"]
    say(f"distill   fitted on {made.about['fit']['pairs']:,} pairs, {facts['pairs']:,} held out  {output}")
    say(f"          {facts['statement']}")
    category = facts["category"]
    if category["accuracy"] <= category["most_frequent_accuracy"]:
        say(f"          Its categories are right no more often than always saying {category['most_frequent']}.")
    if as_json:
        give({"predictor": str(output), "sha256": made.sha256, **made.about}, True)
        return
    give(_summary(facts), False, "effective gap of held-out pairs")
    print("by the category of the panel")
    show(_categories(facts))


_COLUMNS: Final = {
    "pairs": "pairs",
    "actual": "actual",
    "predicted": "predicted",
    "error": "mae",
    "constant": "constant_mae",
    "slope": "slope",
    "at 0": "intercept",
}
"""Heads of the table by category, and the facts below them."""


def _summary(facts: dict[str, Any]) -> dict[str, Any]:
    """The lines of the table of values."""
    gap, call, category, reversed_ = (facts[key] for key in ("gap", "one_call", "category", "known_reversed"))
    lines = {
        "mean absolute error": gap["mae"],
        "  of a constant": gap["constant_mae"],
        "  one call of the panel": call["mae"],
        "share of squared error saved (R²)": gap["saved"],
        "rank correlation": gap["spearman"],
        "  one call of the panel, rank correlation": call["spearman"],
        "calibration: slope": facts["calibration"]["slope"],
        "calibration: intercept": facts["calibration"]["intercept"],
        "category as the panel's": category["accuracy"],
        f"  always {category['most_frequent']}": category["most_frequent_accuracy"],
    }
    if reversed_:
        lines |= {"AUC against known_reversed": reversed_["auc"], "  of the panel": reversed_["auc_of_panel"]}
    return lines


def _categories(facts: dict[str, Any]) -> Table:
    """Calibration by the category of the panel."""
    table = Table("category", *_COLUMNS, box=SIMPLE_HEAD)
    for category, row in facts["by_category"].items():
        table.add_row(category, *(_shown(row[name]) for name in _COLUMNS.values()))
    return table


def _shown(value: float | int | None) -> str:
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
