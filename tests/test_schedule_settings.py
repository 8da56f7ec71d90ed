"""Every setting of `schedule`, through the commands, against a second reckoning in plain Python from gaps.parquet.

The expected values come from lists and the formulas alone: no arrays, and nothing of `ensemble` or `schedule`.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
import yaml

from conftest import Sp2dpo
from report_runs import judged, make_run, pair
from sp2dpo.process import load_process
from sp2dpo.runs import Run

ANNOTATORS, VARIANTS = ("a", "b", "c"), ("v1", "v2", "v3")
PRIORITY = ("Safety", "Factuality", "Instruction", "Reasoning", "Helpfulness", "Style")
MISSING = {
    **dict.fromkeys([(1, "a", "v1"), (2, "a", "v1"), (2, "a", "v2"), (9, "a", "v3"), (9, "b", "v1")], ""),
    **dict.fromkeys([(3, "b", v) for v in VARIANTS], ""),
    **dict.fromkeys([(4, a, v) for a in "ab" for v in VARIANTS], ""),
    **dict.fromkeys([(5, a, v) for a in ANNOTATORS for v in VARIANTS if (a, v) != ("c", "v2")], ""),
    **dict.fromkeys([(6, a, v) for a in ANNOTATORS for v in VARIANTS], ""),
}
"""Pair 1 lacks one answer, 2 two of one annotator, 3 an annotator, 4 two, 5 all but one, 6 all, 9 two of two."""


def answer(n: int, annotator: str, variant: str) -> str:
    """Noise around a level of each pair, with an annotator and a prompt that judge higher; some gaps at 0 and 1."""
    dice = random.Random(f"{n}{annotator}{variant}")
    level = n % 7 / 6 + {"a": 0.0, "b": 0.1, "c": -0.15}[annotator] + {"v1": 0.0, "v2": 0.05, "v3": -0.05}[variant]
    magnitude = min(max(level + dice.gauss(0, 0.15), 0.0), 1.0)
    category = PRIORITY[n % 6] if dice.random() < 0.6 else dice.choice(PRIORITY)
    return MISSING.get((n, annotator, variant), judged(category, round(magnitude, 3), round(dice.uniform(0.7, 1.0), 3)))


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Sixteen pairs × three annotators × three prompts, with gaps in it."""
    return make_run(tmp_path_factory.mktemp("answered"), [pair(n) for n in range(16)], answer, annotators=ANNOTATORS)


def process_with(answered: Run, folder: Path, schedule: Mapping[str, Any]) -> Path:
    """A process file of the same questions with another `schedule`, in the folder of the recorded answers."""
    source = answered.path.parent
    process = yaml.safe_load((source / "process.yaml").read_text(encoding="utf-8")) | {"schedule": dict(schedule)}
    process["data"]["source"] = str(source / "pairs.jsonl")
    for annotator in process["panel"]["annotators"]:
        annotator["calls"] = str(source / annotator["calls"])
    (folder / "process.yaml").write_text(yaml.safe_dump(process), encoding="utf-8")
    return folder / "process.yaml"


# The second reckoning -----------------------------------------------------------------------------------------------

Calls = dict[tuple[str, str], tuple[str, float]]
"""Category and gap of the valid answers about one pair, by annotator and variant."""


def calls_of(run: Path) -> dict[str, Calls]:
    pairs: dict[str, Calls] = defaultdict(dict)
    for row in parquet.read_table(run / "gaps.parquet").to_pylist():
        pairs[row["pair_id"]][row["annotator"], row["variant"]] = row["category"], row["effective_gap"]
    return pairs


def expected(pairs: Mapping[str, Calls], settings: Mapping[str, Any]) -> dict[str, float]:
    """β of each pair that has enough answers; offsets are those of just these pairs."""
    least = settings.get("min_calls")
    counts = {
        pair_id: [weight(cell, settings) > 0 or least is None for cell in calls] for pair_id, calls in pairs.items()
    }
    kept = {pair_id: calls for pair_id, calls in pairs.items() if sum(counts[pair_id]) >= (least or 9)}
    b, d = offsets(kept, settings["debias"]) if settings.get("debias") is not None else ({}, {})
    betas = {}
    for pair_id, calls in kept.items():
        gaps = {(a, v): gap - b.get(a, 0.0) - d.get(v, 0.0) for (a, v), (_, gap) in calls.items()}
        betas[pair_id] = beta_of(calls, gaps, settings)
    return betas


