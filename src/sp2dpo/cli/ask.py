"""Commands up to the call log: prepare, cost, preflight, annotate, export, import."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from sp2dpo.cli.terminal import ARGUMENTS, AsJson, Limit, ProcessPath, RunDir, app, give, open_run, say, show
from sp2dpo.errors import InputError, Unfinished
from sp2dpo.numbers import some
from sp2dpo.runs import Run

if TYPE_CHECKING:
    from sp2dpo.annotate.account import Account
    from sp2dpo.annotate.estimate import Estimate
    from sp2dpo.process import Process

__all__ = [
    "Budget",
    "Concurrency",
    "DryRun",
    "Reuse",
    "Rpm",
    "Tpm",
    "TransportName",
    "ask_panel",
    "cost",
    "how_to_go_on",
    "options_of",
    "prepare_pairs",
]

Concurrency = Annotated[int, typer.Option("--concurrency", min=1, help="calls in flight for each annotator")]
Reuse = Annotated[
    Path | None,
    typer.Option("--reuse", help="another run directory, whose answers to the same questions are taken over"),
]
Retry = Annotated[
    list[str] | None,
    typer.Option("--retry", metavar="KIND", help="only questions that failed so the last time; may be repeated"),
]
Budget = Annotated[
    float | None,
    typer.Option("--budget-usd", min=0, help="never spend more in this run directory, past calls included"),
]
TransportName = Annotated[
    str, typer.Option("--transport", metavar="sync|batch|ray", help="single calls, batch jobs, or a Ray cluster")
]
Rpm = Annotated[
    list[str] | None,
    typer.Option("--rpm", metavar="[NAME=]N", help="requests a minute, of one annotator or of each; may be repeated"),
]
Tpm = Annotated[list[str] | None, typer.Option("--tpm", metavar="[NAME=]N", help="tokens a minute, likewise")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="say what would be done, and do nothing")]


@app.command(epilog="sp2dpo prepare hh.jsonl.gz -o pairs.parquet")
def prepare(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="hub id, folder, .parquet, .jsonl[.gz], .json or .csv")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="PAIRS.parquet", help="where the pairs go")],
    revision: Annotated[str | None, typer.Option(help="commit of a hub dataset")] = None,
    split: Annotated[str | None, typer.Option(help="split of a folder or hub dataset")] = None,
    files: Annotated[str | None, typer.Option(help="glob that picks files of a folder or hub dataset")] = None,
    filters: Annotated[str, typer.Option(help="reasons to drop a row")] = "duplicate_prompt_id,empty_field",
    as_json: AsJson = False,
) -> None:
    """Load, normalise, filter and count preference pairs."""
    from sp2dpo.hashing import sha256_path
    from sp2dpo.pairs import prepare as prepare_source
    from sp2dpo.pairs import write_prepared
    from sp2dpo.settings import DataSettings

    names = tuple(name.strip() for name in filters.split(",") if name.strip())
    data = DataSettings(source=source, revision=revision, split=split, files=files, filters=names)
    prepared = prepare_source(data, Path.cwd())
    pinned = sha256_path(Path(source)) if Path(source).exists() else str(revision)
    write_prepared(prepared, output, inputs={"source": pinned}, lambda_hash="")
    _give_counts({"counts": prepared.counts, "notes": prepared.notes, "schema": prepared.schema}, as_json)
    say(f"wrote {output} and {output.with_suffix('.dropped.csv').name}")


def _give_counts(manifest: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps({name: manifest[name] for name in ("schema", "counts", "notes")}))
        return
    give(manifest["counts"], False, f"rows of the source (read as: {manifest['schema']})")
    seen = {name: n for name, n in manifest["notes"].items() if n}
    if seen:
        give(seen, False, "kept, but worth a look; drop them with data.filters")


@app.command(epilog="sp2dpo cost process.yaml --pilot 50")
def cost(
    process: ProcessPath,
    run_dir: RunDir = None,
    limit: Limit = None,
    pilot: Annotated[
        int | None, typer.Option("--pilot", min=1, help="ask (and pay) about so many pairs first, to measure tokens")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Calls, tokens and USD before they are spent."""
    from sp2dpo.annotate.estimate import estimate
    from sp2dpo.process import load_process

    if pilot is not None:
        run = open_run(process, run_dir)
        prepare_pairs(run)
        ask_panel(run, {"sample": pilot})
    one = load_process(process)
    folder = run_dir or Path("runs") / one.settings.name
    made = estimate(one, run_dir=folder if _belongs(folder, one) else None, limit=limit)
    if pilot is not None and limit is None:
        made.write(folder, one.lambda_hash)
    if as_json:
        give(made.as_json(), True)
    else:
        _show_estimate(made)


