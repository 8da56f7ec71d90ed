"""Each run as one row, and the settings of λ at which runs differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sp2dpo.audit.agreement import interval_alpha
from sp2dpo.calls import open_calls
from sp2dpo.evidence import Evidence
from sp2dpo.runs import Run, differences
from sp2dpo.stages import read_excluded

__all__ = ["RunRow", "Setting", "operators", "row_of", "settings_that_differ"]

WITHOUT_EFFECT = ("schedule.random_seed", "schedule.method")
"""Keys of the schedule that do not act on β."""


@dataclass(frozen=True)
class RunRow:
    """A run in the table.

    `pairs` have a β, `excluded` rows of the source have none. `alpha` is Krippendorff's α of the annotators' gaps, None
    where it is not defined, as with one annotator. `cost_usd` is of the live calls of this run, None if an
    annotator that was asked has no price.
    """

    label: str
    name: str
    path: str
    lambda_hash: str
    pairs: int
    excluded: int
    annotators: tuple[str, ...]
    variants: tuple[str, ...]
    beta_mean: float
    beta_min: float
    beta_max: float
    beta_std: float
    alpha: float | None
    calls: int
    live_calls: int
    cost_usd: float | None


@dataclass(frozen=True)
class Setting:
    """A key of λ, and its value in each run; None where a run does not have it."""

    key: str
    values: tuple[str | None, ...]


def row_of(label: str, evidence: Evidence) -> RunRow:
    """The row of a run; β with the standard deviation of all pairs (ddof 0)."""
    run, beta = evidence.run, evidence.beta_i
    calls, live, usd = _spent(run)
    return RunRow(
        label=label,
        name=run.process.settings.name,
        path=str(run.path),
        lambda_hash=run.process.lambda_hash,
        pairs=evidence.n,
        excluded=read_excluded(run).num_rows,
        annotators=evidence.annotators,
        variants=evidence.variants,
        beta_mean=float(beta.mean()),
        beta_min=float(beta.min()),
        beta_max=float(beta.max()),
        beta_std=float(beta.std()),
        alpha=interval_alpha(evidence.gap_ij),
        calls=calls,
        live_calls=live,
        cost_usd=usd,
    )


def _spent(run: Run) -> tuple[int, int, float | None]:
    """Attempts, those among them that were live, and what these cost."""
    with open_calls(run.calls) as log:
        counts = log.counts()
    live = [count for count in counts if count.origin == "live"]
    priced = {annotator.name for annotator in run.process.settings.panel.annotators if annotator.price is not None}
    usd = sum(count.cost_usd for count in live) if {count.annotator for count in live} <= priced else None
    return sum(count.attempts for count in counts), sum(count.attempts for count in live), usd


def settings_that_differ(runs: Sequence[Run]) -> tuple[Setting, ...]:
    """Keys whose values are not alike in all runs, those of the schedule first; annotators are compared by name."""
    processes = [_by_name(run.process.resolved) for run in runs]
    keys = {key for other in processes[1:] for key in differences(processes[0], other)}
    keys -= {f"annotators.{name}" for process in processes for name in process["annotators"]}  # in one panel only
    order = sorted(keys, key=lambda key: (not key.startswith("schedule."), key))
    return tuple(Setting(key, tuple(_shown(_at(process, key)) for process in processes)) for key in order)


def operators(one: Run, other: Run) -> tuple[str, ...]:
    """Keys of the schedule that act on β and differ."""
    keys = (setting.key for setting in settings_that_differ([one, other]))
    return tuple(key for key in keys if key.startswith("schedule.") and key not in WITHOUT_EFFECT)


def _by_name(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Annotators as a list of names, and apart from it what is said of each."""
    panel, names = resolved["panel"], [one["name"] for one in resolved["panel"]["annotators"]]
    each = dict(zip(names, panel["annotators"], strict=True))
    return {**resolved, "panel": {**panel, "annotators": names}, "annotators": each}


def _at(process: Mapping[str, Any], key: str) -> Any:
    """The value under a key with dots; a name of its own may hold dots too, so the longest that fits goes first."""
    if not key:
        return process
    parts = key.split(".")
    for n in range(len(parts), 0, -1):
        name = ".".join(parts[:n])
        if isinstance(process, Mapping) and name in process:
            return _at(process[name], ".".join(parts[n:]))
    return None


def _shown(value: Any) -> str | None:
    if value is None or value == {}:
        return None
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return ", ".join(str(_shown(inner)) for inner in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
