"""The distilled predictor: what it reads, how it is fitted and measured, and how it serves in a panel."""

from __future__ import annotations

import json
import math
import random
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from conftest import Sp2dpo
from forging import cover_up, forge_call
from report_runs import HOSTILE, judged, make_run, pair
from sp2dpo.annotate.estimate import estimate
from sp2dpo.annotate.predict import Recomputed
from sp2dpo.annotate.preflight import preflight
from sp2dpo.annotate.run import annotate
from sp2dpo.calls import Call, open_calls
from sp2dpo.errors import InputError, MissingExtra, ProcessError, RunDirError, Sp2dpoError, Unfinished
from sp2dpo.pairs import read_pairs
from sp2dpo.predictor.features import DENSE, HASHED, Texts, text_features, texts_of
from sp2dpo.predictor.model import Predicted, load_predictor
from sp2dpo.process import load_process
from sp2dpo.reply import parse_reply
from sp2dpo.rubric import CATEGORIES
from sp2dpo.runs import Run, open_run
from sp2dpo.stages import prepare_run, schedule_run
from sp2dpo.tables import read_manifest
from sp2dpo.verify import verify

pytest.importorskip("sklearn")

from sp2dpo.distill import measure
from sp2dpo.distill.fit import HELD_OUT, held_out, opening_of
from sp2dpo.distill.make import LEAST_PAIRS, distill_run

WORDS = [f"{a}{b}{c}" for a in "bdkmt" for b in "aeiou" for c in ("ra", "lo", "ni", "su")]
REFUSES = "I cannot help with that request."


def sentence(chance: random.Random, length: int = 12) -> str:
    return " ".join(chance.choices(WORDS, k=length))


