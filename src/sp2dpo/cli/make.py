"""Commands from the call log on: schedule, verify, train, report, and run, which is every arrow."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from sp2dpo.cli import ask
from sp2dpo.cli.terminal import AsJson, Limit, ProcessPath, RunDir, RunDirPath, app, give, open_run, say
from sp2dpo.errors import MissingExtra, Unfinished
from sp2dpo.numbers import some
from sp2dpo.runs import Run


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


@app.command(epilog="sp2dpo train process.yaml    or    accelerate launch -m sp2dpo.train process.yaml")
def train(process: ProcessPath, run_dir: RunDir = None, limit: Limit = None, as_json: AsJson = False) -> None:
    """Train the student with each method of the process."""
    _train(open_run(process, run_dir), limit, as_json, data=True)


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
    _verify(one.path, checked.append)
    say(f"verify    {some(len(checked), 'check')}, all equal")
    if one.process.settings.train is not None:
        _train(one, None, as_json=False)
    else:
        say("train     left out: the process has no 'student' and 'train'")
    _report(one.path)
    if as_json:
        give({"run_dir": str(one.path), **scheduled, "report": str(one.report)}, True)


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

        check_settings(train)
