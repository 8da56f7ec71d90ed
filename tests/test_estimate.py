"""The estimate: prompts as they will be sent, tokens as they are counted where they are, and what a pilot saw."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

import local_server as server
from conftest import GOOD, NewRun, Sp2dpo, completion, rows, teacher, write_process
from fault_server import fault_server
from sp2dpo.annotate.estimate import (
    CHARACTERS_PER_TOKEN,
    ESTIMATE,
    OUTPUT_TOKENS,
    AnnotatorCost,
    Estimate,
    estimate,
)
from sp2dpo.annotate.run import annotate
from sp2dpo.calls import open_calls
from sp2dpo.pairs import read_pairs
from sp2dpo.process import load_process
from sp2dpo.prompts import render
from sp2dpo.runs import Run
from teacher_server import Answer, Asked, Handler, teacher_server

PRICE = {"input": 2.0, "output": 8.0, "as_of": "2026-01-01"}
MIXED = [{"prompt": f"{n} " * (1 + n * 7 % 40), "chosen": "a" * n, "rejected": "½ 中" * n} for n in range(1, 31)]
"""Pairs of many lengths."""


def prompts(run: Run, variant: str) -> list[str]:
    """The text of each question as it is asked."""
    pairs = read_pairs(run.pairs, "").to_pylist()
    asked = (render(run.process.pack, variant, pair["prompt"], pair["chosen"], pair["rejected"]) for pair in pairs)
    return ["".join(message["content"] for message in messages) for messages in asked]


def only(made: Estimate) -> AnnotatorCost:
    (part,) = made.annotators
    return part


# A guess ------------------------------------------------------------------------------------------------------------


def test_without_any_count_tokens_are_guessed_from_the_prompts_as_they_are_sent(new_run: NewRun) -> None:
    one, two = teacher("one", price=PRICE), teacher("two", price=PRICE | {"output": 0.0})
    run = new_run(pairs=MIXED, panel={"variants": ["v1", "v3"], "annotators": [one, two]})
    made = estimate(run.process)
    characters = sum(len(text) for variant in ("v1", "v3") for text in prompts(run, variant))
    tokens = characters / CHARACTERS_PER_TOKEN
    assert (made.pairs, made.calls, made.recorded_answers) == (30, 120, 0)
    assert made.input_tokens == pytest.approx(2 * tokens, abs=1)
    assert made.output_tokens == 120 * OUTPUT_TOKENS
    assert [part.usd for part in made.annotators] == [
        pytest.approx((tokens * 2 + 60 * OUTPUT_TOKENS * 8) / 1e6),
        pytest.approx(tokens * 2 / 1e6),
    ]
    assert made.usd == pytest.approx(sum(part.usd or 0 for part in made.annotators))
    assert {(part.counted_by, part.hidden_tokens, part.pilot_calls) for part in made.annotators} == {("guess", None, 0)}
    assert "tokens guessed" in made.annotators[0].basis
    assert "price of 2026-01-01" in made.annotators[0].basis


def test_a_run_directory_without_answers_changes_nothing(new_run: NewRun) -> None:
    run = new_run(pairs=MIXED)
    there, not_yet = (estimate(run.process, run_dir=folder) for folder in (run.path, None))
    assert there.annotators == not_yet.annotators


def test_a_limit_takes_the_first_pairs(new_run: NewRun) -> None:
    run = new_run(pairs=MIXED)
    made = estimate(run.process, limit=7)
    assert (made.pairs, made.calls) == (7, 7)
    assert made.input_tokens == pytest.approx(
        sum(len(text) for text in prompts(run, "v1")[:7]) / CHARACTERS_PER_TOKEN, abs=1
    )


def test_a_batch_costs_less_where_the_provider_has_batches_and_the_same_elsewhere(new_run: NewRun) -> None:
    batched = teacher("one", model="gpt-4o-mini", provider="openai", price=PRICE)
    run = new_run(panel={"annotators": [batched, teacher("two", price=PRICE)]})
    made = estimate(run.process)
    one, two = made.annotators
    assert one.usd is not None
    assert one.usd_batch == pytest.approx(one.usd / 2)
    assert two.usd_batch is None
    assert made.usd_batch == pytest.approx(one.usd / 2 + (two.usd or 0))


def test_without_a_price_the_cost_is_unknown_and_so_is_the_sum(new_run: NewRun) -> None:
    run = new_run(panel={"annotators": [teacher("one", price=PRICE), teacher("two")]})
    made = estimate(run.process)
    one, two = made.annotators
    assert one.usd is not None
    assert (two.usd, two.usd_batch, two.price_as_of) == (None, None, None)
    assert (made.usd, made.usd_batch, made.oldest_price) == (None, None, "2026-01-01")
    assert "no price" in two.basis


def test_the_oldest_price_is_named(new_run: NewRun) -> None:
    old = PRICE | {"as_of": "2025-03-04"}
    run = new_run(panel={"annotators": [teacher("one", price=PRICE), teacher("two", price=old)]})
    assert estimate(run.process).oldest_price == "2025-03-04"


def test_recorded_answers_cost_nothing(new_run: NewRun, tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text('{"pair_id": "x", "variant": "v1", "raw_text": ""}\n')
    old = {"name": "old", "kind": "recorded", "model": "m", "calls": "answers.jsonl"}
    run = new_run(pairs=rows(5), panel={"variants": ["v1", "v2"], "annotators": [old]})
    made = estimate(run.process)
    assert (made.calls, made.recorded_answers, made.usd, made.annotators) == (0, 10, 0, ())


def test_typed_decisions_are_one_call_for_each_pair_and_write_nothing(new_run: NewRun) -> None:
    one = teacher(kind="decisions", api="decisions", price=PRICE)
    run = new_run(pairs=rows(5), panel={"variants": ["v1", "v2", "v3"], "annotators": [one]})
    part = only(estimate(run.process))
    assert (part.calls, part.output_tokens) == (5, 0)
    assert part.usd == pytest.approx(5 * part.input_tokens * 2 / 1e6)


# Counted by the endpoint --------------------------------------------------------------------------------------------


def tokens_of(base_url: str, text: str) -> int:
    request = urllib.request.Request(
        base_url.removesuffix("/v1") + "/tokenize",
        json.dumps({"content": text}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return len(json.loads(response.read())["tokens"])


def test_a_server_that_counts_for_nothing_is_asked(new_run: NewRun, server_url: str) -> None:
    local = teacher(model=server.MODEL, base_url=server_url, provider="llama_cpp", price=PRICE)
    run = new_run(pairs=MIXED[:9], panel={"annotators": [local]})
    part = only(estimate(run.process))
    counted = [tokens_of(server_url, text) for text in prompts(run, "v1")]
    assert part.counted_by == "endpoint"
    assert part.input_tokens == pytest.approx(sum(counted) / 9, rel=0.01)
    assert part.output_tokens == OUTPUT_TOKENS
    assert "counted by the endpoint's tokenizer" in part.basis
    assert not run.calls.exists()


COUNTS: dict[str, Any] = {
    "tokens": {"tokens": [1] * 100},
    "tokens with their text": {"tokens": [{"id": 1, "piece": "a"}] * 100},
    "vLLM": {"count": 100, "max_model_len": 4096, "tokens": [1] * 100},
    "count": {"count": 100},
}


def tokenizing(new_run: NewRun, answer: Handler) -> AnnotatorCost:
    """Counted by a server that answers the question for tokens so."""

    def handle(asked: Asked) -> Answer:
        assert (asked.method, asked.path) == ("POST", "/tokenize")
        assert asked.json["content"] == asked.json["prompt"]
        return answer(asked)

    with teacher_server(handle) as there:
        run = new_run(panel={"annotators": [teacher(base_url=there.base_url, provider="vllm")]})
        return only(estimate(run.process))


@pytest.mark.parametrize("name", COUNTS)
def test_tokens_are_counted_in_all_forms_of_an_answer(new_run: NewRun, name: str) -> None:
    part = tokenizing(new_run, lambda asked: Answer(COUNTS[name]))
    assert part.counted_by == "endpoint"
    assert part.input_tokens == pytest.approx(100, rel=0.01)


@pytest.mark.parametrize(
    "answer",
    [
        Answer(status=404),
        Answer({"tokens": []}),
        Answer({"count": -1}),
        Answer({"count": "7"}),
        Answer([1]),
        Answer("[" * 100_000),
        Answer("<html>"),
        Answer(how="closed"),
    ],
)
def test_a_count_that_is_none_is_a_guess(new_run: NewRun, answer: Answer) -> None:
    assert tokenizing(new_run, lambda asked: answer).counted_by == "guess"


def test_a_server_that_is_down_is_a_guess(new_run: NewRun) -> None:
    down = teacher(base_url="http://127.0.0.1:1/v1", provider="llama_cpp")
    assert only(estimate(new_run(panel={"annotators": [down]}).process)).counted_by == "guess"


def test_a_key_that_is_not_set_is_a_guess(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    locked = teacher(base_url="http://127.0.0.1:1/v1", provider="vllm", api_key_env="TEACHER_KEY")
    assert only(estimate(new_run(panel={"annotators": [locked]}).process)).counted_by == "guess"


# A pilot ------------------------------------------------------------------------------------------------------------


def billed(run: Run) -> float:
    """USD that the log says was spent."""
    with open_calls(run.calls) as log:
        return sum(call.cost_usd or 0.0 for call in log)


def answering(usage: Mapping[str, Any], every: int = 1, spoilt: str = "no") -> Callable[[Asked], Answer]:
    """Each `every`-th answer is good; the others are spoilt, and billed all the same."""
    count = 0

    def handle(asked: Asked) -> Answer:
        nonlocal count
        count += 1
        return completion(GOOD if count % every == 0 else spoilt, usage=usage)

    return handle


USAGE = {"prompt_tokens": 900, "completion_tokens": 340, "completion_tokens_details": {"reasoning_tokens": 300}}


def test_a_pilot_about_every_pair_gives_what_was_billed(new_run: NewRun) -> None:
    """Hidden tokens and answers in vain included."""
    run = new_run(pairs=rows(8), panel={"annotators": [teacher(price=PRICE)]})
    with teacher_server(answering(USAGE, every=2)) as there:
        assert annotate(run, connector=there.connector, concurrency=1).valid == 8
    made = estimate(run.process, run_dir=run.path)
    part = only(made)
    assert (part.counted_by, part.pilot_calls, part.answered, part.billed_per_answer) == ("pilot", 16, 8, 2.0)
    assert (part.output_tokens, part.hidden_tokens) == (340, 300)
    assert part.input_tokens == pytest.approx(900)
    assert made.usd == pytest.approx(billed(run)) == pytest.approx(16 * (900 * 2 + 340 * 8) / 1e6)
    assert (made.input_tokens, made.output_tokens) == (16 * 900, 16 * 340)
    assert "as billed in 16 calls, 2.00 for each answer" in part.basis


def test_a_pilot_of_some_pairs_foretells_the_bill_of_all(new_run: NewRun) -> None:
    """The server bills 300 hidden tokens a call, and about a third of its answers are worthless."""
    with fault_server(fault_rate=0.35, faults=("truncated", "empty"), reasoning_tokens=300) as there:
        decoding = {"retry_attempts": 10, "retry_delay_base": 0}
        one = teacher(base_url=there.base_url, price=PRICE)
        run = new_run(pairs=rows(160), panel={"annotators": [one], "decoding": decoding})
        before = estimate(run.process, run_dir=run.path).usd
        assert annotate(run, sample=60).valid == 60
        foretold = estimate(run.process, run_dir=run.path)
        assert annotate(run).valid == 160
    assert only(foretold).pilot_calls > 60
    assert only(foretold).hidden_tokens == pytest.approx(300)
    assert foretold.usd == pytest.approx(billed(run), rel=0.1)
    assert before is not None
    assert before < billed(run) / 2


def test_prompts_that_are_longer_than_those_of_the_pilot_cost_more(new_run: NewRun) -> None:
    pairs = [{"prompt": "x" * n, "chosen": "a", "rejected": "b"} for n in (4, 40_000)]
    run = new_run(pairs=pairs, panel={"annotators": [teacher(price=PRICE)]})
    short, long = prompts(run, "v1")
    with teacher_server(lambda asked: completion()) as there:
        annotate(run, connector=there.connector, limit=1)
    part = only(estimate(run.process, run_dir=run.path))
    assert part.input_tokens == pytest.approx(1000 * (len(short) + len(long)) / len(short) / 2)


def test_a_pilot_without_a_valid_answer_tells_what_a_call_costs_and_guesses_its_prompts(new_run: NewRun) -> None:
    run = new_run(pairs=rows(4), panel={"annotators": [teacher(price=PRICE)]})
    with teacher_server(lambda asked: completion("no", usage=USAGE)) as there:
        assert annotate(run, connector=there.connector).valid == 0
    part = only(estimate(run.process, run_dir=run.path))
    assert (part.answered, part.pilot_calls, part.output_tokens) == (0, 12, 340)
    assert part.billed_per_answer == 12


@pytest.mark.parametrize("answer", [completion(usage=None), Answer(status=500)])
def test_a_pilot_without_counts_leaves_the_guess(new_run: NewRun, answer: Answer) -> None:
    run = new_run(pairs=rows(4), panel={"annotators": [teacher(price=PRICE)]})
    guessed = only(estimate(run.process))
    with teacher_server(lambda asked: answer) as there:
        annotate(run, connector=there.connector)
    part = only(estimate(run.process, run_dir=run.path))
    assert (part.counted_by, part.usd, part.hidden_tokens) == ("guess", guessed.usd, None)


def test_a_pilot_of_one_annotator_says_nothing_of_another(new_run: NewRun) -> None:
    two = teacher("two", base_url="http://127.0.0.1:1/v1", price=PRICE)
    run = new_run(pairs=rows(4), panel={"annotators": [teacher("one", price=PRICE), two]})
    with teacher_server(lambda asked: completion() if "of-one" in asked.text else Answer(status=401)) as there:
        annotate(run, connector=there.connector)
    assert [part.counted_by for part in estimate(run.process, run_dir=run.path).annotators] == ["pilot", "guess"]


def test_answers_that_were_taken_over_are_no_pilot(new_run: NewRun) -> None:
    old, new = new_run("old", pairs=rows(4)), new_run("new", pairs=rows(4))
    with teacher_server(lambda asked: completion()) as there:
        annotate(old, connector=there.connector)
        assert annotate(new, connector=there.connector, reuse=old.path).reused == 4
    assert only(estimate(new.process, run_dir=new.path)).counted_by == "guess"


# The command --------------------------------------------------------------------------------------------------------


def test_a_pilot_asks_about_so_many_pairs_once_and_its_answers_stay(sp2dpo: Sp2dpo, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "small"
    with fault_server(reasoning_tokens=100) as there:
        annotators = [teacher(name, base_url=there.base_url, price=PRICE) for name in ("one", "two")]
        path = write_process(tmp_path / "p", pairs=rows(30), panel={"annotators": annotators})
        first = sp2dpo("cost", path, "--pilot", "5", "--json")
        assert (first.code, there.stats()["requests"]) == (0, 10)
        again = sp2dpo("cost", path, "--pilot", "5", "--json")
        assert (again.code, there.stats()["requests"]) == (0, 10)
        found = json.loads(first.out)
        assert json.loads((run / ESTIMATE).read_text())["usd"] == found["usd"]
        assert sp2dpo("annotate", path).code == 0
        stats = there.stats()
    assert (stats["requests"], stats["asked_again"]) == (60, {"valid": 0, "mend": 0})
    assert (found["pairs"], found["calls"]) == (30, 60)
    assert {part["counted_by"] for part in found["annotators"]} == {"pilot"}
    with open_calls(run / "calls.sqlite") as log:
        assert found["usd"] == pytest.approx(sum(call.cost_usd or 0 for call in log), rel=0.05)
        pilot = {call.pair_id for call in islice(log, 10)}
    order = read_pairs(run / "pairs.parquet", "")["pair_id"].to_pylist()
    assert [n for n, pair in enumerate(order) if pair in pilot] == [0, 6, 12, 18, 24]
    assert "10 calls made" in first.err
    assert json.loads((run / ESTIMATE).read_text())["usd"] == found["usd"]


def test_a_pilot_that_gets_no_answer_says_so_and_the_estimate_is_a_guess(sp2dpo: Sp2dpo, tmp_path: Path) -> None:
    down = teacher(base_url="http://127.0.0.1:1/v1", price=PRICE)
    ran = sp2dpo("cost", write_process(tmp_path / "p", panel={"annotators": [down]}), "--pilot", "5")
    assert "annotator 'teacher' was stopped" in ran.err
    assert "tokens guessed" in ran.out
    assert "only a pilot measures it" in ran.err


def test_the_table_has_a_line_for_each_annotator_and_says_what_it_rests_on(sp2dpo: Sp2dpo, tmp_path: Path) -> None:
    annotators = [teacher("one", price=PRICE), teacher("two")]
    ran = sp2dpo("cost", write_process(tmp_path / "p", pairs=rows(5), panel={"annotators": annotators}))
    assert ran.code == 0
    assert "5 pairs, 10 calls, 0 recorded answers" in ran.out
    assert "one: tokens guessed" in ran.out
    assert "two: tokens guessed, 4 characters to one; output guessed; no price" in ran.out
    assert "sp2dpo cost PROCESS.yaml --pilot 50" in ran.err


def test_an_estimate_does_not_prepare_a_run(sp2dpo: Sp2dpo, tmp_path: Path) -> None:
    path = write_process(tmp_path / "p", pairs=MIXED)
    found = json.loads(sp2dpo("cost", path, "--json").out)
    assert not (tmp_path / "runs").exists()
    assert found["pairs"] == 30
    assert found["calls"] == only(estimate(load_process(path))).calls
