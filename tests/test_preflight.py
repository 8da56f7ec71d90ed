"""Preflight: each thing that would spoil a run is told before the run, with what to do; and a good panel passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest

from conftest import KEY, Sp2dpo, completion, teacher, write_process
from fault_server import fault_server
from sp2dpo.annotate.preflight import OLD_PRICE, SOON, Check, preflight
from sp2dpo.process import Process, load_process
from teacher_server import Answer, Asked, Handler, teacher_server

TODAY = date(2026, 11, 21)
PRICE = {"input": 1.0, "output": 2.0, "as_of": "2026-11-01"}
JSON = {"response_format": "json_object"}


def panel_of(folder: Path, *annotators: dict[str, Any], **keys: Any) -> Process:
    decoding = {"timeout": 5, "retry_attempts": 0} | keys.pop("decoding", {})
    return load_process(write_process(folder, panel={"annotators": list(annotators), "decoding": decoding} | keys))


def about(checks: list[Check], what: str) -> tuple[str, str]:
    """State and words of the one check with that name."""
    (check,) = [check for check in checks if check.what == what]
    return check.state, check.found


def bad(checks: list[Check]) -> dict[str, str]:
    """What is not all right, and how bad."""
    return {check.what: check.state for check in checks if check.state != "ok"}


Checked = Callable[..., list[Check]]


@pytest.fixture
def checked(tmp_path: Path) -> Checked:
    """Checks of a panel of one annotator, whose endpoint answers as a handler says."""

    def check(handler: Handler, decoding: dict[str, Any] | None = None, **annotator: Any) -> list[Check]:
        one = teacher(**({"price": PRICE} | JSON | annotator))
        process = panel_of(tmp_path, one, decoding=decoding or {})
        with teacher_server(handler) as server:
            return preflight(process, today=TODAY, connector=server.connector)

    return check


def endpoint(chat: Answer | None = None, models: Answer | None = None) -> Handler:
    """An endpoint with a chat and a list of models."""
    there = Answer({"data": [{"id": "model-of-teacher"}]})
    whole = completion(model="model-of-teacher")

    def handle(asked: Asked) -> Answer:
        if asked.method == "POST":
            return chat or whole
        return (models or there) if asked.path == "/v1/models" else Answer(status=404)

    return handle


# All is well --------------------------------------------------------------------------------------------------------


def test_a_panel_in_order_passes_with_one_paid_call_for_each_annotator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    with fault_server(
        key=KEY, models=("model-of-a", "model-of-b"), shutdown_date="2028-01-01", json_mode="enforced", rpm=500
    ) as server:
        both = [
            teacher(name, base_url=server.base_url, api_key_env="TEACHER_KEY", price=PRICE, **JSON) for name in "ab"
        ]
        checks = preflight(panel_of(tmp_path, *both), today=TODAY)
        stats = server.stats()
    assert bad(checks) == {}
    assert (stats["requests"], stats["by_kind"]) == (2, {"valid": 2})
    assert {check.annotator for check in checks} == {"a", "b"}
    own = [check for check in checks if check.annotator == "a"]
    assert about(own, "key") == ("ok", "TEACHER_KEY is set")
    assert about(own, "model") == ("ok", "there until 2028-01-01")
    assert about(own, "served model") == ("ok", "model-of-a")
    assert about(own, "JSON mode")[1].startswith("json_object is enforced")
    assert "500 requests" in about(own, "rate limit")[1]
    assert float(about(own, "cost of this call")[1].removeprefix("$")) > 0
    assert KEY not in repr(checks)


def test_what_is_sent_is_what_the_panel_will_send(checked: Checked) -> None:
    bodies: list[dict[str, Any]] = []

    def handle(asked: Asked) -> Answer:
        if asked.method == "POST":
            bodies.append(asked.json)
        return endpoint()(asked)

    checks = checked(handle, decoding={"temperature": 0.3, "max_tokens": 99}, omit=["seed"], extra={"odd": 1})
    (body,) = bodies
    assert (body["model"], body["temperature"], body["max_tokens"], body["odd"]) == ("model-of-teacher", 0.3, 99, 1)
    assert "seed" not in body
    state, found = about(checks, "parameters")
    assert state == "ok"
    assert found.startswith("taken: ")
    assert found.endswith("not sent, because the model refuses them: seed")


def test_recorded_annotators_are_not_checked(tmp_path: Path) -> None:
    tmp_path.joinpath("answers.jsonl").write_text('{"pair_id": "x", "variant": "v1", "raw_text": ""}\n')
    process = panel_of(tmp_path, {"name": "old", "kind": "recorded", "model": "m", "calls": "answers.jsonl"})
    assert preflight(process, today=TODAY) == []


# Key and model ------------------------------------------------------------------------------------------------------


def no_one(asked: Asked) -> Answer:
    raise AssertionError("asked")


def test_a_key_that_is_not_set_is_told_and_nothing_is_asked(checked: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    state, found = about(checked(no_one, api_key_env="TEACHER_KEY"), "key")
    assert state == "fail"
    assert "export TEACHER_KEY=" in found


def test_a_key_that_is_not_taken_is_told_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    with fault_server(key="another") as server:
        one = teacher(base_url=server.base_url, api_key_env="TEACHER_KEY")
        checks = preflight(panel_of(tmp_path, one), today=TODAY)
    state, found = about(checks, "model")
    assert (state, "the key is not taken (HTTP 401)" in found) == ("fail", True)
    assert about(checks, "call")[0] == "fail"
    assert KEY not in repr(checks)


def test_an_endpoint_that_repeats_the_key_does_not_get_it_into_the_checks(
    checked: Checked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    checks = checked(lambda asked: Answer(f"bad {asked.headers['authorization']}", 403), api_key_env="TEACHER_KEY")
    assert about(checks, "model")[0] == about(checks, "call")[0] == "fail"
    assert "Bearer [key]" in about(checks, "call")[1]
    assert KEY not in repr(checks)


def test_a_model_that_is_not_there_is_told_with_those_that_are(tmp_path: Path) -> None:
    with fault_server(models=("one", "two")) as server:
        checks = preflight(panel_of(tmp_path, teacher(base_url=server.base_url)), today=TODAY)
    assert about(checks, "model") == ("warn", "not in the list of models; there are: one, two")
    assert about(checks, "call")[0] == "fail"


def test_a_snapshot_in_the_list_of_models_is_the_model(checked: Checked) -> None:
    models = Answer({"data": [{"id": "other"}, {"id": "model-of-teacher-2026-01-02", "shutdown_date": "2028-01-01"}]})
    assert about(checked(endpoint(models=models)), "model") == ("ok", "there until 2028-01-01")


@pytest.mark.parametrize(
    "body", [{"data": []}, {"data": None}, {"data": [1, "x"]}, [], "<html>", "[" * 100_000, {"object": "list"}]
)
def test_an_endpoint_without_a_list_of_models_is_no_failure(checked: Checked, body: Any) -> None:
    checks = checked(endpoint(models=Answer(body)))
    assert about(checks, "model") == ("warn", "the endpoint has no list of models (HTTP 200)")
    assert "fail" not in bad(checks).values()


@pytest.mark.parametrize("name", [None, 7, ["model-of-teacher"], {}])
def test_a_model_without_a_name_is_not_the_one_asked_for(checked: Checked, name: Any) -> None:
    checks = checked(endpoint(models=Answer({"data": [{"id": name}, {"id": "other"}]})))
    state, found = about(checks, "model")
    assert state == "warn"
    assert "not in the list of models" in found


def seconds(day: date) -> float:
    return datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("ends", "state", "says"),
    [
        ("2026-11-20", "fail", "shut down on 2026-11-20"),
        ("2026-11-21", "fail", "shut down on 2026-11-21"),
        ("2026-11-22", "warn", "there until 2026-11-22"),
        ((TODAY + SOON).isoformat(), "ok", f"there until {TODAY + SOON}"),
        ("2026-12-31T23:59:59Z", "warn", "there until 2026-12-31"),
        (seconds(date(2026, 12, 1)), "warn", "there until 2026-12-01"),
        (seconds(date(2020, 1, 1)), "fail", "shut down on 2020-01-01"),
        (None, "ok", "names no day"),
        ("soon", "ok", "names no day"),
        (1e30, "ok", "names no day"),
        (True, "ok", "names no day"),
        ([], "ok", "names no day"),
    ],
)
def test_the_day_on_which_a_model_ends_is_told(checked: Checked, ends: Any, state: str, says: str) -> None:
    models = Answer({"data": [{"id": "model-of-teacher", "shutdown_date": ends}]})
    found = about(checked(endpoint(models=models)), "model")
    assert (found[0], says in found[1]) == (state, True)


def test_the_day_is_read_where_a_model_is_asked_for_alone(tmp_path: Path) -> None:
    with fault_server(shutdown_date="2026-12-01") as server:
        checks = preflight(panel_of(tmp_path, teacher(base_url=server.base_url)), today=TODAY)
    assert about(checks, "model") == ("warn", "there until 2026-12-01")


@pytest.mark.parametrize("how", ["closed", "never"])
def test_an_endpoint_that_is_down_is_told(checked: Checked, how: Any) -> None:
    checks = checked(lambda asked: Answer(how=how), decoding={"timeout": 0.2})
    state, found = about(checks, "model")
    assert (state, "http://teacher.invalid/v1 does not answer" in found) == ("fail", True)
    assert about(checks, "call")[0] == "fail"


def test_an_address_where_nobody_is_found_is_told(tmp_path: Path) -> None:
    checks = preflight(panel_of(tmp_path, teacher()), today=TODAY)
    assert bad(checks) == {"model": "fail", "call": "fail", "price": "warn"}
    assert "Cannot connect to host" in about(checks, "call")[1]


def test_one_annotator_that_is_down_hides_nothing_of_another(tmp_path: Path) -> None:
    with fault_server() as server:
        process = panel_of(tmp_path, teacher("down"), teacher("up", base_url=server.base_url))
        checks = preflight(process, today=TODAY)
    assert {check.annotator for check in checks if check.state == "fail"} == {"down"}
    assert about([check for check in checks if check.annotator == "up"], "served model")[0] == "ok"


# What is sent -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("refused", "more", "advice"),
    [
        ("seed", {}, "omit: [seed]"),
        ("top_p", {}, "omit: [top_p]"),
        ("response_format", {}, "response_format: none"),
        ("max_completion_tokens", {"provider": "vllm"}, "omit: [max_tokens]"),
        ("chat_template_kwargs", {"extra": {"chat_template_kwargs": {"thinking": False}}}, "extra"),
    ],
)
def test_a_refused_parameter_is_named_with_what_to_do(
    tmp_path: Path, refused: str, more: dict[str, Any], advice: str
) -> None:
    """The advice must be one that the process file takes."""
    with fault_server(refuse=(refused,)) as server:
        one = teacher(base_url=server.base_url, **JSON, **more)
        checks = preflight(panel_of(tmp_path, one), today=TODAY)
    state, found = about(checks, "call")
    assert (state, f"Unsupported parameter: '{refused}'" in found) == ("fail", True)
    assert advice in found.partition("Unsupported parameter")[2]


def test_an_annotator_that_follows_the_advice_passes(tmp_path: Path) -> None:
    with fault_server(refuse=("seed", "top_p"), json_mode="enforced") as server:
        one = teacher(base_url=server.base_url, omit=["seed", "top_p"], price=PRICE, **JSON)
        assert bad(preflight(panel_of(tmp_path, one), today=TODAY)) == {}


def test_a_refusal_that_names_no_parameter_gives_no_advice(checked: Checked) -> None:
    state, found = about(checked(endpoint(Answer("No.", 400))), "call")
    assert (state, found) == ("fail", "bad_request: No.")


def test_a_json_mode_that_is_silently_ignored_is_told(tmp_path: Path) -> None:
    with fault_server(json_mode="ignored") as server:
        checks = preflight(panel_of(tmp_path, teacher(base_url=server.base_url, **JSON)), today=TODAY)
    state, found = about(checks, "JSON mode")
    assert (state, found.startswith("json_object is ignored: asked for a word")) == ("fail", True)
    assert "set response_format: none" in found


def test_a_json_schema_that_is_enforced_is_told(tmp_path: Path) -> None:
    with fault_server(json_mode="enforced") as server:
        one = teacher(base_url=server.base_url, response_format="json_schema")
        checks = preflight(panel_of(tmp_path, one), today=TODAY)
    assert about(checks, "JSON mode") == ("ok", "json_schema is enforced: asked for a word, JSON came")


def test_json_that_is_cut_at_the_cap_is_enforced_all_the_same(checked: Checked) -> None:
    assert about(checked(endpoint(completion('{"semantic', "length"))), "JSON mode")[0] == "ok"
    assert about(checked(endpoint(completion("blue {", "length"))), "JSON mode")[0] == "fail"
    assert about(checked(endpoint(completion("[" * 100_000))), "JSON mode")[0] == "fail"


def test_without_a_json_mode_that_is_told(checked: Checked) -> None:
    assert about(checked(endpoint(completion("blue")), response_format="none"), "JSON mode")[0] == "warn"


def test_hidden_reasoning_is_told_with_its_tokens(tmp_path: Path) -> None:
    with fault_server(reasoning_tokens=300) as server:
        checks = preflight(panel_of(tmp_path, teacher(base_url=server.base_url)), today=TODAY)
    state, found = about(checks, "reasoning")
    assert (state, found.startswith("300 hidden tokens")) == ("warn", True)


@pytest.mark.parametrize("content", [None, "", " \n"])
def test_hidden_reasoning_that_eats_the_cap_is_told_with_what_to_do(checked: Checked, content: str | None) -> None:
    details = {"completion_tokens_details": {"reasoning_tokens": 64}}
    usage = {"prompt_tokens": 30, "completion_tokens": 64} | details
    checks = checked(endpoint(completion(content, "length", usage=usage)))
    state, found = about(checks, "answer")
    assert (state, "finish_reason length" in found, "raise max_tokens" in found) == ("fail", True, True)
    assert about(checks, "reasoning")[1].startswith("64 hidden tokens")


@pytest.mark.parametrize(
    "answer",
    [Answer("<html>Please log in.</html>"), Answer({"error": {"message": "quota"}}), completion(choices=[])],
    ids=["html", "error", "no choices"],
)
def test_a_response_of_no_chat_is_told_as_that(checked: Checked, answer: Answer) -> None:
    checks = checked(endpoint(answer))
    assert "fail" in bad(checks).values()
    failed = " ".join(check.found for check in checks if check.state == "fail")
    assert "bad_response" in failed
    assert "raise max_tokens" not in failed


# Typed decisions ----------------------------------------------------------------------------------------------------


def decided(asked: Asked, questions: int | None = None) -> Answer:
    """The first so many answers to the questions of a call, each with the same share for every choice."""
    answers: list[dict[str, Any]] = []
    for question in asked.json["questions"][:questions]:
        one = {"name": question["name"], "type": question["type"], "probability": 0.5, "score": 1.0, "confidence": 0.5}
        values = [choice["value"] for choice in question.get("choices", ())]
        labels = [level["label"] for level in question.get("levels", ())]
        shares = [{"value": value, "probability": 1 / len(values)} for value in values]
        shares += [{"value": n, "label": label, "probability": 1 / len(labels)} for n, label in enumerate(labels)]
        answers.append(one | {"choice": next(iter(values), None), "probabilities": shares})
    return Answer({"model": "model-of-teacher", "answers": answers, "usage": {"input_tokens": 700, "output_tokens": 0}})


def test_typed_decisions_are_tried_with_one_call_for_all_variants(tmp_path: Path) -> None:
    one = teacher(kind="decisions", api="decisions", price=PRICE)
    process = panel_of(tmp_path, one, variants=["v1", "v2"])

    def whole(asked: Asked) -> Answer:
        return decided(asked) if asked.method == "POST" else Answer({"data": [{"id": "model-of-teacher"}]})

    with teacher_server(whole) as server:
        checks = preflight(process, today=TODAY, connector=server.connector)
        assert [asked.path for asked in server.asked if asked.method == "POST"] == ["/v1/decisions"]
    assert bad(checks) == {}
    assert about(checks, "decisions") == ("ok", "2 variants in one call")
    assert about(checks, "cost of this call") == ("ok", "$0.000700")


def test_a_decision_that_is_missing_is_told_for_its_variant(tmp_path: Path) -> None:
    process = panel_of(tmp_path, teacher(kind="decisions", api="decisions"), variants=["v1", "v2"])

    def half(asked: Asked) -> Answer:
        return decided(asked, 4) if asked.method == "POST" else Answer(status=404)

    with teacher_server(half) as server:
        checks = preflight(process, today=TODAY, connector=server.connector)
    assert {what: state for what, state in bad(checks).items() if state == "fail"} == {"decision v2": "fail"}
    assert "decisions" not in {check.what for check in checks}


# Who answers, and for how much --------------------------------------------------------------------------------------


def test_another_model_is_told_with_what_to_do(tmp_path: Path) -> None:
    with fault_server() as server:
        server.script("", "other_model")
        checks = preflight(panel_of(tmp_path, teacher(base_url=server.base_url)), today=TODAY)
        state, found = about(checks, "served model")
        assert (state, "served_as: model-of-teacher-of-another-day" in found) == ("fail", True)


def test_a_model_that_is_expected_under_another_name_passes(checked: Checked) -> None:
    checks = checked(endpoint(completion(model="other")), served_as="other")
    assert about(checks, "served model") == ("ok", "other")


@pytest.mark.parametrize("model", [None, 7, ["m"]])
def test_an_endpoint_that_does_not_say_who_answered_is_told(checked: Checked, model: Any) -> None:
    assert about(checked(endpoint(completion(model=model))), "served model")[0] == "warn"


def test_a_price_that_is_missing_or_old_is_told(checked: Checked) -> None:
    state, found = about(checked(endpoint(), price=None), "price")
    assert (state, "--budget-usd" in found) == ("warn", True)
    day = TODAY - OLD_PRICE
    assert "price" not in bad(checked(endpoint(), price=PRICE | {"as_of": day.isoformat()}))
    older = (day.replace(day=day.day - 1)).isoformat()
    assert about(checked(endpoint(), price=PRICE | {"as_of": older}), "price") == (
        "warn",
        f"as of {older}: look it up again",
    )


def test_the_cost_of_the_call_is_told(checked: Checked) -> None:
    assert about(checked(endpoint()), "cost of this call") == ("ok", "$0.001100")


def test_an_endpoint_that_counts_no_tokens_is_told(checked: Checked) -> None:
    assert about(checked(endpoint(completion(model="model-of-teacher", usage=None))), "tokens")[0] == "warn"


# The command --------------------------------------------------------------------------------------------------------


def test_the_command_ends_with_0_or_with_1_and_what_failed(tmp_path: Path, sp2dpo: Sp2dpo) -> None:
    with fault_server(json_mode="enforced") as server:
        path = write_process(tmp_path, panel={"annotators": [teacher(base_url=server.base_url, **JSON)]})
        code, out, _ = sp2dpo("preflight", path)
        assert code == 0
        assert "enforced" in out
        server.script("", "quota", "quota")
        code, out, err = sp2dpo("preflight", path, "--json")
    assert code == 1
    assert {"annotator", "what", "state", "found"} == {*json.loads(out)[0]}
    assert [check["what"] for check in json.loads(out) if check["state"] == "fail"] == ["call"]
    assert err.startswith("sp2dpo: 1 check failed")
    assert not [*tmp_path.glob("**/calls.sqlite")]
