"""Files, folders and hub ids that pairs are read from; everything is written by the tests, nothing is downloaded."""

from __future__ import annotations

import csv
import gzip
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from sp2dpo.errors import DataError
from sp2dpo.pairs import prepare
from sp2dpo.pairs.load import Rows, read_source
from sp2dpo.settings import DataSettings

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def row(n: int) -> dict[str, Any]:
    ask = {"role": "user", "content": f"q{n}, \n“x”"}
    good, bad = ({"role": "assistant", "content": content} for content in ("good", "bad"))
    return {"prompt": ask["content"], "prompt_id": str(n), "chosen": [ask, good], "rejected": [ask, bad]}


ROWS = [row(0), row(1)]


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows)


def put(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jsonl(rows))


def read(base: Path, source: str, **settings: Any) -> Rows:
    return read_source(DataSettings(source=source, **settings), base)


# Files --------------------------------------------------------------------------------------------------------------

WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": lambda path: path.write_bytes(jsonl(ROWS) + b"\n"),
    "bom.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + jsonl(ROWS)),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(jsonl(ROWS))),
    "a.json": lambda path: path.write_text(json.dumps(ROWS), encoding="utf-8"),
    "a.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    "a.csv": lambda path: write_csv(path, ROWS),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert read(tmp_path, name) == Rows(ROWS, (name,))


