"""Publishing: what is published loads elsewhere with the same β, says where it came from, and leaks nothing."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import yaml

from conftest import KEY, NewRun, Sp2dpo, completion, rows, teacher
from fake_hub import Hub, fake_hub
from report_runs import HOSTILE, judged, make_run, pair
from sp2dpo.annotate.run import annotate
from sp2dpo.calls import open_calls, open_ledger
from sp2dpo.errors import InputError, RunDirError, Unfinished
from sp2dpo.evidence import read_evidence
from sp2dpo.process import load_process
from sp2dpo.publish.card import _decoding
from sp2dpo.publish.dataset import TRAIN, publish_dataset
from sp2dpo.publish.markdown import cell
from sp2dpo.publish.trainers import TRAINERS, export
from sp2dpo.report.provenance import Setting
from sp2dpo.runs import Run, open_run
from sp2dpo.stages import prepare_run, read_schedule, schedule_run
from teacher_server import teacher_server

TOKEN = "hf_recogniseMe0123456789"


def says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


LONG = [says("system", "Be brief."), says("user", "Hi."), says("assistant", "Hello."), says("user", "And?")]


def answer(n: int, annotator: str, variant: str) -> str:
    """Pair 5 lacks the answers of one annotator, pair 2 is doubted, and the prompts differ a little."""
    if n == 5 and annotator == "b":
        return ""
    wording = {"v1": 0.0, "v2": 0.01, "v3": 0.05}[variant]
    return judged("Style" if n % 2 else "Safety", min(n / 10, 0.9) + wording, 0.2 if n == 2 else 0.9)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Twelve pairs; the prompt of pair 3 has a system message and turns, one source row has an empty reply."""
    sources = [pair(n) for n in range(12)]
    sources[3]["prompt"] = LONG
    sources.append(pair(12) | {"chosen": [says("assistant", " ")]})
    return make_run(tmp_path_factory.mktemp("published"), sources, answer, annotators=("a", "b"))


@pytest.fixture(scope="module")
def published(run: Run) -> Path:
    return publish_dataset(run.path, run.path.parent / "dataset", license="cc-by-4.0").path


