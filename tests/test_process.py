"""The process file: what is wrong is refused by the name of its key, and whatever shapes the artifact is in λ."""

from __future__ import annotations

import datetime
import json
import shutil
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import NewRun, rows, teacher, write_process
from sp2dpo import process as process_module
from sp2dpo.errors import ProcessError, RunDirError
from sp2dpo.hashing import sha256_json
from sp2dpo.process import load_process, process_of
from sp2dpo.providers import PRESETS, profile_of
from sp2dpo.runs import open_run

TOY = {"student": {"model": "toy"}}


def refused(path: Path) -> str:
    with pytest.raises(ProcessError) as caught:
        load_process(path)
    return str(caught.value)


def refusal(folder: Path, **keys: Any) -> str:
    return refused(write_process(folder, **keys))


def annotator(**more: Any) -> dict[str, Any]:
    return {"annotators": [teacher(**more)]}


# Keys ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["name", "data", "panel"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    path = write_process(tmp_path)
    values = yaml.safe_load(path.read_text())
    del values[key]
    path.write_text(yaml.safe_dump(values))
    assert f"missing key '{key}'" in refused(path)


@pytest.mark.parametrize(
    ("keys", "missing"),
    [
        ({"data": {}}, "data.source"),
        ({"panel": {"annotators": [{"name": "a", "base_url": "http://a/v1"}]}}, "panel.annotators.0.model"),
        ({"panel": {"annotators": [{"model": "m", "base_url": "http://a/v1"}]}}, "panel.annotators.0.name"),
        ({"panel": annotator(price={"input": 1, "output": 2})}, "panel.annotators.0.price.as_of"),
        ({"student": {}, "train": {}}, "student.model"),
        ({"evaluate": {"judge": {"name": "j", "model": "x"}}}, "evaluate.judge.base_url"),
    ],
)
def test_a_missing_key_below_another_is_named_with_its_place(tmp_path: Path, keys: Any, missing: str) -> None:
    assert f"missing key '{missing}'" in refusal(tmp_path, **keys)