def _belongs(folder: Path, process: Process) -> bool:
    """Whether a run directory is one of this λ, so that what was measured there holds."""
    from sp2dpo.process import process_of

    return (folder / "process.yaml").is_file() and process_of(folder).lambda_hash == process.lambda_hash


def _show_estimate(made: Estimate) -> None:
    predicted = f", {made.predicted_answers:,} predicted" if made.predicted_answers else ""
    recorded = some(made.recorded_answers, "recorded answer")
    print(f"{some(made.pairs, 'pair')}, {some(made.calls, 'call')}, {recorded}{predicted}")
    table = Table("annotator", box=SIMPLE_HEAD)
    for name in ("calls", "tokens in", "out", "hidden", "USD", "as batch"):
        table.add_column(name, justify="right")
    for part in made.annotators:
        hidden = "unknown" if part.hidden_tokens is None else f"{part.hidden_tokens:,.0f}"
        tokens = (f"{part.input_tokens:,.0f}", f"{part.output_tokens:,.0f}", hidden)
        table.add_row(part.annotator, f"{part.calls:,}", *tokens, _usd(part.usd), _usd(part.usd_batch))
    table.add_row("all", f"{made.calls:,}", "", "", "", _usd(made.usd), _usd(made.usd_batch))
    show(table)
    for part in made.annotators:
        print(f"{part.annotator}: {part.basis}")
    if any(part.counted_by != "pilot" and part.output_tokens for part in made.annotators):
        say("hidden reasoning is billed, and only a pilot measures it: sp2dpo cost PROCESS.yaml --pilot 50")


def _usd(amount: float | None) -> str:
    return "–" if amount is None else f"{amount:,.2f}" if amount >= 0.01 else f"{amount:.6f}"


@app.command(epilog="sp2dpo preflight process.yaml")
def preflight(process: ProcessPath, as_json: AsJson = False) -> None:
    """One paid call per annotator: key, model, JSON mode."""
    from sp2dpo.annotate.preflight import preflight as preflight_checks
    from sp2dpo.process import load_process

    checks = preflight_checks(load_process(process))
    if as_json:
        print(json.dumps([check.as_json() for check in checks], ensure_ascii=False))
    else:
        table = Table("annotator", "", "what", "found", box=SIMPLE_HEAD)
        for check in checks:
            mark = "·" if check.what == "not verified" else {"ok": "✓", "warn": "!", "fail": "✗"}[check.state]
            table.add_row(check.annotator, mark, check.what, check.found)
        show(table)
    failed = sum(check.state == "fail" for check in checks)
    if failed:
        what = "1 check failed" if failed == 1 else f"{failed} checks failed"
        raise Unfinished(f"{what}; nothing should be asked of this panel before that is mended")


