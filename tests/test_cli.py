"""The command line: exit codes, data on stdout, talk on stderr, one line for an error."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from conftest import GOOD, Sp2dpo, completion, rows, teacher, write_process
from sp2dpo import cli
from sp2dpo.calls import open_calls
from sp2dpo.cli import ask, make
from sp2dpo.methods import METHODS
from sp2dpo.pairs import read_pairs
from sp2dpo.process import load_process
from sp2dpo.runs import open_run
from sp2dpo.stages import prepare_run
from teacher_server import Answer, Asked, teacher_server

COMMANDS = sorted(
    command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback
)


def recorded_process(folder: Path, n: int = 3, answered: int | None = None, **keys: Any) -> Path:
    """A process whose annotator is a recording of `answered` of its `n` pairs, one of them in a code fence."""
    recording = {"name": "old", "kind": "recorded", "model": "m", "calls": "answers.jsonl"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "answers.jsonl").touch()
    path = write_process(folder, pairs=rows(n), panel={"annotators": [recording]}, **keys)
    scratch = open_run(load_process(path), folder / "scratch")
    prepare_run(scratch)
    ids = read_pairs(scratch.pairs, "")["pair_id"].to_pylist()[:answered]
    lines = [{"pair_id": p, "variant": "v1", "raw_text": GOOD if i else f"```\n{GOOD}\n```"} for i, p in enumerate(ids)]
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def is_one_line(err: str) -> bool:
    return err.count("sp2dpo: ") == 1 and err.splitlines()[-1].startswith("sp2dpo: ") and "Traceback" not in err


# Help ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_says_what_it_does_and_gives_an_example(sp2dpo: Sp2dpo, name: str) -> None:
    ran = sp2dpo(name, "--help")
    assert ran.code == 0
    assert f"sp2dpo {name} " in ran.out.rsplit("Options", 1)[-1]


@pytest.mark.parametrize("module", [ask, make])
def test_what_a_command_does_fits_its_line_of_the_help_at_80_columns(module: ModuleType) -> None:
    ours = [c.callback for c in cli.app.registered_commands if c.callback and c.callback.__module__ == module.__name__]
    assert ours
    for command in ours:
        assert len((command.__doc__ or "").splitlines()[0]) <= 60


def test_help_and_version_go_to_stdout(sp2dpo: Sp2dpo) -> None:
    assert all(name in sp2dpo("--help").out for name in COMMANDS)
    assert sp2dpo("--version") == (0, "0.1.0\n", "")


# Exit codes ---------------------------------------------------------------------------------------------------------


def test_the_arrows_up_to_verify_end_with_0(sp2dpo: Sp2dpo, tmp_path: Path) -> None:
    path = recorded_process(tmp_path / "p")
    assert sp2dpo("annotate", path).code == 0
    assert sp2dpo("schedule", path).code == 0
    verified = sp2dpo("verify", "runs/small")
    assert verified.code == 0
    assert verified.out.startswith("process   λ ")
    assert verified.err == ""


def test_a_difference_that_verify_finds_ends_with_1(sp2dpo: Sp2dpo, tmp_path: Path) -> None:
    path = recorded_process(tmp_path / "p")
    sp2dpo("annotate", path)
    sp2dpo("schedule", path)
    with Path("runs/small/schedule.csv").open("a") as file:
        file.write("\n")
    ran = sp2dpo("verify", "runs/small")
    assert ran.code == 1
    assert is_one_line(ran.err)
    assert "schedule.csv" in ran.err


@pytest.mark.usefixtures("key")
def test_an_annotator_that_was_stopped_ends_with_1_and_says_what_is_missing(sp2dpo: Sp2dpo, tmp_path: Path) -> None:
    unreachable = teacher(base_url="http://127.0.0.1:9/v1", api_key_env="TEACHER_KEY")
    path = write_process(tmp_path / "p", pairs=rows(9), panel={"annotators": [unreachable]})
    ran = sp2dpo("annotate", path, "--concurrency", "1")
    assert ran.code == 1
    assert is_one_line(ran.err)
    assert re.search(r"annotator 'teacher' was stopped: 3 attempts in a row without an answer; .*127\.0\.0\.1", ran.err)
    assert ran.err.endswith(
        "sp2dpo: 9 answers are missing; once that is mended, ask for them with: "
        f"sp2dpo annotate {path} --concurrency 1\n"
    )


def test_the_command_for_the_rest_asks_for_just_the_rest(sp2dpo: Sp2dpo, tmp_path: Path) -> None:
    faults = {"question 1": Answer(status=400), "question 2": completion("?")}

    def choosy(asked: Asked) -> Answer:
        return next((answer for text, answer in faults.items() if text in asked.text), completion())

    with teacher_server(choosy) as server:
        path = write_process(tmp_path / "p", rows(4), panel={"annotators": [teacher(base_url=server.base_url)]})
        ran = sp2dpo("annotate", path, "--run-dir", "here")
        command = ran.err.rstrip().rpartition("ask for them with: ")[2]
        assert ran.code == 1
        assert command == f"sp2dpo annotate {path} --run-dir here --retry bad_request --retry no_object"
        faults.clear()
        server.asked.clear()
        assert sp2dpo(*command.split()[1:]).code == 0
        assert len(server.asked) == 2


LACKING = "the recording of 'old' (pinned in λ) has no valid answer to 1 question: "


@pytest.mark.parametrize(
    ("schedule", "out"),
    [
        ({}, "pairs without all answers are left out; schedule.min_calls in a new process would use what they have"),
        ({"min_calls": 1}, "pairs with fewer than 1 valid answers (schedule.min_calls) are left out"),
    ],
)
def test_what_a_recording_lacks_is_said_and_not_offered_to_be_asked_for(
    sp2dpo: Sp2dpo, tmp_path: Path, schedule: dict[str, int], out: str
) -> None:
    path = recorded_process(tmp_path / "p", n=4, answered=3, schedule=schedule)
    ran = sp2dpo("annotate", path)
    assert ran.code == 1
    assert ran.err.splitlines()[-1] == f"sp2dpo: 1 answer is missing; {LACKING}{out}"
    ran = sp2dpo("run", path)
    assert ran.code == 0
    assert f"          1 answer is missing; {LACKING}{out}\n" in ran.err
    assert "ask for" not in ran.err


def test_beside_a_recording_that_lacks_answers_only_the_failures_of_who_is_asked_are_asked_again(
    sp2dpo: Sp2dpo, tmp_path: Path
) -> None:
    recording = yaml.safe_load(recorded_process(tmp_path / "p", n=4, answered=3).read_text())["panel"]["annotators"][0]
    faults = {"question 1": completion("?"), "question 2": completion(None)}

    def choosy(asked: Asked) -> Answer:
        return next((answer for text, answer in faults.items() if text in asked.text), completion())

    with teacher_server(choosy) as server:
        panel = {"annotators": [recording, teacher(base_url=server.base_url)]}
        path = write_process(tmp_path / "p", rows(4), panel=panel)
        first = sp2dpo("annotate", path)
        assert first.err.splitlines()[-1].startswith(f"sp2dpo: 3 answers are missing; {LACKING}")
        command = first.err.rstrip().rpartition("; ask for the other 2 with: ")[2]
        assert command == f"sp2dpo annotate {path} --retry empty --retry no_object"
        faults.clear()
        second = sp2dpo(*command.split()[1:])
    assert second.code == 1
    assert second.err.splitlines()[-1].startswith(f"sp2dpo: 1 answer is missing; {LACKING}")
    assert "ask for" not in second.err


def test_answers_of_a_recording_that_were_not_read_yet_are_not_lacking(sp2dpo: Sp2dpo, tmp_path: Path) -> None:
    path = recorded_process(tmp_path / "p", n=4)
    ran = sp2dpo("annotate", path, "--retry", "empty")
    assert ran.err.endswith(f"sp2dpo: 4 answers are missing; ask for them with: sp2dpo annotate {path}\n")
    assert sp2dpo("annotate", path).code == 0


@pytest.mark.parametrize("name", ["matplotlib", "krippendorff", "sklearn"])
def test_a_run_without_a_package_of_its_report_ends_before_anything_is_asked(
    sp2dpo: Sp2dpo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = recorded_process(tmp_path / "p")
    monkeypatch.setattr(make, "find_spec", lambda module: None if module == name else importlib.util.find_spec(module))
    ran = sp2dpo("run", path)
    assert ran.code == 2
    assert is_one_line(ran.err)
    assert f"(no module '{name}')" in ran.err
    assert "pip install 'sp2dpo[report]'" in ran.err
    assert not Path("runs/small/calls.sqlite").exists()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["annotate", "nowhere.yaml"], "no such process file"),
        (["schedule", "bad.yaml"], "unknown key 'shedule'"),
        (["verify", "."], "no run directory"),
        (["prepare", "nowhere.jsonl", "-o", "pairs.parquet"], "nowhere.jsonl"),
        (["annotate", "good.yaml", "--retry", "odd"], "--retry odd: no such kind of failure"),
        (["annotate", "good.yaml", "--transport", "pigeon"], "--transport pigeon: choose sync, batch or ray"),
        (["annotate", "good.yaml", "--rpm", "0"], "--rpm 0: give a number above 0, or NAME=number"),
        (["annotate", "good.yaml", "--tpm", "teacher=fast"], "--tpm teacher=fast: give a number"),
        (
            ["annotate", "good.yaml", "--rpm", "taecher=5"],
            "no annotator of that name is asked (did you mean 'teacher'?)",
        ),
        (["annotate", "good.yaml", "--budget-usd", "5"], "annotator 'teacher' has no price"),
        (["prepare", "org/name", "-o", "pairs.parquet", "--filters", "odd"], "'odd' is no filter"),
    ],
)
def test_bad_input_ends_with_2_and_one_line(sp2dpo: Sp2dpo, tmp_path: Path, args: list[str], says: str) -> None:
    write_process(tmp_path, shedule={}).rename(tmp_path / "bad.yaml")
    write_process(tmp_path).rename(tmp_path / "good.yaml")
    ran = sp2dpo(*args)
    assert ran.code == 2
    assert ran.out == ""
    assert is_one_line(ran.err)
    assert says in ran.err


def test_a_key_that_is_not_set_ends_with_2_before_anything_is_asked(sp2dpo: Sp2dpo, tmp_path: Path) -> None:
    path = write_process(tmp_path / "p", panel={"annotators": [teacher(api_key_env="KEY_THAT_IS_NOT_SET")]})
    ran = sp2dpo("annotate", path)
    assert ran.code == 2
    assert "export KEY_THAT_IS_NOT_SET=" in ran.err
    assert not Path("runs/small/calls.sqlite").exists()


@pytest.mark.parametrize(
    "args",
    [
        ["nothing"],
        ["annotate"],
        ["annotate", "p.yaml", "--limit", "0"],
        ["annotate", "p.yaml", "--budget-usd", "-1"],
        ["verify", "--no"],
    ],
)
def test_a_wrong_call_of_a_command_ends_with_2(sp2dpo: Sp2dpo, args: list[str]) -> None:
    ran = sp2dpo(*args)
    assert ran.code == 2
    assert ran.out == ""


STALLING_SERVER = f"""
import http.server, json, threading

