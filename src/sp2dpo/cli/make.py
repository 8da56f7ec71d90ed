"""Commands from the call log on: schedule, verify, train, report, and run, which is every arrow."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from sp2dpo.arms import CONTROLS, arm_of
from sp2dpo.cli import ask
from sp2dpo.cli.terminal import AsJson, Limit, ProcessPath, RunDir, RunDirPath, app, give, open_run, say, show
from sp2dpo.errors import InputError, MissingExtra, Unfinished
from sp2dpo.numbers import dec, some
from sp2dpo.runs import Run

if TYPE_CHECKING:
    from sp2dpo.train.run import Trained


@app.command(epilog="sp2dpo schedule process.yaml --json")
def schedule(process: ProcessPath, run_dir: RunDir = None, as_json: AsJson = False) -> None:
    """Call log to gaps to β, as Parquet and CSV."""
    give(_schedule(open_run(process, run_dir)), as_json)


def _schedule(run: Run) -> dict[str, Any]:
    from sp2dpo.stages import schedule_run

    made = schedule_run(run)
    beta = made.schedule["beta"].to_numpy()
    n, out = made.schedule.num_rows, made.excluded.num_rows
    say(
        f"schedule  {some(n, 'pair')} with β in [{beta.min():.4f}, {beta.max():.4f}], mean {beta.mean():.4f}; "
        f"{some(out, 'row')} excluded  {run.schedule}"
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

    for line in verify_run(run_dir, workers=None):
        out(line)


Methods = Annotated[
    list[str] | None, typer.Option("--method", metavar="NAME", help="train this arm instead; can be repeated")
]
Controls = Annotated[bool, typer.Option("--controls", help="train the method, its baselines and all controls")]
TrainLimit = Annotated[int | None, typer.Option("--limit", min=1, help="train on the first N pairs: a run of its own")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="say what would be trained; load no model")]


@app.command(epilog="sp2dpo train process.yaml --controls    or    accelerate launch -m sp2dpo.train process.yaml")
def train(
    process: ProcessPath,
    run_dir: RunDir = None,
    method: Methods = None,
    controls: Controls = False,
    limit: TrainLimit = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Train the student with each arm of the process."""
    if controls and method:
        raise InputError("--controls names its arms itself; give it, or --method")
    with _one_voice():
        one = open_run(process, run_dir)
        names = _controls(one) if controls else method
        if dry_run:
            _preview(one, names, limit, as_json)
            return
        trained = _train(one, names, limit)
        _give_trained(trained, as_json)
    _check_trained(trained)


@contextmanager
def _one_voice() -> Iterator[None]:
    """Of the processes of a launcher only the main one speaks; an error of any is still told."""
    if os.environ.get("RANK", "0") in ("", "0"):
        yield
        return
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def _controls(run: Run) -> list[str]:
    """The controls that can be trained: without held-out pairs there is nothing to measure the untuned student on."""
    train = run.process.settings.train
    if train is None or train.held_out:
        return list(CONTROLS)
    say("          untuned is left out: it is measured on held-out pairs, and train.held_out is 0")
    return [name for name in CONTROLS if arm_of(name).trained]


def _preview(run: Run, names: Sequence[str] | None, limit: int | None, as_json: bool) -> None:
    made = _training().preview_run(run, names, limit)
    rows, how = made.rows(run.process.lambda_hash), made.how()
    if as_json:
        give({"arms": rows, **how, "disk_bytes_per_arm": made.disk, "pairs_per_step": made.pairs_per_step}, True)
        return
    show(_table(rows))
    for name, words in how.items():
        print(f"{name}: {words}")
    print(made.line([one for one in made.sweep if one.done(run.process.lambda_hash)]))


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("arm", "β", "pairs", "steps", "state", box=SIMPLE_HEAD)
    for row in rows:
        low, mean, high = (dec(row[f"beta_{name}"]) for name in ("min", "mean", "max"))
        beta = mean if low == high else f"{low} to {high}, mean {mean}"
        table.add_row(row["method"], beta, f"{row['pairs']:,}", f"{row['steps']:,}", row["state"])
    return table


def _train(run: Run, names: Sequence[str] | None = None, limit: int | None = None) -> list[Trained]:
    trained: list[Trained] = _training().train_run(run, names, limit=limit, say=say)
    return trained


