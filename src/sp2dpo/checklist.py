"""What a reviewer needs to hold a schedule to account, as plain values. J.4, the minimal checklist of APO.

Made from the process, the counts of the pairs, the counts of the call log and the schedule; made again by `verify`.
Knows nothing of how it is written.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sp2dpo.calls import Asked, Attempts, Cell
from sp2dpo.pairs.filters import REASONS, STRUCTURAL
from sp2dpo.process import Process
from sp2dpo.rubric import CATEGORIES
from sp2dpo.settings import Schedule

__all__ = ["SOURCE_COLUMN", "LogCounts", "checklist", "estimator"]

Array = NDArray[np.float64]

SOURCE_COLUMN: Final = "source"
_MOST_SOURCES: Final = 20
_TERTILES: Final = ("low", "middle", "high")
_QUANTILES: Final = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "max": 1.0}


@dataclass(frozen=True)
class LogCounts:
    """What the call log holds: its hash, its attempts, and how the last attempt at each open question ended."""

    content: str
    attempts: Sequence[Attempts]
    asked: Sequence[Asked]
    failures: Mapping[Cell, str]


def checklist(
    process: Process,
    prepared: Mapping[str, Any],
    log: LogCounts,
    pairs: pa.Table,
    gaps: pa.Table,
    schedule: pa.Table,
    files: Mapping[str, str],
) -> dict[str, Any]:
    """All of J.4 that a schedule can say.

    Args:
        prepared: the manifest of the pairs.
        pairs: with `pair_id`, and with `source` if there is such a column.
        files: hashes of the files of the schedule.
    """
    return {
        "pinned_inputs": _inputs(process, prepared),
        "preprocessing": _preprocessing(process),
        "prompts": dict(process.pack.hashes),
        "decoding": [_decoding(row) for row in log.asked],
        "served": _served(log.attempts),
        "calls": {"content": log.content, **_calls(log, process, pairs, gaps)},
        "aggregation": _aggregation(process.settings.schedule),
        "control": {"files": dict(files), **_control(pairs, schedule, len(process.settings.panel.annotators))},
        "decoupling": _decoupling(process),
    }


def _inputs(process: Process, prepared: Mapping[str, Any]) -> dict[str, Any]:
    data, counts = process.settings.data, prepared["counts"]
    return {
        "source": data.source,
        "revision": data.revision,
        "split": data.split,
        "files": data.files,
        "pin": process.resolved["pins"]["data"],
        "read": prepared.get("source_files", []),
        "layout": prepared.get("schema"),
        "hashes": prepared["files"],
        "raw": counts["raw"],
        "dropped": {name: n for name, n in counts.items() if name not in ("raw", "kept")},
        "kept": counts["kept"],
    }


def _preprocessing(process: Process) -> dict[str, Any]:
    data = process.settings.data
    return {
        "renamed_columns": dict(data.columns),
        "filters": {name: REASONS[name] for name in data.filters},
        "always": dict(STRUCTURAL),
    }


def _decoding(row: Asked) -> dict[str, Any]:
    asked, sent = json.loads(row.params_requested), json.loads(row.params_sent)
    return {
        "annotator": row.annotator,
        "attempts": row.attempts,
        "asked": asked,
        "sent": sent,
        "ignored": json.loads(row.params_ignored),
        "not_sent": sorted(name for name, value in asked.items() if value is not None and name not in sent),
    }


def _served(attempts: Iterable[Attempts]) -> list[dict[str, Any]]:
    """Which models answered, for how many attempts, and from when to when."""
    found: dict[tuple[str, str, str, str, str | None], list[Attempts]] = defaultdict(list)
    for one in attempts:
        found[one.annotator, one.kind, one.origin, one.requested_model, one.served_model].append(one)
    names = ("annotator", "kind", "origin", "requested_model", "served_model")
    return [
        {
            **dict(zip(names, key, strict=True)),
            "attempts": sum(one.attempts for one in rows),
            "first": min(one.first for one in rows),
            "last": max(one.last for one in rows),
        }
        for key, rows in sorted(found.items(), key=lambda item: tuple(str(part) for part in item[0]))
    ]


def _calls(log: LogCounts, process: Process, pairs: pa.Table, gaps: pa.Table) -> dict[str, Any]:
    """For each annotator and prompt: attempts by outcome, and questions without a valid answer by what came last."""
    panel, known = process.settings.panel, pairs["pair_id"].unique()
    outcomes: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for one in log.attempts:
        outcomes[one.annotator, one.variant][one.outcome] += one.attempts
    answered = gaps.filter(pc.is_in(gaps["pair_id"], known)).group_by(["annotator", "variant"])
    valid = {(row["annotator"], row["variant"]): row["n"] for row in _counted(answered)}
    ids, dropped = set(known.to_pylist()), defaultdict[tuple[str, str], Counter[str]](Counter)
    for (pair, annotator, variant), why in log.failures.items():
        dropped[annotator, variant][why] += pair in ids
    questions = []
    for key in product([annotator.name for annotator in panel.annotators], panel.variants):
        missing = +dropped[key]
        missing["not asked"] = len(ids) - valid.get(key, 0) - missing.total()
        questions.append(
            {
                "annotator": key[0],
                "variant": key[1],
                "attempts": dict(sorted(outcomes[key].items())),
                "valid": valid.get(key, 0),
                "dropped": dict(sorted((+missing).items())),
            }
        )
    return {"attempts": sum(one.attempts for one in log.attempts), "questions": questions}


def _counted(groups: pa.TableGroupBy) -> list[dict[str, Any]]:
    return groups.aggregate([([], "count_all")]).rename_columns(["annotator", "variant", "n"]).to_pylist()


def _aggregation(settings: Schedule) -> dict[str, Any]:
    return {
        "estimator": estimator(settings),
        "tie_break": list(CATEGORIES),
        "settings": settings.model_dump(mode="json"),
    }


def estimator(settings: Schedule) -> str:
    """How β is made from the judgements, in words, in the order in which it is done."""
    steps = ["g = magnitude × confidence of each call (eq. 29)"]
    if settings.debias is not None:
        steps.append(f"less the offsets of annotators and prompts, fitted with ridge {settings.debias:g} (eq. 44)")
    if settings.over_calls is not None:
        steps.append(f"{_operator(settings.over_calls, settings)} over all calls of a pair (eq. 43)")
        steps.append(_envelope(settings))
    else:
        weighted = ", weighted" if settings.prompt_weights is not None else ""
        eq = {"mean": f"{weighted} (eq. 41)", "median": " (eq. 16)"}[settings.over_prompts]
        steps.append(f"{settings.over_prompts} over the prompts of an annotator{eq}")
        if settings.damping is not None:
            form = {"exponential": "exp(−λu)", "rational": "1/(1 + λu)"}[settings.damping.form]
            steps.append(
                f"times {form} with λ = {settings.damping.strength:g}, u = disagreement of the prompts (eq. 39)"
            )
        over = f"{_operator(settings.over_annotators, settings)} over the annotators"
        over += ", weighted (eq. 42)" if settings.annotator_weights is not None else " (eq. 17, C.5.3)"
        mapped = _envelope(settings)
        steps += [over, mapped] if settings.over_annotators == "huber" else [mapped, over]
    complete = "every call" if settings.min_calls is None else f"at least {settings.min_calls} calls"
    steps.append(f"for pairs with a valid answer to {complete}")
    return "; ".join(steps)


def _operator(name: str, settings: Schedule) -> str:
    if name == "trimmed_mean":
        return f"mean without the {settings.trim:g} at each end"
    return f"Huber mean with δ = {settings.huber_delta:g}" if name == "huber" else name


def _envelope(settings: Schedule) -> str:
    mapped = f"β = {settings.beta_min:g} + ({settings.beta_max:g} − {settings.beta_min:g})·clip(g, 0, 1) (eq. 15)"
    own = [f"{c} [{one.beta_min:g}, {one.beta_max:g}]" for c, one in settings.envelopes.items()]
    return f"{mapped}, within {', '.join(own)} for pairs of these categories (J.5)" if own else mapped


def _control(pairs: pa.Table, schedule: pa.Table, annotators: int) -> dict[str, Any]:
    """β in all, by category, by tertile of disagreement, and by source if the source has such a column."""
    beta = schedule["beta"].to_numpy()
    category = schedule["category"].to_numpy(zero_copy_only=False)
    summary: dict[str, Any] = {
        "beta": _summary(beta),
        "by_category": {name: _summary(beta[category == name]) for name in CATEGORIES if (category == name).any()},
        "by_disagreement": _by_disagreement(schedule, beta, annotators),
    }
    if SOURCE_COLUMN in pairs.column_names:
        at = pc.index_in(schedule["pair_id"], pairs["pair_id"].combine_chunks())
        source = np.array([str(name) for name in pairs[SOURCE_COLUMN].take(at).to_pylist()], dtype=object)
        common = [name for name, _ in sorted(Counter(source).items(), key=lambda item: (-item[1], item[0]))]
        named = {name: _summary(beta[source == name]) for name in common[:_MOST_SOURCES]}
        rest = ~np.isin(source, common[:_MOST_SOURCES])
        summary["by_source"] = named | ({"(others)": _summary(beta[rest])} if rest.any() else {})
    return summary


def _by_disagreement(schedule: pa.Table, beta: Array, annotators: int) -> dict[str, Any]:
    """Tertiles of how far annotators are apart; of one annotator, its prompts."""
    alone = next(name for name in schedule.column_names if name.startswith("prompt_disagreement_"))
    measure = "annotator_std" if annotators > 1 else alone
    disagreement: Array = schedule[measure].to_numpy()
    known = np.isfinite(disagreement)
    if not known.any():
        return {"measure": measure}
    bounds = [float(bound) for bound in np.quantile(disagreement[known], (1 / 3, 2 / 3), method="lower")]
    tertile = np.searchsorted(bounds, disagreement, side="left")
    parts = {name: beta[known & (tertile == n)] for n, name in enumerate(_TERTILES)} | {"unknown": beta[~known]}
    return {"measure": measure, "bounds": bounds} | {name: _summary(part) for name, part in parts.items() if len(part)}


def _summary(beta: Array) -> dict[str, float]:
    """Number, mean, standard deviation and quartiles; sums are exact, so that every machine finds the same."""
    n = len(beta)
    mean = math.fsum(beta) / n
    deviation = math.sqrt(math.fsum((beta - mean) ** 2) / n)
    quantiles = dict(zip(_QUANTILES, np.quantile(beta, list(_QUANTILES.values())), strict=True))
    numbers = {"mean": mean, "std": deviation, **quantiles}
    return {"n": n} | {name: round(float(value), 6) for name, value in numbers.items()}


def _decoupling(process: Process) -> dict[str, Any]:
    """Who teaches and who judges, and what the code lets through."""
    settings = process.settings
    judge = settings.evaluate.judge
    teachers = {annotator.name: annotator.model for annotator in settings.panel.annotators}
    if judge is None:
        said = "The process names no judge, so that no benchmark of this run can have been scored by a teacher."
    else:
        said = (
            f"The judge {judge.model} is none of the annotators. That two models of one vendor or family may share "
            "their leanings is not checked."
        )
    return {
        "annotators": teachers,
        "judge": judge.model if judge is not None else None,
        "refused": [
            "a judge with the model name of an annotator, in any case of letters: the process file is not read"
        ],
        "statement": said,
    }