def test_csv_text_that_is_no_list_of_messages_stays_text_and_scores_become_numbers(tmp_path: Path) -> None:
    cells = {"prompt": "[1, 2]", "chosen": "[{broken", "rejected": '{"role": "user"}', "score_chosen": "7.5"}
    write_csv(tmp_path / "a.csv", [cells])
    assert read(tmp_path, "a.csv").rows == [cells | {"score_chosen": 7.5}]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", jsonl(ROWS) + b'{"prompt": ', "a.jsonl, line 3, is not JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "a.jsonl, line 2, is a list"),
        ("a.jsonl", b'{"a": "\xff"}\n', "a.jsonl, line 1, is not JSON"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1, is not JSON"),
        ("a.jsonl.gz", gzip.compress(jsonl(ROWS))[:-12], "a.jsonl.gz cannot be read to its end"),
        ("a.jsonl.gz", jsonl(ROWS), "a.jsonl.gz cannot be read to its end"),
        ("a.json", b'{"a": 1}', "holds a dict, not a list of objects"),
        ("a.json", jsonl(ROWS), "name it .jsonl"),
        ("a.json", b"[1]", "item 1, is a int"),
        ("a.parquet", b"PAR1", "is not a readable Parquet file"),
        ("a.csv", b"prompt,chosen\nx\n", "a.csv, line 2, has not as many cells"),
        ("a.csv", b"prompt,chosen\nx,y,z\n", "a.csv, line 2, has not as many cells"),
        ("a.csv", b'prompt\n"x', "is not CSV"),
        ("a.jsonl", b"\n", "no rows"),
        ("a.csv", b"prompt,chosen\n", "no rows"),
        ("a.txt", b"x", "no suffix that is known"),
    ],
)
def test_a_damaged_file_is_named_with_the_place(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(tmp_path, name)
    assert said in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


def test_a_source_that_is_not_there_is_named(tmp_path: Path) -> None:
    for source in ("nowhere.jsonl", "data/nowhere.jsonl", "a/b/c"):
        with pytest.raises(DataError, match=f"'{source}' is not there"):
            read(tmp_path, source)


# Folders ------------------------------------------------------------------------------------------------------------


def test_shards_of_a_split_are_read_in_order(tmp_path: Path) -> None:
    for i in (1, 0):
        put(tmp_path / "data" / f"train_prefs-0000{i}-of-00002.jsonl", [ROWS[i]])
    put(tmp_path / "data" / "train_sft-00000-of-00001.jsonl", [row(7)])
    put(tmp_path / ".cache" / "train_prefs.jsonl", [row(8)])
    (tmp_path / "dataset_info.json").write_text("{}")
    names = ("data/train_prefs-00000-of-00002.jsonl", "data/train_prefs-00001-of-00002.jsonl")
    assert read(tmp_path, ".", split="train_prefs") == Rows(ROWS, names)


def test_a_split_is_matched_as_a_word(tmp_path: Path) -> None:
    for name in ("train.jsonl", "train_prefs.jsonl", "retrain.jsonl", "train/0.jsonl", "test.jsonl"):
        put(tmp_path / name, [row(0)])
    assert read(tmp_path, ".", split="train").files == ("train.jsonl", "train/0.jsonl")


def test_a_glob_picks_files(tmp_path: Path) -> None:
    for name in ("b/1.jsonl", "b/2.jsonl", "c.jsonl", "b/read.me"):
        put(tmp_path / name, [row(0)])
    assert read(tmp_path, ".", files="b/*").files == ("b/1.jsonl", "b/2.jsonl")
    assert read(tmp_path, ".", files="**/*.jsonl").files == ("b/1.jsonl", "b/2.jsonl", "c.jsonl")


def test_a_folder_where_nothing_matches_lists_what_is_there(tmp_path: Path) -> None:
    put(tmp_path / "data" / "train_prefs-00000-of-00001.jsonl", ROWS)
    with pytest.raises(DataError, match=r"data.split 'train'; splits there: train_prefs; files there: data/train_pre"):
        read(tmp_path, ".", split="train")
    with pytest.raises(DataError, match=r"data.files '\*.csv'"):
        read(tmp_path, ".", files="*.csv")


def test_several_splits_are_not_mixed_unasked(tmp_path: Path) -> None:
    put(tmp_path / "train.jsonl.gz", ROWS)
    put(tmp_path / "test.jsonl.gz", ROWS)
    with pytest.raises(DataError, match=r"several splits \(test, train\)"):
        read(tmp_path, ".")


def test_files_without_a_split_name_are_joined(tmp_path: Path) -> None:
    put(tmp_path / "b.jsonl", ROWS[1:])
    put(tmp_path / "a.jsonl", ROWS[:1])
    assert read(tmp_path, ".") == Rows(ROWS, ("a.jsonl", "b.jsonl"))


def test_a_missing_shard_is_noticed(tmp_path: Path) -> None:
    put(tmp_path / "train-00000-of-00002.jsonl", ROWS)
    with pytest.raises(DataError, match="1 of the 2 parts of train"):
        read(tmp_path, ".")


# The hub ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An offline hub cache with one commit of org/prefs in it; returns that snapshot's folder."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repo = tmp_path / "hub" / "datasets--org--prefs"
    put(repo / "blobs" / "b", ROWS)
    snapshot = repo / "snapshots" / COMMIT
    (snapshot / "data").mkdir(parents=True)
    (snapshot / "data" / "train_prefs-00000-of-00001.jsonl").symlink_to(repo / "blobs" / "b")
    put(snapshot / "data" / "test_prefs-00000-of-00001.jsonl", [row(5)])
    return snapshot


def test_a_hub_id_is_read_from_the_cache(tmp_path: Path, hub_cache: Path) -> None:
    source = read(tmp_path, "org/prefs", revision=COMMIT, split="train_prefs")
    assert source == Rows(ROWS, (f"org/prefs@{COMMIT}/data/train_prefs-00000-of-00001.jsonl",))
    settings: Any = {"source": "org/prefs", "revision": COMMIT, "split": "train_prefs"}
    assert prepare(DataSettings(**settings), tmp_path).counts["kept"] == 2


def test_a_hub_id_without_a_revision_says_where_to_find_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.revision.*https://huggingface.co/datasets/org/prefs/commits/main"):
        read(tmp_path, "org/prefs")


def test_a_hub_split_that_is_not_there_lists_those_that_are(tmp_path: Path, hub_cache: Path) -> None:
    with pytest.raises(DataError, match=r"splits there: test_prefs, train_prefs"):
        read(tmp_path, "org/prefs", revision=COMMIT, split="train")


@pytest.mark.parametrize("revision", ["f" * 40, "main", "../x"])
def test_what_the_hub_does_not_give_is_one_line(tmp_path: Path, hub_cache: Path, revision: str) -> None:
    with pytest.raises(DataError, match=r"^the hub did not give dataset 'org/prefs' at revision .*HF_HUB_OFFLINE") as e:
        read(tmp_path, "org/prefs", revision=revision, split="train_prefs")
    assert "\n" not in str(e.value)


class NotFound(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *args: Any) -> None:
        pass


def test_a_dataset_that_the_hub_does_not_know_is_one_line(
    tmp_path: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), NotFound) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(DataError, match=r"the hub did not give dataset 'org/other' .*404"):
            read(tmp_path, "org/other", revision=COMMIT)
        server.shutdown()


def test_an_existing_folder_wins_over_a_hub_id(tmp_path: Path) -> None:
    put(tmp_path / "org" / "prefs" / "a.jsonl", ROWS)
    assert read(tmp_path, "org/prefs").rows == ROWS
