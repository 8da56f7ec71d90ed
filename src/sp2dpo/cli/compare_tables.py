"""A comparison of runs as tables on the terminal. Numbers and words come from `sp2dpo.compare`."""

from __future__ import annotations

from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.table import Table

from sp2dpo.cli.terminal import show
from sp2dpo.compare import Change, Comparison, Moves, RunRow
from sp2dpo.compare.words import headline, lacking, named, panel_of, summary, transitions
from sp2dpo.numbers import count, dec, percent, signed

__all__ = ["print_comparison"]

MOST_SETTINGS = 15
LONGEST = 20
"""Settings and their characters that the terminal shows."""


def print_comparison(compared: Comparison) -> None:
    """Readable in half a minute: the runs, their settings, what moved."""
    for run in compared.runs:
        print(f"{run.label}  {run.name}  λ {run.lambda_hash[:12]}  {run.path}  ({panel_of(run)})")
    numbers = ["pairs", "excluded", "mean β", "range", "std", "α", "calls", "USD"]
    _table("", ["run"], numbers, map(_run, compared.runs))
    if len(compared.runs) > 1:
        _settings(compared)
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
