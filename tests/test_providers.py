"""What is sent to whom: the exact bodies, and the profiles against what vendors' own packages and real servers say."""

from __future__ import annotations

import datetime
import inspect
import json
import re
import urllib.request
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sp2dpo.errors import ProcessError
from sp2dpo.llm.chat import GAP_SCHEMA
from sp2dpo.providers import (
    PRESETS,
    Profile,
    Sent,
    catalogue,
    params_requested,
    params_sent,
    preset_annotators,
    profile_of,
    refuse_ended,
)
from sp2dpo.reply import parse_reply
from sp2dpo.settings import Annotator, Decoding

TODAY = datetime.date(2026, 11, 21)
URLS = {
    "openai": "https://api.openai.com/v1",
    "gemini": "https://generativelanguage.googleapis.com/v1beta/openai",
    "dashscope": "https://dashscope-intl.aliyuncs.com/compatible-mode/v1",
}
SCHEMA = {
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "semantic_gap", "strict": True, "schema": GAP_SCHEMA},
    }
}
OBJECT = {"response_format": {"type": "json_object"}}
SAMPLING = {"temperature": 0.1, "top_p": 0.8}
OFF = {"frequency_penalty": 0.0, "presence_penalty": 0.0}
QWEN_OFF = {"chat_template_kwargs": {"enable_thinking": False}}


def annotator(at: str, model: str, **more: Any) -> Annotator:
    """An annotator at a provider's own host, or, for servers of one's own, at one that names the provider."""
    where = {"base_url": URLS[at]} if at in URLS else {"base_url": "http://h/v1", "provider": at}
    return Annotator.model_validate({"name": "a", "model": model} | where | more)


def sent(one: Annotator, **decoding: Any) -> Sent:
    return params_sent(one, Decoding(**decoding), profile_of(one))


# What is sent with the settings of Table 6 ----------------------------------------------------------------------------