def beta_of(calls: Calls, gaps: Mapping[tuple[str, str], float], settings: Mapping[str, Any]) -> float:
    bounds = settings.get("envelopes", {}).get(category_of(calls), settings)
    low, high = bounds.get("beta_min", 0.03), bounds.get("beta_max", 0.30)

    def f(gap: float) -> float:
        return low + (high - low) * min(max(gap, 0.0), 1.0)

    if settings.get("over_calls"):
        weights = [weight(cell, settings) for cell in gaps]
        return f(centre(settings["over_calls"], list(gaps.values()), weights, settings))
    of_annotators = {a: gap_of(a, calls, gaps, settings) for a in ANNOTATORS if any(a == one for one, _ in gaps)}
    alpha = settings.get("annotator_weights") or {}
    weights = [alpha.get(a, 1.0) for a in of_annotators]
    how = settings.get("over_annotators", "mean")
    if how == "huber":
        return f(centre(how, [min(max(gap, 0.0), 1.0) for gap in of_annotators.values()], weights, settings))
    return centre(how, [f(gap) for gap in of_annotators.values()], weights, settings)


def gap_of(annotator: str, calls: Calls, gaps: Mapping[tuple[str, str], float], settings: Mapping[str, Any]) -> float:
    """Over the prompts, damped by how far the answers as given lie apart."""
    mine = {v: gap for (a, v), gap in gaps.items() if a == annotator}
    gamma = settings.get("prompt_weights") or {}
    gap = centre(
        settings.get("over_prompts", "median"), list(mine.values()), [gamma.get(v, 1.0) for v in mine], settings
    )
    damping = settings.get("damping")
    if not damping:
        return gap
    given = [gap for (a, _), (_, gap) in calls.items() if a == annotator]
    middle = statistics.median(given)
    u = damping["strength"] * statistics.median(abs(one - middle) for one in given)
    return gap * (math.exp(-u) if damping.get("form", "exponential") == "exponential" else 1 / (1 + u))


def weight(cell: tuple[str, str], settings: Mapping[str, Any]) -> float:
    alpha, gamma = settings.get("annotator_weights") or {}, settings.get("prompt_weights") or {}
    return float(alpha.get(cell[0], 1.0) * gamma.get(cell[1], 1.0))


def centre(how: str, values: Sequence[float], weights: Sequence[float], settings: Mapping[str, Any]) -> float:
    if how == "median":
        return statistics.median(values)
    if how == "huber":
        return huber(values, settings.get("huber_delta", 0.1))
    if how == "trimmed_mean":
        cut = math.floor(settings.get("trim", 0.2) * len(values) + 1e-9)
        return statistics.fmean(sorted(values)[cut : len(values) - cut])
    return statistics.fmean(values, weights)


def huber(values: Sequence[float], delta: float) -> float:
    """Where the pull of the values, each at most `delta`, is zero; by halving, from both sides."""

    def edge(sign: int) -> float:
        low, high = min(values) - delta, max(values) + delta
        for _ in range(80):
            mid = (low + high) / 2
            pull = math.fsum(min(max(one - mid, -delta), delta) for one in values)
            low, high = (mid, high) if pull > sign * 1e-13 else (low, mid)
        return low

    return (edge(1) + edge(-1)) / 2


def offsets(pairs: Mapping[str, Calls], ridge: float) -> tuple[dict[str, float], dict[str, float]]:
    """Of annotators and prompts: each is in turn what the others leave, until nothing changes."""
    b, d = dict.fromkeys(ANNOTATORS, 0.0), dict.fromkeys(VARIANTS, 0.0)
    cells = [(pair, a, v, gap) for pair, calls in pairs.items() for (a, v), (_, gap) in calls.items()]
    for _ in range(400):
        left = defaultdict(list)
        for pair_id, a, v, gap in cells:
            left[pair_id].append(gap - b[a] - d[v])
        g = {pair_id: statistics.fmean(values) for pair_id, values in left.items()}
        for a in ANNOTATORS:
            mine = [gap - g[pair_id] - d[v] for pair_id, one, v, gap in cells if one == a]
            b[a] = math.fsum(mine) / (len(mine) + ridge)
        for v in VARIANTS:
            mine = [gap - g[pair_id] - b[a] for pair_id, a, one, gap in cells if one == v]
            d[v] = math.fsum(mine) / (len(mine) + ridge)
    means = statistics.fmean(b.values()), statistics.fmean(d.values())
    return {a: one - means[0] for a, one in b.items()}, {v: one - means[1] for v, one in d.items()}


