"""Commands of the audit: agreement, likely label errors, and a sample that people judge."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from sp2dpo.cli.terminal import AsJson, RunDirPath, app, give, say
from sp2dpo.errors import InputError, MissingExtra

if TYPE_CHECKING:
    from sp2dpo.audit.agreement import AgreementReport, Among, Compared, Estimate
    from sp2dpo.audit.score import Bin, InCategory, Judge, Score
    from sp2dpo.evidence import Evidence

__all__ = ["group"]

group = typer.Typer(
    name="audit", help="Agreement of the panel, labels it doubts, people's verdicts.", no_args_is_help=True
)
app.add_typer(group)

SHOWN = 20
"""Likely label errors in the table on the terminal."""


def _evidence(run_dir: Path) -> Evidence:
    from sp2dpo.evidence import read_evidence
    from sp2dpo.runs import read_run

    return read_evidence(read_run(run_dir))


@group.command(epilog="sp2dpo audit agreement runs/quickstart")
def agreement(run_dir: RunDirPath, as_json: AsJson = False) -> None:
    """How far annotators agree, and prompts with each other."""
    try:
        from sp2dpo.audit.agreement import agreement as agreement_of
    except ModuleNotFoundError as error:
        raise MissingExtra(f"sp2dpo audit agreement (no module '{error.name}')", "report") from error

    report = agreement_of(_evidence(run_dir))
    if as_json:
        give(report.as_json(), True)
    else:
        _show_agreement(report)


def _show_agreement(report: AgreementReport) -> None:
    print(f"{report.pairs:,} pairs, {report.answers:,} answers; in brackets, 95 % intervals")
    if report.predictors:
        print(f"one voice under all prompts, so counted once: {', '.join(report.predictors)} (distilled)")
    among = [one for one in (report.annotators, *report.prompts, report.calls) if one]
    if not among:
        print("one annotator and one voice: there is nothing to compare")
        return
    _show("agreement of", ("α of gap", "α of category", "same", "range"), map(_among, among))
    print("\nα: 1 is full agreement, 0 is chance; by custom 0.80 is reliable, 0.67 the least to go by")
    print("same: pairs to which all give the same category; range: highest less lowest gap of a pair, on average")
    _show("two compared", ("Pearson", "Spearman", "difference", "same"), map(_compared, report.compared))
    offsets = [*report.annotator_offsets, *report.prompt_offsets]
    _show("judges", ("higher by",), ((one.name, _estimate(one.offset, "+z.3f")) for one in offsets))


def _among(one: Among) -> tuple[str, ...]:
    alphas = (_estimate(one.alpha_gap), _estimate(one.alpha_category))
    return one.of, *alphas, _percent(one.same_category), _number(one.mean_range)


def _compared(one: Compared) -> tuple[str, ...]:
    numbers = map(_number, (one.correlation, one.rank_correlation, one.difference))
    return f"{one.of}: {one.one}, {one.other}", *numbers, _percent(one.same_category)


def _show(what: str, heads: Iterable[str], rows: Iterable[tuple[str, ...]]) -> None:
    """A table of names and numbers."""
    table = Table(what, box=SIMPLE_HEAD)
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    _print(table)


def _print(table: Table) -> None:
    """A table with rows, after an empty line and with none below it, so that there is one between two tables."""
    if not table.row_count:
        return
    console = Console(markup=False, emoji=False, highlight=False)
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()[:-1]))


def _number(value: float | None, form: str = "z.3f") -> str:
    return "–" if value is None else format(value, form)


def _percent(value: float | None) -> str:
    return _number(value, "z.0%")


def _estimate(one: Estimate, form: str = "z.2f") -> str:
    interval = "" if one.low is None else f" ({_number(one.low, form)}, {_number(one.high, form)})"
    return _number(one.value, form) + interval


@group.command(epilog="sp2dpo audit errors runs/quickstart -o errors.csv")
def errors(
    run_dir: RunDirPath,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help=".csv for a spreadsheet, .json for Argilla; whole texts"),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="only the N likeliest")] = None,
    as_json: AsJson = False,
) -> None:
    """Pairs whose label the panel doubts, the likeliest error first."""
    from sp2dpo.audit.argilla import settings_path, write_argilla
    from sp2dpo.audit.errors import DOUBT, label_errors, review_rows, write_review

    if output and output.suffix not in (".csv", ".json"):
        raise InputError(f"-o {output}: the name must end in .csv (a spreadsheet) or .json (Argilla)")
    evidence = _evidence(run_dir)
    found = label_errors(evidence)
    rows = review_rows(evidence, found, limit)
    counted = f"{len(found.listed):,} of {evidence.n:,} pairs"
    say(f"errors    {counted}: most annotators doubt them (confidence at most {DOUBT})")
    if output:
        (write_review if output.suffix == ".csv" else write_argilla)(output, rows)
        beside = f", its settings in {settings_path(output).name}" if output.suffix == ".json" else ""
        say(f"          wrote {len(rows):,} to {output}{beside}")
    if as_json:
        give({"pairs": evidence.n, "listed": len(found.listed), "rule": found.rule, "errors": rows}, True)
    elif not output:
        _show_errors(rows[:SHOWN])
        if len(rows) > SHOWN:
            say(f"          the first {SHOWN} are shown; all of them go into a file with -o errors.csv")


def _show_errors(rows: Iterable[Mapping[str, Any]]) -> None:
    table = Table(box=SIMPLE_HEAD, expand=True)
    for head in ("pair_id", "doubt", "conf.", "magn.", "category"):
        table.add_column(head, no_wrap=True)
    table.add_column("question", no_wrap=True, overflow="ellipsis", ratio=1)
    for row in rows:
        question = row["prompt"].rpartition("\n\nuser: ")[2].removeprefix("user: ")
        numbers = (_percent(row["doubt"]), _number(row["confidence"], ".2f"), _number(row["magnitude"], ".2f"))
        table.add_row(row["pair_id"][:12], *numbers, row["category"], _one_line(question))
    _print(table)


def _one_line(text: str) -> str:
    """A text from strangers, with nothing in it that moves a cursor or turns a line round."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