WIRE: list[tuple[str, str, dict[str, Any], tuple[str, ...], tuple[str, ...]]] = [
    (
        "openai",
        "gpt-4.1-mini",
        {**SAMPLING, "max_completion_tokens": 64, "seed": 42, **OFF, "n": 1, **SCHEMA},
        (),
        (),
    ),
    (
        "openai",
        "gpt-5-mini-2025-08-07",
        {"max_completion_tokens": 64, "seed": 42, "n": 1, "reasoning_effort": "minimal", **SCHEMA},
        ("temperature", "top_p"),
        (),
    ),
    (
        "openai",
        "gpt-5.1-2025-11-13",
        {**SAMPLING, "max_completion_tokens": 64, "seed": 42, "n": 1, "reasoning_effort": "none", **SCHEMA},
        (),
        (),
    ),
    (
        "openai",
        "gpt-5.6-luna",
        {**SAMPLING, "max_completion_tokens": 64, "seed": 42, "n": 1, "reasoning_effort": "none", **SCHEMA},
        (),
        (),
    ),
    (
        "openai",
        "gpt-6-luna",
        {"max_completion_tokens": 64, "seed": 42, "n": 1, "reasoning_effort": "none", **SCHEMA},
        ("temperature", "top_p"),
        (),
    ),
    (
        "openai",
        "gpt-6-astra",
        {"max_completion_tokens": 64, "seed": 42, "n": 1, "reasoning_effort": "none", **SCHEMA},
        ("temperature", "top_p"),
        (),
    ),
    (
        "openai",
        "gpt-6.1-terra",
        {"max_completion_tokens": 64, "seed": 42, "n": 1, "reasoning_effort": "none", **SCHEMA},
        ("temperature", "top_p"),
        (),
    ),
    ("openai", "gpt-9", {**SAMPLING, "max_completion_tokens": 64, "seed": 42, "n": 1, **SCHEMA}, (), ()),
    ("gemini", "gemini-2.0-flash", {**SAMPLING, "max_tokens": 64, "n": 1, **SCHEMA}, ("seed",), ()),
    (
        "gemini",
        "models/gemini-2.5-flash",
        {**SAMPLING, "max_tokens": 64, "reasoning_effort": "none", **SCHEMA},
        ("seed",),
        (),
    ),
    (
        "gemini",
        "gemini-2.5-pro",
        {**SAMPLING, "max_tokens": 64, "reasoning_effort": "low", **SCHEMA},
        ("seed",),
        (),
    ),
    (
        "gemini",
        "gemini-3.1-flash-lite",
        {**SAMPLING, "max_tokens": 64, "reasoning_effort": "minimal", **SCHEMA},
        ("seed",),
        (),
    ),
    (
        "gemini",
        "gemini-3.5-flash-lite",
        {"max_tokens": 64, "reasoning_effort": "minimal", **SCHEMA},
        ("seed",),
        ("temperature", "top_p"),
    ),
    (
        "gemini",
        "gemini-3.8-flash",
        {"max_tokens": 64, "reasoning_effort": "minimal", **SCHEMA},
        ("seed",),
        ("temperature", "top_p"),
    ),
    ("gemini", "gemma-3-27b", {**SAMPLING, "max_tokens": 64}, ("seed",), ()),
    *(
        (
            "dashscope",
            model,
            {
                **SAMPLING,
                "max_completion_tokens": 64,
                "seed": 42,
                "presence_penalty": 0.0,
                "repetition_penalty": 1.0,
                "n": 1,
                **more,
            },
            (),
            (),
        )
        for model, more in {
            "qwen-max-2025-01-25": OBJECT,
            "qwen3-max": {"enable_thinking": False, **OBJECT},
            "qwen-flash": {"enable_thinking": False, **OBJECT},
            "qwen3.7-plus": {"enable_thinking": False, **OBJECT},
            "qwen3.8-flash": {"enable_thinking": False, **OBJECT},
            "qwen3.8-max-0902": {},
            "qwen4-max-preview": {"enable_thinking": False},
            "deepseek-v4-flash": {},
        }.items()
    ),
    *(
        (
            provider,
            model,
            {
                **SAMPLING,
                "max_completion_tokens": 64,
                "seed": 42,
                **OFF,
                "repetition_penalty": 1.0,
                "n": 1,
                **more,
                **SCHEMA,
            },
            (),
            (),
        )
        for provider in ("vllm", "sglang")
        for model, more in {"meta-llama/Llama-3.1-8B-Instruct": {}, "Qwen/Qwen3.5-27B": QWEN_OFF}.items()
    ),
    ("llama_cpp", "tiny", {**SAMPLING, "max_tokens": 64, "seed": 42, **OFF, "n": 1, **SCHEMA}, (), ()),
    (
        "llama_cpp",
        "Qwen3-8B-Q4",
        {**SAMPLING, "max_tokens": 64, "seed": 42, **OFF, "n": 1, **QWEN_OFF, **SCHEMA},
        (),
        (),
    ),
    ("ollama", "llama3.1:8b", {**SAMPLING, "max_tokens": 64, "seed": 42, **OFF, **SCHEMA}, (), ()),
    (
        "ollama",
        "qwen3:8b",
        {**SAMPLING, "max_tokens": 64, "seed": 42, **OFF, "reasoning_effort": "none", **SCHEMA},
        (),
        (),
    ),
    ("transformers_serve", "tiny", {**SAMPLING, "max_tokens": 64, "seed": 42, "frequency_penalty": 0.0}, (), ()),
    (
        "transformers_serve",
        "Qwen/Qwen3-8B",
        {**SAMPLING, "max_tokens": 64, "seed": 42, "frequency_penalty": 0.0, **QWEN_OFF},
        (),
        (),
    ),
    ("generic", "anything", {**SAMPLING, "max_tokens": 64, "seed": 42, **OFF, "n": 1}, (), ()),
]