def card(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def front(folder: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(card(folder).split("---\n")[1]))


def python_of(folder: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card(folder), re.DOTALL)


def everything(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def made() -> list[str]:
    """What is in the folder that a command runs in."""
    return [path.name for path in Path.cwd().iterdir()]


# The dataset folder


def test_datasets_loads_the_pairs_with_beta_and_the_schedule(run: Run, published: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    evidence = read_evidence(run)
    pairs = datasets.load_dataset(str(published), split="train", cache_dir=str(tmp_path))
    assert pairs["beta"] == evidence.beta_i.astype(np.float32).tolist()
    assert pairs[3]["prompt"] == LONG
    assert pairs[0]["chosen"] == [says("assistant", "Good answer 0 ")]
    schedule = datasets.load_dataset(str(published), "schedule", split="train", cache_dir=str(tmp_path))
    assert schedule["beta"] == evidence.beta_i.tolist()
    assert schedule["pair_id"] == pairs["pair_id"]


@pytest.mark.filterwarnings("ignore:ConjunctiveGraph is deprecated", "ignore:The inplace keyword")
def test_croissant_is_valid_and_gives_beta_and_texts(run: Run, published: Path) -> None:
    mlcroissant = pytest.importorskip("mlcroissant")
    dataset = mlcroissant.Dataset(jsonld=str(published / "croissant.json"))
    assert not dataset.metadata.ctx.issues.errors
    assert not dataset.metadata.ctx.issues.warnings
    beta = read_evidence(run).beta_i
    assert [row["schedule/beta"] for row in dataset.records("schedule")] == beta.tolist()
    pairs = list(dataset.records("pairs"))
    assert [row["pairs/beta"] for row in pairs] == beta.astype(np.float32).tolist()
    roles = [message["pairs/prompt/role"] for message in pairs[3]["pairs/prompt"]]
    assert roles == [b"system", b"user", b"assistant", b"user"]


def test_croissant_and_the_manifest_hold_the_hash_of_each_file(published: Path) -> None:
    now = {name: hashlib.sha256(data).hexdigest() for name, data in everything(published).items()}
    manifest = json.loads((published / "publish.manifest.json").read_text(encoding="utf-8"))
    del now["publish.manifest.json"]
    assert manifest["files"] == now
    described = json.loads((published / "croissant.json").read_text(encoding="utf-8"))["distribution"]
    del now["croissant.json"]
    assert {one["contentUrl"]: one["sha256"] for one in described} == now


def test_files_of_the_run_are_copied_bit_for_bit(run: Run, published: Path) -> None:
    copies = {
        "schedule/schedule.parquet": "schedule.parquet",
        "schedule/schedule.csv": "schedule.csv",
        "manifests/schedule.manifest.json": "schedule.manifest.json",
        **{name: name for name in ("process.yaml", "excluded.csv", "prompts/v1.txt", "prompts/user.txt")},
    }
    for copy, original in copies.items():
        assert (published / copy).read_bytes() == (run.path / original).read_bytes(), copy


def test_the_same_run_gives_the_same_bytes(run: Run, published: Path, tmp_path: Path) -> None:
    again = publish_dataset(run.path, tmp_path / "again", license="cc-by-4.0").path
    assert everything(again) == everything(published)


def test_the_snippets_of_the_card_run_in_the_folder(
    run: Run, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.chdir(published)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    load, _, check_files, check_beta = python_of(published)
    for block in (load.replace("OWNER/NAME", str(published)), check_files, check_beta):
        exec(compile(block, "README.md", "exec"), {})
    (published / "excluded.csv").write_bytes(changed := everything(published)["excluded.csv"] + b" ")
    try:
        with pytest.raises(AssertionError, match=re.escape("excluded.csv")):
            exec(check_files, {})
    finally:
        (published / "excluded.csv").write_bytes(changed[:-1])


def test_the_card_accounts_for_every_source_row(published: Path) -> None:
    text = card(published)
    assert "13 source rows: 11 have a β, 2 have none" in text
    assert "| annotate | `no_valid_answer` | 1 |" in text
    assert "| prepare | `empty_field` | 1 |" in text


def test_the_card_tells_beta_by_category_agreement_and_doubt(run: Run, published: Path) -> None:
    text, evidence = card(published), read_evidence(run)
    style = evidence.beta_i[evidence.category_i == "Style"]
    assert f"| Style | {len(style)} | {style.mean():.4f} | {style.min():.4f} | {style.max():.4f} |" in text
    assert "| annotators | 1.000 | 1.000 to 1.000 |" in text
    assert "Likely label errors: 1 of 11 pairs." in text
    assert run.process.lambda_hash in text
    assert all(sha in text for sha in run.process.pack.hashes.values())


def test_no_line_of_a_card_ends_in_a_space(run: Run, published: Path, tmp_path: Path) -> None:
    cards = [published, *(export(run.path, tmp_path / name, name).path for name in TRAINERS)]
    lines = [line for folder in cards for line in card(folder).splitlines()]
    assert [line for line in lines if line != line.rstrip()] == []


def test_front_matter_names_licence_configs_and_features(published: Path) -> None:
    keys = front(published)
    assert keys["license"] == "cc-by-4.0"
    assert [config["config_name"] for config in keys["configs"]] == ["default", "schedule"]
    assert keys["size_categories"] == ["n<1K"]
    assert {"dpo", "preference", "sp2dpo"} <= set(keys["tags"])
    for config, info in zip(keys["configs"], keys["dataset_info"], strict=True):
        schema = pq.read_schema(published / config["data_files"][0]["path"])
        assert [feature["name"] for feature in info["features"]] == schema.names
        assert info["splits"][0]["num_examples"] == 11


def test_without_a_licence_none_is_guessed(run: Run, tmp_path: Path) -> None:
    made = publish_dataset(run.path, tmp_path / "out")
    assert (front(made.path)["license"], front(made.path)["license_name"]) == ("other", "not-stated")
    assert "**Licence: not stated.**" in card(made.path)
    assert json.loads((made.path / "croissant.json").read_text(encoding="utf-8"))["license"] == "not stated"
    assert "no licence is stated" in made.notes[0]


def test_a_licence_that_is_no_identifier_is_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="repositories-licenses"):
        publish_dataset(run.path, tmp_path / "out", license="Apache 2.0\nevil: yes")
    assert list(tmp_path.iterdir()) == []


def test_without_texts_no_text_is_in_any_file_and_the_join_brings_them_back(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = publish_dataset(run.path, tmp_path / "out", texts=False)
    names = everything(made.path)
    assert not [name for name in names if name.startswith("data/")]
    assert not [name for name, data in names.items() if b"answer 1" in data or b"Question" in data]
    schedule = pq.read_table(made.path / "schedule/schedule.parquet")
    assert not [name for name in schedule.column_names if "Good answer" in str(schedule[name].to_pylist())]
    assert [config["config_name"] for config in front(made.path)["configs"]] == ["schedule"]
    monkeypatch.chdir(made.path)
    (made.path / "pairs.jsonl").write_bytes((run.path.parent / "pairs.jsonl").read_bytes())
    space: dict[str, Any] = {}
    exec(next(block for block in python_of(made.path) if "prepare" in block), space)
    train = pq.read_table(publish_dataset(run.path, tmp_path / "with").path / TRAIN)
    for column in ("prompt", "chosen", "rejected"):
        assert space["train"][column].to_pylist() == train[column].to_pylist()
    assert space["train"]["beta"].to_pylist() == read_evidence(run).beta_i.tolist()


def test_the_files_of_a_dataset_without_texts_load_too(run: Run, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = publish_dataset(run.path, tmp_path / "out", texts=False)
    loaded = datasets.load_dataset(str(made.path), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["beta"] == read_evidence(run).beta_i.tolist()


def test_every_snippet_of_a_card_without_texts_runs_in_the_folder(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    made = publish_dataset(run.path, tmp_path / "out", texts=False)
    (made.path / "pairs.jsonl").write_bytes((run.path.parent / "pairs.jsonl").read_bytes())
    monkeypatch.chdir(made.path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    blocks = python_of(made.path)
    assert len(blocks) == 4
    space: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block.replace("OWNER/NAME", str(made.path)), "README.md", "exec"), space)
        if "load_dataset" in block:
            assert space["schedule"]["beta"] == read_evidence(run).beta_i.tolist()


def test_one_pair_one_annotator_one_prompt_is_enough(tmp_path: Path) -> None:
    small = make_run(tmp_path, [pair(3)], answer, variants=("v1",))
    made = publish_dataset(small.path, tmp_path / "out")
    assert made.pairs == 1
    assert "Each pair was judged once, so nothing is known about agreement." in card(made.path)
    assert "what 1 annotator under 1 prompt said" in card(made.path)


def test_hostile_texts_stay_in_the_data_and_reach_no_page(tmp_path: Path) -> None:
    hostile = make_run(tmp_path, [pair(0, HOSTILE), pair(1)], answer)
    made = publish_dataset(hostile.path, tmp_path / "out")
    train = pq.read_table(made.path / TRAIN).to_pylist()
    assert HOSTILE in train[0]["prompt"][0]["content"]
    assert not [name for name, data in everything(made.path).items() if b"onerror" in data and name != TRAIN]


@pytest.mark.parametrize("value", ["a|b", "<b>x</b>", "`c`", "[l](u)", "two\nlines", "*e*", "x_y_"])
def test_a_value_in_a_table_of_the_card_stays_text(value: str) -> None:
    markdown_it = pytest.importorskip("markdown_it")
    html = markdown_it.MarkdownIt("commonmark").enable("table").render(f"| h |\n| --- |\n| {cell(value)} |\n")
    shown = re.search(r"<td>(.*)</td>", html)
    assert shown is not None
    assert shown[1] == " ".join(value.split()).replace("<", "&lt;").replace(">", "&gt;")


def changed_schedule(folder: Path, **settings: Any) -> Run:
    """A run whose process file has another section `schedule`."""
    first = make_run(folder / "first", [pair(n) for n in range(7)], answer, annotators=("a", "b"))
    keys = yaml.safe_load((folder / "first/process.yaml").read_text(encoding="utf-8")) | {"schedule": settings}
    (folder / "first/process.yaml").write_text(yaml.safe_dump(keys), encoding="utf-8")
    run = open_run(load_process(folder / "first/process.yaml"), folder / "run")
    assert run.process.lambda_hash != first.process.lambda_hash
    prepare_run(run)
    annotate(run)
    schedule_run(run)
    return run


def test_another_aggregation_is_named_and_the_default_formula_is_not_claimed(tmp_path: Path) -> None:
    run = changed_schedule(tmp_path, over_annotators="median", damping={"form": "rational", "strength": 2.0})
    text = card(publish_dataset(run.path, tmp_path / "out").path)
    assert ". Median over the annotators (2)" in text
    assert ". Less where the prompts disagree" in text
    assert "schedule_beta" not in text


def test_missing_answers_stay_missing_and_a_schedule_with_them_loads(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    run = changed_schedule(tmp_path, min_calls=3)
    made = publish_dataset(run.path, tmp_path / "out")
    assert made.pairs == 7
    loaded = datasets.load_dataset(str(made.path), "schedule", split="train", cache_dir=str(tmp_path / "cache"))
    row = loaded[5]
    assert (row["valid_calls"], row["category_b_v1"], row["magnitude_b_v1"]) == (3, None, None)
    assert loaded["beta"] == read_evidence(run).beta_i.tolist()


@pytest.mark.parametrize("beta_max", [0.3, 0.25])
def test_with_missing_answers_the_card_has_the_lines_that_make_beta_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beta_max: float
) -> None:
    def gaps(n: int, annotator: str, variant: str) -> str:
        return "" if (n, annotator) == (5, "b") or (n, variant) == (2, "v3") else answer(n, annotator, variant)

    sources = [pair(n) for n in range(7)]
    of = {"min_calls": 3, "beta_max": beta_max}
    run = make_run(tmp_path / "run", sources, gaps, annotators=("a", "b"), schedule=of)
    made = publish_dataset(run.path, tmp_path / "out")
    assert made.pairs == 7
    monkeypatch.chdir(made.path)
    check = python_of(made.path)[-1]
    assert "nanmedian" in check
    exec(compile(check, "README.md", "exec"), {})
    path = made.path / "schedule/schedule.parquet"
    table = pq.read_table(path)
    changed = table["beta"].to_numpy().copy()
    changed[5] += 0.001
    pq.write_table(table.set_column(table.schema.get_field_index("beta"), "beta", [changed]), path)
    with pytest.raises(AssertionError):
        exec(compile(check, "README.md", "exec"), {})


def test_pairs_outside_the_common_envelope_but_inside_that_of_their_category_are_published(tmp_path: Path) -> None:
    run = changed_schedule(tmp_path, envelopes={"Safety": {"beta_min": 0.4, "beta_max": 0.5}})
    made = publish_dataset(run.path, tmp_path / "out")
    assert max(pq.read_table(made.path / TRAIN)["beta"].to_pylist()) > 0.4


def test_served_models_what_was_sent_and_prices_are_told(new_run: NewRun, tmp_path: Path, key: str) -> None:
    price = {"input": 1.0, "output": 2.0, "as_of": "2026-01-31"}
    one = teacher(api_key_env="TEACHER_KEY", price=price, omit=["seed"])
    run = new_run(pairs=rows(3), panel={"annotators": [one]})
    with teacher_server(lambda asked: completion(model="model-of-teacher-2026-01-15")) as server:
        annotate(run, connector=server.connector, concurrency=1)
    schedule_run(run)
    made = publish_dataset(run.path, tmp_path / "out")
    text = card(made.path)
    assert "| teacher | chat_json | live | model-of-teacher | model-of-teacher-2026-01-15" in text
    assert "temperature 0.1" in text
    assert "| repetition\\_penalty, seed |" in text
    assert "2026-01-31 (teacher)" in text
    assert not [name for name, data in everything(made.path).items() if KEY.encode() in data]


def test_a_predictor_in_the_panel_is_told_as_one_voice_and_as_no_other_model(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    from sp2dpo.distill.make import distill_run

    judges = make_run(tmp_path / "judges", [pair(n, f"of topic {n % 7}") for n in range(60)], answer)
    distill_run(judges, tmp_path / "predictor")
    make_run(tmp_path / "served", [pair(n) for n in range(6)], answer)
    keys = yaml.safe_load((tmp_path / "served/process.yaml").read_text(encoding="utf-8"))
    keys["panel"]["annotators"].append({"name": "local", "kind": "distilled", "model": "../predictor"})
    (tmp_path / "served/process.yaml").write_text(yaml.safe_dump(keys), encoding="utf-8")
    run = open_run(load_process(tmp_path / "served/process.yaml"), tmp_path / "second")
    prepare_run(run)
    annotate(run)
    schedule_run(run)
    text = card(publish_dataset(run.path, tmp_path / "out").path)
    (row,) = [line for line in text.splitlines() if line.startswith("| local | distilled | predicted |")]
    assert "another model" not in row
    assert "Predicted by a local model, not judged: local. A predictor repeats what another panel said" in text


def test_a_cap_that_was_sent_under_its_new_name_is_not_listed_as_missing() -> None:
    asked = [
        Setting("t", 5, "max_tokens", "64", "–", "not sent"),
        Setting("t", 5, "top_p", "0.8", "–", "not sent"),
        Setting("t", 5, "max_completion_tokens", "–", "64", "added for this model"),
        Setting("t", 5, "response_format", "–", '{"json_schema": {"name": "x"}, "type": "json_schema"}', ""),
    ]
    (row,) = _decoding(asked)
    assert row.not_sent == "top_p"
    assert row.sent == "max_completion_tokens 64, response_format json_schema"


def test_paths_of_this_machine_in_the_process_are_pointed_out(tmp_path: Path) -> None:
    make_run(tmp_path, [pair(1)], answer)
    keys = yaml.safe_load((tmp_path / "process.yaml").read_text(encoding="utf-8"))
    keys["data"]["source"] = str(tmp_path / "pairs.jsonl")
    (tmp_path / "process.yaml").write_text(yaml.safe_dump(keys), encoding="utf-8")
    run = open_run(load_process(tmp_path / "process.yaml"), tmp_path / "second")
    prepare_run(run)
    annotate(run)
    schedule_run(run)
    made = publish_dataset(run.path, tmp_path / "out", license="mit")
    assert str(tmp_path / "pairs.jsonl") in made.notes[0]
    assert str(tmp_path) not in card(made.path)


# What is refused


@pytest.mark.parametrize("name", ["schedule.parquet", "schedule.csv", "excluded.csv", "pairs.parquet", "gaps.parquet"])
def test_a_run_that_is_not_as_its_manifest_says_is_not_published(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path, [pair(1), pair(2)], answer)
    data = bytearray((run.path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (run.path / name).write_bytes(data)
    for make in (
        lambda: publish_dataset(run.path, tmp_path / "out"),
        lambda: export(run.path, tmp_path / "out", "trl"),
    ):
        with pytest.raises(Unfinished, match=rf"{re.escape(name)} .*sp2dpo verify"):
            make()
    assert not (tmp_path / "out").exists()


def test_answers_that_came_after_the_schedule_are_not_passed_over(tmp_path: Path) -> None:
    run = make_run(tmp_path, [pair(n) for n in range(6)], answer, annotators=("a", "b"))
    with open_ledger(run.calls) as ledger:
        with open_calls(run.calls) as log:
            first = next(iter(log))
        ledger.append(replace(first, attempt=2))
    with pytest.raises(Unfinished, match=r"calls\.sqlite"):
        publish_dataset(run.path, tmp_path / "out")


def test_a_run_without_a_schedule_names_the_command(tmp_path: Path) -> None:
    run = make_run(tmp_path, [pair(1)], answer)
    (run.path / "schedule.manifest.json").unlink()
    with pytest.raises(RunDirError, match="sp2dpo schedule"):
        publish_dataset(run.path, tmp_path / "out")


def test_a_folder_of_someone_else_is_left_alone_and_ones_own_is_replaced(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(RunDirError, match=r"publish\.manifest\.json"):
        publish_dataset(run.path, out)
    assert (out / "thesis.txt").read_text() == "mine"
    (out / "thesis.txt").unlink()
    publish_dataset(run.path, out)
    export(run.path, out, "axolotl")
    assert sorted(everything(out)) == ["README.md", "publish.manifest.json", "train.jsonl"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_publishing_again_keeps_every_file_that_is_not_its_own(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    publish_dataset(run.path, out)
    mine = {".git/HEAD": b"ref", "notes.md": b"mine", "data/mine.txt": b"mine"}
    for name, data in mine.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(data)
    publish_dataset(run.path, out, license="mit")
    fresh = everything(publish_dataset(run.path, tmp_path / "fresh", license="mit").path)
    assert everything(out) == fresh | mine
    export(run.path, out, "axolotl")
    assert everything(out) == everything(export(run.path, tmp_path / "axolotl", "axolotl").path) | mine
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == [".git", "data"]


@pytest.mark.parametrize("name", ["README.md", TRAIN])
def test_a_published_file_that_was_changed_is_named_and_nothing_is_touched(run: Run, tmp_path: Path, name: str) -> None:
    out = publish_dataset(run.path, tmp_path / "out").path
    (out / name).write_bytes(b"mine")
    before = everything(out)
    with pytest.raises(RunDirError, match=rf"changed in .*: {re.escape(name)}\..*another name, or delete it"):
        export(run.path, out, "trl")
    assert everything(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (out / name).unlink()
    export(run.path, out, "trl")
    assert sorted(everything(out)) == ["README.md", "publish.manifest.json", "train.parquet"]


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl/mine"])
def test_a_file_of_someone_else_is_not_overwritten_by_a_new_one(run: Run, tmp_path: Path, name: str) -> None:
    out = publish_dataset(run.path, tmp_path / "out").path
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_bytes(b"mine")
    before = everything(out)
    with pytest.raises(RunDirError, match=r"in the way of train\.jsonl\. Nothing was touched"):
        export(run.path, out, "axolotl")
    assert everything(out) == before


def test_a_file_in_the_place_of_a_new_subfolder_is_not_overwritten(run: Run, tmp_path: Path) -> None:
    out = export(run.path, tmp_path / "out", "trl").path
    (out / "data").write_bytes(b"mine")
    before = everything(out)
    with pytest.raises(RunDirError, match=rf"in the way of {TRAIN}"):
        publish_dataset(run.path, out)
    assert everything(out) == before


@pytest.mark.parametrize("done", range(0, 24, 4))
def test_a_stop_while_files_are_exchanged_is_made_good_by_the_next_start(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    out = publish_dataset(run.path, tmp_path / "out").path
    (out / "notes.md").write_bytes(b"mine")
    steps = 0

    def stop_after(step: Any) -> Any:
        def counted(*given: Any, **more: Any) -> Any:
            nonlocal steps
            if Path(given[-1]).is_relative_to(out) and steps >= done:
                raise KeyboardInterrupt
            steps += Path(given[-1]).is_relative_to(out)
            return step(*given, **more)

        return counted

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", stop_after(Path.unlink))
        patched.setattr("shutil.move", stop_after(shutil.move))
        with pytest.raises(KeyboardInterrupt):
            publish_dataset(run.path, out, license="mit")
    assert (out / "publish.manifest.json").exists() == (done == 0)
    publish_dataset(run.path, out, license="mit")
    fresh = publish_dataset(run.path, tmp_path / "fresh", license="mit").path
    assert everything(out) == everything(fresh) | {"notes.md": b"mine"}


@pytest.mark.parametrize(
    "manifest", ["", "{}", "[]", '{"files": {"../thesis.txt": ["%s"]}}', '{"files": {"/thesis.txt": "%s"}}']
)
def test_a_manifest_that_is_not_ours_deletes_nothing(run: Run, tmp_path: Path, manifest: str) -> None:
    (tmp_path / "thesis.txt").write_bytes(b"mine")
    (tmp_path / "out").mkdir()
    text = manifest.replace("%s", hashlib.sha256(b"mine").hexdigest())
    (tmp_path / "out/publish.manifest.json").write_text(text)
    with pytest.raises(RunDirError, match="is not as sp2dpo publish wrote it"):
        export(run.path, tmp_path / "out", "trl")
    assert (tmp_path / "thesis.txt").read_bytes() == b"mine"


def test_the_folder_that_one_is_in_can_be_the_target(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export(run.path, Path(), "trl")
    assert sorted(made()) == ["README.md", "publish.manifest.json", "train.parquet"]


@pytest.mark.parametrize("out", ["afile", "afile/x", "/proc/x", "/proc/x/y"])
def test_a_path_where_no_folder_can_be_is_one_line_and_leaves_nothing(sp2dpo: Sp2dpo, run: Run, out: str) -> None:
    Path("afile").write_bytes(b"mine")
    ran = sp2dpo("publish", run.path, "-o", out, "--for", "trl")
    assert ran.code == 2
    said = ran.err.splitlines()[-1]
    assert said.startswith(f"sp2dpo: {out} ")
    assert ("-o" in said, ".partial" in said) == (True, False)
    assert (made(), Path("afile").read_bytes()) == (["afile"], b"mine")


def test_folders_made_on_the_way_go_if_nothing_is_published(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [odd_rows()[1]], answer)
    with pytest.raises(InputError, match="takes none"):
        export(run.path, tmp_path / "new/deep/out", "llama-factory")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_failure_in_the_middle_keeps_the_folder_that_was_there(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_dataset(run.path, tmp_path / "out")
    before = everything(tmp_path / "out")

    def fails(*_: Any, **__: Any) -> None:
        raise OSError("disk")

    monkeypatch.setattr("sp2dpo.publish.dataset.write_card", fails)
    with pytest.raises(OSError, match="disk"):
        publish_dataset(run.path, tmp_path / "out", license="mit")
    assert everything(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# Other trainers


def exported(run: Run, tmp_path: Path, name: str) -> tuple[list[dict[str, Any]], Path]:
    made = export(run.path, tmp_path / name, name)
    lines = (made.path / TRAINERS[name].file).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines], made.path


def odd_rows() -> list[dict[str, Any]]:
    """A developer message, two user messages in a row, a reply of three messages, a tool's answer, and a plain row."""
    developer = pair(0) | {"prompt": [says("developer", "Terse."), says("user", "Why?")]}
    doubled = pair(1) | {"prompt": [says("user", "One."), says("user", "Two.")]}
    several = pair(2)
    several["rejected"] = [says("assistant", "No."), says("user", "Really?"), says("assistant", "Yes.")]
    tool = pair(3) | {"prompt": [says("user", "Sum?"), says("assistant", "add(1, 2)"), says("tool", "3")]}
    return [developer, doubled, several, tool, pair(4)]


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("odd"), odd_rows(), answer)


def test_trl_gets_prompt_chosen_rejected_and_beta_that_its_own_tools_take(run: Run, tmp_path: Path) -> None:
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    made = export(run.path, tmp_path / "out", "trl")
    train = datasets.load_dataset(
        "parquet", data_files=str(made.path / "train.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert trl.data_utils.is_conversational(train[0])
    assert train[3] == trl.data_utils.maybe_extract_prompt(train[3])
    assert train[3]["prompt"] == LONG
    assert train["beta"] == read_evidence(run).beta_i.astype(np.float32).tolist()


@pytest.mark.slow
def test_a_step_of_trl_and_of_ours_runs_on_the_export(run: Run, tmp_path: Path) -> None:
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sp2dpo.train import PairwiseDPOConfig, PairwiseDPOTrainer
    from sp2dpo.train.toy import make_toy

    made = export(run.path, tmp_path / "out", "trl")
    train = datasets.load_dataset("parquet", data_files=str(made.path / "train.parquet"), split="train")
    make_toy(tmp_path / "toy", [row["prompt"] + row["chosen"] for row in train], steps=1)
    for trainer, config in ((trl.DPOTrainer, trl.DPOConfig), (PairwiseDPOTrainer, PairwiseDPOConfig)):
        arguments = config(
            output_dir=str(tmp_path / "run"),
            max_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=False,
            save_strategy="no",
        )
        done = trainer(
            AutoModelForCausalLM.from_pretrained(tmp_path / "toy"),
            args=arguments,
            train_dataset=train,
            processing_class=AutoTokenizer.from_pretrained(tmp_path / "toy"),
        ).train()
        assert done.training_loss == pytest.approx(np.log(2), abs=1e-3)


def test_axolotl_gets_messages_and_one_message_for_each_reply(odd: Run, tmp_path: Path) -> None:
    got, folder = exported(odd, tmp_path, "axolotl")
    assert got[0]["messages"] == [says("system", "Terse."), says("user", "Why?")]
    assert got[0]["chosen"] == says("assistant", "Good answer 0 ")
    roles = set(yaml.safe_load(re.findall(r"```yaml\n(.*?)```", card(folder), re.DOTALL)[0])["datasets"][0]["roles"])
    assert {message["role"] for row in got for message in row["messages"]} <= roles
    left = pyarrow.csv.read_csv(folder / "left_out.csv").to_pylist()
    assert [(row["prompt_id"], row["reason"]) for row in left] == [("p2", "reply_of_several_messages")]


def test_llama_factory_gets_alternating_turns_and_a_dataset_info_that_fits_them(odd: Run, tmp_path: Path) -> None:
    got, folder = exported(odd, tmp_path, "llama-factory")
    info = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))["sp2dpo"]
    assert (info["formatting"], info["ranking"]) == ("sharegpt", True)
    assert (folder / info["file_name"]).is_file()
    tags = info["tags"]
    for row in got:
        turns = [message[tags["role_tag"]] for message in row[info["columns"]["messages"]]]
        turns = turns[turns[0] == tags["system_tag"] :]
        assert len(turns) % 2 == 1
        assert set(turns[::2]) <= {tags["user_tag"], tags["observation_tag"]}
        assert set(turns[1::2]) <= {tags["assistant_tag"]}
        assert row[info["columns"]["chosen"]][tags["role_tag"]] == tags["assistant_tag"]
        assert isinstance(row[info["columns"]["rejected"]][tags["content_tag"]], str)
    assert [row["prompt_id"] for row in got] == ["p0", "p3", "p4"]
    assert "| `turns_do_not_alternate` | 1 |" in card(folder)
    assert "| `reply_of_several_messages` | 1 |" in card(folder)


def test_openrlhf_gets_lists_that_its_chat_template_call_can_add_up(odd: Run, tmp_path: Path) -> None:
    got, folder = exported(odd, tmp_path, "openrlhf")
    assert len(got) == 5
    assert [message["role"] for message in got[2]["prompt"] + got[2]["rejected"]][1:] == [
        "assistant",
        "user",
        "assistant",
    ]
    assert "--data.prompt_key prompt --data.chosen_key chosen --data.rejected_key rejected" in card(folder)


def test_ms_swift_gets_both_whole_conversations_with_roles_that_it_knows(odd: Run, tmp_path: Path) -> None:
    got, _ = exported(odd, tmp_path, "ms-swift")
    assert len(got) == 5
    assert got[0]["messages"] == [says("system", "Terse."), says("user", "Why?"), says("assistant", "Good answer 0 ")]
    assert got[2]["rejected_messages"][-3:] == odd_rows()[2]["rejected"]
    known = {"system", "user", "assistant", "tool"}
    assert {m["role"] for row in got for m in row["messages"] + row["rejected_messages"]} <= known


@pytest.mark.parametrize("name", TRAINERS)
def test_every_row_of_an_export_has_its_pair_and_beta(run: Run, tmp_path: Path, name: str) -> None:
    made = export(run.path, tmp_path / "out", name)
    path = made.path / TRAINERS[name].file
    if path.suffix == ".parquet":
        got = pq.read_table(path).to_pylist()
    else:
        got = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    evidence = read_evidence(run)
    assert [row["pair_id"] for row in got] == evidence.schedule["pair_id"].to_pylist()
    assert np.allclose([row["beta"] for row in got], evidence.beta_i, rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", TRAINERS)
def test_every_export_says_who_can_use_beta_and_is_the_same_each_time(run: Run, tmp_path: Path, name: str) -> None:
    one, other = (export(run.path, tmp_path / folder, name).path for folder in ("one", "other"))
    assert everything(one) == everything(other)
    text = card(one)
    assert all(f"{trainer.title}" in text and trainer.beta in text for trainer in TRAINERS.values())
    assert ("plain DPO with one β for all pairs" in text) == (name != "trl")


def test_a_trainer_that_can_take_no_row_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path, [odd_rows()[1]], answer)
    with pytest.raises(InputError, match="takes none of the 1 pairs: turns_do_not_alternate"):
        export(run.path, tmp_path / "out", "llama-factory")
    assert not (tmp_path / "out").exists()


# The hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with fake_hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def push(sp2dpo: Sp2dpo, run: Run, *more: str) -> Any:
    ran = sp2dpo("publish", run.path, "-o", "out", "--push-to-hub", "me/mine", "--json", *more)
    assert TOKEN not in ran.out + ran.err
    return ran


def test_a_push_uploads_the_folder_as_it_is(sp2dpo: Sp2dpo, run: Run, hub: Hub) -> None:
    ran = push(sp2dpo, run, "--license", "mit")
    assert ran.code == 0
    assert json.loads(ran.out)["url"] == f"{hub.url}/datasets/me/mine"
    assert hub.files == everything(Path("out"))
    assert f"Bearer {TOKEN}" in hub.tokens
    assert hub.private is False
    assert hub.messages == [f"β of 11 pairs, λ {run.process.lambda_hash[:12]}"]
    assert 'load_dataset("me/mine", split="train")' in card(Path("out"))


def test_texts_of_an_earlier_push_are_deleted_by_one_without_texts(sp2dpo: Sp2dpo, run: Run, hub: Hub) -> None:
    push(sp2dpo, run)
    hub.files["LICENSE"] = b"theirs"
    assert TRAIN in hub.files
    assert push(sp2dpo, run, "--without-texts").code == 0
    assert TRAIN not in hub.files
    assert hub.files.pop("LICENSE") == b"theirs"
    assert hub.files == everything(Path("out"))


def test_a_push_uploads_no_file_that_publish_did_not_make(sp2dpo: Sp2dpo, run: Run, hub: Hub) -> None:
    assert sp2dpo("publish", run.path, "-o", "out").code == 0
    for name in ("notes.md", "data/mine.txt", "prompts/mine.txt"):
        Path("out", name).write_bytes(b"mine")
    assert push(sp2dpo, run).code == 0
    assert b"mine" not in hub.files.values()
    assert len(hub.files) == len(everything(Path("out"))) - 3


def test_a_private_push_makes_a_private_repository_and_never_fills_a_public_one(
    sp2dpo: Sp2dpo, run: Run, hub: Hub
) -> None:
    assert push(sp2dpo, run, "--private").code == 0
    assert hub.private is True
    hub.private, hub.files = False, {}
    ran = push(sp2dpo, run, "--private")
    assert (ran.code, hub.files) == (2, {})
    assert "is there and is public; nothing was uploaded" in ran.err


def test_without_private_the_owner_s_default_holds(sp2dpo: Sp2dpo, run: Run, hub: Hub) -> None:
    hub.default = "private"
    assert push(sp2dpo, run).code == 0
    assert hub.private is True


@pytest.mark.parametrize(
    ("status", "said"),
    [(401, "not valid"), (403, "may not write to me/mine"), (404, "no owner 'me'"), (400, "refused …")],
)
def test_a_refusal_of_the_hub_is_one_line_and_keeps_the_folder(
    sp2dpo: Sp2dpo, run: Run, hub: Hub, status: int, said: str
) -> None:
    hub.refuse = status
    ran = push(sp2dpo, run)
    assert ran.code == 1
    assert said in ran.err
    assert "hf_this" not in ran.err
    assert (Path("out") / TRAIN).is_file()


def test_a_hub_that_is_not_there_is_one_line(
    sp2dpo: Sp2dpo, run: Run, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    ran = push(sp2dpo, run)
    assert ran.code == 1
    assert "the hub did not take it: ConnectError" in ran.err


def test_without_a_token_or_a_network_nothing_is_made(
    sp2dpo: Sp2dpo, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    ran = push(sp2dpo, run)
    assert (ran.code, "HF_TOKEN" in ran.err, made()) == (2, True, [])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    ran = push(sp2dpo, run)
    assert (ran.code, "HF_HUB_OFFLINE is set" in ran.err, made()) == (2, True, [])


# The command


def test_the_command_gives_counts_as_json_and_talks_on_stderr(sp2dpo: Sp2dpo, run: Run) -> None:
    ran = sp2dpo("publish", run.path, "-o", "out", "--json")
    assert json.loads(ran.out) == {"folder": "out", "pairs": 11, "files": len(everything(Path("out"))) - 1}
    assert "no licence is stated" in ran.err
    ran = sp2dpo("publish", run.path, "-o", "ax", "--for", "axolotl", "--json")
    assert json.loads(ran.out) == {"folder": "ax", "pairs": 11, "left_out": 0}
    assert "nothing reads it" in ran.err


def test_without_the_report_extra_the_dataset_names_it_and_exports_work(
    sp2dpo: Sp2dpo, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith(("sp2dpo.publish", "sp2dpo.audit"))]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("krippendorff", "matplotlib", "sklearn"):
        monkeypatch.setitem(sys.modules, name, None)
    ran = sp2dpo("publish", run.path, "-o", "out")
    assert (ran.code, "pip install 'sp2dpo[report]'" in ran.err, made()) == (2, True, [])
    assert sp2dpo("publish", run.path, "-o", "out", "--for", "ms-swift").code == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--for", "axolotal"), "did you mean 'axolotl'?"),
        (("--for", "trl", "--license", "mit"), "leave out the options of the dataset"),
        (("--for", "trl", "--without-texts"), "leave out the options of the dataset"),
        (("--for", "trl", "--push-to-hub", "me/mine"), "leave out the options of the dataset"),
        (("--private",), "goes with --push-to-hub"),
        (("--push-to-hub", "mine"), "is not OWNER/NAME"),
    ],
)
def test_options_that_do_not_fit_are_refused(sp2dpo: Sp2dpo, run: Run, options: tuple[str, ...], said: str) -> None:
    ran = sp2dpo("publish", run.path, "-o", "out", *options)
    assert (ran.code, said in ran.err, made()) == (2, True, [])


def test_no_run_directory_is_one_line(sp2dpo: Sp2dpo, tmp_path: Path) -> None:
    ran = sp2dpo("publish", tmp_path, "-o", "out")
    assert ran.code == 2
    assert "is no run directory" in ran.err


def test_the_paper_s_64_columns_are_the_first_of_the_published_csv(tmp_path: Path) -> None:
    run = make_run(tmp_path, [pair(1)], answer, annotators=("a", "c", "d"))
    made = publish_dataset(run.path, tmp_path / "out")
    header = (
        (made.path / "schedule/schedule.csv").read_text(encoding="utf-8").splitlines()[0].replace('"', "").split(",")
    )
    assert header == read_schedule(run).column_names
    papers = [name for name in header if name != "pair_id"][:64]
    assert (papers[:2], papers[-1]) == (["prompt_id", "prompt_variant_count"], "beta_random")