@group.command(epilog="sp2dpo audit sample runs/quickstart -n 200 -o sheet.csv")
def sample(
    run_dir: RunDirPath,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="SHEET.csv", help="the sheet; never overwritten")],
    number: Annotated[int, typer.Option("--number", "-n", min=1, help="pairs to judge")] = 200,
    seed: Annotated[int, typer.Option("--seed", min=0, help="another seed draws other pairs")] = 0,
) -> None:
    """Draw pairs for people to judge, as a blind sheet."""
    from sp2dpo.audit.sample import draw, strata_of
    from sp2dpo.audit.sheet import write_sheet

    evidence = _evidence(run_dir)
    drawn = draw(evidence, number, seed)
    write_sheet(output, evidence, drawn, number, seed)
    pairs, strata = len(strata_of(evidence).at), len(drawn["stratum"].unique())
    say(f"sample    {drawn.num_rows:,} of {pairs:,} pairs, from {strata} strata  {output}")
    then = shlex.join(["sp2dpo", "audit", "score", str(run_dir), str(output)])
    say(f"          write A, B or tie into the column verdict; then: {then}")


@group.command(epilog="sp2dpo audit score runs/quickstart sheet.csv")
def score(
    run_dir: RunDirPath,
    sheets: Annotated[list[Path], typer.Argument(metavar="SHEET.csv...", help="filled in; one file for each person")],
    as_json: AsJson = False,
) -> None:
    """What people's verdicts say of the labels and the panel."""
    try:
        from sp2dpo.audit.score import score as score_of
        from sp2dpo.audit.score import write_score
    except ModuleNotFoundError as error:
        raise MissingExtra(f"sp2dpo audit score (no module '{error.name}')", "report") from error
    from sp2dpo.audit.sheet import read_sheet
    from sp2dpo.audit.weights import weights_yaml

    evidence, filled = _evidence(run_dir), [read_sheet(path) for path in sheets]
    scored = score_of(evidence, filled)
    written = write_score(evidence.run, scored, filled)
    if as_json:
        give(scored.as_json(), True)
    else:
        _show_score(scored)
        if scored.weights:
            print("\nWeights of annotators learnt from these verdicts, for the process file of a new run:\n")
            print(weights_yaml(scored.weights, evidence.run.process.settings.schedule))
    for text in scored.warnings:
        say(f"warning   {text}")
    say(f"score     {written}; to see it in the report: {shlex.join(['sp2dpo', 'report', str(run_dir)])}")


def _show_score(scored: Score) -> None:
    judged = scored.right + scored.wrong + scored.ties
    ties = "ties or split" if scored.raters else "ties"
    counts = f"{scored.right:,} for the label, {scored.wrong:,} against, {scored.ties:,} {ties}"
    print(f"{judged:,} of {scored.rows:,} pairs judged: {counts}")
    print("labels, gaps and confidences of the run; in brackets, 95 % intervals")
    shares = [("labels that are right, without ties", scored.agreement), (ties, scored.tied)]
    if scored.same_category:
        shares.append(("categories that are the schedule's", scored.same_category))
    if scored.raters:
        shares.append((f"pairs on which all say the same, of {scored.raters.pairs:,}", scored.raters.same))
    _show("of the run", ("share",), ((name, _estimate(one, ".1%")) for name, one in shares))
    if scored.raters:
        print(f"\nKrippendorff's α between {len(scored.raters.names)} people: {_number(scored.raters.alpha, 'z.2f')}")
    heads = ("AUC of gap", "AUC of confidence", "confidence", "off by")
    _show("judges", heads, map(_judge, scored.judges))
    print("\nAUC: how often a right label has the larger gap than a wrong one; 0.50 is chance")
    print("off by: |confidence − share of right labels| over the bins below, on average")
    panel = scored.judges[0].curve
    _show("panel's confidence", ("pairs", "claimed", "labels right"), map(_bin, panel))
    heads = ("pairs", "labels right", "AUC of gap", "off by")
    _show("category", heads, map(_in_category, (one for one in scored.categories if one.panel)))
    few = [f"{one.category} {one.decided}" for one in scored.categories if not one.panel]
    if few:
        print(f"\ntoo few verdicts without ties for figures of their own: {', '.join(few)}")


def _judge(one: Judge) -> tuple[str, ...]:
    aucs = map(_estimate, (one.auc_gap, one.auc_confidence))
    return one.name, *aucs, _number(one.claimed, ".2f"), _number(one.error, ".2f")


def _bin(one: Bin) -> tuple[str, ...]:
    return f"{one.low:.2f} to {one.high:.2f}", str(one.right.n), f"{one.claimed:.2f}", _estimate(one.right)


def _in_category(one: InCategory) -> tuple[str, ...]:
    assert one.panel is not None
    assert one.right is not None
    figures = _estimate(one.right), _estimate(one.panel.auc_gap), _number(one.panel.error, ".2f")
    return one.category, str(one.decided), *figures