@pytest.mark.parametrize(
    ("keys", "unknown", "meant"),
    [
        ({"shedule": {}}, "shedule", "schedule"),
        ({"data": {"source": "pairs.jsonl", "revison": "x"}}, "data.revison", "revision"),
        ({"panel": {"variant": ["v1"]}}, "panel.variant", "variants"),
        ({"panel": annotator(api_key="X")}, "panel.annotators.0.api_key", "api_key_env"),
        ({"panel": annotator(serve_as="X")}, "panel.annotators.0.serve_as", "served_as"),
        ({"panel": annotator(price={"inputs": 1})}, "panel.annotators.0.price.inputs", "input"),
        ({"panel": {"decoding": {"temprature": 0}}}, "panel.decoding.temprature", "temperature"),
        ({"schedule": {"beta_mn": 0.1}}, "schedule.beta_mn", "beta_min"),
        ({"student": {"modl": "toy"}, "train": {}}, "student.modl", "model"),
        ({**TOY, "train": {"learning_rat": 1e-4}}, "train.learning_rat", "learning_rate"),
        ({**TOY, "train": {"r": 8, "lora_alfa": 16}}, "train.lora_alfa", "lora_alpha"),
        ({**TOY, "train": {"method": ["dpo"]}}, "train.method", "methods"),
        ({"evaluate": {"judges": {}}}, "evaluate.judges", "judge"),
        ({"report": {"known_revers": "x"}}, "report.known_revers", "known_reversed"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(
    tmp_path: Path, keys: Any, unknown: str, meant: str
) -> None:
    message = refusal(tmp_path, **keys)
    assert f"unknown key '{unknown}'" in message
    assert f"did you mean '{meant}'?" in message


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"name": "../up"}, "name"),
        ({"name": 5}, "name"),
        ({"data": "pairs.jsonl"}, "data"),
        ({"data": {"source": ["pairs.jsonl"]}}, "data.source"),
        ({"panel": {"variants": []}}, "panel.variants"),
        ({"panel": {"annotators": []}}, "panel.annotators"),
        ({"panel": annotator(kind="chat")}, "panel.annotators.0.kind"),
        ({"panel": annotator(response_format="json")}, "panel.annotators.0.response_format"),
        ({"panel": annotator(provider="gpt")}, "panel.annotators.0.provider"),
        ({"panel": annotator(kind="decisions", api="chat")}, "panel.annotators.0.api"),
        ({"panel": annotator(price={"input": -1, "output": 1, "as_of": "2026-01-01"})}, "price.input"),
        ({"panel": annotator(price={"input": 1, "output": 1, "as_of": "spring"})}, "price.as_of"),
        ({"panel": {"decoding": {"temperature": "hot"}}}, "panel.decoding.temperature"),
        ({"panel": {"decoding": {"max_tokens": 0}}}, "panel.decoding.max_tokens"),
        ({"panel": {"decoding": {"seed": 1.5}}}, "panel.decoding.seed"),
        ({"panel": {"decoding": {"n": 2}}}, "panel.decoding.n"),
        ({"panel": {"decoding": {"timeout": 0}}}, "panel.decoding.timeout"),
        ({"panel": {"decoding": {"retry_attempts": -1}}}, "panel.decoding.retry_attempts"),
        ({"schedule": {"beta_min": 0}}, "schedule.beta_min"),
        ({"schedule": {"beta_max": float("inf")}}, "schedule.beta_max"),
        ({"schedule": {"beta_min": float("nan")}}, "schedule.beta_min"),
        ({**TOY, "train": {"learning_rate": "fast"}}, "train.learning_rate"),
        ({**TOY, "train": {"per_device_train_batch_size": 1.5}}, "train.per_device_train_batch_size"),
        ({**TOY, "train": {"max_prompt_length": 0}}, "train.max_prompt_length"),
        ({**TOY, "train": {"output_dir": "x"}}, "train.output_dir"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_by_the_name_of_its_key(tmp_path: Path, keys: Any, named: str) -> None:
    assert named in refusal(tmp_path, **keys)


def test_a_key_given_twice_is_named(tmp_path: Path) -> None:
    path = write_process(tmp_path)
    text = path.read_text()
    path.write_text(text + "name: other\n")
    assert f"'name' is given twice, again in line {text.count(chr(10)) + 1}" in refused(path)


def test_a_learning_rate_without_a_point_is_a_number(tmp_path: Path) -> None:
    path = write_process(tmp_path, **TOY, train={})
    for text in ("5e-6", "5E-6", "0.000005", "5.0e-06"):
        path.write_text(path.read_text().split("train:")[0] + f"train:\n  learning_rate: {text}\n")
        train = load_process(path).settings.train
        assert train is not None
        assert train.model_dump()["learning_rate"] == 5e-6


@pytest.mark.parametrize(
    "content", ["", "- a\n", "just words\n", "a: [\n", "a: !!python/object:os.system x\n", "? [a]\n: 1\n"]
)
def test_a_file_that_is_no_process_is_refused_with_its_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "process.yaml"
    path.write_text(content)
    assert str(path) in refused(path)


def test_a_file_that_is_not_text_or_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "process.yaml").write_bytes(b"\xff\xfe\x00name")
    assert "not readable YAML" in refused(tmp_path / "process.yaml")
    assert "no such process file" in refused(tmp_path / "other.yaml")


# What belongs together ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"data": {"source": "org/name"}}, "needs data.revision"),
        ({"student": {"model": "org/name"}, "train": {}}, "needs student.revision"),
        ({"student": {"model": "a b"}, "train": {}}, "student.model"),
        ({"student": {"model": "toy"}}, "'student' and 'train' go together"),
        ({"train": {}}, "'student' and 'train' go together"),
        ({**TOY, "train": {"lora_alpha": 16}}, "no 'r'"),
        ({"panel": {"annotators": [{"name": "a", "model": "m"}]}}, "needs the key 'base_url'"),
        ({"panel": {"annotators": [{"name": "a", "model": "m", "kind": "recorded"}]}}, "needs the key 'calls'"),
        ({"panel": annotator(calls="x.sqlite")}, "takes no 'calls'"),
        ({"panel": annotator(api="systemone")}, "takes no 'api'"),
        ({"panel": annotator(kind="decisions", api="systemone", omit=["seed"])}, "takes no 'omit'"),
        ({"panel": annotator(kind="decisions", response_format="none")}, "takes no 'response_format'"),
        ({"panel": annotator(kind="decisions")}, "give 'api' (decisions or systemone)"),
        ({"panel": {"annotators": [{"name": "a", "model": "m", "kind": "decisions"}]}}, "needs the key 'base_url'"),
        (
            {"panel": annotator(base_url="teacher.invalid/v1")},
            "0.base_url: a base_url must be like http",
        ),
        ({"panel": {"annotators": [teacher(), teacher(model="m")]}}, "same name: teacher"),
        ({"panel": {"variants": ["v1", "v1"]}}, "same name: v1"),
        ({"schedule": {"beta_min": 0.3, "beta_max": 0.1}}, "beta_max 0.1 is below beta_min 0.3"),
    ],
)
def test_keys_that_do_not_go_together_are_refused_with_the_way_out(tmp_path: Path, keys: Any, says: str) -> None:
    assert says in refusal(tmp_path, **keys)


