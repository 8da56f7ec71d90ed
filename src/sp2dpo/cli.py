"""The command line: one verb for each arrow, no logic. Data goes to stdout, talk to stderr."""

from __future__ import annotations

import errno
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from sp2dpo import __version__
from sp2dpo.errors import InputError, MissingExtra, Sp2dpoError, Unfinished
from sp2dpo.runs import Run

if TYPE_CHECKING:
    from sp2dpo.annotate.account import Account
    from sp2dpo.annotate.estimate import Estimate
    from sp2dpo.process import Process

__all__ = ["app", "main"]

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
AsJson = Annotated[bool, typer.Option("--json", help="the result as one JSON object on stdout")]


INTERRUPTED = 130
_ARGUMENTS: list[str] = []


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
    Console(markup=False).print(table)


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _open(process_path: Path, run_dir: Path | None) -> Run:
    from sp2dpo.process import load_process
    from sp2dpo.runs import open_run

    run = open_run(load_process(process_path), run_dir)
    say(f"λ {run.process.lambda_hash[:12]}  run directory {run.path}")
    return run


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
    from sp2dpo.pairs import prepare as prepare_pairs
    from sp2dpo.pairs import write_prepared
    from sp2dpo.settings import DataSettings

    names = tuple(name.strip() for name in filters.split(",") if name.strip())
    data = DataSettings(source=source, revision=revision, split=split, files=files, filters=names)
    prepared = prepare_pairs(data, Path.cwd())
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
        run = _open(process, run_dir)
        _prepare(run)
        _annotate(run, {"sample": pilot})
    one = load_process(process)
    folder = run_dir or Path("runs") / one.settings.name
    made = estimate(one, run_dir=folder if _belongs(folder, one) else None, limit=limit)
    if pilot is not None and limit is None:
        made.write(folder)
    if as_json:
        give(made.as_json(), True)
    else:
        _show_estimate(made)


def _belongs(folder: Path, process: Process) -> bool:
    """Whether a run directory is one of this λ, so that what was measured there holds."""
    from sp2dpo.process import process_of

    return (folder / "process.yaml").is_file() and process_of(folder).lambda_hash == process.lambda_hash


def _show_estimate(made: Estimate) -> None:
    print(f"{made.pairs:,} pairs, {made.calls:,} calls, {made.recorded_answers:,} recorded answers")
    table = Table("annotator", box=SIMPLE_HEAD)
    for name in ("calls", "tokens in", "out", "hidden", "USD", "as batch"):
        table.add_column(name, justify="right")
    for part in made.annotators:
        hidden = "unknown" if part.hidden_tokens is None else f"{part.hidden_tokens:,.0f}"
        tokens = (f"{part.input_tokens:,.0f}", f"{part.output_tokens:,.0f}", hidden)
        table.add_row(part.annotator, f"{part.calls:,}", *tokens, _usd(part.usd), _usd(part.usd_batch))
    table.add_row("all", f"{made.calls:,}", "", "", "", _usd(made.usd), _usd(made.usd_batch))
    Console(markup=False).print(table)
    for part in made.annotators:
        print(f"{part.annotator}: {part.basis}")
    if any(part.counted_by != "pilot" and part.output_tokens for part in made.annotators):
        say("hidden reasoning is billed, and only a pilot measures it: sp2dpo cost PROCESS.yaml --pilot 50")


def _usd(amount: float | None) -> str:
    return "–" if amount is None else f"{amount:,.2f}" if amount >= 0.01 else f"{amount:.6f}"


@app.command(epilog="sp2dpo preflight process.yaml")
def preflight(process: ProcessPath, as_json: AsJson = False) -> None:
    """Keys, models, parameters and JSON mode: one paid call for each annotator."""
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
        Console(markup=False).print(table)
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
    run = _open(process, run_dir)
    _prepare(run)
    options = _asking(limit, concurrency, transport, budget_usd, rpm, tpm, reuse)
    options |= {"retry": tuple(retry or ()), "forget_batches": forget_batches}
    account = _annotate(run, options)
    if as_json:
        give(account.as_json(), True)
    if account.missing:
        raise Unfinished(_how_to_go_on(account))