@pytest.mark.parametrize(("provider", "model", "params", "refused", "ignored"), WIRE, ids=lambda v: str(v)[:30])
def test_table_6_goes_over_the_wire_as_the_provider_takes_it(
    provider: str, model: str, params: Any, refused: Any, ignored: Any
) -> None:
    assert sent(annotator(provider, model)) == Sent(params, refused, ignored)


def test_every_family_is_one_that_a_model_above_belongs_to() -> None:
    reached = {(p.provider, p.family) for p in (profile_of(annotator(*case[:2])) for case in WIRE)}
    assert reached == {(name, f.family) for name, one in catalogue().providers.items() for f in one.families}


FAMILIES = [family for one in catalogue().providers.values() for family in one.families]


@given(
    profile=st.sampled_from(FAMILIES),
    decoding=st.builds(
        Decoding,
        temperature=st.floats(0, 2),
        top_p=st.floats(0.1, 1),
        top_k=st.none() | st.integers(1, 50),
        max_tokens=st.integers(1, 500),
        max_output_tokens=st.none() | st.integers(1, 500),
        seed=st.none() | st.integers(0, 9),
        frequency_penalty=st.sampled_from([0.0, 0.5]),
        presence_penalty=st.sampled_from([0.0, 0.5]),
        repetition_penalty=st.sampled_from([1.0, 1.2]),
        stop=st.none() | st.just(("}",)),
    ),
    omit=st.sets(st.sampled_from(sorted(params_requested(Decoding())))),
)
def test_no_setting_is_lost_without_a_word(profile: Profile, decoding: Decoding, omit: set[str]) -> None:
    """Whatever was asked for and does something is sent as it is, or named as refused or without effect."""
    one = annotator("generic", "m", omit=sorted(omit))
    got = params_sent(one, decoding, profile)
    nothing = {"frequency_penalty": 0, "presence_penalty": 0, "repetition_penalty": 1, "n": 1}
    for name, value in params_requested(decoding).items():
        capped = name in ("max_tokens", "max_output_tokens") and got.params.get(profile.cap) == value
        named = (*got.refused, *got.ignored).count(name)
        assert named <= 1
        assert value is None or capped or nothing.get(name) == value or (got.params.get(name) == value) != bool(named)
        assert name not in omit or name not in got.params


@pytest.mark.parametrize("profile", FAMILIES, ids=lambda p: f"{p.provider}-{p.family}")
def test_a_setting_that_a_profile_excludes_never_reaches_the_wire(profile: Profile) -> None:
    loud = Decoding(top_k=5, frequency_penalty=0.5, presence_penalty=0.5, repetition_penalty=1.2, stop=("}",))
    got = params_sent(annotator("generic", "m"), loud, profile)
    by_status = {status: {n for n, s in profile.settings.items() if s == status} for status in ("refuses", "ignores")}
    asked = {name for name, value in params_requested(loud).items() if value is not None} - {"max_tokens", "n"}
    assert set(got.refused) == by_status["refuses"] & asked
    assert set(got.ignored) == by_status["ignores"] & asked
    assert not (set(got.params) - {profile.cap}) & (by_status["refuses"] | by_status["ignores"])


def test_extra_goes_on_top_of_all() -> None:
    extra = {"reasoning_effort": "high", "temperature": 1, "response_format": {"type": "text"}, "top_logprobs": 3}
    assert sent(annotator("openai", "gpt-6-luna", extra=extra)).params.items() >= extra.items()


def test_an_output_cap_in_extra_replaces_the_cap() -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        params = sent(annotator("openai", "gpt-6-luna", extra={name: 500})).params
        assert {key: value for key, value in params.items() if "tokens" in key} == {name: 500}


def test_a_setting_in_omit_is_not_sent_and_recorded_as_refused() -> None:
    got = sent(annotator("generic", "m", omit=["seed", "max_tokens"]))
    assert not {"seed", "max_tokens"} & set(got.params)
    assert got.refused == ("max_tokens", "seed")


