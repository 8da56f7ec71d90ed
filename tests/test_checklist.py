"""The checklist in the manifest of a schedule: what J.4 of the paper asks for, counted again here in another way."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from report_runs import judged, make_run, pair
from sp2dpo.calls import open_calls, open_ledger
from sp2dpo.checklist import estimator
from sp2dpo.hashing import sha256_file
from sp2dpo.rubric import CATEGORIES
from sp2dpo.runs import Run
from sp2dpo.settings import Evaluate, Schedule
from sp2dpo.stages import build_schedule, checklist_of, read_schedule
from sp2dpo.tables import read_manifest

ROWS = [pair(n, source=("web", "books")[n % 2]) for n in range(12)]


def answer(n: int, annotator: str, variant: str) -> str:
    """Nothing readable of `b` about pair 3, nothing at all about pair 4."""
    if annotator == "b" and n in (3, 4):
        return "I cannot say" if n == 3 else ""
    text = judged(CATEGORIES[n % 3], n / 12, 0.5 + 0.1 * int(variant[1]) * (annotator == "b"))
    return f"Sure: {text}" if n == 5 else text


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    rows = [*ROWS, {**ROWS[0], "chosen": [{"role": "assistant", "content": " "}], "prompt_id": "p90"}]
    return make_run(tmp_path_factory.mktemp("checklist"), rows, answer, annotators=("a", "b"), variants=("v1", "v2"))


@pytest.fixture(scope="module")
def listed(run: Run) -> Mapping[str, Any]:
    manifest = read_manifest(run.schedule)
    assert manifest is not None
    checklist: Mapping[str, Any] = manifest["checklist"]
    return checklist


def test_inputs_are_pinned_and_every_row_of_the_source_is_accounted_for(run: Run, listed: Mapping[str, Any]) -> None:
    inputs = listed["pinned_inputs"]
    assert inputs["pin"] == sha256_file(run.path.parent / "pairs.jsonl")
    assert (inputs["source"], inputs["revision"], inputs["raw"], inputs["kept"]) == ("pairs.jsonl", None, 13, 12)
    assert inputs["raw"] == inputs["kept"] + sum(inputs["dropped"].values())
    assert inputs["dropped"]["empty_field"] == 1
    assert inputs["hashes"]["pairs.parquet"] == sha256_file(run.pairs)
    assert list(listed["preprocessing"]["filters"]) == ["duplicate_prompt_id", "empty_field"]


def test_prompts_are_the_files_of_the_run_by_their_hashes(run: Run, listed: Mapping[str, Any]) -> None:
    assert listed["prompts"] == {n: sha256_file(run.path / "prompts" / f"{n}.txt") for n in ("v1", "v2", "user")}


def test_calls_are_counted_by_annotator_prompt_and_outcome_as_the_log_has_them(
    run: Run, listed: Mapping[str, Any]
) -> None:
    with open_calls(run.calls) as log:
        calls = list(log)
        assert listed["calls"]["content"] == log.content_hash()
    assert listed["calls"]["attempts"] == len(calls) == 48
    for row in listed["calls"]["questions"]:
        ours = [call for call in calls if (call.annotator, call.variant) == (row["annotator"], row["variant"])]
        assert row["attempts"] == Counter(call.outcome for call in ours)
        assert row["valid"] == sum(call.valid for call in ours)
        assert row["valid"] + sum(row["dropped"].values()) == 12
    assert listed["calls"]["questions"][2]["dropped"] == {"no_object": 1, "not_recorded": 1}


def test_models_that_answered_are_named_with_the_first_and_last_day(run: Run, listed: Mapping[str, Any]) -> None:
    with open_calls(run.calls) as log:
        calls = list(log)
    for row in listed["served"]:
        ours = [call.started_at for call in calls if call.annotator == row["annotator"]]
        assert (row["attempts"], row["first"], row["last"]) == (len(ours), min(ours), max(ours))
        assert row["requested_model"] == f"model-of-{row['annotator']}"
    assert [row["annotator"] for row in listed["served"]] == ["a", "b"]


def test_decoding_is_said_as_asked_sent_and_ignored(listed: Mapping[str, Any]) -> None:
    assert [(row["annotator"], row["attempts"]) for row in listed["decoding"]] == [("a", 24), ("b", 24)]
    assert all((row["asked"], row["sent"], row["ignored"]) == ({}, {}, []) for row in listed["decoding"])


def test_the_released_schedule_is_summed_up_by_category_disagreement_and_source(
    run: Run, listed: Mapping[str, Any]
) -> None:
    control, rows = listed["control"], read_schedule(run).to_pylist()
    assert control["files"]["schedule.parquet"] == sha256_file(run.schedule)
    assert control["beta"]["n"] == len(rows) == 10
    assert control["beta"]["mean"] == pytest.approx(statistics.mean(row["beta"] for row in rows), abs=1e-6)
    assert control["beta"]["std"] == pytest.approx(statistics.pstdev(row["beta"] for row in rows), abs=1e-6)
    for name, summary in control["by_category"].items():
        ours = [row["beta"] for row in rows if row["category"] == name]
        assert (summary["n"], summary["min"]) == (len(ours), pytest.approx(min(ours), abs=1e-6))
    source = {row["pair_id"]: row["prompt_id"] for row in rows}
    odd = sum(int(prompt_id[1:]) % 2 for prompt_id in source.values())
    assert {name: part["n"] for name, part in control["by_source"].items()} == {"web": 10 - odd, "books": odd}
    tertiles = control["by_disagreement"]
    assert tertiles["measure"] == "annotator_std"
    assert sum(tertiles[name]["n"] for name in ("low", "middle", "high")) == 10
    low = [row["beta"] for row in rows if row["annotator_std"] <= tertiles["bounds"][0]]
    assert tertiles["low"]["n"] == len(low)


def test_one_annotator_is_sorted_by_how_far_its_prompts_are_apart(tmp_path: Path) -> None:
    run = make_run(tmp_path, ROWS, answer, annotators=("a",))
    made = build_schedule(run)
    assert checklist_of(run, made, {})["control"]["by_disagreement"]["measure"] == "prompt_disagreement_a"


def test_the_same_run_gives_the_same_checklist_and_it_is_plain_json(run: Run, listed: Mapping[str, Any]) -> None:
    files = listed["control"]["files"]
    again = checklist_of(run, build_schedule(run), files)
    assert json.loads(json.dumps(again, allow_nan=False)) == listed


def test_settings_that_changed_within_an_annotator_are_told_apart(run: Run, tmp_path: Path) -> None:
    with open_calls(run.calls) as log:
        calls = list(log)
    with open_ledger(tmp_path / "calls.sqlite") as ledger:
        ledger.append(*calls[:5], replace(calls[5], params_sent='{"seed":1}'), *calls[6:])
        asked = ledger.asked()
    assert {(row.annotator, row.params_sent): row.attempts for row in asked} == {
        ("a", "{}"): 23,
        ("a", '{"seed":1}'): 1,
        ("b", "{}"): 24,
    }


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "median over the prompts of an annotator (eq. 16); β = 0.03 + (0.3 − 0.03)·clip(g, 0, 1) (eq. 15); mean"),
        ({"debias": 0.5}, "fitted with ridge 0.5 (eq. 44)"),
        (
            {"over_prompts": "mean", "prompt_weights": {"v1": 1, "v2": 2}},
            "mean over the prompts of an annotator, weighted",
        ),
        ({"damping": {"form": "rational", "strength": 2.0}}, "times 1/(1 + λu) with λ = 2"),
        ({"over_annotators": "trimmed_mean", "trim": 0.25}, "mean without the 0.25 at each end over the annotators"),
        ({"annotator_weights": {"a": 1.0, "b": 2.0}}, "mean over the annotators, weighted (eq. 42)"),
        ({"over_calls": "huber", "huber_delta": 0.2}, "Huber mean with δ = 0.2 over all calls of a pair (eq. 43)"),
        ({"envelopes": {"Style": {"beta_min": 0.01, "beta_max": 0.1}}}, "Style [0.01, 0.1]"),
        ({"min_calls": 2}, "at least 2 calls"),
    ],
)
def test_the_estimator_is_said_in_words(settings: dict[str, Any], words: str) -> None:
    assert words in estimator(Schedule.model_validate(settings))


def test_a_huber_mean_over_annotators_is_of_gaps_and_the_others_of_beta() -> None:
    said = {over: estimator(Schedule.model_validate({"over_annotators": over})) for over in ("huber", "median")}
    assert said["huber"].index("over the annotators") < said["huber"].index("β =")
    assert said["median"].index("over the annotators") > said["median"].index("β =")


def test_the_judge_is_named_beside_the_annotators(run: Run, listed: Mapping[str, Any]) -> None:
    assert listed["decoupling"]["annotators"] == {"a": "model-of-a", "b": "model-of-b"}
    assert listed["decoupling"]["judge"] is None


def test_a_judge_that_is_no_annotator_is_said_to_be_none(run: Run) -> None:
    settings = run.process.settings.model_copy(
        update={
            "evaluate": Evaluate.model_validate({"judge": {"name": "j", "model": "other", "base_url": "http://j/v1"}})
        }
    )
    judged_run = replace(run, process=replace(run.process, settings=settings))
    decoupling = checklist_of(judged_run, build_schedule(judged_run), {})["decoupling"]
    assert decoupling["judge"] == "other"
    assert decoupling["statement"].startswith("The judge other is none of the annotators.")