def _asking(
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


def _prepare(run: Run) -> None:
    from sp2dpo.stages import prepare_run

    manifest = prepare_run(run)
    counts = manifest["counts"]
    dropped = ", ".join(f"{name} {n:,}" for name, n in counts.items() if name not in ("raw", "kept"))
    say(f"prepare   {counts['raw']:,} rows → {counts['kept']:,} pairs ({dropped or 'none dropped'})  {run.pairs}")


def _annotate(run: Run, options: Mapping[str, Any]) -> Account:
    """Ask, and say what came of it."""
    from sp2dpo.annotate.run import annotate as annotate_run

    account = annotate_run(run, **options)
    say(f"annotate  {account.valid:,} of {account.questions:,} questions have a valid answer  {run.calls}")
    for line in account.lines():
        say(f"          {line}")
    return account


def _how_to_go_on(account: Account) -> str:
    """The command that asks for what is missing: this one, and if nothing was left unasked, for the failures only."""
    words = list(_ARGUMENTS)
    while "--retry" in words:
        at = words.index("--retry")
        del words[at : at + 2]
    if words[:1] == ["annotate"]:
        words += account.retry_flags()
    mended = "once that is mended, " if account.stopped or (account.stopped_all and not account.over_budget) else ""
    return f"{account.missing:,} answers are missing; {mended}ask for them with: {shlex.join(['sp2dpo', *words])}"


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
    """Open questions as the input of a batch, to be answered elsewhere."""
    from sp2dpo.annotate.exchange import export_open

    run = _open(process, run_dir)
    _prepare(run)
    calls = export_open(run, output, annotator=annotator, limit=limit)
    say(f"export    {calls:,} questions  {output}")


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
    """Answers made elsewhere into the call log, read as if they were asked for."""
    from sp2dpo.annotate.exchange import import_answers

    run = _open(process, run_dir)
    _prepare(run)
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


@app.command(epilog="sp2dpo schedule process.yaml --json")
def schedule(process: ProcessPath, run_dir: RunDir = None, as_json: AsJson = False) -> None:
    """Call log to gaps to β, as Parquet and CSV."""
    give(_schedule(_open(process, run_dir)), as_json)


def _schedule(run: Run) -> dict[str, Any]:
    from sp2dpo.stages import schedule_run

    made = schedule_run(run)
    beta = made.schedule["beta"].to_numpy()
    n, out = made.schedule.num_rows, made.excluded.num_rows
    say(
        f"schedule  {n:,} pairs with β in [{beta.min():.4f}, {beta.max():.4f}], mean {beta.mean():.4f}; "
        f"{out:,} rows excluded  {run.schedule}"
    )
    if len(set(made.kinds.values())) > 1:
        listed = ", ".join(f"{name} {kind}" for name, kind in made.kinds.items())
        say(f"          annotators of different kinds, which no paper has compared: {listed}")
    betas = {"beta_min": float(beta.min()), "beta_mean": float(beta.mean()), "beta_max": float(beta.max())}
    return {"scheduled": n, "excluded": out, **betas, "schedule": str(run.schedule)}


@app.command(epilog="sp2dpo verify runs/quickstart")
def verify(run_dir: RunDirPath) -> None:
    """Recompute hashes, gaps and β; exit 1 if they differ."""
    _verify(run_dir, print)


def _verify(run_dir: Path, out: Callable[[str], Any]) -> None:
    from sp2dpo.verify import verify as verify_run

    for line in verify_run(run_dir):
        out(line)


@app.command(epilog="sp2dpo train process.yaml    or    accelerate launch -m sp2dpo.train process.yaml")
def train(process: ProcessPath, run_dir: RunDir = None, limit: Limit = None, as_json: AsJson = False) -> None:
    """Train the student with each method of the process."""
    _train(_open(process, run_dir), limit, as_json, data=True)


def _train(run: Run, limit: int | None, as_json: bool, *, data: bool = False) -> None:
    try:
        from sp2dpo.train.run import train_run
    except ModuleNotFoundError as error:
        raise MissingExtra(f"sp2dpo train (no module '{error.name}')", "train") from error

    trained = train_run(run, limit=limit)
    for one in trained:
        if one.set_aside:
            say(f"          {one.folder.name} had been trained on another schedule; that is now {one.set_aside}")
        state = "already done" if one.already_done else f"{one.metrics.get('train_runtime', 0):.0f} s"
        say(f"train     {one.method}: {state}, loss {one.metrics.get('train_loss', float('nan')):.4f}  {one.folder}")
    if data:
        give({one.method: one.metrics.get("train_loss") for one in trained}, as_json, "mean training loss")


@app.command(epilog="sp2dpo report runs/quickstart")
def report(run_dir: RunDirPath) -> None:
    """One self-contained HTML file about a run."""
    _report(run_dir)


def _report(run_dir: Path) -> None:
    try:
        from sp2dpo.report.build import build_report
    except ModuleNotFoundError as error:
        raise MissingExtra(f"sp2dpo report (no module '{error.name}')", "report") from error

    say(f"report    {build_report(run_dir)}")


@app.command(epilog="sp2dpo run examples/quickstart/process.yaml")
def run(
    process: ProcessPath,
    run_dir: RunDir = None,
    limit: Limit = None,
    concurrency: Concurrency = 8,
    transport: TransportName = "sync",
    budget_usd: Budget = None,
    rpm: Rpm = None,
    tpm: Tpm = None,
    reuse: Reuse = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """All of these in order; what is done is not repeated."""
    if dry_run:
        cost(process, run_dir, limit, as_json=as_json)
        return
    one = _open(process, run_dir)
    _check_extras(one)
    _prepare(one)
    account = _annotate(one, _asking(limit, concurrency, transport, budget_usd, rpm, tpm, reuse))
    if account.stopped or account.stopped_all:
        raise Unfinished(_how_to_go_on(account))
    if account.missing:
        say(f"          {_how_to_go_on(account)}")
    scheduled = _schedule(one)
    checked: list[str] = []
    _verify(one.path, checked.append)
    say(f"verify    {len(checked)} checks, all equal")
    if one.process.settings.train is not None:
        _train(one, None, as_json=False)
    else:
        say("train     left out: the process has no 'student' and 'train'")
    _report(one.path)
    if as_json:
        give({"run_dir": str(one.path), **scheduled, "report": str(one.report)}, True)


def _check_extras(run: Run) -> None:
    """What the later arrows need, before the first one costs anything."""
    if find_spec("matplotlib") is None:
        raise MissingExtra("sp2dpo run ends with a report, which", "report")
    train = run.process.settings.train
    if train is not None:
        for name in ("torch", "trl", "peft", "datasets"):
            if find_spec(name) is None:
                raise MissingExtra(f"the process has a section 'train', which (no module '{name}')", "train")
        from sp2dpo.train.run import check_settings

        check_settings(train)


def _version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; the project's own errors are one line, a bug keeps its traceback."""
    _ARGUMENTS[:] = sys.argv[1:] if argv is None else argv
    try:
        app(argv, standalone_mode=True)
    except Sp2dpoError as error:
        say(f"sp2dpo: {error}")
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        say(f"sp2dpo: {error.filename or 'a file'} could not be written: {error.strerror}; what is done is kept")
        sys.exit(Unfinished.exit_code)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            say("sp2dpo: interrupted; what is done is kept, and the same command goes on with the rest")
        raise
