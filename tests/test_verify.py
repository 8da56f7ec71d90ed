"""Verification: one thing at a time is changed in a finished run, and each change is found and named."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import GOOD, rows, teacher, write_process
from sp2dpo.annotate.run import annotate
from sp2dpo.calls.rows import COLUMNS, line_of
from sp2dpo.decision import LEVELS
from sp2dpo.errors import RunDirError, Unfinished
from sp2dpo.hashing import sha256_file
from sp2dpo.process import load_process
from sp2dpo.rubric import CATEGORIES
from sp2dpo.runs import open_run
from sp2dpo.stages import prepare_run, schedule_run
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


def rewrite_manifest(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads(path.read_text(encoding="utf-8"))
    change(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")


def cover_up(run_dir: Path) -> None:
    """Make the chain of the log again, and write the hashes of the files as they now are into all manifests.

    As a careful forger would.
    """
    content = ""
    with unguarded(run_dir / "calls.sqlite") as db:
        for number, *row in db.execute(f"SELECT id, {', '.join(COLUMNS)} FROM calls ORDER BY id").fetchall():
            content = hashlib.sha256((content + line_of(row)).encode()).hexdigest()
            db.execute("UPDATE calls SET chain = ? WHERE id = ?", (content, number))
    now = {path.name: sha256_file(path) for path in run_dir.iterdir() if path.is_file()} | {"calls.sqlite": content}

    def fit(manifest: dict[str, Any]) -> None:
        for part in ("files", "inputs"):
            manifest[part] = {name: now.get(name, sha) for name, sha in manifest[part].items()}
        if "content" in manifest:
            manifest["content"] = content

    for path in run_dir.glob("*.manifest.json"):
        rewrite_manifest(path, fit)


@contextmanager
def unguarded(path: Path) -> Iterator[sqlite3.Connection]:
    """A call log without its triggers."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        triggers = db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            db.execute(f"DROP TRIGGER {name}")
        yield db
        for _, create in triggers:
            db.execute(create)


def forge_call(run_dir: Path, sql: str) -> None:
    """Change the call log past its triggers."""
    with unguarded(run_dir / "calls.sqlite") as db:
        assert db.execute(sql).rowcount >= 1


def test_an_untouched_run_passes_and_says_what_was_checked(run_dir: Path) -> None:
    lines = list(verify(run_dir))
    assert [line.split()[0] for line in lines] == ["process", "prompts", "manifests", "pairs", "calls", "schedule"]
    assert "5 β" in lines[-1]
    assert "2 excluded" in lines[-1]


def test_a_run_of_typed_decisions_passes_and_a_changed_probability_is_found(
    finished_decisions: Path, tmp_path: Path
) -> None:
    run_dir = Path(shutil.copytree(finished_decisions, tmp_path / "run"))
    assert "5 β" in list(verify(run_dir))[-1]
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
        "calls.sqlite: head of the chain",
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
