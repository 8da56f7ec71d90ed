"""No key gets out: every fault, every transport, a kill and a crash, and then every file and stream is searched for it.

The endpoints of these tests repeat the key wherever an endpoint can: in texts, errors, headers, names of models and ids
of files, plain and in the escapes of JSON, of URLs, and in base64.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
import os
import re
import socketserver
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from conftest import rows, teacher, write_process
from fault_server import BATCH_FAULTS, cures, fault_server
from faults import judgement, question_key
from sp2dpo.decision import LEVELS
from sp2dpo.errors import ProcessError
from sp2dpo.llm.http import Endpoint, read_key
from sp2dpo.process import load_process
from sp2dpo.rubric import CATEGORIES
from teacher_server import Answer, Asked, teacher_server

KEY = "sk-Recognise/Me+0123456789="


# The search ----------------------------------------------------------------------------------------------------------


def in_base64(text: str) -> Iterator[str]:
    """What the base64 of a longer text has in it if it holds `text`, at each of the three places."""
    for lead in range(3):
        code = base64.b64encode(b"\0" * lead + text.encode()).decode().rstrip("=")
        yield code[(0, 2, 3)[lead] : len(code) - ((lead + len(text)) % 3 > 0)]


def escaped(text: str) -> str:
    """Every letter as JSON may write it."""
    return "".join(f"\\u{ord(letter):04x}" for letter in text)


def without_escapes(text: str) -> str:
    text = re.sub(r"\\+u00([0-9a-fA-F]{2})", lambda m: chr(int(m[1], 16)), text)
    return re.sub(r"\\+(.)", r"\1", text)


def forms_of_the_key(text: str) -> list[str]:
    """In which forms the key is in a text."""
    forms = {"plain": text, "JSON": without_escapes(text), "URL": unquote(unquote(text)), "HTML": html.unescape(text)}
    found = [name for name, plain in forms.items() if KEY in plain]
    return found + ["base64"] * any(code in text for code in in_base64(KEY))


def texts_in(path: Path) -> Iterator[str]:
    """A file as it is, and what is packed in it."""
    data = path.read_bytes()
    yield data.decode("latin-1")
    if path.suffix == ".gz":
        yield gzip.decompress(data).decode()
    if path.suffix == ".parquet":
        yield json.dumps([pq.read_schema(path).metadata, pq.read_table(path).to_pylist()], default=str)
    if path.suffix == ".sqlite":
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as log:
            yield "\n".join(log.iterdump())


def leaks(folder: Path, said: str = "") -> list[str]:
    """Where the key is, and in which form."""
    found = [f"said, {form}" for form in forms_of_the_key(said)]
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found += [f"{path.name}, {form}" for text in texts_in(path) for form in forms_of_the_key(text)]
    return found


WRITINGS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "as JSON escapes": escaped,
    "as JSON in JSON": lambda key: json.dumps(json.dumps(escaped(key))),
    "with escaped slashes": lambda key: key.replace("/", "\\/"),
    "in a URL": lambda key: quote(key, safe=""),
    "in a URL in a URL": lambda key: quote(quote(key, safe="")).replace("%252F", "%252f"),
    "in HTML": lambda key: "".join(f"&#{ord(letter)};" for letter in key),
    "in base64": lambda key: base64.b64encode(key.encode()).decode(),
    "in the base64 of a header": lambda key: base64.b64encode(f"Bearer {key}\r\n".encode()).decode(),
    "in the base64 of a line": lambda key: base64.b64encode(f"ab{key} ".encode()).decode(),
}


@pytest.mark.parametrize("writing", WRITINGS)
def test_the_search_finds_the_key_in_every_form_and_file(writing: str, tmp_path: Path) -> None:
    text = f"a {WRITINGS[writing](KEY)} b"
    (tmp_path / "plain.html").write_text(text)
    (tmp_path / "packed.gz").write_bytes(gzip.compress(text.encode()))
    pq.write_table(pa.table({"column": [text] * 100}), tmp_path / "table.parquet", compression="zstd")
    with closing(sqlite3.connect(tmp_path / "calls.sqlite")) as log:
        log.execute("CREATE TABLE calls (raw_text)")
        log.execute("INSERT INTO calls VALUES (?)", ("x" * 20_000 + text,))
        log.commit()
    names = {leak.partition(",")[0] for leak in leaks(tmp_path, text)}
    assert names == {"said", "plain.html", "packed.gz", "table.parquet", "calls.sqlite"}
    assert leaks(tmp_path / "elsewhere", text.replace("0", "1").replace("M", "N")) == []


# An endpoint that repeats the key ------------------------------------------------------------------------------------


def completion(asked: Asked, **more: Any) -> dict[str, Any]:
    """A valid answer, with the key in an explanation or wherever `more` puts it."""
    body = asked.json
    text = json.dumps(judgement(question_key(body)) | {"explanation": more.pop("explanation", "none")})
    message = {"role": "assistant", "content": text} | more.pop("message", {})
    choice = {"index": 0, "finish_reason": more.pop("finish_reason", "stop"), "message": message}
    usage = {"prompt_tokens": 9, "completion_tokens": 9, "total_tokens": 18}
    return {"model": body["model"], "choices": [choice], "usage": usage} | more


def error(message: str) -> dict[str, Any]:
    return {
        "error": {
            "message": f"Incorrect API key provided: {message} [/b].",
            "code": "invalid_api_key",
            "param": message,
        }
    }


Way = Callable[[Asked, str], Answer]
HEADERS = {"x-request-id": f"req {KEY}", "Set-Cookie": f"key={KEY}", "Server": KEY, "WWW-Authenticate": f"Bearer {KEY}"}


def said(**more: Any) -> Way:
    """A completion with KEY in it, which becomes the key."""
    return lambda asked, key: Answer(json.dumps(completion(asked, **more)).replace("KEY", key))


def written(text: str) -> Way:
    """A completion whose text has the key as it is written there."""
    return lambda asked, key: Answer(json.dumps(completion(asked, explanation="KEY")).replace("KEY", text))


def failing(status: int, body: Any = None, **headers: str) -> Way:
    return lambda asked, key: Answer(error(key) if body is None else body, status, headers)


WAYS: Mapping[str, Way] = {
    **{f"in the text, {form}": written(json.dumps(writing(KEY))[1:-1]) for form, writing in WRITINGS.items()},
    "in the text, in escapes of the body": written(escaped(KEY)),
    "in a text that is no answer": said(message={"content": "I was asked by KEY."}),
    "in a refusal": said(message={"content": None, "refusal": "Not for KEY."}),
    "in names": said(system_fingerprint="KEY", id="KEY", finish_reason="KEY", usage="KEY"),
    "in content that is no text": said(message={"content": ["KEY"]}),
    "in headers": lambda asked, key: Answer(completion(asked), headers=HEADERS),
    "in a 500": failing(500),
    "in a 503 in escapes": failing(503, json.dumps({"error": "KEY"}).replace("KEY", escaped(KEY))),
    "in a page": failing(502, f"<html>{KEY} {WRITINGS['in HTML'](KEY)} {quote(KEY)}</html>"),
    "in headers of a failure": failing(500, "", **HEADERS),
    "in a redirect": failing(302, "", Location=f"http://127.0.0.1:9/{KEY}"),
    "in a 400": failing(400),
    "in limits": failing(429, "", **{"retry-after": KEY, "x-ratelimit-limit-requests": KEY}),
    "in no gzip": failing(200, KEY, **{"Content-Encoding": "gzip"}),
    "behind what is no UTF-8": failing(200, b"\xff\xfe" + KEY.encode() + b"\xc3"),
    "in half a body": lambda asked, key: Answer(error(key) | {"more": "x" * 500}, how="cut"),
}


def decision(asked: Asked, key: str) -> dict[str, Any]:
    """Whole answers to all questions, except that the first one of the second variant has the key in it."""
    answers: dict[str, Any] = {}
    for name, question in asked.json["questions"].items():
        shares = dict.fromkeys(CATEGORIES if question["type"] == "choice" else LEVELS, 0.0)
        shares[next(iter(shares))] = 1.0
        answers[name] = {"type": question["type"], "probabilities": shares}
        if question["type"] == "noul":
            answers[name] = {"type": "noul", "noul": 0.5, "note": key}
    return {"model": asked.json["model"], "answers": answers, "usage": {"input_tokens": 9, "output_tokens": 0}}


@dataclass
class Echo:
    """The handler: the first time that a question comes it meets the next of the ways, later a plain answer."""

    met: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)
    files: dict[str, bytes] = field(default_factory=dict)

    def __call__(self, asked: Asked) -> Answer:
        key = asked.headers["Authorization"].removeprefix("Bearer ")
        assert key == KEY
        path = asked.path.partition("?")[0].removeprefix("/v1")
        if path == "/chat/completions":
            return self.chat(asked, key)
        if path == "/systemone":
            return self.decide(asked, key)
        if path.startswith("/models"):
            return Answer(
                {"id": f"any {key}", "object": "model", "owned_by": key, "data": [{"id": key}]}, headers=HEADERS
            )
        return self.batch(asked, key, path)

    def chat(self, asked: Asked, key: str) -> Answer:
        question = question_key(asked.json)
        self.seen[question] += 1
        if self.seen[question] > 1:
            return Answer(completion(asked))
        way = next((way for way in WAYS if way not in self.met), "in the text, plain")
        self.met[way] += 1
        return WAYS[way](asked, key)

    def decide(self, asked: Asked, key: str) -> Answer:
        self.seen[asked.text] += 1
        if self.seen[asked.text] == 1:
            self.met["in a decision"] += 1
            spoilt = json.dumps(decision(asked, key)).replace('"Safety"', json.dumps(f"Safety {key}"))
            return Answer(spoilt.replace('"4"', json.dumps(f"4 {quote(key)}")))
        return Answer(decision(asked, key))

    def batch(self, asked: Asked, key: str, path: str) -> Answer:
        """Files and jobs, each with the key in it."""
        self.met[f"{asked.method} {re.sub('[0-9]+', 'N', path)}"] += 1
        if asked.method == "POST" and path == "/files":
            name = f"file-{len(self.files)}"
            self.files[name] = "\n".join(line for line in asked.text.split("\n") if line.startswith("{")).encode()
            return Answer({"id": name, "filename": key}, headers=HEADERS)
        if path.endswith("/content"):
            return self.output(key, path)
        if path.startswith("/files"):
            return Answer({"id": path.rpartition("/")[2], "filename": key})
        job: dict[str, Any] = {
            "id": "batch-0",
            "status": "completed",
            "input_file_id": "file-0",
            "output_file_id": "file-0",
        }
        job |= {
            "errors": {"data": [{"code": key, "message": key}]},
            "metadata": {"key": key},
            "request_counts": {"total": key},
        }
        return Answer(job, headers=HEADERS)

    def output(self, key: str, path: str) -> Answer:
        """A line for each question: an answer, an error, or none at all, always with the key."""
        out = []
        for n, line in enumerate(self.files["file-0"].splitlines()):
            asked = Asked("POST", "", "", {}, json.dumps(json.loads(line)["body"]))
            body = (completion(asked, explanation=key), error(key), key)[n % 3]
            response = {"status_code": (200, 400, 500)[n % 3], "request_id": key, "body": body}
            row = {"id": key, "custom_id": json.loads(line)["custom_id"], "response": response, "error": None}
            out.append(json.dumps(row | ({"response": None, "error": {"message": key}} if n % 4 == 3 else {})))
        return Answer("\n".join(out).replace("Recognise", escaped("Recognise")))


ENDPOINT = Endpoint("http://127.0.0.1:9/v1", KEY, 1.0)


@pytest.mark.parametrize("writing", WRITINGS)
def test_no_form_of_the_key_is_kept(writing: str) -> None:
    kept = ENDPOINT.clean(f"before {WRITINGS[writing](KEY)} behind")
    assert forms_of_the_key(kept) == []
    assert kept.startswith("before ")
    assert "[key]" in kept
    assert kept.endswith(" behind")


def test_an_answer_without_the_key_is_kept_as_it_is() -> None:
    for text in (escaped(KEY[:-1]), "100 % \\u0041 \\/ &#65; \\\\ %41", KEY.lower(), KEY[1:], "\u00e9\ufeff"):
        assert ENDPOINT.clean(text) == text


@pytest.mark.timeout(60)
@pytest.mark.parametrize("part", ["\\", "%", "%25", "&#0", "sk-", KEY[:-1], "\\u0073", "\\\\/"])
def test_no_length_of_a_response_keeps_the_search_busy(part: str) -> None:
    text = "%" + part * 300_000
    assert ENDPOINT.clean(text) == text


# A whole run ---------------------------------------------------------------------------------------------------------

QUICK = """
import sys
from sp2dpo.annotate.batch_api import BatchClient
from sp2dpo.cli import main
BatchClient.__init__.__defaults__ = ((0.05, 0.2),)  # the wait between two looks at a job
main(sys.argv[1:])
"""
CRASHING = """
import sys
from sp2dpo.annotate.engine import Line
from sp2dpo.cli import main
def crash(self, job, raw, rows):
    raise RuntimeError(f"{self!r} {self.endpoint!r} {self.teacher!r} {job!r} {raw!r} {rows!r}")