def category_of(calls: Calls) -> str:
    """The majority over annotators of the majority over prompts; ties go to the first in priority."""
    by_annotator = defaultdict(list)
    for (a, _), (category, _) in calls.items():
        by_annotator[a].append(category)
    return majority([majority(mine) for mine in by_annotator.values()])


def majority(names: Sequence[str]) -> str:
    votes = Counter(names)
    return min(votes, key=lambda name: (-votes[name], PRIORITY.index(name)))


# The commands against it --------------------------------------------------------------------------------------------

ALPHA, GAMMA = {"a": 3, "b": 1, "c": 0.5}, {"v1": 1, "v2": 0, "v3": 2.5}
WIDE = {"beta_min": 0.1, "beta_max": 0.6}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "debias": {"debias": 2.0},
    "debias without ridge": {"debias": 0},
    "mean over prompts": {"over_prompts": "mean"},
    "prompt weights": {"over_prompts": "mean", "prompt_weights": GAMMA},
    "damping": {"damping": {"strength": 4.0}},
    "rational damping": {"damping": {"form": "rational", "strength": 4}},
    "debias and damping": {"debias": 1, "damping": {"strength": 2}},
    "annotator weights": {"annotator_weights": ALPHA},
    "median over annotators": {"over_annotators": "median"},
    "trimmed mean over annotators": {"over_annotators": "trimmed_mean", "trim": 0.34},
    "huber over annotators": {"over_annotators": "huber", "huber_delta": 0.03},
    "mean over calls": {"over_calls": "mean"},
    "weighted calls": {"over_calls": "mean", "annotator_weights": ALPHA, "prompt_weights": GAMMA},
    "median over calls": {"over_calls": "median", "debias": 1.0},
    "trimmed mean over calls": {"over_calls": "trimmed_mean"},
    "trimmed mean over calls, other trim": {"over_calls": "trimmed_mean", "trim": 0.4},
    "huber over calls": {"over_calls": "huber"},
    "huber over calls, other delta": {"over_calls": "huber", "huber_delta": 0.02},
    "bounds": {"beta_min": 0.05, "beta_max": 0.5},
    "envelopes": {"envelopes": {"Safety": WIDE, "Style": {"beta_min": 0.01, "beta_max": 0.01}}},
    "envelopes with huber": {"over_annotators": "huber", "envelopes": {"Reasoning": WIDE}},
    "envelopes over calls": {"over_calls": "mean", "envelopes": {"Factuality": WIDE}},
}  # fmt: skip


CASES = [(name, least) for name in SETTINGS for least in (None, 1)] + [("default", 6), ("weighted calls", 6)]


@pytest.mark.parametrize(("name", "min_calls"), CASES)
def test_every_setting_gives_the_beta_of_the_second_reckoning(
    sp2dpo: Sp2dpo, answered: Run, tmp_path: Path, name: str, min_calls: int | None
) -> None:
    settings = SETTINGS[name] | ({} if min_calls is None else {"min_calls": min_calls})
    process = process_with(answered, tmp_path, settings)
    assert sp2dpo("annotate", process, "--run-dir", "run", "--reuse", answered.path).code == 1  # pair 6 has no answer
    assert sp2dpo("schedule", process, "--run-dir", "run").code == 0
    schedule = parquet.read_table("run/schedule.parquet").to_pylist()
    wanted = expected(calls_of(Path("run")), settings)
    assert {row["pair_id"]: row["beta"] for row in schedule} == pytest.approx(wanted, abs=1e-9)
    assert len(wanted) == {None: 9, 1: 15 if "prompt_weights" not in settings else 14, 6: len(wanted)}[min_calls]
    assert sp2dpo("verify", "run").code == 0


def test_every_setting_but_the_default_gives_other_betas(answered: Run) -> None:
    pairs = calls_of(answered.path)
    betas = {name: expected(pairs, settings | {"min_calls": 1}) for name, settings in SETTINGS.items()}
    for name, one in betas.items():
        assert name == "default" or one != pytest.approx(betas["default"], abs=1e-6), name