def _training() -> Any:
    """`sp2dpo.train.run`, where what it needs is installed."""
    try:
        return import_module("sp2dpo.train.run")
    except ModuleNotFoundError as error:
        raise MissingExtra(f"sp2dpo train (no module '{error.name}')", "train") from error


def _give_trained(trained: Sequence[Trained], as_json: bool) -> None:
    if as_json:
        about = ("metrics", "already_done", "problem")
        give(
            {
                one.method: {**{name: getattr(one, name) for name in about}, "folder": str(one.folder)}
                for one in trained
            },
            True,
        )
        return
    columns = {
        "loss": "train_loss",
        "held-out loss": "held_out_loss",
        "accuracy": "held_out_accuracy",
        "Δ": "held_out_margin",
    }
    table = Table("arm", *columns, box=SIMPLE_HEAD)
    for one in trained:
        table.add_row(one.method, *(dec(one.metrics.get(name)) for name in columns.values()))
    show(table)


def _check_trained(trained: Sequence[Trained]) -> None:
    """Raises:
    Unfinished: an arm failed; it is named.
    """
    failed = [one.method for one in trained if one.problem]
    if failed:
        raise Unfinished(f"{some(len(failed), 'arm')} of {len(trained)} could not be trained: {', '.join(failed)}")


MaxMb = Annotated[
    float, typer.Option(min=0.1, help="Size of the file in MB (10⁶ bytes); texts of pairs that do not fit are cut.")
]


@app.command(epilog="sp2dpo report runs/quickstart --max-mb 50")
def report(run_dir: RunDirPath, max_mb: MaxMb = 20.0) -> None:
    """One self-contained HTML file about a run."""
    _report(run_dir, max_mb)


def _report(run_dir: Path, max_mb: float = 20.0) -> None:
    try:
        from sp2dpo.report.build import build_report
    except ModuleNotFoundError as error:
        raise MissingExtra(f"sp2dpo report (no module '{error.name}')", "report") from error

    say(f"report    {build_report(run_dir, max_mb)}")


@app.command(epilog="sp2dpo run examples/quickstart/process.yaml")
def run(
    process: ProcessPath,
    run_dir: RunDir = None,
    limit: Limit = None,
    concurrency: ask.Concurrency = 8,
    transport: ask.TransportName = "sync",
    budget_usd: ask.Budget = None,
    rpm: ask.Rpm = None,
    tpm: ask.Tpm = None,
    reuse: ask.Reuse = None,
    dry_run: ask.DryRun = False,
    as_json: AsJson = False,
) -> None:
    """All arrows down to here; what is done is not repeated."""
    if dry_run:
        ask.cost(process, run_dir, limit, as_json=as_json)
        return
    one = open_run(process, run_dir)
    _check_extras(one)
    ask.prepare_pairs(one)
    account = ask.ask_panel(one, ask.options_of(limit, concurrency, transport, budget_usd, rpm, tpm, reuse))
    if account.stopped or account.stopped_all:
        raise Unfinished(ask.how_to_go_on(one, account))
    if account.missing:
        say(f"          {ask.how_to_go_on(one, account)}")
    scheduled = _schedule(one)
    checked: list[str] = []
    trained: list[Trained] = []
    _verify(one.path, checked.append)
    say(f"verify    {some(len(checked), 'check')}, all equal")
    if one.process.settings.train is not None:
        trained = _train(one)
    else:
        say("train     left out: the process has no 'student' and 'train'")
    _report(one.path)
    if as_json:
        give({"run_dir": str(one.path), **scheduled, "report": str(one.report)}, True)
    _check_trained(trained)


def _check_extras(run: Run) -> None:
    """What the later arrows need, before the first one costs anything."""
    for name in ("matplotlib", "krippendorff", "sklearn"):
        if find_spec(name) is None:
            raise MissingExtra(f"sp2dpo run ends with a report, which (no module '{name}')", "report")
    train = run.process.settings.train
    if train is not None:
        for name in ("torch", "trl", "peft", "datasets"):
            if find_spec(name) is None:
                raise MissingExtra(f"the process has a section 'train', which (no module '{name}')", "train")
        from sp2dpo.train.run import check_settings

        student = run.process.settings.student
        assert student is not None
        check_settings(train, student)
