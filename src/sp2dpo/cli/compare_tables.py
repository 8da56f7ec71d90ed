"""A comparison of runs as tables on the terminal. Numbers and words come from `sp2dpo.compare`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rich.box import SIMPLE_HEAD
from rich.table import Table

from sp2dpo.audit.agreement import Estimate
from sp2dpo.cli.terminal import show
from sp2dpo.compare import Change, Comparison, Moves, RunRow
from sp2dpo.compare.words import (
    ONE_SEED,
    answered,
    headline,
    lacking,
    measured_on,
    named,
    not_shown,
    over_seeds,
    panel_of,
    place_of,
    summary,
    transitions,
)
from sp2dpo.numbers import count, dec, percent, signed
from sp2dpo.report.measured import ArmRow, Measured
from sp2dpo.rubric import CATEGORIES

__all__ = ["print_comparison"]

MOST_SETTINGS = 15
LONGEST = 20
"""Settings and their characters that the terminal shows."""


def print_comparison(compared: Comparison) -> None:
    """Readable in half a minute: the runs, their settings, what moved."""
    for run in compared.runs:
        print(f"{run.label}  {run.name}  λ {run.lambda_hash[:12]}  {place_of(run)}  ({panel_of(run)})")
    numbers = ["pairs", "excluded", "mean β", "range", "std", "α", "calls", "USD"]
    _table("", ["run"], numbers, map(_run, compared.runs))
    if len(compared.runs) > 1:
        _settings(compared)
    if compared.training:
        _training(compared)
    for moves in compared.moves:
        _moves(moves)


def _run(run: RunRow) -> list[str]:
    betas = [dec(run.beta_mean), f"{dec(run.beta_min, 3)}–{dec(run.beta_max, 3)}", dec(run.beta_std), dec(run.alpha, 2)]
    return [run.label, count(run.pairs), count(run.excluded), *betas, count(run.calls), dec(run.cost_usd, 2)]


def _table(title: str, words: Iterable[str], numbers: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Columns of words, then columns of numbers."""
    if title:
        print(f"\n{title}")
    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False, show_edge=False)
    for n, name in enumerate(words):
        table.add_column(name, overflow="fold", no_wrap=n == 0)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    show(table)


def _settings(compared: Comparison) -> None:
    if not compared.settings:
        print("\nAll settings are the same.")
        return
    shown = compared.settings[:MOST_SETTINGS]
    rows = [[one.key, *("–" if value is None else _short(value) for value in one.values)] for one in shown]
    _table("Settings that differ", ["key", *(run.label for run in compared.runs)], [], rows)
    if len(compared.settings) > len(shown):
        print(f"… and {len(compared.settings) - len(shown)} more; all are in --json")


def _short(value: str) -> str:
    return value if len(value) <= LONGEST else value[: LONGEST - 1] + "…"


def _training(compared: Comparison) -> None:
    """All arms of all runs, then by category, then what the controls answer."""
    arms = [(f"{run.label} {arm.arm}", arm) for run in compared.training for arm in run.training.trained]
    _lines(f"Training, {measured_on(run)}" for run in compared.training if run.training.trained)
    if arms:
        _arms(arms)
    moved = [(name, arm) for name, arm in arms if arm.steps]
    there = [name for name in CATEGORIES if any(name in arm.groups for _, arm in moved)]
    for title, shown in _BY_CATEGORY.items() if there else ():
        rows = ([name, *(shown(arm.groups.get(each, Measured(0))) for each in there)] for name, arm in moved)
        _table(f"{title} by category", ["arm"], there, rows)
    _lines(line for run in compared.training for line in answered(run))
    _lines(over_seeds(one) for one in compared.over_seeds)
    for one in compared.between:
        earlier, later = one.labels
        print(f"{one.arm}, {later} less {earlier}: held-out loss {_change_of(one.contrast.loss)}, n {one.contrast.n:,}")
    if compared.between or any(run.training.measured_on == "held-out pairs" for run in compared.training):
        print(ONE_SEED)
    _lines(line for run in compared.training for line in not_shown(run))


def _arms(arms: Iterable[tuple[str, ArmRow]]) -> None:
    """Without the columns in which no arm has a number."""
    names, rows = zip(*arms, strict=True)
    columns = {name: [shown(arm) for arm in rows] for name, shown in _NUMBERS.items()}
    told = {name: cells for name, cells in columns.items() if set(cells) != {"–"}}
    _table("", ["arm"], told, zip(names, *told.values(), strict=True))
    if says := [f"{name}: {what}" for name, what in _SAYS.items() if name in told]:
        print("; ".join(says))


_NUMBERS: dict[str, Callable[[ArmRow], str]] = {
    "loss": lambda arm: dec(arm.held_out_loss, 3),
    "less constant_beta": lambda arm: _change_of(arm.versus.loss) if arm.versus else "–",
    "acc.": lambda arm: percent(arm.groups["all pairs"].accuracy),
    "mean Δ": lambda arm: dec(arm.groups["all pairs"].margin, 2),
    "β̄·|Δ|": lambda arm: dec(arm.groups["all pairs"].beta_margin, 2),
    "satur.": lambda arm: dec(arm.groups["all pairs"].saturation, 4),
    "left": lambda arm: percent(arm.groups["all pairs"].left),
}
_SAYS = {
    "loss": "DPO's at train.beta, held-out pairs",
    "satur.": "mean β·σ(−βΔ), and what is left of its start",
}


_BY_CATEGORY: dict[str, Callable[[Measured], str]] = {
    "Accuracy": lambda one: percent(one.accuracy),
    "Mean Δ": lambda one: dec(one.margin, 2),
    "Saturation": lambda one: dec(one.saturation, 4),
}


def _change_of(one: Estimate) -> str:
    """With half the width of its interval."""
    half = "" if one.low is None or one.high is None else f" ±{dec((one.high - one.low) / 2, 3)}"
    return f"{signed(one.value, 3)}{half}"


def _moves(moves: Moves) -> None:
    one, other = moves.labels
    print(f"\n{one} → {other}", headline(moves), *summary(moves), sep="\n")
    if moves.both:
        changes = {each.name: each for each in moves.categories if each.n} | {"all": moves.all}
        numbers = ["n", f"mean β {one}", f"mean β {other}", "mean Δβ", "mean |Δβ|", "up", "down"]
        _table(f"By category of {one}", ["category"], numbers, ([name, *_change(of)] for name, of in changes.items()))
    _lines(f"{before} → {after}: {n:,}" for before, after, n in transitions(moves))
    if moves.moved_most:
        _most(moves)
    lone = ((moves.lost, other), (moves.gained, one))
    _lines(f"only in {of.label}: {n:,} {why}" for of, lacks in lone for n, why in lacking(of, lacks))


def _lines(lines: Iterable[str]) -> None:
    """Apart from what comes before, if there are any."""
    if told := list(lines):
        print("", *told, sep="\n")


def _change(of: Change) -> list[str]:
    means = [dec(of.beta_one), dec(of.beta_other), signed(of.mean), dec(of.mean_absolute)]
    return [count(of.n), *means, percent(of.up), percent(of.down)]


def _most(moves: Moves) -> None:
    rows = [
        [named(pair), " → ".join(dict.fromkeys(pair.category)), pair.why, *map(dec, pair.beta)]
        for pair in moves.moved_most
    ]
    _table("Pairs that moved most", ["pair", "category", "why"], [f"β {label}" for label in moves.labels], rows)