Line._judge = crash
main(sys.argv[1:])
"""


@dataclass
class Shell:
    """Runs commands in a folder, and keeps all that they say."""

    folder: Path
    said: str = ""

    def start(self, code: str, *args: str, debug: bool = False) -> subprocess.Popen[str]:
        env = (
            os.environ
            | {"TEACHER_KEY": KEY, "COLUMNS": "2000"}
            | ({"PYTHONASYNCIODEBUG": "1", "PYTHONDEVMODE": "1"} if debug else {})
        )
        command = [sys.executable, "-c", code, *args]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=self.folder, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True)

    def run(self, *args: str, code: str = QUICK, debug: bool = False) -> int:
        with self.start(code, *args, debug=debug) as process:
            said, _ = process.communicate(timeout=120)
        self.said += said
        return process.returncode

    def check(self) -> None:
        """Nothing that was said or written has the key in it."""
        assert leaks(self.folder, self.said) == []


def annotator(name: str, base_url: str, **more: Any) -> dict[str, Any]:
    return teacher(name, base_url=base_url, api_key_env="TEACHER_KEY", **more)


DECODING = {"timeout": 1, "retry_attempts": 8, "retry_delay_base": 0}


def process_file(
    folder: Path, pairs: int, *annotators: dict[str, Any], variants: tuple[str, ...] = ("v1", "v2")
) -> None:
    panel = {"variants": list(variants), "annotators": list(annotators), "decoding": DECODING}
    write_process(folder, rows(pairs), panel=panel)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_no_fault_no_kill_and_no_crash_lets_the_key_out(tmp_path: Path) -> None:
    kinds = cures("retry", "mend")
    echo, shell = Echo(), Shell(tmp_path)
    with fault_server(key=KEY, retry_after=0.0) as faulty, teacher_server(echo) as echoing:
        pairs = 18
        for pair in range(pairs):
            faulty.script(f"question {pair}\n", *kinds[pair::pairs])
        process_file(
            tmp_path,
            pairs,
            annotator("faulty", faulty.base_url),
            annotator("echo", echoing.base_url),
            annotator("decider", echoing.base_url, kind="decisions", api="systemone"),
        )
        assert shell.run("preflight", "process.yaml") == 1
        assert shell.run("cost", "process.yaml", "--pilot", "1") == 0
        assert shell.run("export", "process.yaml", "--annotator", "echo", "-o", "open.jsonl.gz") == 0
        assert shell.run("annotate", "process.yaml", "--limit", "3", code=CRASHING, debug=True) == 1
        assert "Traceback" in shell.said
        assert "RuntimeError: <sp2dpo.annotate.engine.Line" in shell.said
        shell.check()
        before = len(echoing.asked)
        with shell.start(QUICK, "annotate", "process.yaml", "--concurrency", "2") as killed:
            wait_for(lambda: len(echoing.asked) > before + 6)
            killed.kill()
        assert (tmp_path / "runs/small/calls.sqlite-wal").stat().st_size > 0
        shell.check()
        assert shell.run("annotate", "process.yaml") == 1
        assert shell.run("annotate", "process.yaml", "--json", debug=True) == 0
        for command in ("schedule", "verify", "report"):
            assert shell.run(command, "process.yaml" if command == "schedule" else "runs/small") == 0
        assert set(kinds) <= set(faulty.stats()["by_kind"])
    assert set(echo.met) == {*WAYS, "in a decision"}
    assert "[key]" in shell.said
    assert (tmp_path / "runs/small/report.html").is_file()
    assert "".join(texts_in(tmp_path / "runs/small/calls.sqlite")).count("[key]") > len(WAYS) - 6
    shell.check()


def test_no_batch_job_lets_the_key_out(tmp_path: Path) -> None:
    echo, shell = Echo(), Shell(tmp_path)
    faults = tuple(BATCH_FAULTS)
    with ExitStack() as stack:
        echoing = stack.enter_context(teacher_server(echo))
        faulty = stack.enter_context(fault_server(key=KEY, batch_faults=faults))
        several = [annotator(f"faulty-{n}", faulty.base_url) for n in range(len(faults))]
        process_file(tmp_path, 6, *several, annotator("echo", echoing.base_url), variants=("v1",))
        assert shell.run("annotate", "process.yaml", "--transport", "batch") in (0, 1)
        assert shell.run("annotate", "process.yaml", "--json") in (0, 1)
        for command in ("schedule", "report"):
            assert shell.run(command, "process.yaml" if command == "schedule" else "runs/small") == 0
        assert faulty.stats()["requests"] > 6
    assert {"POST /files", "POST /batches", "GET /files/file-N/content"} <= set(echo.met)
    assert "[key]" in "".join(texts_in(tmp_path / "runs/small/calls.sqlite"))
    shell.check()


BROKEN = (
    f"HTTP/1.1 200 OK\r\nx-echo: Bearer {KEY}\x01\r\n\r\n",
    f"HTTP/1.1 {KEY}\r\n\r\n",
    f"HTTP/1.1 200 OK\r\nContent-Length: {KEY}\r\n\r\n",
    f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{KEY}\r\n",
    f"Authorization: Bearer {KEY}\r\n\r\n",
)


@contextmanager
def broken_server() -> Iterator[str]:
    """The base URL of a server that does not speak HTTP, each time in another way, and repeats the key."""
    answers = cycle(BROKEN)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            assert KEY.encode() in self.request.recv(65536)
            self.request.sendall(next(answers).encode())

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            server.shutdown()
            thread.join()


def always(way: Way) -> Callable[[Asked], Answer]:
    """The same to every question; its models are not told."""
    return lambda asked: way(asked, KEY) if asked.method == "POST" else Answer(error(KEY), 404, HEADERS)


def test_no_reason_to_stop_lets_the_key_out(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    stops = {
        "denied": failing(401, **HEADERS),
        "missing": failing(404),
        "used-up": failing(429, json.dumps(error(f"insufficient_quota of {KEY}"))),
        "later": failing(503, **{"retry-after": "9999", "x-request-id": KEY}),
        "swapped": said(model="model of KEY"),
    }
    with ExitStack() as stack:
        urls = {name: stack.enter_context(teacher_server(always(way))).base_url for name, way in stops.items()}
        urls["broken"] = stack.enter_context(broken_server())
        process_file(tmp_path, 4, *(annotator(name, url) for name, url in urls.items()), variants=("v1",))
        assert shell.run("preflight", "process.yaml") == 1
        assert shell.said.count("[key]") >= len(urls)
        swapped = urls.pop("swapped")
        process_file(tmp_path, 4, *(annotator(name, url) for name, url in urls.items()), variants=("v1",))
        assert shell.run("annotate", "process.yaml", "--run-dir", "runs/stopped") == 1
        assert all(f"annotator '{name}' was stopped" in shell.said for name in urls.keys() - {"broken"})
        process_file(tmp_path, 4, annotator("swapped", swapped), variants=("v1",))
        assert shell.run("annotate", "process.yaml", "--run-dir", "runs/swapped") == 1
        assert "model of [key] answered" in shell.said
    shell.check()


# A key in the process file -------------------------------------------------------------------------------------------


def with_keys(**keys: Any) -> Callable[[dict[str, Any]], object]:
    return lambda process: process["panel"]["annotators"][0].update(keys)


MISPLACED: dict[str, Callable[[dict[str, Any]], object]] = {
    "as a key of an annotator": with_keys(api_key=KEY),
    "as another key of an annotator": with_keys(authorization=f"Bearer {KEY}"),
    "as a key of the panel": lambda process: process["panel"].update(api_key=KEY),
    "at the top": lambda process: process.update(api_key=KEY),
    "as a key of the judge": lambda process: process.update(
        evaluate={"judge": {"name": "j", "model": "m", "base_url": "https://host/v1", "api_key": KEY}}
    ),
    "for the name of its variable": with_keys(api_key_env=KEY),
    "for the name of its variable, with a dollar": with_keys(api_key_env=f"${KEY}"),
    "in a list for the name of its variable": with_keys(api_key_env=[KEY]),
    "as the user of the address": with_keys(base_url=f"https://{quote(KEY, safe='')}@host/v1"),
    "as the password of the address": with_keys(base_url=f"https://user:{quote(KEY, safe='')}@host/v1"),
    "plain in the address": with_keys(base_url=f"https://user:{KEY}@host/v1"),
    "in the query of the address": with_keys(base_url=f"https://host/v1?key={KEY}"),
    "in the fragment of the address": with_keys(base_url=f"https://host/v1#{KEY}"),
    "as the address": with_keys(base_url=KEY),
    "in place of extra": with_keys(extra=KEY),
    **{
        f"in extra, as {name}": with_keys(extra={name: KEY})
        for name in ("api_key", "apiKey", "API-Key", "x-api-key", "x-goog-api-key", "Authorization", "access_token",
                     "auth_token", "hf_token", "token", "key", "auth", "secret", "password", "bearer", "credentials")
    },
    "deep in extra": with_keys(extra={"extra_headers": [{"a": {"Authorization": f"Bearer {KEY}"}}]}),
    "in extra, under a harmless name": with_keys(extra={"user": KEY}),
    "in extra, in a header": with_keys(extra={"headers": {"x": f"Bearer {KEY}"}}),
}  # fmt: skip


@pytest.mark.parametrize("where", MISPLACED)
def test_a_key_in_the_process_file_is_refused_and_not_repeated(where: str, tmp_path: Path) -> None:
    path = write_process(tmp_path)
    process = yaml.safe_load(path.read_text())
    MISPLACED[where](process)
    path.write_text(yaml.safe_dump(process))
    with pytest.raises(ProcessError) as refusal:
        load_process(path)
    assert forms_of_the_key("".join(traceback.format_exception(refusal.value))) == []


@pytest.mark.parametrize(
    "line", [f"api_key: {KEY}: x", f"api_key: '{KEY}", f"a: [{KEY}", f"{KEY}\n  : -", f"a: 1\na: {KEY}"]
)
def test_a_file_that_is_no_yaml_is_not_repeated_either(line: str, tmp_path: Path) -> None:
    path = tmp_path / "process.yaml"
    path.write_text(f"name: x\n{line}\n")
    with pytest.raises(ProcessError) as refusal:
        load_process(path)
    assert forms_of_the_key("".join(traceback.format_exception(refusal.value))) == []


def test_the_command_line_does_not_repeat_it_and_makes_no_run_directory(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    write_process(tmp_path, panel={"annotators": [teacher(api_key=KEY)]})
    assert shell.run("annotate", "process.yaml") == 2
    assert "unknown key 'panel.annotators.0.api_key'" in shell.said
    assert forms_of_the_key(shell.said) == []
    assert not (tmp_path / "runs").exists()


def test_a_key_that_no_header_can_carry_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for spoilt in (f"{KEY}\nx", f"{KEY}é", f"\x00{KEY}"[1:] + "\x7f"):
        monkeypatch.setenv("TEACHER_KEY", spoilt)
        with pytest.raises(ProcessError) as refusal:
            read_key("TEACHER_KEY", "annotator 'a'")
        assert forms_of_the_key(str(refusal.value)) == []