def test_a_judge_that_is_an_annotator_is_refused(tmp_path: Path) -> None:
    judge = {"name": "j", "model": "MODEL-of-teacher", "base_url": "http://elsewhere/v1"}
    assert "which is also the annotator 'teacher'" in refusal(tmp_path, evaluate={"judge": judge})


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"data": {"source": "nowhere.jsonl"}}, r"data.source: .*nowhere.jsonl does not exist"),
        ({"panel": {"prompts": "nowhere"}}, "nowhere has no v1.txt"),
        ({"panel": {"variants": ["v4"]}}, "no v4.txt"),
        ({"panel": {"variants": ["user"]}}, "'user'"),
        (
            {"panel": {"annotators": [{"name": "a", "model": "m", "kind": "recorded", "calls": "x.sqlite"}]}},
            "calls of annotator 'a': .*x.sqlite does not exist",
        ),
    ],
)
def test_a_file_that_is_not_there_is_named_with_the_key_that_points_to_it(tmp_path: Path, keys: Any, says: str) -> None:
    path = write_process(tmp_path, **keys)
    with pytest.raises(ProcessError, match=says):
        load_process(path)


@pytest.mark.parametrize("lora", [{"lora_dropout": 0.1}, {"target_modules": "all-linear"}, {"use_dora": True}])
def test_any_lora_key_without_a_rank_is_refused(tmp_path: Path, lora: dict[str, Any]) -> None:
    assert "'r'" in refusal(tmp_path, **TOY, train=lora)


def test_a_key_pasted_into_the_file_is_not_repeated_in_the_message(tmp_path: Path) -> None:
    assert "sk-pasted" not in refusal(tmp_path, panel=annotator(api_key="sk-pasted"))


@pytest.mark.parametrize(
    "bad",
    [
        {"base_url": "https://user:password@host/v1"},
        {"base_url": "https://host/v1?key=secret"},
        {"base_url": "https://host:port/v1"},
        {"base_url": "https://"},
        {"api_key_env": "sk-abcdef0123456789"},
        {"omit": ["temprature"]},
        {"extra": {"messages": []}},
        {"extra": {"n": 3}},
        {"extra": {"variants": ["v1"]}},
        {"extra": {"from": datetime.date(2026, 1, 1)}},
        {"extra": {"bias": float("nan")}},
    ],
    ids=str,
)
def test_an_annotator_that_could_not_be_asked_as_λ_says_is_refused(tmp_path: Path, bad: dict[str, Any]) -> None:
    assert next(iter(bad)) in refusal(tmp_path, panel=annotator(**bad))


@pytest.mark.parametrize(
    "extra",
    [
        {"api_key": "sk-pasted"},
        {"apiKey": "sk-pasted"},
        {"extra_headers": {"Authorization": "Bearer sk-pasted"}},
        {"metadata": [{"deep": {"X-API-Key": "sk-pasted"}}]},
        {"client_secret": "sk-pasted"},
        {"Password": "sk-pasted"},
        {"access_token": "sk-pasted"},
    ],
    ids=str,
)
def test_a_key_in_extra_is_refused_by_its_name_and_its_value_is_nowhere(tmp_path: Path, extra: dict[str, Any]) -> None:
    with pytest.raises(ProcessError, match="name the variable of the key in api_key_env") as caught:
        load_process(write_process(tmp_path, panel=annotator(extra=extra)))
    assert "sk-pasted" not in "".join(traceback.format_exception(caught.value))