def test_a_cap_named_twice_is_sent_once() -> None:
    assert "max_output_tokens" not in sent(annotator("generic", "m"), max_output_tokens=64).params
    assert sent(annotator("generic", "m"), max_output_tokens=65).params["max_output_tokens"] == 65
    assert sent(annotator("openai", "gpt-6-luna"), max_output_tokens=65).refused[-1] == "max_output_tokens"


@pytest.mark.parametrize(
    ("mode", "format_sent"), [("none", {}), ("json_object", OBJECT), ("json_schema", SCHEMA), ("auto", SCHEMA)]
)
def test_a_mode_of_json_that_is_named_goes_before_that_of_the_profile(mode: str, format_sent: Any) -> None:
    params = sent(annotator("openai", "gpt-6-luna", response_format=mode)).params
    assert {key: value for key, value in params.items() if key == "response_format"} == format_sent


def test_a_mode_of_json_that_is_known_to_have_no_effect_is_sent_and_recorded_as_ignored() -> None:
    got = sent(annotator("transformers_serve", "m", response_format="json_schema"))
    assert got.params.items() >= SCHEMA.items()
    assert got.ignored == ("response_format",)


def test_typed_decisions_have_no_settings_and_the_dialect_of_the_profile() -> None:
    got = sent(annotator("openai", "gpt-6-luna", kind="decisions", extra={"safety_identifier": "x"}))
    assert got.params == {"api": "decisions", "safety_identifier": "x"}
    assert set(got.refused) == {name for name, value in params_requested(Decoding()).items() if value is not None}
    assert sent(annotator("transformers_serve", "m", kind="decisions")).params == {"api": "systemone"}
    assert sent(annotator("generic", "m", kind="decisions", api="systemone")).params == {"api": "systemone"}


@pytest.mark.parametrize(("provider", "model"), [("generic", "m"), ("gemini", "gemini-3.5-flash-lite")])
def test_typed_decisions_of_an_endpoint_that_is_not_known_to_have_them_need_the_dialect(
    provider: str, model: str
) -> None:
    with pytest.raises(ProcessError, match="give 'api'"):
        sent(annotator(provider, model, kind="decisions"))


# Which profile --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "provider"),
    [
        ("https://api.openai.com/v1", "openai"),
        ("https://eu.api.openai.com/v1", "openai"),
        ("HTTPS://API.OPENAI.COM:443/v1", "openai"),
        ("https://generativelanguage.googleapis.com/v1beta/openai/", "gemini"),
        ("https://dashscope.aliyuncs.com/compatible-mode/v1", "dashscope"),
        ("https://dashscope-us.aliyuncs.com/compatible-mode/v1", "dashscope"),
        ("https://cn-hongkong.dashscope.aliyuncs.com/compatible-mode/v1", "dashscope"),
        ("https://batch.dashscope.aliyuncs.com/compatible-mode/v1", "dashscope"),
        ("https://ws-1.ap-southeast-1.maas.aliyuncs.com/compatible-mode/v1", "dashscope"),
        ("https://ollama.com/v1", "ollama"),
        ("http://127.0.0.1:8000/v1", "generic"),
        ("http://{node}:8000/v1", "generic"),
        ("https://api.openai.com.example.org/v1", "generic"),
        ("https://example.org/api.openai.com/v1", "generic"),
        ("https://notapi.openai.com/v1", "generic"),
    ],
)
def test_a_host_leads_to_its_provider_and_any_other_to_the_generic_one(url: str, provider: str) -> None:
    assert profile_of(Annotator(name="a", model="m", base_url=url)).provider == provider


@pytest.mark.parametrize("model", ["GPT-6-Luna", "openai/gpt-6-luna", "gpt-6-luna-2026-09-22"])
def test_a_family_is_found_whatever_the_case_prefix_or_snapshot_of_the_name(model: str) -> None:
    assert profile_of(annotator("openai", model)).family == "gpt-6-luna"


