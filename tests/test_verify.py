"""Verification: one thing at a time is changed in a finished run, and each change is found and named."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import GOOD, Sp2dpo, rows, teacher, write_process
from forging import cover_up, forge_call, rewrite_manifest
from report_runs import make_run, pair
from sp2dpo.annotate.run import annotate
from sp2dpo.annotate.teacher import body_of, request_hash
from sp2dpo.calls import open_calls, open_ledger
from sp2dpo.decision import LEVELS
from sp2dpo.errors import RunDirError, Unfinished
from sp2dpo.gaps import gaps_table
from sp2dpo.hashing import sha256_file
from sp2dpo.process import load_process
from sp2dpo.rubric import CATEGORIES
from sp2dpo.runs import open_run, read_run
from sp2dpo.stages import prepare_run, schedule_run
from sp2dpo.tables import write_manifest
from sp2dpo.verify import verify
from teacher_server import Answer, Asked, Handler, teacher_server


def number_in(asked: Asked) -> int:
    return int(re.findall(r"question (\d+)", asked.text)[0])


def judged(asked: Asked) -> Answer:
    """A gap that depends on the question; nothing about the last pair."""
    number = number_in(asked)
    text = GOOD.replace("0.5", f"0.{number}5") if number < 5 else "no idea"
    return Answer({"choices": [{"finish_reason": "stop", "message": {"content": text}}]})


def decided(asked: Asked) -> Answer:
    """The same as probabilities, for two variants; a category that is none about the last pair."""
    number = number_in(asked)
    category = "Style" if number < 5 else "Tone"
    answers: dict[str, Any] = {}
    for v in ("v1", "v2"):
        answers[f"category_{v}"] = {
            "type": "choice",
            "probabilities": dict.fromkeys(CATEGORIES, 0.0) | {category: 1.0},
        }
        answers[f"magnitude_{v}"] = {
            "type": "score",
            "probabilities": dict.fromkeys(LEVELS, 0.0) | {"0": 1 - number / 10, "4": number / 10},
        }
        answers[f"confidence_{v}"] = {"type": "noul", "noul": 0.4}
    return Answer({"answers": answers})


def make_finished(folder: Path, handler: Handler, **more: Any) -> Path:
    """A run of 7 rows: 5 in the schedule, one dropped as empty, one without a valid answer."""
    pairs = [*rows(6), {"prompt": "question 9", "chosen": " ", "rejected": "x"}]
    with teacher_server(handler) as server:
        annotators = [teacher(name, base_url=server.base_url, **more) for name in ("a", "b")]
        panel = {"variants": ["v1", "v2"], "annotators": annotators}
        run = open_run(load_process(write_process(folder, pairs=pairs, panel=panel)), folder / "run")
        prepare_run(run)
        annotate(run, concurrency=1)
    schedule_run(run)
    return run.path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_finished(tmp_path_factory.mktemp("finished"), judged)


@pytest.fixture(scope="module")
def finished_decisions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_finished(tmp_path_factory.mktemp("decisions"), decided, kind="decisions", api="systemone")


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def difference(run_dir: Path) -> str:
    with pytest.raises(Unfinished) as caught:
        list(verify(run_dir))
    return str(caught.value)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) >= 1
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def set_cell(path: Path, column: str, row: int, value: Any) -> None:
    table = pq.read_table(path)
    values = table[column].to_pylist()
    assert values[row] != value
    values[row] = value
    where = table.column_names.index(column)
    pq.write_table(table.set_column(where, column, pa.array(values, table[column].type)), path)


def test_an_untouched_run_passes_and_says_what_was_checked(run_dir: Path) -> None:
    lines = {line.split()[0]: line for line in verify(run_dir)}
    assert list(lines) == ["process", "prompts", "manifests", "pairs", "calls", "schedule"]
    assert "5 β" in lines["schedule"]
    assert "2 excluded" in lines["schedule"]


def test_a_run_of_typed_decisions_passes_and_a_changed_probability_is_found(
    finished_decisions: Path, tmp_path: Path
) -> None:
    run_dir = Path(shutil.copytree(finished_decisions, tmp_path / "run"))
    assert any("5 β" in line for line in verify(run_dir))
    for sql, named in (
        ("UPDATE calls SET raw_text = replace(raw_text, '0.4', '0.9') WHERE id = 1", "judgement"),
        ("UPDATE calls SET params_sent = replace(params_sent, '\"v2\"', '\"v1\"') WHERE id = 1", "request_hash"),
        ("UPDATE calls SET params_sent = '{}' WHERE id = 1", "params_sent"),
        ("UPDATE calls SET kind = 'chat_json' WHERE id = 1", "request_hash"),
    ):
        forged = Path(shutil.copytree(run_dir, tmp_path / named / str(len(sql))))
        forge_call(forged, sql)
        cover_up(forged)
        assert named in difference(forged)


def test_a_run_may_be_moved_and_verified_elsewhere_without_its_source(run_dir: Path, tmp_path: Path) -> None:
    assert list(verify(Path(shutil.move(run_dir, tmp_path / "elsewhere"))))


# Files changed, manifests left alone --------------------------------------------------------------------------------

PLAIN_CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a byte of a prompt": (lambda d: edit(d / "prompts/v1.txt", "e", "E"), "prompts/v1.txt"),
    "the template": (lambda d: edit(d / "prompts/user.txt", "Judge", "judge"), "prompts/user.txt"),
    "a setting": (lambda d: edit(d / "process.yaml", "temperature: 0.1", "temperature: 0.2"), "process.yaml"),
    "λ": (lambda d: edit(d / "process.yaml", "\nlambda: ", "\nlambda: 0"), "process.yaml"),
    "a pin": (lambda d: edit(d / "process.yaml", "user: ", "user: 0"), "process.yaml"),
    "a cell of the CSV": (lambda d: edit(d / "schedule.csv", '"Style"', '"Safety"'), "schedule.csv"),
    "a row of excluded.csv": (lambda d: edit(d / "excluded.csv", "no_valid_answer", "empty_field"), "excluded.csv"),
    "a dropped row": (lambda d: edit(d / "pairs.dropped.csv", "empty_field", "unreadable"), "pairs.dropped.csv"),
    "a β": (lambda d: set_cell(d / "schedule.parquet", "beta", 0, 0.3), "schedule.parquet"),
    "a gap": (lambda d: set_cell(d / "gaps.parquet", "magnitude", 1, 0.99), "gaps.parquet"),
    "a pair's id": (lambda d: set_cell(d / "pairs.parquet", "prompt_id", 0, "x"), "pairs.parquet"),
    "a raw answer": (lambda d: forge_call(d, "UPDATE calls SET raw_text = '' WHERE id = 3"), "calls.sqlite"),
    "a latency": (lambda d: forge_call(d, "UPDATE calls SET latency_s = 9.5 WHERE id = 3"), "calls.sqlite"),
    "a call less": (lambda d: forge_call(d, "DELETE FROM calls WHERE id = 21"), "calls.sqlite"),
    "the last call": (
        lambda d: forge_call(d, "DELETE FROM calls WHERE id = (SELECT max(id) FROM calls)"),
        "gaps.manifest.json: hash of its input calls.sqlite",
    ),
    "a link of the chain": (
        lambda d: forge_call(d, "UPDATE calls SET chain = '00' WHERE id = (SELECT max(id) FROM calls)"),
        "calls.sqlite, row 32: link of the chain is '00'",
    ),
}


@pytest.mark.parametrize("what", PLAIN_CHANGES)
def test_a_change_is_found_and_its_file_is_named(run_dir: Path, what: str) -> None:
    change, name = PLAIN_CHANGES[what]
    change(run_dir)
    assert name in difference(run_dir)


@pytest.mark.parametrize("name", ["pairs", "calls", "gaps", "schedule"])
def test_a_manifest_that_is_gone_is_found(run_dir: Path, name: str) -> None:
    (run_dir / f"{name}.manifest.json").unlink()
    assert name in difference(run_dir)


TABLES = ("pairs.parquet", "pairs.dropped.csv", "gaps.parquet", "schedule.parquet", "schedule.csv", "excluded.csv")


@pytest.mark.parametrize("name", [*TABLES, "calls.sqlite", "prompts/v1.txt", "prompts/user.txt"])
def test_a_file_that_is_gone_is_found(run_dir: Path, name: str) -> None:
    (run_dir / name).unlink()
    assert Path(name).name in difference(run_dir)


@pytest.mark.parametrize("name", ["pairs", "gaps", "schedule"])
def test_the_hash_of_every_input_and_λ_in_a_manifest_is_compared(run_dir: Path, name: str) -> None:
    path = run_dir / f"{name}.manifest.json"
    whole = path.read_text(encoding="utf-8")
    for source in json.loads(whole)["inputs"]:
        rewrite_manifest(path, lambda manifest, source=source: manifest["inputs"].update({source: "0" * 64}))
        assert source in difference(run_dir)
        path.write_text(whole, encoding="utf-8")
    rewrite_manifest(path, lambda manifest: manifest.update({"lambda": "0" * 64}))
    assert name in difference(run_dir)


def test_a_folder_that_is_no_run_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match=r"no process\.yaml"):
        list(verify(tmp_path))


# Files changed, and every manifest made to fit ----------------------------------------------------------------------


def mend_judgement(d: Path) -> None:
    forge_call(d, "UPDATE calls SET magnitude = 0.99 WHERE id = (SELECT min(id) FROM calls WHERE outcome = 'ok')")


def resend(d: Path, column: str, value: str) -> None:
    """Ask another endpoint, model or with other settings, and hash the question as it then is."""
    run = read_run(d)
    pairs = {pair["pair_id"]: pair for pair in pq.read_table(run.pairs).to_pylist()}
    forge_call(d, f"UPDATE calls SET {column} = '{value}' WHERE id = 1")
    with open_calls(run.calls) as log:
        call = next(iter(log))
    sent = json.loads(call.params_sent)
    _, body = body_of(call.kind, call.requested_model, run.process.pack, pairs[call.pair_id], [call.variant], sent)
    forge_call(d, f"UPDATE calls SET request_hash = '{request_hash(call.endpoint, body)}' WHERE id = 1")


FORGERIES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a β": (lambda d: set_cell(d / "schedule.parquet", "beta", 2, 0.3), r"schedule.parquet, row 2: beta is 0.3"),
    "a random β": (lambda d: set_cell(d / "schedule.parquet", "beta_random", 0, 0.1), "beta_random"),
    "a pair's order": (lambda d: set_cell(d / "schedule.parquet", "prompt_id", 0, "x"), "prompt_id"),
    "a category": (lambda d: set_cell(d / "schedule.parquet", "category_a_v1", 0, "Safety"), "category_a_v1"),
    "a gap": (lambda d: set_cell(d / "gaps.parquet", "confidence", 1, 0.99), "gaps.parquet, row 1: confidence"),
    "a cell of the CSV": (lambda d: edit(d / "schedule.csv", '"Style"', '"Safety"'), "schedule.csv, line 2"),
    "a row of excluded.csv": (lambda d: edit(d / "excluded.csv", "no_valid_answer", "not_asked"), "excluded.csv, line"),
    "a pair's text": (
        lambda d: set_cell(d / "pairs.parquet", "chosen", 0, [{"role": "assistant", "content": "other"}]),
        "pairs.parquet, row 0: pair_id",
    ),
    "a dropped row": (lambda d: edit(d / "pairs.dropped.csv", "empty_field", "unreadable"), "excluded.csv, line"),
    "a raw answer": (
        lambda d: forge_call(d, "UPDATE calls SET raw_text = replace(raw_text, 'Style', 'Safety') WHERE id = 1"),
        "judgement",
    ),
    "a magnitude": (mend_judgement, "judgement"),
    "a failure made an answer": (
        lambda d: forge_call(d, "UPDATE calls SET outcome = 'ok' WHERE outcome = 'no_object'"),
        "outcome",
    ),
    "an answer made a failure": (
        lambda d: forge_call(d, "UPDATE calls SET outcome = 'timeout' WHERE id = 1"),
        "gaps.parquet|schedule.parquet",
    ),
    "a request hash": (lambda d: forge_call(d, "UPDATE calls SET request_hash = '00' WHERE id = 1"), "request_hash"),
    "a model": (lambda d: forge_call(d, "UPDATE calls SET requested_model = 'x' WHERE id = 1"), "request_hash"),
    "a setting sent": (lambda d: forge_call(d, "UPDATE calls SET params_sent = '{}' WHERE id = 1"), "request_hash"),
    "another endpoint": (lambda d: resend(d, "endpoint", "http://other/v1"), "endpoint is 'http://other/v1'"),
    "another model": (lambda d: resend(d, "requested_model", "x"), "requested_model is 'x'"),
    "other settings": (
        lambda d: resend(d, "params_sent", '{"temperature":1.0}'),
        "params_sent is {'temperature': 1.0}",
    ),
    "a stranger": (lambda d: forge_call(d, "UPDATE calls SET annotator = 'c' WHERE id = 1"), "no such annotator"),
    "a variant": (lambda d: forge_call(d, "UPDATE calls SET variant = 'v2' WHERE variant = 'v1'"), "request_hash"),
    "an unknown variant": (lambda d: forge_call(d, "UPDATE calls SET variant = 'v9' WHERE id = 1"), "v9"),
    "another kind": (lambda d: forge_call(d, "UPDATE calls SET kind = 'decisions' WHERE id = 1"), "no decisions"),
    "a strange pair": (lambda d: forge_call(d, "UPDATE calls SET pair_id = 'x' WHERE id = 1"), "not in pairs.parquet"),
    "settings that are no JSON": (
        lambda d: forge_call(d, "UPDATE calls SET params_sent = '{' WHERE id = 1"),
        "params_sent",
    ),
    "a whole column": (
        lambda d: pq.write_table(
            pq.read_table(d / "schedule.parquet").drop_columns(["annotator_std"]), d / "schedule.parquet"
        ),
        "schedule.parquet: columns",
    ),
    "a figure of the checklist": (
        lambda d: rewrite_manifest(
            d / "schedule.manifest.json", lambda m: m["checklist"]["control"]["beta"].update(mean=0.1)
        ),
        r"schedule.manifest.json: checklist.control.beta.mean is 0.1, recomputed it is 0\.",
    ),
    "the number of pairs scheduled": (
        lambda d: rewrite_manifest(d / "schedule.manifest.json", lambda m: m["counts"].update(scheduled=9)),
        "schedule.manifest.json: counts",
    ),
    "a count": (
        lambda d: rewrite_manifest(d / "pairs.manifest.json", lambda m: m["counts"].update(raw=9)),
        "raw count",
    ),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_a_change_with_manifests_that_fit_it_is_still_found(run_dir: Path, what: str) -> None:
    change, named = FORGERIES[what]
    change(run_dir)
    cover_up(run_dir)
    assert re.search(named, difference(run_dir))


# One bit ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a report, and with a job of a batch."""
    build = pytest.importorskip("sp2dpo.report.build")
    texts = [pair(n, "ü", source="books") for n in range(3)]
    run = make_run(tmp_path_factory.mktemp("bits"), texts, annotators=("a", "b"), variants=("v1", "v2"))
    build.build_report(run.path)
    line = b'{"custom_id":"1"}\n'
    job = run.path / "batches" / "a" / f"{hashlib.sha256(line).hexdigest()}.jsonl"
    job.parent.mkdir(parents=True)
    job.write_bytes(line)
    return run.path