# Settings that do not fit -------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], Sequence[str]]] = {
    "weights of half the panel": (
        {"annotator_weights": {"a": 1, "b": 1}},
        ["schedule.annotator_weights needs one weight for each of a, b, c", "it has a: 1, b: 1"],
    ),
    "weights of a stranger": (
        {"over_prompts": "mean", "prompt_weights": {"v1": 1, "v2": 1, "v4": 1}},
        ["schedule.prompt_weights needs one weight for each of v1, v2, v3", "v4: 1"],
    ),
    "no weight at all": ({"annotator_weights": dict.fromkeys("abc", 0)}, ["not all of them zero"]),
    "a negative weight": ({"annotator_weights": {"a": 1, "b": 1, "c": -1}}, ["schedule.annotator_weights.c", "-1"]),
    "annotator weights of a median": (
        {"over_annotators": "median", "annotator_weights": ALPHA},
        ["annotator_weights are those of a mean, and over_annotators is median"],
    ),
    "prompt weights of the median by default": (
        {"prompt_weights": GAMMA},
        ["prompt_weights are those of a mean, and over_prompts is median; give over_prompts: mean"],
    ),
    "weights of a pooled median": (
        {"over_calls": "median", "prompt_weights": GAMMA},
        ["prompt_weights are those of a mean, and over_calls is median"],
    ),
    "over_calls and over_prompts": (
        {"over_calls": "mean", "over_prompts": "mean"},
        ["over_calls stands in place of over_prompts and over_annotators; give it, or them"],
    ),
    "over_calls and over_annotators": ({"over_calls": "mean", "over_annotators": "huber"}, ["over_calls stands"]),
    "over_calls and damping": ({"over_calls": "mean", "damping": {"strength": 1}}, ["damping acts on the gap of an"]),
    "more calls than there are": ({"min_calls": 10}, ["schedule.min_calls is 10, and a pair has 9 calls"]),
    "no call": ({"min_calls": 0}, ["schedule.min_calls", "greater than or equal to 1"]),
    "an envelope upside down": (
        {"envelopes": {"Style": {"beta_min": 0.2, "beta_max": 0.1}}},
        ["schedule.envelopes.Style: beta_max 0.1 is below beta_min 0.2"],
    ),
    "bounds upside down": ({"beta_min": 0.4}, ["schedule: beta_max 0.3 is below beta_min 0.4"]),
    "an unknown category": ({"envelopes": {"Humour": WIDE}}, ["unknown name 'Humour' in schedule.envelopes;"]),
    "half an envelope": ({"envelopes": {"Style": {"beta_min": 0.1}}}, ["schedule.envelopes.Style.beta_max"]),
    "damping without strength": ({"damping": {"form": "rational"}}, ["missing key 'schedule.damping.strength'"]),
    "damping as a number": ({"damping": 0.5}, ["schedule.damping: it takes the keys form, strength (it is 0.5)"]),
    "trim of a half": ({"over_calls": "trimmed_mean", "trim": 0.5}, ["schedule.trim", "less than 0.5", "it is 0.5"]),
    "trim without its operator": ({"trim": 0.34}, ["trim is that of trimmed_mean, which neither over_annotators nor"]),
    "huber_delta of another operator": ({"over_calls": "mean", "huber_delta": 0.2}, ["huber_delta is that of huber"]),
    "huber_delta of zero": ({"over_calls": "huber", "huber_delta": 0}, ["schedule.huber_delta", "greater than 0"]),
    "a negative ridge": ({"debias": -1}, ["schedule.debias", "greater than or equal to 0"]),
    "an unknown operator": ({"over_annotators": "trimmed"}, ["schedule.over_annotators", "it is 'trimmed'"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_settings_that_do_not_fit_are_one_line_that_names_them(
    sp2dpo: Sp2dpo, answered: Run, tmp_path: Path, name: str
) -> None:
    settings, texts = WRONG[name]
    ran = sp2dpo("schedule", process_with(answered, tmp_path, settings), "--run-dir", "run")
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert [text for text in texts if text not in ran.err] == [], ran.err
    assert not Path("run").exists()


def test_the_process_that_is_read_has_every_setting_that_is_reckoned_here(answered: Run, tmp_path: Path) -> None:
    known = set(type(load_process(process_with(answered, tmp_path, {})).settings.schedule).model_fields)
    assert known - {key for settings in SETTINGS.values() for key in settings} == {"method", "min_calls", "random_seed"}