def test_a_provider_that_is_named_goes_before_the_host_and_without_the_facts_of_its_models() -> None:
    resold = annotator("openai", "gpt-5-mini", base_url="https://resold.example.org/v1", provider="openai")
    assert profile_of(resold).settings == profile_of(annotator("openai", "gpt-5-mini")).settings
    assert (profile_of(resold).ends, profile_of(resold).price) == (None, None)


def test_every_provider_of_the_process_file_has_profiles_and_ends_with_one_for_any_model() -> None:
    names = Annotator.model_fields["provider"].annotation.__args__  # type: ignore[union-attr]
    assert set(names) - {"auto"} == set(catalogue().providers)
    assert all(one.families[-1].match == ("*",) for one in catalogue().providers.values())


@pytest.mark.parametrize("profile", FAMILIES, ids=lambda p: f"{p.provider}-{p.family}")
def test_a_profile_speaks_of_every_setting_and_says_where_that_stands(profile: Profile) -> None:
    assert set(profile.settings) == set(params_requested(Decoding()))
    assert set(profile.json) == {"json_object", "json_schema"}
    assert profile.sources
    assert set(profile.sources) <= set(catalogue().sources)
    assert profile.settings["max_tokens"] == "takes" or profile.cap != "max_tokens"


# The profiles against others' word ------------------------------------------------------------------------------------


def test_the_days_on_which_openai_models_end_are_those_that_its_package_names() -> None:
    params = pytest.importorskip("openai.types.chat.completion_create_params")
    text = " ".join(inspect.getsource(params.CompletionCreateParamsBase).split())
    told = {
        model: datetime.date.fromisoformat(day)
        for models, day in re.findall(r'- ((?:"[^"]+",? ?)+): Announced shutdown date: (\d{4}-\d\d-\d\d)', text)
        for model in re.findall(r'"([^"]+)"', models)
    }
    ours = {model: fact.ends for fact in catalogue().providers["openai"].models for model in fact.match if fact.ends}
    assert len(told) > 50
    assert ours == {model: told.get(model) for model in ours}


def test_transformers_serve_takes_refuses_and_ignores_what_its_source_says() -> None:
    chat = pytest.importorskip("transformers.cli.serving.chat_completion")
    known = chat.TransformersCompletionCreateParamsStreaming.__mutable_keys__
    status = {name: "takes" if name in known else "refuses" for name in params_requested(Decoding())}
    status |= dict.fromkeys(set(status) & chat.UNUSED_CHAT_COMPLETION_FIELDS, "ignores")
    profile = profile_of(annotator("transformers_serve", "m"))
    assert profile.settings == status
    assert "response_format" in chat.UNUSED_CHAT_COMPLETION_FIELDS
    assert profile_of(annotator("transformers_serve", "qwen3")).reasoning.keys() <= known