def flipped(path: Path, bit: int) -> bytes:
    """Change one bit of a file; returns what it was."""
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(changed)
    return whole


def test_one_changed_bit_of_any_file_is_found_and_the_file_is_named(reported: Path, tmp_path: Path) -> None:
    run_dir, dice = Path(shutil.copytree(reported, tmp_path / "run")), random.Random(0)
    assert not [line for line in verify(run_dir) if line.startswith(("uncovered", "stale"))]
    files = sorted(path for path in run_dir.rglob("*") if path.is_file() and path.stat().st_size)
    assert len(files) >= 18
    for path in files:
        bits = path.stat().st_size * 8
        for bit in {0, bits // 2, bits - 1, *(dice.randrange(bits) for _ in range(4))}:
            whole = flipped(path, bit)
            assert path.name in difference(run_dir), f"bit {bit} of {path.name}"
            path.write_bytes(whole)
    assert list(verify(run_dir))


def test_one_changed_bit_anywhere_in_the_pages_of_the_call_log_is_found(reported: Path, tmp_path: Path) -> None:
    run_dir, dice = Path(shutil.copytree(reported, tmp_path / "run")), random.Random(1)
    path = run_dir / "calls.sqlite"
    pages = range(0, path.stat().st_size, 4096)
    heads = [8 * (page + byte) for page in pages for byte in (0, 1, 3, 5, 7, 4095)]
    for bit in [*heads, *(8 * byte for byte in range(16, 100, 7)), *dice.sample(range(len(pages) * 4096 * 8), 60)]:
        whole = flipped(path, bit)
        assert "calls.sqlite" in difference(run_dir), f"bit {bit}"
        path.write_bytes(whole)


def test_a_bit_that_no_row_is_made_of_is_told_from_one_of_a_row(run_dir: Path) -> None:
    log = run_dir / "calls.sqlite"
    at = log.read_bytes().index(b"append-only")
    flipped(log, 8 * at)
    assert "its rows are as they were logged" in difference(run_dir)


# Elsewhere ----------------------------------------------------------------------------------------------------------


def traces(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of all that is in a folder, and of the folder."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in [folder, *folder.rglob("*")]}


def test_it_says_the_same_on_another_machine_and_leaves_no_trace(finished: Path, tmp_path: Path) -> None:
    here = Path(shutil.copytree(finished, tmp_path / "über uns" / "run"))
    for path in here.rglob("*"):
        path.chmod(0o444 if path.is_file() else 0o555)
    here.chmod(0o555)
    before = traces(here)
    command = [str(Path(sys.executable).with_name("sp2dpo")), "verify", str(here)]
    places = ({"LC_ALL": "C", "TZ": "Asia/Tokyo", "PYTHONHASHSEED": "1"}, {"LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "2"})
    said = []
    for place in places:
        ran = subprocess.run(command, env={**os.environ, **place}, capture_output=True, timeout=120, check=False)
        assert ran.returncode == 0, ran.stderr
        said.append(ran.stdout)
    assert said[0] == said[1]
    assert traces(here) == before


@pytest.fixture
def small_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sp2dpo.verify.calls._AT_ONCE", 5)
    monkeypatch.setattr("sp2dpo.verify.calls._WORTH_A_PROCESS", 1)


@pytest.mark.usefixtures("small_stretches")
def test_several_processes_find_the_same_and_the_first_difference_first(run_dir: Path) -> None:
    assert list(verify(run_dir, workers=2)) == list(verify(run_dir))
    for row in (7, 29):
        forge_call(run_dir, f"UPDATE calls SET request_hash = '00' WHERE id = {row}")
    cover_up(run_dir)
    with pytest.raises(Unfinished, match=r"row 7 .*request_hash"):
        list(verify(run_dir, workers=2))


# Beside the rule ----------------------------------------------------------------------------------------------------


def test_a_file_that_no_manifest_describes_is_named_and_is_no_failure(run_dir: Path) -> None:
    (run_dir / "notes.txt").write_text("mine")
    line = next(line for line in verify(run_dir) if line.startswith("uncovered"))
    assert "notes.txt" in line


def test_a_later_stage_made_from_an_earlier_schedule_is_named_and_is_no_failure(run_dir: Path) -> None:
    write_manifest(
        run_dir / "audit.json",
        files={},
        inputs={"schedule.parquet": "0" * 64},
        lambda_hash=read_run(run_dir).process.lambda_hash,
    )
    assert any(line.startswith("stale") and "audit" in line and "schedule.parquet" in line for line in verify(run_dir))


def test_manifests_of_an_older_version_are_renewed_by_schedule(run_dir: Path) -> None:
    for path in run_dir.glob("*.manifest.json"):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        del manifest["self"]
        if path.name.startswith("calls"):
            manifest["files"] = {}
        path.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    (run_dir / "calls.sqlite.lock").write_text("process 1 on host\n")
    assert "older version" in difference(run_dir)
    assert "run sp2dpo schedule again" in difference(run_dir)
    schedule_run(read_run(run_dir))
    assert list(verify(run_dir))


def test_of_two_valid_answers_to_a_question_the_first_counts(run_dir: Path) -> None:
    before = pq.read_table(run_dir / "gaps.parquet")
    with open_ledger(run_dir / "calls.sqlite") as ledger:
        call = next(call for call in ledger if call.valid)
        text = GOOD.replace("Style", "Safety")
        ledger.append(replace(call, raw_text=text, category="Safety", magnitude=0.5, confidence=0.4))
    with open_calls(run_dir / "calls.sqlite") as log:
        assert gaps_table(log).equals(before)


def test_a_log_that_was_read_as_its_writer_ended_is_brought_in_order_by_schedule(run_dir: Path) -> None:
    log = run_dir / "calls.sqlite"
    with open_calls(log) as reading:
        assert len(reading)
        with open_ledger(log) as ledger:
            ledger.start()
            ledger.end()
    assert "was still being read as its writer ended" in difference(run_dir)
    schedule_run(read_run(run_dir))
    assert list(verify(run_dir))


def test_scheduling_again_changes_no_byte(run_dir: Path) -> None:
    before = {path: sha256_file(path) for path in run_dir.rglob("*") if path.is_file()}
    schedule_run(read_run(run_dir))
    assert {path: sha256_file(path) for path in run_dir.rglob("*") if path.is_file()} == before


def test_a_log_whose_writer_was_killed_is_refused_until_it_is_in_order(run_dir: Path, tmp_path: Path) -> None:
    with open_ledger(run_dir / "calls.sqlite") as ledger:
        ledger.start()
        killed = Path(shutil.copytree(run_dir, tmp_path / "killed"))
    assert "is being written, or what wrote it was killed" in difference(killed)
    assert list(verify(run_dir))
    with open_ledger(killed / "calls.sqlite"):
        pass
    assert list(verify(killed))


@pytest.mark.slow
def test_every_file_of_a_whole_run_with_training_is_covered(sp2dpo: Sp2dpo, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    example = Path(__file__).resolve().parents[1] / "examples" / "quickstart" / "process.yaml"
    assert sp2dpo("run", example, "--run-dir", tmp_path / "run").code == 0
    run_dir, dice = tmp_path / "run", random.Random(2)
    assert not [line for line in verify(run_dir) if line.startswith(("uncovered", "stale"))]
    for folder in ("student", "train"):
        files = sorted(path for path in (run_dir / folder).rglob("*") if path.is_file() and path.stat().st_size)
        assert files
        for path in files:
            whole = flipped(path, dice.randrange(path.stat().st_size * 8))
            assert path.name in difference(run_dir)
            path.write_bytes(whole)
