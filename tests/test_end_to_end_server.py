"""The whole path up to a verified schedule against a real server, whose answers are valid or noise."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

import local_server as server
from conftest import Sp2dpo, write_process
from fault_server import fault_server
from sp2dpo.annotate.batch_api import BatchClient
from sp2dpo.calls import open_calls
from sp2dpo.verify import verify

TOPICS = ("boiling an egg", "a lost wallet", "the tides", "a rude neighbour", "prime numbers", "a late train", "bread")


def transcripts() -> Iterator[dict[str, str]]:
    """22 rows: 18 usable, of one turn or three; 2 without a response, 1 with other prompts, 1 that is no transcript."""
    for n in range(20):
        topic = TOPICS[n % len(TOPICS)]
        head = f"\n\nHuman: Question {n} about {topic}, please."
        if n % 3 == 0:
            head += f"\n\nAssistant: What of {topic}?\n\nHuman: All of it; {{chosen}} and {{tag}} are mere words here."
        bad = "" if n in (4, 9) else f"No idea about {topic}."
        yield {
            "chosen": f"{head}\n\nAssistant: Here is {topic} in {n} steps.",
            "rejected": f"{head}\n\nAssistant: {bad}",
        }
    yield {"chosen": "\n\nHuman: one\n\nAssistant: x", "rejected": "\n\nHuman: two\n\nAssistant: y"}
    yield {"chosen": "plain text", "rejected": "other plain text"}


def process(folder: Path, url: str, response_format: str) -> Path:
    annotator: dict[str, Any] = {
        "name": "local",
        "model": server.MODEL,
        "base_url": url,
        "response_format": response_format,
    }
    panel = {"variants": ["v1", "v2", "v3"], "annotators": [annotator]}
    decoding = {"max_tokens": 64, "timeout": 60, "retry_attempts": 1, "retry_delay_base": 0}
    return write_process(folder, pairs=list(transcripts()), panel=panel | {"decoding": decoding})


def excluded(run: Path) -> list[dict[str, str]]:
    with (run / "excluded.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_server_that_keeps_to_the_schema_gives_a_verified_schedule(
    server_url: str, tmp_path: Path, sp2dpo: Sp2dpo
) -> None:
    path, run = process(tmp_path, server_url, "json_schema"), tmp_path / "run"
    assert sp2dpo("annotate", path, "--run-dir", run, "--concurrency", 4).code == 0
    assert sp2dpo("schedule", path, "--run-dir", run).code == 0
    assert list(verify(run))
    schedule, left_out = pq.read_table(run / "schedule.parquet"), excluded(run)
    assert Counter(row["reason"] for row in left_out) == {"empty_field": 2, "prompts_differ": 1, "unreadable": 1}
    assert schedule.num_rows == 18
    source_rows = dict(
        zip(*(pq.read_table(run / "pairs.parquet")[c].to_pylist() for c in ("pair_id", "source_row")), strict=True)
    )
    scheduled = [source_rows[pair] for pair in schedule["pair_id"].to_pylist()]
    assert sorted(scheduled + [int(row["source_row"]) for row in left_out]) == list(range(22))
    assert all(0.03 <= beta <= 0.3 for beta in schedule["beta"].to_pylist())
    assert len(set(schedule["beta"].to_pylist())) > 1


def test_the_whole_run_in_one_command_ends_with_a_report(server_url: str, tmp_path: Path, sp2dpo: Sp2dpo) -> None:
    pytest.importorskip("sp2dpo.report.build", exc_type=ImportError)
    path, run = process(tmp_path, server_url, "json_schema"), tmp_path / "run"
    assert sp2dpo("run", path, "--run-dir", run, "--limit", 6).code == 0
    assert pq.read_table(run / "schedule.parquet").num_rows == 6
    assert Counter(row["reason"] for row in excluded(run))["not_asked"] == 12
    assert "<html" in (run / "report.html").read_text(encoding="utf-8")


def test_a_server_that_answers_noise_loses_nothing_and_schedules_nothing(
    server_url: str, tmp_path: Path, sp2dpo: Sp2dpo
) -> None:
    path, run = process(tmp_path, server_url, "none"), tmp_path / "run"
    code, _, said = sp2dpo("annotate", path, "--run-dir", run, "--limit", 5)
    assert code == 1
    assert "0 of 15 questions have a valid answer" in said
    assert "30 calls made" in said
    with open_calls(run / "calls.sqlite") as log:
        assert len(log) == 30
        assert not [call for call in log if call.valid or call.magnitude is not None]
        assert all(call.http_status == 200 for call in log)
        assert all(call.raw_text for call in log if call.outcome != "empty")
    code, _, said = sp2dpo("schedule", path, "--run-dir", run)
    assert code == 1
    assert said.splitlines()[-1].startswith("sp2dpo: no pair has a complete set")
    assert "Traceback" not in said
    assert not (run / "schedule.parquet").exists()


@pytest.mark.parametrize("transport", ["sync", "batch"])
def test_every_question_is_answered_through_a_proxy_that_spoils_what_the_model_says(
    tmp_path: Path, server_url: str, sp2dpo: Sp2dpo, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    monkeypatch.setattr(BatchClient.__init__, "__defaults__", ((0.05, 0.2),))
    with fault_server(upstream=server_url, fault_rate=0.4, retry_after=0.1, seed=3, batch_seconds=0.2) as proxy:
        path = process(tmp_path, proxy.base_url, "json_schema")
        keys = yaml.safe_load(path.read_text())
        keys["panel"]["decoding"] |= {"retry_attempts": 10, "retry_delay_base": 0.05, "timeout": 5}
        path.write_text(yaml.safe_dump(keys))
        run = tmp_path / "run"
        assert sp2dpo("annotate", path, "--run-dir", run, "--transport", transport).code == 0
        asked = proxy.stats()
    with open_calls(run / "calls.sqlite") as log:
        outcomes = Counter(call.outcome for call in log)
    assert outcomes["ok"] + outcomes["repaired"] == 54
    assert len(outcomes) > 5
    assert asked["asked_again"] == {"valid": 0, "mend": 0}
    assert sp2dpo("schedule", path, "--run-dir", run).code == 0
    assert list(verify(run))