def test_parameters_with_tokens_in_their_names_are_no_keys(tmp_path: Path) -> None:
    extra = {"max_completion_tokens": 64, "logit_bias": {"50256": -100}, "prompt_cache_key": "x"}
    load_process(write_process(tmp_path, panel=annotator(extra=extra)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"api_key_env": ["sk-pasted"]},
        {"base_url": {"key": "sk-pasted"}},
        {"extra": "sk-pasted"},
        {"price": {"sk": "sk-pasted"}},
        {"served_as": ["sk-pasted"]},
        {"api_key": "sk-pasted"},
    ],
    ids=str,
)
def test_a_key_pasted_where_it_does_not_belong_is_in_no_message_and_no_traceback(
    tmp_path: Path, wrong: dict[str, Any]
) -> None:
    with pytest.raises(ProcessError) as caught:
        load_process(write_process(tmp_path, panel=annotator(**wrong)))
    assert "sk-pasted" not in "".join(traceback.format_exception(caught.value))


def test_a_line_that_is_no_yaml_is_named_by_its_number_and_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "process.yaml"
    path.write_text('name: x\napi_key: "sk-pasted\n')
    with pytest.raises(ProcessError, match=r"not readable YAML: .*, line \d") as caught:
        load_process(path)
    assert "sk-pasted" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("value", [True, "0.3"])
def test_true_or_a_text_is_no_number(tmp_path: Path, value: Any) -> None:
    assert "schedule.beta_max" in refusal(tmp_path, schedule={"beta_max": value})


# λ ------------------------------------------------------------------------------------------------------------------

CHANGES: list[dict[str, Any]] = [
    {"name": "other"},
    {"data": {"source": "pairs.jsonl", "filters": ["empty_field"]}},
    {"data": {"source": "pairs.jsonl", "columns": {"prompt": "question"}}},
    {"data": {"source": "pairs.jsonl", "split": "train"}},
    {"panel": {"variants": ["v2"]}},
    {"panel": {"variants": ["v1", "v2"]}},
    {"panel": {"variants": ["v2", "v1"]}},
    {"panel": annotator(model="other")},
    {"panel": annotator(base_url="http://other/v1")},
    {"panel": annotator(api_key_env="OTHER")},
    {"panel": annotator(response_format="json_object")},
    {"panel": annotator(response_format="none")},
    {"panel": annotator(provider="vllm")},
    {"panel": annotator(served_as="another name")},
    {"panel": annotator(kind="decisions", api="systemone")},
    {"panel": annotator(kind="decisions", api="decisions")},
    {"panel": annotator(omit=["seed"])},
    {"panel": annotator(extra={"reasoning_effort": "minimal"})},
    {"panel": annotator(price={"input": 1, "output": 2, "as_of": "2026-01-01"})},
    {"panel": {"annotators": [teacher(), teacher("second")]}},
    *(
        {"panel": {"decoding": {"retry_attempts": 2, "retry_delay_base": 0} | {name: value}}}
        for name, value in {
            "temperature": 0.2,
            "top_p": 0.9,
            "top_k": 5,
            "max_tokens": 65,
            "max_output_tokens": 64,
            "seed": 43,
            "frequency_penalty": 0.1,
            "presence_penalty": 0.1,
            "repetition_penalty": 1.1,
            "stop": ["}"],
            "timeout": 1,
            "retry_attempts": 4,
            "retry_delay_base": 1,
        }.items()
    ),
    {"panel": {"decoding": {"retry_attempts": 2, "retry_delay_base": 0, "seed": None}}},
    {"schedule": {"beta_min": 0.04}},
    {"schedule": {"beta_max": 0.2}},
    {"schedule": {"random_seed": 1}},
    {**TOY, "train": {}},
    {**TOY, "train": {"learning_rate": 5e-6}},
    {**TOY, "train": {"learning_rate": 6e-6}},
    {**TOY, "train": {"methods": ["dpo"]}},
    {**TOY, "train": {"max_prompt_length": 5}},
    {"evaluate": {"judge": {"name": "j", "model": "judge", "base_url": "http://j/v1"}}},
    {"report": {"known_reversed": "flag"}},
]


def test_every_setting_changes_λ(tmp_path: Path) -> None:
    seen = {load_process(write_process(tmp_path)).lambda_hash: "nothing"}
    for change in CHANGES:
        lam = load_process(write_process(tmp_path, **change)).lambda_hash
        assert lam not in seen, (change, seen[lam])
        seen[lam] = str(change)


def test_the_content_of_the_source_and_of_a_recording_changes_λ(tmp_path: Path) -> None:
    recorded = {"name": "a", "model": "m", "kind": "recorded", "calls": "answers.jsonl"}
    (tmp_path / "answers.jsonl").write_text("{}\n")
    path = write_process(tmp_path, panel={"annotators": [recorded]})
    seen = {load_process(path).lambda_hash}
    for name in ("pairs.jsonl", "answers.jsonl"):
        (tmp_path / name).write_text((tmp_path / name).read_text() + "\n")
        seen.add(load_process(path).lambda_hash)
    assert len(seen) == 3