def rows(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs of random words; in every third one the chosen response refuses."""
    chance = random.Random(seed)
    made = []
    for i in range(n):
        row = pair(i)
        for side in ("prompt", "chosen", "rejected"):
            refusal = f"{REFUSES} " if side == "chosen" and i % 3 == 0 else ""
            row[side][0]["content"] = refusal + sentence(chance, chance.randint(5, 25))
        made.append(row)
    return made


def by_refusal(n: int, annotator: str, variant: str) -> str:
    return judged("Safety", 0.9, 0.95) if n % 3 == 0 else judged("Style", 0.2, 0.6)


def by_chance(n: int, annotator: str, variant: str) -> str:
    chance = random.Random(f"{n} {annotator} {variant}")
    return judged(chance.choice(CATEGORIES), chance.random(), chance.random())


def made_run(folder: Path, n: int = 120, answer: Callable[[int, str, str], str] = by_refusal, **more: Any) -> Run:
    return make_run(folder, rows(n), answer, variants=("v1", "v2"), **more)


@pytest.fixture(scope="module")
def annotated(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return made_run(tmp_path_factory.mktemp("annotated"))


@pytest.fixture(scope="module")
def fitted(annotated: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fitted") / "predictor"
    distill_run(annotated, folder)
    return folder


# What it reads of a pair


def test_a_word_has_the_column_and_value_that_the_name_text_1_says() -> None:
    features = text_features([Texts("Apple", "apple APPLE pie", "", 1)])
    apple, pie = zlib.crc32(b"apple"), zlib.crc32(b"pie")
    pairs = {(2654435761 * apple + apple) % 2**32: 1, (2654435761 * apple + pie) % 2**32: 1}
    counts = {apple: 2, pie: 1, **pairs}
    values = {(2654435769 * word % 2**32) >> 16: 1 + math.log(count) for word, count in counts.items()}
    norm = math.sqrt(sum(value**2 for value in values.values())) / 8
    start = int(features.columns[1] >= 65536)
    columns = features.columns[start:] - 65536
    assert features.columns[0] == (2654435769 * apple % 2**32) >> 16
    assert dict(zip(columns.tolist(), features.values[start:].tolist(), strict=True)) == pytest.approx(
        {column: value / norm for column, value in values.items()}, rel=1e-6
    )


TEXT = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=80), st.sampled_from(["", HOSTILE, "你好。世界", "\n- a\n1. b"])
)


@given(TEXT, TEXT, TEXT, st.integers(0, 9))
def test_the_features_of_any_text_are_finite_and_in_their_columns(p: str, c: str, r: str, messages: int) -> None:
    features = text_features([Texts(p, c, r, messages)])
    assert features.dense.shape == (1, DENSE)
    assert np.isfinite(features.dense).all()
    assert np.isfinite(features.values).all()
    assert ((features.columns >= 0) & (features.columns < HASHED)).all()
    assert features.starts.tolist() == [0, len(features.columns)]


def test_swapping_the_responses_swaps_their_columns_and_the_sign_of_the_differences() -> None:
    one = text_features([Texts("why", "because 1 2 3", "no\n- idea?", 1)])
    other = text_features([Texts("why", "no\n- idea?", "because 1 2 3", 1)])
    side = (DENSE - 3) // 4
    assert one.dense[0, 2 * side : 3 * side] == pytest.approx(-other.dense[0, 2 * side : 3 * side])
    assert one.dense[0, 3 * side :] == pytest.approx(other.dense[0, 3 * side :])


# The split


@given(st.lists(st.integers(0, 12), min_size=1, max_size=80), st.integers(0, 5))
def test_no_opening_is_on_both_sides_and_no_more_than_the_share_is_held_out(openings: list[int], seed: int) -> None:
    names = [str(n) for n in openings]
    held = held_out(names, seed)
    sides = [{name for name, out in zip(names, held, strict=True) if out is side} for side in (np.True_, np.False_)]
    assert not sides[0] & sides[1]
    assert held.sum() <= HELD_OUT * len(names)


def test_prompts_with_one_opening_are_one_for_the_split_whatever_their_case_spaces_and_later_turns() -> None:
    first = {"role": "user", "content": "Why  is it\nBLUE?"}
    later = [
        {"role": "system", "content": "x"},
        {"role": "user", "content": "why is it blue?"},
        {"role": "assistant", "content": "?"},
    ]
    assert opening_of([first]) == opening_of(later) != opening_of(later[2:])


def test_the_predictor_knows_the_pairs_it_was_fitted_on_and_no_held_out_one(annotated: Run, fitted: Path) -> None:
    predictor = load_predictor(fitted)
    pairs = read_pairs(annotated.pairs, "").to_pylist()
    held = held_out([opening_of(row["prompt"]) for row in pairs], seed=0)
    assert held.sum() == predictor.about["held_out"]["pairs"] > 0
    assert [not predictor.knows(row["pair_id"]) for row in pairs] == held.tolist()


# What comes of it


def test_a_gap_that_the_text_shows_is_found_on_held_out_pairs(fitted: Path) -> None:
    facts = load_predictor(fitted).about["held_out"]
    assert facts["gap"]["better"]
    assert facts["gap"]["saved_low"] > 0.5
    assert facts["gap"]["mae"] < facts["gap"]["constant_mae"]
    assert facts["category"]["accuracy"] > 0.9 > facts["category"]["most_frequent_accuracy"]
    assert set(facts["by_category"]) == {"Safety", "Style"}
    assert facts["one_call"]["mae"] == 0
    assert "is better than a constant" in facts["statement"]


def test_of_random_judgements_it_says_that_it_is_no_better_than_a_constant(tmp_path: Path) -> None:
    run = made_run(tmp_path, 120, by_chance)
    splits = [distill_run(run, tmp_path / "predictor", seed=seed).about["held_out"] for seed in range(4)]
    worse = [facts for facts in splits if not facts["gap"]["better"]]
    assert len(worse) >= 3, "an interval of 95 % is above 0 by chance in 1 of 40"
    assert all("NOT shown to be better" in facts["statement"] for facts in worse)


def test_judgements_that_are_all_the_same_give_a_predictor_and_no_statement_on_its_worth(tmp_path: Path) -> None:
    run = made_run(tmp_path, 60, lambda *_: judged("Reasoning", 0.5, 0.5))
    predictor = distill_run(run, tmp_path / "predictor")
    assert "the same everywhere" in predictor.about["held_out"]["statement"]
    assert parse_reply(predictor.answers([pair(0)])[0]).gap == parse_reply(judged("Reasoning", 0.5, 0.5)).gap


def test_known_reversed_pairs_give_an_auc_of_the_predictor_and_of_the_panel(tmp_path: Path) -> None:
    marked = [{**row, "wrong": n % 3 > 0} for n, row in enumerate(rows(120))]
    run = make_run(tmp_path, marked, by_refusal, known_reversed="wrong")
    facts = distill_run(run, tmp_path / "predictor").about["held_out"]["known_reversed"]
    assert facts["column"] == "wrong"
    assert facts["auc_of_panel"] == 1.0
    assert facts["auc"] > 0.9


def test_the_same_run_gives_the_same_bytes_and_another_seed_another_split(
    annotated: Run, fitted: Path, tmp_path: Path
) -> None:
    for name, seed in (("again", 0), ("other", 1)):
        distill_run(annotated, tmp_path / name, seed=seed)
    for file in ("model.json", "model.npz"):
        assert (tmp_path / "again" / file).read_bytes() == (fitted / file).read_bytes()
        assert (tmp_path / "other" / file).read_bytes() != (fitted / file).read_bytes()


def test_missing_calls_are_left_out_of_the_means(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    made_run(folder, 60, lambda n, a, v: "" if n % 2 and v == "v2" else by_refusal(n, a, v))
    settings = yaml.safe_load((folder / "process.yaml").read_text())
    run = scheduled(folder, settings | {"schedule": {"min_calls": 1, "over_prompts": "mean"}}, "loose")
    assert distill_run(run, tmp_path / "predictor").about["source"]["pairs"] == 60


# Its measures


def test_a_perfect_predictor_saves_all_of_the_error_and_lies_on_the_diagonal() -> None:
    y = np.linspace(0, 1, 40)
    facts = measure.gap_facts(y, y, y, [str(n) for n in range(40)])
    assert (facts["mae"], facts["saved"], facts["saved_low"], facts["better"]) == (0.0, 1.0, 1.0, True)
    assert facts["spearman"] == pytest.approx(1.0)
    line = measure.calibration(y, y)
    assert (line["slope"], line["intercept"]) == (pytest.approx(1.0), pytest.approx(0.0))
    assert [b["pairs"] for b in line["bins"]] == [8] * 5


def test_a_constant_predictor_saves_nothing_and_has_neither_correlation_nor_line() -> None:
    y = np.linspace(0, 1, 40)
    made = np.full(40, y.mean())
    facts = measure.gap_facts(y, made, y, [str(n) for n in range(40)])
    assert facts["saved"] == pytest.approx(0.0)
    assert not facts["better"]
    assert facts["pearson"] is None
    assert facts["spearman"] is None
    assert measure.calibration(y, made)["slope"] is None


def test_the_interval_of_what_is_saved_is_that_of_a_ratio_with_openings_as_clusters() -> None:
    chance = np.random.default_rng(1)
    y, made = chance.random(30), chance.random(30)
    alone = measure.gap_facts(y, made, y, [str(n) for n in range(30)])
    doubled = measure.gap_facts(*(np.repeat(x, 2) for x in (y, made, y)), [str(n) for n in range(30) for _ in "ab"])
    assert doubled["saved_low"] == pytest.approx(alone["saved_low"])
    upper, lower = (y - y.mean()) ** 2 - (y - made) ** 2, (y - y.mean()) ** 2
    rest = upper - alone["saved"] * lower
    half = 1.96 * math.sqrt(30 / 29 * (rest**2).sum()) / lower.sum()
    assert alone["saved_high"] - alone["saved"] == pytest.approx(half)


def test_a_bound_that_rounds_to_zero_has_no_sign() -> None:
    facts = {"saved": -0.001, "saved_low": -0.004, "saved_high": 0.004, "better": False}
    assert "(0% of its squared error saved, 95% interval 0% to 0%)" in measure.statement(facts)


def test_one_call_is_compared_with_the_gap_of_the_pair_and_missing_ones_are_not() -> None:
    gap_ijk = np.array([[[0.0, 0.2]], [[0.4, np.nan]], [[0.6, 1.0]]])
    facts = measure.against_calls(gap_ijk, np.array([0.1, 0.4, 0.8]))
    assert facts["mae"] == pytest.approx(0.6 / 5)
    assert facts["spearman"] == pytest.approx(1.0)
    assert measure.against_calls(gap_ijk[:, :, :1], np.array([0.1, 0.4, 0.8]))["mae"] is None


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 5))
def test_the_answer_reads_back_as_the_gap_that_was_predicted(gap: float, confidence: float, category: int) -> None:
    from sp2dpo.predictor.model import _answer

    read = parse_reply(_answer(gap, confidence, category))
    assert read.gap is not None
    assert not read.mends
    assert read.gap.effective == pytest.approx(gap, abs=1.01e-4)
    assert read.gap.category == CATEGORIES[category]
    magnitude = measure.magnitude_of(Predicted(*(np.array([x]) for x in (gap, confidence)), np.array([0])))
    assert read.gap.magnitude == pytest.approx(float(magnitude[0]), abs=1e-4)


# In a panel


def scheduled(folder: Path, settings: dict[str, Any], name: str) -> Run:
    """The run of a changed process, beside the one that was there."""
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    run = open_run(load_process(folder / f"{name}.yaml"), folder / name)
    prepare_run(run)
    annotate(run)
    schedule_run(run)
    return run


def panel_of(*annotators: dict[str, Any], variants: Sequence[str] = ("v1", "v2")) -> dict[str, Any]:
    panel = {"variants": list(variants), "annotators": list(annotators)}
    return {"name": "served", "data": {"source": "pairs.jsonl"}, "panel": panel}


@pytest.fixture
def local(annotated: Run, fitted: Path) -> dict[str, Any]:
    return {"name": "local", "kind": "distilled", "model": str(fitted)}


def serve(tmp_path: Path, *annotators: dict[str, Any], n: int = 12) -> Run:
    make_run(tmp_path, rows(n, seed=7), by_refusal, variants=("v1", "v2"))
    return scheduled(tmp_path, panel_of(*annotators), "served")


def calls_of(run: Run) -> list[Call]:
    with open_calls(run.calls) as log:
        return list(log)


def test_it_answers_every_question_of_its_panel_and_the_run_verifies(tmp_path: Path, local: dict[str, Any]) -> None:
    run = serve(tmp_path, local)
    assert len(list(verify(run.path))) >= 5
    calls = calls_of(run)
    assert len(calls) == 24
    assert {(c.kind, c.origin, c.outcome, c.transport, c.cost_usd) for c in calls} == {
        ("distilled", "predicted", "ok", None, None)
    }
    assert {c.served_model for c in calls} == {load_predictor(Path(local["model"])).name}
    by_pair = {c.pair_id: c.raw_text for c in calls}
    assert all(c.raw_text == by_pair[c.pair_id] for c in calls), "the variants are one voice"
    assert len(set(by_pair.values())) > 1


def test_beside_recorded_answers_the_manifest_names_both_kinds(tmp_path: Path, local: dict[str, Any]) -> None:
    run = serve(tmp_path, local, {"name": "a", "kind": "recorded", "model": "m", "calls": "a.jsonl"})
    list(verify(run.path))
    manifest = read_manifest(run.schedule)
    assert manifest is not None
    assert manifest["kinds"] == {"local": "distilled", "a": "recorded"}
    assert {(c.annotator, c.kind) for c in calls_of(run)} >= {("local", "distilled")}


def test_the_audit_counts_it_as_one_voice_and_says_so(tmp_path: Path, local: dict[str, Any], sp2dpo: Sp2dpo) -> None:
    pytest.importorskip("krippendorff")
    run = serve(tmp_path, local, {"name": "a", "kind": "recorded", "model": "m", "calls": "a.jsonl"})
    shown = sp2dpo("audit", "agreement", run.path)
    assert "one voice under all prompts, so counted once: local (distilled)" in shown.out
    assert "prompts of a " in shown.out
    assert "prompts of local" not in shown.out
    assert "local: v1, v2" not in shown.out
    told = json.loads(sp2dpo("audit", "agreement", run.path, "--json").out)
    assert (told["predictors"], told["calls"]["raters"]) == (["local"], 3)
    alone = sp2dpo("audit", "agreement", serve(tmp_path / "alone", local).path)
    assert "nothing to compare" in alone.out


def test_a_second_start_asks_nothing_more(tmp_path: Path, local: dict[str, Any]) -> None:
    run = serve(tmp_path, local)
    account = annotate(run)
    assert (account.predicted, account.missing, len(calls_of(run))) == (0, 0, 24)


def test_the_command_says_what_a_predictor_is_worth_and_which_pairs_it_was_fitted_on(
    annotated: Run, fitted: Path, sp2dpo: Sp2dpo
) -> None:
    folder = annotated.path.parent
    process = folder / "own.yaml"
    process.write_text(yaml.safe_dump(panel_of({"name": "local", "kind": "distilled", "model": str(fitted)})))
    done = sp2dpo("annotate", process, "--run-dir", "own")
    known = load_predictor(fitted).about["fit"]["pairs"]
    assert done.code == 0
    assert "240 predicted" in done.err
    assert f"annotator 'local' is a predictor; it was fitted on {known} of the pairs that it answered now" in done.err
    assert "is better than a constant" in done.err


def test_it_costs_nothing_and_has_nothing_to_check_before_a_run(tmp_path: Path, local: dict[str, Any]) -> None:
    run = serve(tmp_path, local)
    made = estimate(run.process)
    assert (made.calls, made.usd, made.recorded_answers, made.predicted_answers) == (0, 0, 0, 24)
    assert preflight(run.process) == []


def test_the_report_of_such_a_run_can_be_made(tmp_path: Path, local: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    from sp2dpo.report.build import build_report

    run = serve(tmp_path, local)
    page = build_report(run.path).read_text(encoding="utf-8")
    assert "Predicted by a local model, not judged: local." in page


def test_a_changed_predictor_is_another_process_and_changed_weights_are_refused(tmp_path: Path, fitted: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in ("model.json", "model.npz"):
        (copy / file).write_bytes((fitted / file).read_bytes())
    serve(tmp_path, {"name": "local", "kind": "distilled", "model": "copy"})
    about = json.loads((copy / "model.json").read_text())
    (copy / "model.json").write_text(json.dumps(about | {"note": "x"}))
    with pytest.raises(RunDirError, match=r"different: pins\.predictors\.local"):
        open_run(load_process(tmp_path / "served.yaml"), tmp_path / "served")
    weights = bytearray((copy / "model.npz").read_bytes())
    weights[len(weights) // 2] ^= 1
    (copy / "model.npz").write_bytes(weights)
    with pytest.raises(ProcessError, match=r"annotator 'local': .*model\.npz was changed"):
        load_process(tmp_path / "served.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "is missing; a predictor has"),
        ({"format": 2}, "has the format 2"),
        ({"features": {"name": "text-9"}}, "has the features text-9"),
        ({"weights": {}}, "is no file of sp2dpo distill"),
    ],
)
def test_files_that_are_no_predictor_of_this_version_are_refused(
    fitted: Path, tmp_path: Path, change: dict[str, Any] | None, message: str
) -> None:
    if change is not None:
        about = json.loads((fitted / "model.json").read_text())
        (tmp_path / "model.json").write_text(json.dumps(about | change))
        (tmp_path / "model.npz").write_bytes((fitted / "model.npz").read_bytes())
    with pytest.raises(ProcessError, match=message):
        load_predictor(tmp_path)


def test_what_a_predictor_must_have_answered_is_made_again_elsewhere(tmp_path: Path, local: dict[str, Any]) -> None:
    run = serve(tmp_path, local)
    recomputed, pairs = Recomputed(run), {row["pair_id"]: row for row in read_pairs(run.pairs, "").to_pylist()}
    for call in calls_of(run):
        facts = {name: (found, expected) for name, found, expected in recomputed.facts(call, pairs[call.pair_id])}
        assert facts.keys() == {"kind", "origin", "endpoint", "params_sent", "served_model", "raw_text"}
        assert all(found == expected for found, expected in facts.values())
    call = calls_of(run)[0]
    forged = Call(**{**vars(call), "raw_text": judged("Safety", 1.0, 1.0)})
    wrong = [name for name, found, expected in recomputed.facts(forged, pairs[call.pair_id]) if found != expected]
    assert wrong == ["raw_text"]
    other = Call(**{**vars(call), "annotator": "someone else"})
    assert list(recomputed.facts(other, pairs[call.pair_id])) == []


def test_verify_finds_an_answer_that_the_predictor_did_not_give_and_a_predictor_that_was_changed(
    tmp_path: Path, local: dict[str, Any]
) -> None:
    run = serve(tmp_path, local)
    lines = list(verify(run.path))
    assert not [line for line in lines if line.startswith("uncovered")]
    about = run.path / "predictors/local/model.json"
    about.write_bytes(about.read_bytes().replace(b"1", b"2", 1))
    with pytest.raises(Sp2dpoError, match=r"model\.json is not the file that λ pins"):
        list(verify(run.path))
    about.write_bytes(about.read_bytes().replace(b"2", b"1", 1))
    text = judged("Safety", 1.0, 1.0)
    forge_call(
        run.path,
        f"UPDATE calls SET raw_text = '{text}', category = 'Safety', magnitude = 1.0, confidence = 1.0 WHERE id = 1",
    )
    cover_up(run.path)
    with pytest.raises(Unfinished, match=r"calls\.sqlite, row 1 .*raw_text is"):
        list(verify(run.path))


def test_its_question_is_the_pair_and_the_predictor(tmp_path: Path, local: dict[str, Any], annotated: Run) -> None:
    calls = calls_of(serve(tmp_path / "one", local))
    assert len({c.request_hash for c in calls}) == len({c.pair_id for c in calls}) == 12
    distill_run(annotated, tmp_path / "other", seed=1)
    others = calls_of(serve(tmp_path / "two", local | {"model": str(tmp_path / "other")}))
    assert not {c.request_hash for c in others} & {c.request_hash for c in calls}


# What is refused


def test_a_predictor_is_not_fitted_to_predictions_not_even_to_recorded_ones(
    tmp_path: Path, local: dict[str, Any]
) -> None:
    run = serve(tmp_path, local, n=LEAST_PAIRS)
    with pytest.raises(RunDirError, match="is not fitted to predictions"):
        distill_run(run, tmp_path / "second")
    copied = panel_of({"name": "local", "kind": "recorded", "model": local["model"], "calls": "served/calls.sqlite"})
    again = scheduled(tmp_path, copied, "copied")
    assert again.schedule.is_file()
    with pytest.raises(RunDirError, match="is not fitted to predictions"):
        distill_run(again, tmp_path / "second")


def test_too_few_pairs_or_openings_are_refused(tmp_path: Path) -> None:
    few = made_run(tmp_path / "few", LEAST_PAIRS - 1)
    with pytest.raises(InputError, match=f"a predictor needs {LEAST_PAIRS}"):
        distill_run(few, tmp_path / "predictor")
    same = [{**row, "prompt": [{"role": "user", "content": "the same"}]} for row in rows(LEAST_PAIRS)]
    with pytest.raises(InputError, match="too few different messages"):
        distill_run(make_run(tmp_path / "same", same, by_refusal), tmp_path / "predictor")


def test_a_folder_with_something_else_in_it_is_not_written_to(annotated: Run, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunDirError, match="holds something else"):
        distill_run(annotated, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("key", ["base_url", "calls"])
def test_a_distilled_annotator_takes_neither_an_address_nor_answers(
    tmp_path: Path, local: dict[str, Any], key: str
) -> None:
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(panel_of(local | {key: "http://127.0.0.1:1/v1"})))
    with pytest.raises(ProcessError, match=f"kind distilled, which takes no '{key}'"):
        load_process(tmp_path / "p.yaml")


def test_a_predictor_that_is_not_there_is_named_with_the_command_that_makes_one(tmp_path: Path) -> None:
    make_run(tmp_path, rows(2))
    local = {"name": "local", "kind": "distilled", "model": "nowhere"}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(panel_of(local)))
    with pytest.raises(
        ProcessError, match=r"annotator 'local': .*nowhere/model\.json is missing; .* made by: sp2dpo distill"
    ):
        load_process(tmp_path / "p.yaml")


# The command


def test_the_command_prints_tables_and_says_what_it_is_worth(annotated: Run, sp2dpo: Sp2dpo) -> None:
    done = sp2dpo("distill", annotated.path, "-o", "predictor")
    assert done.code == 0
    assert "is better than a constant" in done.err
    assert "mean absolute error" in done.out
    assert "right no more often" not in done.err
    assert "\n\n\n" not in "\n".join(line.strip() for line in done.out.splitlines())
    assert "Safety" in done.out
    assert Path("predictor/model.json").is_file()


def test_categories_that_are_no_better_than_always_the_same_one_are_called_so(sp2dpo: Sp2dpo, tmp_path: Path) -> None:
    def of_any_category(n: int, annotator: str, variant: str) -> str:
        category = "Safety" if random.Random(f"{n}").random() < 0.6 else "Style"
        return judged(category, 0.9 if n % 3 == 0 else 0.2, 0.9)

    run = made_run(tmp_path / "run", 120, of_any_category)
    done = sp2dpo("distill", run.path, "-o", "predictor")
    facts = json.loads(Path("predictor/model.json").read_text())["held_out"]["category"]
    assert facts["accuracy"] < facts["most_frequent_accuracy"]
    assert "right no more often than always saying Safety" in done.err


def test_help_tells_the_command_in_one_whole_line(sp2dpo: Sp2dpo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    [told] = [line for line in sp2dpo("--help").out.splitlines() if line.split()[:1] == ["distill"]]
    assert told.endswith("answers.")


def test_with_json_it_prints_what_model_json_says(annotated: Run, sp2dpo: Sp2dpo) -> None:
    done = sp2dpo("distill", annotated.path, "--output", "predictor", "--features", "text", "--seed", "3", "--json")
    said = json.loads(done.out)
    about = json.loads(Path("predictor/model.json").read_text())
    assert about["fit"]["seed"] == 3
    assert said == {"predictor": "predictor", "sha256": load_predictor(Path("predictor")).sha256, **about}


@pytest.mark.parametrize("options", [("--features", "embeddings"), ("--embedder", "x")])
def test_embeddings_and_their_encoder_go_together(annotated: Run, sp2dpo: Sp2dpo, options: tuple[str, ...]) -> None:
    done = sp2dpo("distill", annotated.path, "-o", "predictor", *options)
    assert done.code == 2
    assert "go together" in done.err


def test_without_its_extra_the_command_says_what_to_install(
    annotated: Run, sp2dpo: Sp2dpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sp2dpo.distill.make", None)
    done = sp2dpo("distill", annotated.path, "-o", "predictor")
    assert done.code == 2
    assert "sp2dpo[report]" in done.err


# Embeddings


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random encoder of 24 numbers that knows the words of the pairs."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", *WORDS, *REFUSES.rstrip(".").split(), "."])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer.save_pretrained(folder)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def test_a_predictor_on_embeddings_finds_the_gap_and_serves(
    annotated: Run, encoder: Path, tmp_path: Path, sp2dpo: Sp2dpo
) -> None:
    done = sp2dpo("distill", annotated.path, "-o", tmp_path / "p", "--features", "embeddings", "--embedder", encoder)
    assert done.code == 0, done.err
    predictor = load_predictor(tmp_path / "p")
    assert predictor.about["features"]["name"] == "embeddings-1"
    assert predictor.about["held_out"]["gap"]["better"]
    run = serve(tmp_path / "served", {"name": "local", "kind": "distilled", "model": str(tmp_path / "p")})
    list(verify(run.path))
    pairs = {row["pair_id"]: row for row in read_pairs(run.pairs, "").to_pylist()}
    call = calls_of(run)[0]
    names = [name for name, _, _ in Recomputed(run).facts(call, pairs[call.pair_id])]
    assert "raw_text" not in names, "the last digits of embeddings differ between machines"


def test_an_embedding_does_not_depend_on_what_else_is_in_the_batch(encoder: Path) -> None:
    from sp2dpo.predictor.embed import embedded_features, embedder_of, pin_embedder

    embedder = embedder_of(pin_embedder(str(encoder), encoder), encoder)
    texts = [texts_of(row) for row in rows(40)]
    together = embedded_features(embedder, texts).dense
    alone = np.concatenate([embedded_features(embedder, [one]).dense for one in texts[:5]])
    assert together[:5] == pytest.approx(alone, abs=1e-5)
    assert together.shape == (40, 7 * 24 + DENSE)


def test_a_changed_encoder_is_refused(annotated: Run, encoder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "encoder"
    copy.mkdir()
    for file in encoder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    predictor = distill_run(annotated, tmp_path / "p", embedder=str(copy))
    assert len(predictor.answers([pair(1)])) == 1
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    with pytest.raises(ProcessError, match="was changed"):
        load_predictor(tmp_path / "p").answers([pair(1)])


def test_an_encoder_of_the_hub_is_pinned_by_its_revision(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from sp2dpo.predictor.embed import pin_embedder

    assert pin_embedder("org/name@abc123", tmp_path) == {"id": "org/name", "revision": "abc123"}
    with pytest.raises(ProcessError, match="neither a folder nor ID@REVISION"):
        pin_embedder("org/name", tmp_path)


def test_without_the_extra_of_embeddings_it_says_what_to_install(
    annotated: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sp2dpo.predictor.embed", None)
    with pytest.raises(MissingExtra, match=r"sp2dpo\[embeddings\]"):
        distill_run(annotated, tmp_path / "p", embedder="org/name@abc")