def ask(base_url: str, **params: Any) -> str:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Which is better?"}], **params}
    request = urllib.request.Request(
        f"{base_url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return str(json.load(response)["choices"][0]["message"]["content"])


def test_llama_cpp_takes_what_its_profile_sends_and_enforces_the_schema(server_url: str) -> None:
    body = dict(sent(annotator("llama_cpp", "tiny"), max_tokens=200, top_k=40, stop=("\n\n",)).params)
    parsed = parse_reply(ask(server_url, **body))
    assert parsed.gap is not None
    assert parsed.mends == ()


@pytest.mark.parametrize(
    ("name", "value"), [("top_k", 1), ("top_p", 0.01), ("frequency_penalty", 2.0), ("presence_penalty", 2.0)]
)
def test_llama_cpp_heeds_a_setting_that_its_profile_takes(server_url: str, name: str, value: float) -> None:
    plain = {"temperature": 1.0, "seed": 7, "max_tokens": 24}
    assert profile_of(annotator("llama_cpp", "tiny")).settings[name] == "takes"
    assert ask(server_url, **plain, **{name: value}) != ask(server_url, **plain) == ask(server_url, **plain)


@pytest.mark.parametrize(("name", "value"), [("repetition_penalty", 5.0), ("max_output_tokens", 1)])
def test_llama_cpp_does_not_heed_a_setting_that_its_profile_calls_without_effect(
    server_url: str, name: str, value: float
) -> None:
    plain = {"temperature": 1.0, "seed": 7, "max_tokens": 24}
    assert profile_of(annotator("llama_cpp", "tiny")).settings[name] == "ignores"
    assert ask(server_url, **plain, **{name: value}) == ask(server_url, **plain)


# What stands against asking -------------------------------------------------------------------------------------------


def severities(one: Annotator, today: datetime.date = TODAY, **decoding: Any) -> dict[str, str]:
    found = profile_of(one).problems(Decoding(**decoding), today, one)
    return {text: severity for severity, text in found if severity != "note"}


def test_a_cap_that_hidden_reasoning_uses_up_is_an_error() -> None:
    (text,) = severities(annotator("dashscope", "qwen3.8-max"))
    assert severities(annotator("dashscope", "qwen3.8-max"))[text] == "error"
    assert text.startswith("64 tokens include hidden reasoning")
    assert "answers will be empty; raise max_tokens" in text
    assert severities(annotator("dashscope", "qwen3.8-max"), max_tokens=2048) == {}


def test_a_little_hidden_reasoning_is_a_warning_and_none_is_none() -> None:
    assert list(severities(annotator("gemini", "gemini-3.5-flash-lite")).values()) == ["warning"]
    assert severities(annotator("gemini", "gemini-3.5-flash-lite"), max_tokens=256) == {}
    assert severities(annotator("openai", "gpt-6-luna")) == {}


def test_reasoning_that_extra_switches_on_is_an_error_unless_the_cap_leaves_room() -> None:
    on = {"reasoning_effort": "high"}
    (text,) = severities(annotator("openai", "gpt-6-luna", extra=on))
    assert "extra.reasoning_effort switches it on" in text
    assert severities(annotator("openai", "gpt-6-luna", extra=on | {"max_completion_tokens": 4000})) == {}
    assert severities(annotator("openai", "gpt-6-luna", extra=on, omit=["max_tokens"])) == {}
    assert severities(annotator("openai", "gpt-6-luna", extra={"reasoning_effort": "none"})) == {}


def test_a_mode_of_json_that_is_not_enforced_is_named() -> None:
    old = annotator("dashscope", "qwen-max-2025-01-25", response_format="json_schema")
    deaf = annotator("transformers_serve", "m", response_format="json_object")
    assert severities(old) == {"response_format json_schema is refused by qwen-max": "error"}
    assert severities(deaf) == {"response_format json_object is ignored by any other": "warning"}


def test_typed_decisions_need_neither_cap_nor_json() -> None:
    assert severities(annotator("dashscope", "qwen3.8-max", kind="decisions", api="decisions")) == {}


def test_what_is_not_verified_is_noted() -> None:
    notes = [text for severity, text in profile_of(annotator("openai", "gpt-6-luna")).problems(Decoding(), TODAY)]
    assert notes
    assert all(text.startswith("not verified: ") for text in notes)


# When models end ------------------------------------------------------------------------------------------------------


def day_before(day: datetime.date) -> datetime.date:
    return day - datetime.timedelta(days=1)


def test_a_model_is_refused_from_the_day_on_which_it_ends() -> None:
    mini = annotator("openai", "gpt-5-mini-2025-08-07")
    end = datetime.date(2026, 12, 11)
    refuse_ended([mini], day_before(end))
    with pytest.raises(ProcessError, match=r"'a': gpt-5-mini-2025-08-07 ended on 2026-12-11; replacement: gpt-5\.6"):
        refuse_ended([mini], end)
    assert severities(mini, end)["the model ended on 2026-12-11; replacement: gpt-5.6-terra"] == "error"
    assert severities(mini, day_before(end))["the model ends on 2026-12-11; replacement: gpt-5.6-terra"] == "warning"
    assert not [text for text in severities(mini, datetime.date(2026, 9, 1)) if "ends" in text]


def test_only_the_vendor_can_end_a_model() -> None:
    weights = annotator("openai", "gpt-5-mini", base_url="http://127.0.0.1:8000/v1", provider="vllm")
    resold = annotator("openai", "gpt-5-mini", base_url="https://resold.example.org/v1", provider="openai")
    recorded = Annotator(name="r", kind="recorded", model="gemini-2.0-flash", calls="x.jsonl")
    refuse_ended([weights, resold, recorded], datetime.date(2030, 1, 1))


def test_all_models_that_have_ended_are_named() -> None:
    gone = [annotator("gemini", "gemini-2.0-flash", name="one"), annotator("openai", "gpt-4.1", name="two")]
    with pytest.raises(ProcessError, match=r"'one'.*'two'"):
        refuse_ended(gone, datetime.date(2027, 2, 1))


# Presets --------------------------------------------------------------------------------------------------------------


def test_the_papers_panel_refuses_to_start_and_says_when_each_model_ended_or_ends() -> None:
    with pytest.raises(ProcessError) as caught:
        preset_annotators("paper-2025", TODAY)
    message = str(caught.value)
    assert "gemini-2.0-flash ended on 2026-06-01; replacement: gemini-3.1-flash-lite" in message
    assert "gpt-5-mini-2025-08-07 ends on 2026-12-11; replacement: gpt-5.6-terra" in message
    assert "qwen-max-2025-01-25 has no announced end" in message
    assert "panel-2026-11" in message
    with pytest.raises(ProcessError, match="gpt-5-mini-2025-08-07 ended on 2026-12-11"):
        preset_annotators("paper-2025", datetime.date(2026, 12, 11))


def test_the_papers_panel_is_that_of_table_12() -> None:
    models = [one["model"] for one in preset_annotators("paper-2025", datetime.date(2026, 1, 1))]
    assert models == ["qwen-max-2025-01-25", "gpt-5-mini-2025-08-07", "gemini-2.0-flash"]


def test_the_current_panel_starts_with_nothing_worse_than_a_warning_and_hardly_any_reasoning() -> None:
    panel = [Annotator.model_validate(one) for one in preset_annotators("panel-2026-11", TODAY)]
    assert len({profile_of(one).provider for one in panel}) == 3
    for one in panel:
        assert profile_of(one).hidden in ("none", "little")
        assert profile_of(one).json_mode != "none"
        assert "error" not in severities(one).values()


@pytest.mark.parametrize("name", PRESETS)
def test_the_prices_and_keys_of_a_preset_are_those_of_the_price_sheet_and_the_vendor(name: str) -> None:
    for one in PRESETS[name]["annotators"]:
        built = Annotator.model_validate(one)
        assert built.price == profile_of(built).price
        assert built.api_key_env in ("OPENAI_API_KEY", "GEMINI_API_KEY", "DASHSCOPE_API_KEY")


def test_an_unknown_preset_is_named_with_the_nearest() -> None:
    with pytest.raises(ProcessError, match=r"no preset 'paper-2026' \(did you mean 'paper-2025'\?\)"):
        preset_annotators("paper-2026", TODAY)


def test_a_preset_that_was_handed_out_cannot_be_changed_by_its_user() -> None:
    preset_annotators("panel-2026-11", TODAY)[0]["price"]["input"] = 9.9
    assert preset_annotators("panel-2026-11", TODAY)[0]["price"]["input"] == 0.4


def test_a_batch_saves_half_where_files_and_batches_are_to_be_had() -> None:
    having: Mapping[str, Any] = {p.provider: p.batch for p in FAMILIES if p.batch}
    assert set(having) == {"openai", "dashscope"}
    assert {batch.discount for batch in having.values()} == {0.5}
    assert {batch.max_requests for batch in having.values()} == {50_000}