def test_a_file_added_to_a_source_folder_changes_λ(tmp_path: Path) -> None:
    path = write_process(tmp_path, data={"source": "folder"})
    (tmp_path / "folder").mkdir()
    shutil.move(tmp_path / "pairs.jsonl", tmp_path / "folder" / "a.jsonl")
    before = load_process(path).lambda_hash
    shutil.copy(tmp_path / "folder" / "a.jsonl", tmp_path / "folder" / "b.jsonl")
    assert load_process(path).lambda_hash != before


def test_neither_the_place_nor_the_layout_of_the_file_changes_λ(tmp_path: Path) -> None:
    here, there = write_process(tmp_path / "here"), write_process(tmp_path / "there" / "deep")
    values = yaml.safe_load(there.read_text())
    there.with_name("renamed.yaml").write_text("# λ\n" + json.dumps(dict(reversed(values.items()))))
    same = {load_process(path).lambda_hash for path in (here, there, there.with_name("renamed.yaml"))}
    assert len(same) == 1


def test_a_default_that_is_written_out_does_not_change_λ(tmp_path: Path) -> None:
    plain = load_process(write_process(tmp_path)).lambda_hash
    keys = {"schedule": {"method": "sp2dpo", "beta_min": 0.03, "beta_max": 0.3}, "evaluate": {}}
    assert load_process(write_process(tmp_path, **keys)).lambda_hash == plain


# What is sent -------------------------------------------------------------------------------------------------------

LUNA = {"model": "gpt-6-luna", "base_url": "https://api.openai.com/v1"}