class Handler(http.server.BaseHTTPRequestHandler):
    asked = 0

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        Handler.asked += 1
        if Handler.asked > 3:
            print("stalled", flush=True)
            threading.Event().wait()
        choice = {{"finish_reason": "stop", "message": {{"content": {GOOD!r}}}}}
        body = json.dumps({{"choices": [choice]}}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.fixture
def stalling() -> Iterator[subprocess.Popen[str]]:
    """A server that answers three questions and then no more; it prints its port, and a line when it stalls."""
    command = [sys.executable, "-c", STALLING_SERVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        yield server
        server.kill()


def test_ctrl_c_twice_ends_with_130_at_once_and_keeps_what_was_answered(
    tmp_path: Path, stalling: subprocess.Popen[str]
) -> None:
    assert stalling.stdout is not None
    slow = teacher(base_url=f"http://127.0.0.1:{stalling.stdout.readline().strip()}/v1")
    path = write_process(tmp_path, pairs=rows(9), panel={"annotators": [slow]})
    sp2dpo = [sys.executable, "-c", "from sp2dpo.cli import main; main()"]
    command = [*sp2dpo, "annotate", str(path), "--concurrency", "1"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert stalling.stdout.readline() == "stalled\n"
        process.send_signal(signal.SIGINT)
        said = ""
        while "Ctrl-C again" not in said:
            said = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.splitlines() == [
        "3 calls made",
        "missing 6: not asked yet 6",
        "sp2dpo: interrupted; what is done is kept, and the same command goes on with the rest",
    ]
    with open_calls(tmp_path / "runs/small/calls.sqlite") as log:
        assert [call.outcome for call in log] == ["ok"] * 3


# Data and talk ------------------------------------------------------------------------------------------------------


def test_json_is_one_object_on_stdout_and_talk_is_on_stderr(sp2dpo: Sp2dpo, tmp_path: Path) -> None:
    path = recorded_process(tmp_path / "p", n=4, answered=3)
    annotated = sp2dpo("annotate", path, "--json")
    assert json.loads(annotated.out) == {
        "questions": 4,
        "valid": 3,
        "predicted": 0,
        "notes": [],
        "missing": 1,
        "missing_by_cause": {"not_recorded": 1},
        "lacking": {"old": {"not_recorded": 1}},
        "attempts": 4,
        "live": 0,
        "calls": 0,
        "recorded": 4,
        "reused": 0,
        "imported": 0,
        "outcomes": {"ok": 2, "repaired": 1, "not_recorded": 1},
        "mends": {"code_fence": 1},
        "cost_usd": 0.0,
        "spent_usd": None,
        "unknown_usd": None,
        "stopped": {},
        "stopped_all": None,
        "over_budget": False,
    }
    assert "3 of 4 questions have a valid answer" in annotated.err
    assert "4 recorded answers read" in annotated.err
    scheduled = sp2dpo("schedule", path, "--json")
    assert json.loads(scheduled.out)["scheduled"] == 3
    assert json.loads(scheduled.out)["excluded"] == 1
    assert "3 pairs with β" in scheduled.err
    assert "1 row excluded" in scheduled.err


def test_a_whole_run_gives_one_object_too(sp2dpo: Sp2dpo, tmp_path: Path) -> None:
    ran = sp2dpo("run", recorded_process(tmp_path / "p", n=4, answered=3), "--json")
    found = json.loads(ran.out)
    assert (ran.code, found["scheduled"], found["excluded"]) == (0, 3, 1)
    assert Path(found["report"]).is_file()
    assert Path(found["schedule"]).is_file()


def test_prepare_gives_the_table_of_counts(sp2dpo: Sp2dpo, tmp_path: Path) -> None:
    write_process(tmp_path, pairs=[*rows(3), {"prompt": "q", "chosen": "", "rejected": "b"}])
    ran = sp2dpo("prepare", "pairs.jsonl", "-o", "out.parquet", "--json")
    counts = json.loads(ran.out)["counts"]
    assert counts == {"raw": 4, "duplicate_prompt_id": 0, "empty_field": 1, "kept": 3}
    assert read_pairs(tmp_path / "out.parquet", "").num_rows == 3
    table = sp2dpo("prepare", "pairs.jsonl", "-o", "out.parquet").out
    assert re.search(r"empty_field\W+1\b", table)
    assert re.search(r"kept\W+3\b", table)


@pytest.mark.parametrize("command", [["cost"], ["annotate", "--dry-run"], ["run", "--dry-run"]])
def test_an_estimate_asks_nothing(sp2dpo: Sp2dpo, tmp_path: Path, command: list[str]) -> None:
    price = {"input": 2, "output": 8, "as_of": "2026-01-01"}
    no_key = teacher(api_key_env="KEY_THAT_IS_NOT_SET", price=price)
    path = write_process(tmp_path / "p", pairs=rows(5), panel={"annotators": [no_key, teacher("two", price=price)]})
    ran = sp2dpo(command[0], path, *command[1:], "--limit", 3, "--json")
    assert ran.code == 0
    found = json.loads(ran.out)
    assert (found["pairs"], found["calls"], found["output_tokens"]) == (3, 6, 240)
    assert found["usd"] == pytest.approx((found["input_tokens"] * 2 + found["output_tokens"] * 8) / 1e6, rel=1e-3)
    assert not Path("runs/small/calls.sqlite").exists()


def test_one_of_a_thing_is_not_said_in_the_plural(sp2dpo: Sp2dpo, tmp_path: Path) -> None:
    path = recorded_process(tmp_path / "p", n=1)
    assert "prepare   1 row → 1 pair (" in sp2dpo("annotate", path).err
    assert "schedule  1 pair with β in" in sp2dpo("schedule", path).err
    assert sp2dpo("cost", path).out.startswith("1 pair, 0 calls, 1 recorded answer\n")


def test_a_limit_and_then_none_goes_on_where_the_first_stopped(sp2dpo: Sp2dpo, tmp_path: Path) -> None:
    path = recorded_process(tmp_path / "p", n=5)
    first = json.loads(sp2dpo("annotate", path, "--limit", 2, "--json").out)
    rest = json.loads(sp2dpo("annotate", path, "--json").out)
    again = json.loads(sp2dpo("annotate", path, "--json").out)
    assert [(one["questions"], one["attempts"], one["valid"]) for one in (first, rest, again)] == [
        (2, 2, 2),
        (5, 3, 5),
        (5, 0, 5),
    ]


def test_a_run_directory_may_be_chosen(sp2dpo: Sp2dpo, tmp_path: Path) -> None:
    path = recorded_process(tmp_path / "p")
    assert sp2dpo("annotate", path, "--run-dir", "elsewhere").code == 0
    assert Path("elsewhere/calls.sqlite").is_file()
    assert not Path("runs").exists()


def test_a_process_that_changed_is_not_mixed_into_an_old_run(sp2dpo: Sp2dpo, tmp_path: Path) -> None:
    sp2dpo("annotate", recorded_process(tmp_path / "p"))
    ran = sp2dpo("annotate", recorded_process(tmp_path / "q", schedule={"beta_max": 0.2}))
    assert ran.code == 2
    assert is_one_line(ran.err)
    assert "different: schedule.beta_max" in ran.err


def test_a_command_that_keeps_nothing_does_not_say_that_it_goes_on(
    sp2dpo: Sp2dpo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sp2dpo.verify.verify", interrupted)
    ran = sp2dpo("verify", tmp_path)
    assert (ran.code, ran.err.splitlines()[-1]) == (130, "sp2dpo: interrupted; the same command begins anew")


def test_the_catalogue_is_listed_and_one_method_is_told_whole(sp2dpo: Sp2dpo) -> None:
    listed = sp2dpo("methods", "--json")
    assert list(json.loads(listed.out)) == list(METHODS)
    one = json.loads(sp2dpo("methods", "simpo", "--json").out)
    assert one["knobs"]["gamma"]["default"] == 1.0
    assert one["reference"] is False
    told = sp2dpo("methods", "simpo").out
    assert all(word in told for word in ("gamma", METHODS["simpo"].source, "γ/β"))
    assert all(name in sp2dpo("methods").out for name in METHODS)
    wrong = sp2dpo("methods", "simpoo")
    assert (wrong.code, wrong.out) == (2, "")
    assert "did you mean 'simpo'" in wrong.err