@app.command(epilog="sp2dpo annotate process.yaml --limit 100 --concurrency 16")
def annotate(
    process: ProcessPath,
    run_dir: RunDir = None,
    limit: Limit = None,
    concurrency: Concurrency = 8,
    transport: TransportName = "sync",
    budget_usd: Budget = None,
    rpm: Rpm = None,
    tpm: Tpm = None,
    retry: Retry = None,
    forget_batches: Annotated[
        bool, typer.Option("--forget-batches", help="give up batch jobs of earlier starts, and ask anew")
    ] = False,
    reuse: Reuse = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Ask the panel about every pair, or go on with it."""
    if dry_run:
        cost(process, run_dir, limit, as_json=as_json)
        return
    run = open_run(process, run_dir)
    prepare_pairs(run)
    options = options_of(limit, concurrency, transport, budget_usd, rpm, tpm, reuse)
    options |= {"retry": tuple(retry or ()), "forget_batches": forget_batches}
    account = ask_panel(run, options)
    if as_json:
        give(account.as_json(), True)
    if account.missing:
        raise Unfinished(how_to_go_on(run, account))


def options_of(
    limit: int | None,
    concurrency: int,
    transport: str,
    budget_usd: float | None,
    rpm: Sequence[str] | None,
    tpm: Sequence[str] | None,
    reuse: Path | None,
) -> dict[str, Any]:
    """Flags of `annotate` and `run` as the engine takes them."""
    if transport not in ("sync", "batch", "ray"):
        raise InputError(f"--transport {transport}: choose sync, batch or ray")
    return {
        "limit": limit,
        "concurrency": concurrency,
        "transport": transport,
        "budget_usd": budget_usd,
        "rpm": _rates("--rpm", rpm),
        "tpm": _rates("--tpm", tpm),
        "reuse": reuse,
    }


def _rates(flag: str, given: Sequence[str] | None) -> dict[str, float]:
    """`500` is the limit of every annotator, `gpt=500` that of one."""
    limits: dict[str, float] = {}
    for text in given or ():
        name, _, number = text.rpartition("=")
        try:
            limits[name] = float(number)
        except ValueError:
            limits[name] = 0.0
        if not 0 < limits[name] < float("inf"):
            raise InputError(f"{flag} {text}: give a number above 0, or NAME=number")
    return limits


def prepare_pairs(run: Run) -> None:
    """Source to pairs, and say how many."""
    from sp2dpo.stages import prepare_run

    manifest = prepare_run(run)
    counts = manifest["counts"]
    dropped = ", ".join(f"{name} {n:,}" for name, n in counts.items() if name not in ("raw", "kept"))
    rows, pairs = some(counts["raw"], "row"), some(counts["kept"], "pair")
    say(f"prepare   {rows} → {pairs} ({dropped or 'none dropped'})  {run.pairs}")


def ask_panel(run: Run, options: Mapping[str, Any]) -> Account:
    """Ask, and say what came of it."""
    from sp2dpo.annotate.run import annotate as annotate_run

    account = annotate_run(run, **options)
    if account.missing:
        account.settle_recordings(run, limit=options.get("limit"), sample=options.get("sample"))
    say(f"annotate  {account.valid:,} of {account.questions:,} questions have a valid answer  {run.calls}")
    for line in account.lines():
        say(f"          {line}")
    return account


def how_to_go_on(run: Run, account: Account) -> str:
    """What becomes of the answers that are missing: what a recording lacks stays missing, the rest can be asked for."""
    said = [_missing(account.missing)]
    if account.lacking:
        said.append(_lacking(run, account))
    if account.missing_of_asked:
        said.append(_asking_again(account))
    return "; ".join(said)


def _missing(n: int) -> str:
    return "1 answer is missing" if n == 1 else f"{n:,} answers are missing"


def _lacking(run: Run, account: Account) -> str:
    lacks = ", ".join(
        f"the recording of '{name}' (pinned in λ) has no valid answer to {some(causes.total(), 'question')}"
        for name, causes in account.lacking.items()
    )
    least = run.process.settings.schedule.min_calls
    if least is None:
        out = "pairs without all answers are left out; schedule.min_calls in a new process would use what they have"
    else:
        out = f"pairs with fewer than {least} valid answers (schedule.min_calls) are left out"
    return f"{lacks}: {out}"


def _asking_again(account: Account) -> str:
    """The command for it: this one, and if nothing was left unasked, for the failures only."""
    words = list(ARGUMENTS)
    while "--retry" in words:
        at = words.index("--retry")
        del words[at : at + 2]
    if words[:1] == ["annotate"]:
        words += account.retry_flags()
    mended = "once that is mended, " if account.stopped or (account.stopped_all and not account.over_budget) else ""
    n = account.missing_of_asked.total()
    them = f"the other {n:,}" if account.lacking else "it" if n == 1 else "them"
    return f"{mended}ask for {them} with: {shlex.join(['sp2dpo', *words])}"


AnnotatorName = Annotated[
    str | None, typer.Option("--annotator", metavar="NAME", help="whose questions; needed if several are asked")
]


@app.command(epilog="sp2dpo export process.yaml -o questions.jsonl --annotator qwen")
def export(
    process: ProcessPath,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.jsonl[.gz]", help="where the questions go")],
    run_dir: RunDir = None,
    annotator: AnnotatorName = None,
    limit: Limit = None,
) -> None:
    """Open questions as a batch file, to answer elsewhere."""
    from sp2dpo.annotate.exchange import export_open

    run = open_run(process, run_dir)
    prepare_pairs(run)
    calls = export_open(run, output, annotator=annotator, limit=limit)
    say(f"export    {some(calls, 'question')}  {output}")


@app.command("import", epilog="sp2dpo import process.yaml answers.jsonl --annotator qwen")
def import_(
    process: ProcessPath,
    answers: Annotated[
        Path, typer.Argument(metavar="ANSWERS.jsonl[.gz]", help="output of a batch or of `vllm run-batch`")
    ],
    run_dir: RunDir = None,
    annotator: AnnotatorName = None,
    limit: Limit = None,
    as_json: AsJson = False,
) -> None:
    """Answers made elsewhere, read as if they were asked for."""
    from sp2dpo.annotate.exchange import import_answers

    run = open_run(process, run_dir)
    prepare_pairs(run)
    made = import_answers(run, answers, annotator=annotator, limit=limit)
    say(f"import    {made.taken:,} of {made.lines:,} answers taken; {made.account.valid:,} of "
        f"{made.account.questions:,} questions have a valid answer  {run.calls}")  # fmt: skip
    for line in made.account.lines():
        say(f"          {line}")
    if made.unused:
        say(f"          {made.unused:,} answers are about no open question of this annotator")
    if made.duplicates:
        say(f"          {made.duplicates:,} lines answer a question again; the first counts")
    if made.torn:
        say(f"          line {made.torn:,}, the last, was cut off and left out")
    if as_json:
        give(made.account.as_json(), True)