def test_what_is_sent_to_each_annotator_that_is_asked_is_part_of_λ(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text("{}\n")
    recorded = {"name": "old", "model": "m", "kind": "recorded", "calls": "answers.jsonl"}
    teachers = [teacher(), teacher("luna", **LUNA), teacher("typed", **LUNA, kind="decisions"), recorded]
    process = load_process(write_process(tmp_path, panel={"annotators": teachers}))
    assert list(process.resolved["pins"]["sent"]) == ["teacher", "luna", "typed"]
    assert process.sent("teacher")["params"]["temperature"] == 0.1
    assert process.sent("luna")["params"]["reasoning_effort"] == "none"
    assert process.sent("luna")["refused"] == ["temperature", "top_p"]
    assert process.sent("typed")["params"] == {"api": "decisions"}
    assert sha256_json(process.resolved) == process.lambda_hash


def test_a_new_profile_makes_another_λ_only_if_what_is_sent_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_process(tmp_path, panel=annotator(**LUNA))
    before = load_process(path)

    def changed(**facts: Any) -> str:
        monkeypatch.setattr(process_module, "profile_of", lambda one: replace(profile_of(one), **facts))
        return load_process(path).lambda_hash

    assert changed(sources=(), unverified=(), price=None, batch=None) == before.lambda_hash
    assert changed(reasoning={"reasoning_effort": "low"}) != before.lambda_hash


def test_a_run_directory_is_read_back_without_the_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = load_process(write_process(tmp_path, panel=annotator(**LUNA)))
    run = open_run(process, tmp_path / "run")

    def none(*args: object) -> Any:
        raise AssertionError("a profile was looked at")

    monkeypatch.setattr(process_module, "profile_of", none)
    monkeypatch.setattr(process_module, "params_sent", none)
    back = process_of(run.path)
    assert back.lambda_hash == process.lambda_hash
    assert back.sent("teacher") == process.sent("teacher")


def test_a_run_directory_that_does_not_say_what_is_sent_leads_to_reuse(tmp_path: Path) -> None:
    process = load_process(write_process(tmp_path))
    del process.resolved["pins"]["sent"]
    with pytest.raises(ProcessError, match="--reuse"):
        process.sent("teacher")


def test_a_mode_that_needs_the_word_json_is_refused_with_prompts_that_lack_it(tmp_path: Path) -> None:
    qwen = {"model": "qwen3-max", "base_url": "https://dashscope.aliyuncs.com/compatible-mode/v1"}
    pack = tmp_path / "pack"
    pack.mkdir()
    (pack / "v1.txt").write_text("Judge.")
    (pack / "user.txt").write_text("{prompt} {chosen} {rejected}")
    assert "word JSON; write it into v1.txt" in refusal(tmp_path, panel={"prompts": "pack", **annotator(**qwen)})
    load_process(write_process(tmp_path, panel={"prompts": "pack", **annotator(**qwen, response_format="none")}))
    (pack / "v1.txt").write_text("Judge, in Json.")
    load_process(write_process(tmp_path, panel={"prompts": "pack", **annotator(**qwen)}))


# Presets ------------------------------------------------------------------------------------------------------------


def with_preset(folder: Path, preset: Any) -> Path:
    path = write_process(folder)
    values = yaml.safe_load(path.read_text())
    del values["panel"]["annotators"]
    values["panel"]["preset"] = preset
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_preset_has_the_λ_of_its_annotators_written_out(tmp_path: Path) -> None:
    process = load_process(with_preset(tmp_path / "a", "panel-2026-11"))
    written = {"annotators": PRESETS["panel-2026-11"]["annotators"]}
    assert process.lambda_hash == load_process(write_process(tmp_path / "b", panel=written)).lambda_hash
    assert [one["name"] for one in process.resolved["panel"]["annotators"]] == ["qwen", "openai", "gemini"]
    assert "preset" not in process.resolved["panel"]
    assert process_of(open_run(process, tmp_path / "run").path).settings == process.settings


def test_the_papers_own_panel_is_refused_with_the_days_on_which_its_models_ended(tmp_path: Path) -> None:
    message = refused(with_preset(tmp_path, "paper-2025"))
    assert "gemini-2.0-flash ended on 2026-06-01" in message
    assert "panel-2026-11" in message


def test_a_preset_beside_annotators_or_without_a_known_name_is_refused(tmp_path: Path) -> None:
    assert "not both" in refusal(tmp_path, panel={"preset": "panel-2026-11", **annotator()})
    assert "no preset 'panel'" in refused(with_preset(tmp_path, "panel"))
    assert "no preset '5'" in refused(with_preset(tmp_path, 5))
    assert "missing key 'panel.annotators'" in refused(with_preset(tmp_path, None))


# Run directories ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_run_directory_gives_back_the_same_λ_and_settings(tmp_path: Path, change: dict[str, Any]) -> None:
    process = load_process(write_process(tmp_path, **change))
    back = process_of(open_run(process, tmp_path / "run").path)
    assert back.lambda_hash == process.lambda_hash
    assert back.resolved == process.resolved
    assert back.pack == process.pack
    if change != {"panel": {"decoding": {"retry_attempts": 2, "retry_delay_base": 0, "seed": None}}}:
        assert back.settings == process.settings


def test_a_seed_of_null_is_read_back_as_null(tmp_path: Path) -> None:
    process = load_process(write_process(tmp_path, panel={"decoding": {"seed": None}}))
    assert process_of(open_run(process, tmp_path / "run").path).settings.panel.decoding.seed is None


@pytest.mark.parametrize(
    ("old", "new"), [("beta_max: 0.3", "beta_max: 0.4"), ("lambda: ", "lambda: 0"), ("v1: ", "v1: 0")]
)
def test_an_edited_process_in_a_run_directory_is_refused(new_run: NewRun, old: str, new: str) -> None:
    path = new_run().path / "process.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ProcessError, match="was changed after it was written"):
        process_of(path.parent)


def test_a_run_directory_of_another_λ_is_refused_and_the_keys_are_named(new_run: NewRun, tmp_path: Path) -> None:
    run = new_run()
    other = load_process(write_process(tmp_path, pairs=rows(3), schedule={"beta_max": 0.2}))
    with pytest.raises(RunDirError, match=r"different: pins\.data, schedule\.beta_max\..*--reuse"):
        open_run(other, run.path)


def test_the_same_process_may_come_back_to_its_run_directory(new_run: NewRun) -> None:
    before = {path: path.read_bytes() for path in new_run().path.rglob("*") if path.is_file()}
    after = {path: path.read_bytes() for path in new_run().path.rglob("*") if path.is_file()}
    assert before == after


def test_a_folder_with_other_files_in_it_is_not_taken_for_a_run_directory(tmp_path: Path) -> None:
    process = load_process(write_process(tmp_path / "here"))
    with pytest.raises(RunDirError, match="choose another --run-dir"):
        open_run(process, tmp_path)
