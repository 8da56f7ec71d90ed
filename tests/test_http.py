"""HTTP: whatever the other side does comes back as data, and the key goes nowhere but into its header."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from conftest import KEY
from sp2dpo.errors import ProcessError, Unfinished
from sp2dpo.llm import Limits, Raw
from sp2dpo.llm.http import Endpoint, read_key
from teacher_server import Answer, Handler, teacher_server

CHAT = "/chat/completions"
PATIENCE = 20.0


def exchange(
    base_url: str, call: Callable[[Endpoint], Awaitable[Raw]], key: str | None = None, timeout: float = PATIENCE
) -> Raw:
    async def one() -> Raw:
        endpoint = Endpoint(base_url, key, timeout)
        try:
            return await call(endpoint)
        finally:
            await endpoint.close()

    return asyncio.run(one())


def posted(handler: Handler, key: str | None = None, timeout: float = PATIENCE) -> Raw:
    with teacher_server(handler) as server:
        return exchange(server.base_url, lambda endpoint: endpoint.post(CHAT, {"a": 1}), key, timeout)


def answering(**headers: str) -> Handler:
    return lambda asked: Answer("{}", headers={name.replace("_", "-"): value for name, value in headers.items()})


@contextmanager
def speaking(answer: bytes) -> Iterator[str]:
    """The base URL of a socket that says these bytes to the first one who asks, and closes."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(2**16)
            connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        thread.join()


def nobody() -> str:
    """The base URL of a port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


# What is sent -------------------------------------------------------------------------------------------------------


def test_a_body_goes_out_as_json_in_utf_8_with_the_key_in_the_header() -> None:
    body = {"model": "m", "text": "½ 中 🙂", "half": "\ud800"}
    with teacher_server(lambda asked: Answer("{}")) as server:
        exchange(server.base_url + "/", lambda endpoint: endpoint.post(CHAT, body), KEY)
    (asked,) = server.asked
    assert (asked.method, asked.path) == ("POST", "/v1/chat/completions")
    assert asked.json == body
    assert "½ 中 🙂" in asked.text
    assert asked.headers["content-type"] == "application/json"
    assert asked.headers["authorization"] == f"Bearer {KEY}"


def test_without_a_key_there_is_no_header_for_one() -> None:
    with teacher_server(lambda asked: Answer("{}")) as server:
        exchange(server.base_url, lambda endpoint: endpoint.get("/models", limit="2"))
    assert server.asked[0].path == "/v1/models?limit=2"
    assert "authorization" not in server.asked[0].headers


def test_no_cookie_is_kept() -> None:
    async def twice(endpoint: Endpoint) -> Raw:
        await endpoint.get("/models")
        return await endpoint.get("/models")

    with teacher_server(answering(set_cookie="who=you")) as server:
        exchange(server.base_url, twice)
    assert [asked.headers.get("cookie") for asked in server.asked] == [None, None]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed_so_that_the_key_reaches_no_other_host(status: int) -> None:
    with teacher_server(lambda asked: Answer("{}")) as other:
        location = {"location": f"{other.base_url}/elsewhere"}
        raw = posted(lambda asked: Answer("moved", status, location), KEY)
    assert (raw.status, raw.body) == (status, "moved")
    assert other.asked == []


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.usefixtures("no_proxies")
def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", nobody())
    with teacher_server(lambda asked: Answer("{}")) as server:
        for host in ("127.0.0.1", "localhost"):
            url = server.base_url.replace("127.0.0.1", host)
            assert exchange(url, lambda endpoint: endpoint.get("/models")).status == 200


@pytest.mark.usefixtures("no_proxies")
def test_a_proxy_of_the_environment_is_asked_for_other_hosts_unless_they_are_excepted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with teacher_server(lambda asked: Answer("{}")) as proxy:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
        assert exchange("http://teacher.invalid/v1", lambda endpoint: endpoint.get("/models"), KEY).status == 200
        assert [asked.host for asked in proxy.asked] == ["teacher.invalid"]
        monkeypatch.setenv("no_proxy", "teacher.invalid")
        raw = exchange("http://teacher.invalid/v1", lambda endpoint: endpoint.get("/models"), KEY)
    assert (raw.failure, len(proxy.asked)) == ("connection", 1)


@pytest.mark.parametrize(("key", "sent"), [(KEY, f"Bearer {KEY}"), (None, None)])
def test_passwords_that_the_machine_keeps_for_a_host_are_not_sent(
    key: str | None, sent: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "netrc"
    kept.write_text("machine 127.0.0.1 login someone password something\n")
    kept.chmod(0o600)
    monkeypatch.setenv("NETRC", str(kept))
    with teacher_server(lambda asked: Answer("{}")) as server:
        raw = exchange(server.base_url, lambda endpoint: endpoint.get("/models"), key)
    assert raw.status == 200
    assert [asked.headers.get("authorization") for asked in server.asked] == [sent]


# What comes back ----------------------------------------------------------------------------------------------------


def test_a_response_comes_back_as_it_is_whatever_its_status() -> None:
    raw = posted(lambda asked: Answer("½ oops\n", 503, {"x-request-id": "req-7"}))
    assert (raw.status, raw.body, raw.request_id) == (503, "½ oops\n", "req-7")
    assert (raw.failure, raw.error, raw.sent) == (None, None, True)
    assert 0 < raw.latency_s < PATIENCE


def test_bytes_that_are_no_utf_8_are_written_as_escapes() -> None:
    raw = posted(lambda asked: Answer(b"\xff{\xc3\xa9"))
    assert raw.body == "\\xff{é"


def test_a_compressed_body_is_unpacked() -> None:
    raw = posted(lambda asked: Answer(gzip.compress(b"whole"), headers={"content-encoding": "gzip"}))
    assert raw.body == "whole"


def test_a_big_body_is_sent_whole_and_read_whole() -> None:
    text = "½" * 400_000
    with teacher_server(lambda asked: Answer(asked.json["text"] * 20)) as server:
        raw = exchange(server.base_url, lambda endpoint: endpoint.post(CHAT, {"text": text}))
    assert raw.body == text * 20


CUT: dict[str, Handler] = {
    "closed": lambda asked: Answer(how="closed"),
    "cut": lambda asked: Answer("x" * 1000, how="cut"),
    "not gzip": lambda asked: Answer(b"no gzip", headers={"content-encoding": "gzip"}),
    "not deflate": lambda asked: Answer(b"\x00no", headers={"content-encoding": "deflate"}),
}


@pytest.mark.parametrize("name", CUT)
def test_a_response_that_is_not_whole_is_a_connection_that_may_have_been_billed(name: str) -> None:
    raw = posted(CUT[name])
    assert (raw.status, raw.body, raw.failure, raw.sent) == (None, "", "connection", True)
    assert raw.error


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\x16\x03\x01\x02\x00 TLS?",
        b"HTTP/1.1 999999 no\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nx",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX-\xff\x00: 1\r\n\r\n",
    ],
    ids=["nothing", "tls", "status", "length", "two lengths", "chunks", "long header", "header"],
)
def test_what_is_no_http_is_a_connection(answer: bytes) -> None:
    with speaking(answer) as base_url:
        raw = exchange(base_url, lambda endpoint: endpoint.post(CHAT, {}), KEY)
    assert (raw.status, raw.failure, raw.sent) == (None, "connection", True)
    assert raw.error
    assert len(raw.error) <= 2000


def test_no_answer_within_the_time_is_a_timeout_that_may_have_been_billed() -> None:
    raw = posted(lambda asked: Answer(how="never"), timeout=0.2)
    assert (raw.failure, raw.error, raw.sent) == ("timeout", "no answer within 0.2 s", True)
    assert raw.latency_s >= 0.2


def test_a_body_that_does_not_end_is_a_timeout() -> None:
    def drip(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nx")
            over.wait(PATIENCE)

    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, args=(listener,))
        thread.start()
        raw = exchange(f"http://127.0.0.1:{listener.getsockname()[1]}", lambda e: e.post(CHAT, {}), timeout=0.2)
        over.set()
        thread.join()
    assert (raw.failure, raw.status, raw.sent) == ("timeout", None, True)


@pytest.mark.parametrize("url", ["http://no-such-host.invalid/v1", "http://127.0.0.1:1/v1", "https://127.0.0.1:1/v1"])
@pytest.mark.usefixtures("no_proxies")
def test_a_host_that_is_not_found_or_refuses_was_sent_nothing(url: str) -> None:
    raw = exchange(url, lambda endpoint: endpoint.post(CHAT, {}), KEY)
    assert (raw.failure, raw.sent, raw.status) == ("connection", False, None)
    assert raw.error
    assert "Cannot connect to host" in raw.error


def test_a_host_that_does_not_take_the_connection_in_time_was_sent_nothing() -> None:
    """The queue of a listener that accepts nobody is full after one connection, and the next ones wait."""
    with socket.socket() as listener, ExitStack() as waiting:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            one = waiting.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
        raw = exchange(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", lambda e: e.post(CHAT, {}), timeout=0.5)
    assert (raw.failure, raw.sent) == ("timeout", False)


def test_an_address_that_is_none_is_a_connection() -> None:
    raw = exchange("http://127.0.0.1:99999/v1", lambda endpoint: endpoint.post(CHAT, {}), KEY)
    assert raw.failure == "connection"
    assert KEY not in repr(raw)


def test_an_endpoint_that_failed_can_be_asked_again() -> None:
    async def twice(endpoint: Endpoint) -> Raw:
        assert (await endpoint.get("/models")).failure == "connection"
        return await endpoint.get("/models")

    with teacher_server(lambda asked: Answer("cut" * 99, how="cut" if len(server.asked) == 1 else "whole")) as server:
        assert exchange(server.base_url, twice).status == 200


# Headers ------------------------------------------------------------------------------------------------------------


def day(seconds: float) -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry_after": "7"}, 7.0),
        ({"retry_after": "0.5"}, 0.5),
        ({"retry_after": "0"}, 0.0),
        ({"retry_after_ms": "250"}, 0.25),
        ({"retry_after_ms": "250", "retry_after": "7"}, 0.25),
        ({"retry_after_ms": "soon", "retry_after": "7"}, 7.0),
        ({"retry_after": day(-3600)}, 0.0),
        ({"retry_after": "Wed, 21 Oct 2015 07:28:00"}, 0.0),
        ({"retry_after": "-1"}, None),
        ({"retry_after": "nan"}, None),
        ({"retry_after": "inf"}, None),
        ({"retry_after": "soon"}, None),
        ({"retry_after": ""}, None),
        ({"retry_after": "Wed, 99 Oct 2015 07:28:00 GMT"}, None),
        ({"retry_after": "Wed, 21 Oct 99999999999999999999 07:28:00 GMT"}, None),
    ],
)
def test_the_wait_that_is_asked_for_is_read_in_all_its_forms(headers: dict[str, str], seconds: float | None) -> None:
    assert posted(answering(**headers)).retry_after == seconds


def test_a_day_to_come_is_a_wait_until_then() -> None:
    wait = posted(answering(retry_after=day(3600))).retry_after
    assert wait is not None
    assert 3600 - PATIENCE < wait <= 3600


def test_limits_are_read_and_what_is_no_number_is_left_out() -> None:
    named = {
        "x_ratelimit_limit_requests": "500",
        "x_ratelimit_remaining_requests": "499",
        "x_ratelimit_limit_tokens": "many",
    }
    assert posted(answering(**named)).limits == Limits(requests=500.0)
    assert posted(answering(x_ratelimit_limit_tokens="90000")).limits == Limits(tokens=90000.0)
    assert posted(answering(x_ratelimit_limit_tokens="-1")).limits is None
    assert posted(answering(x_ratelimit_limit_tokens="nan")).limits is None


# The key ------------------------------------------------------------------------------------------------------------

ODD_KEY = 'sk-"odd"\\key/0123456789'


def in_escapes(text: str, form: str = "04x") -> str:
    return "".join(f"\\u{ord(letter):{form}}" for letter in text)


SPELLINGS: dict[str, Callable[[str], str]] = {
    "plain": lambda key: key,
    "as JSON": lambda key: json.dumps(key),
    "slashes": lambda key: json.dumps(key).replace("/", "\\/"),
    "escapes": in_escapes,
    "upper escapes": lambda key: in_escapes(key, "04X"),
    "some escapes": lambda key: in_escapes(key[:3]) + json.dumps(key[3:])[1:-1],
    "escapes after a backslash": lambda key: "\\\\" + in_escapes(key),
    "twice": lambda key: f"{key}{key}",
    "in a header": lambda key: f"Authorization: Bearer {key}\n",
}


def holds(text: str, key: str) -> bool:
    """Whether a text has the key, as it is or to who reads the text as JSON."""
    with_letters = text
    for letter in {*key}:
        for form in ("04x", "04X"):
            with_letters = with_letters.replace(f"\\u{ord(letter):{form}}", letter)
    spellings = (key, json.dumps(key)[1:-1], json.dumps(key)[1:-1].replace("/", "\\/"))
    return any(spelling in seen for spelling in spellings for seen in (text, with_letters))


@pytest.mark.parametrize("key", [KEY, "sk-plain-0123456789"])
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("status", [200, 400, 500])
def test_a_key_that_comes_back_in_a_body_is_taken_out(key: str, spelling: str, status: int) -> None:
    written = SPELLINGS[spelling](key)
    assert holds(written, key)
    raw = posted(lambda asked: Answer(f'before {written} after "½ \\u00e9 \\n"', status), key)
    assert raw.body.startswith("before ")
    assert raw.body.endswith(' after "½ \\u00e9 \\n"')
    assert "[key]" in raw.body
    assert not holds(raw.body, key)


@pytest.mark.parametrize("spelling", ["plain", "as JSON", "slashes"])
def test_a_key_with_quotes_and_backslashes_is_taken_out(spelling: str) -> None:
    raw = posted(lambda asked: Answer(SPELLINGS[spelling](ODD_KEY)), ODD_KEY)
    assert "[key]" in raw.body
    assert not holds(raw.body, ODD_KEY)


def test_json_around_a_key_in_escapes_is_read_as_before() -> None:
    said = {"text": 'a "quote", \\u0073, a\nbreak, é', "key": KEY}
    raw = posted(lambda asked: Answer(json.dumps(said).replace(json.dumps(KEY), f'"{in_escapes(KEY)}"')), KEY)
    assert json.loads(raw.body) == said | {"key": "[key]"}


def test_a_key_that_comes_back_in_a_header_is_taken_out() -> None:
    headers = {"x-request-id": f"req-{KEY}", "retry-after": KEY, "x-ratelimit-limit-requests": KEY}
    raw = posted(lambda asked: Answer("{}", headers=headers), KEY)
    assert raw.request_id == "req-[key]"
    assert (raw.retry_after, raw.limits) == (None, None)


def test_a_key_that_comes_back_in_what_is_no_http_is_taken_out() -> None:
    for answer in (f"HTTP/1.1 {KEY} no\r\n\r\n", f"HTTP/1.1 200 OK\r\nContent-Length: {KEY}\r\n\r\n", f"{KEY}\r\n\r\n"):
        with speaking(answer.encode()) as base_url:
            raw = exchange(base_url, lambda endpoint: endpoint.post(CHAT, {}), KEY)
        assert raw.failure == "connection"
        assert not holds(json.dumps(asdict(raw)), KEY)


def test_a_key_in_an_address_that_is_none_is_taken_out() -> None:
    raw = exchange(f"http://127.0.0.1:{KEY}", lambda endpoint: endpoint.get("/models"), KEY)
    assert raw.failure == "connection"
    assert not holds(json.dumps(asdict(raw)), KEY)


def test_a_long_error_is_cut_after_the_key_is_taken_out() -> None:
    answer = b"HTTP/1.1 200 " + b"x" * 1900 + KEY.encode() * 9 + b"\r\nBad Header\r\n\r\n"
    with speaking(answer) as base_url:
        raw = exchange(base_url, lambda endpoint: endpoint.post(CHAT, {}), KEY)
    assert KEY[:12] not in json.dumps(asdict(raw))


def test_a_short_key_is_no_secret() -> None:
    assert posted(lambda asked: Answer("EMPTY is EMPTY"), "EMPTY").body == "EMPTY is EMPTY"


def test_an_endpoint_shows_its_address_and_no_key() -> None:
    assert repr(Endpoint("http://127.0.0.1/v1/", KEY, 1.0)) == "Endpoint('http://127.0.0.1/v1')"


def test_a_key_is_read_from_its_variable_without_the_line_break(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", f" {KEY}\n")
    assert read_key("TEACHER_KEY", "annotator 'a'") == KEY
    assert read_key(None, "annotator 'a'") is None


def test_a_key_that_is_not_set_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    with pytest.raises(ProcessError, match=r"annotator 'a' reads its key from TEACHER_KEY.*export TEACHER_KEY="):
        read_key("TEACHER_KEY", "annotator 'a'")


# Files --------------------------------------------------------------------------------------------------------------


def test_a_file_goes_up_as_a_form(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text('{"a": "½"}\n', encoding="utf-8")
    with teacher_server(lambda asked: Answer({"id": "file-1"})) as server:
        raw = exchange(server.base_url, lambda endpoint: endpoint.upload("/files", file, purpose="batch"), KEY)
    (asked,) = server.asked
    assert raw.status == 200
    assert asked.headers["content-type"].startswith("multipart/form-data")
    assert 'name="purpose"' in asked.text
    assert 'filename="questions.jsonl"' in asked.text
    assert '{"a": "½"}\n' in asked.text


def downloaded(handler: Handler, to: Path, key: str | None = KEY) -> Raw:
    with teacher_server(handler) as server:
        return exchange(server.base_url, lambda endpoint: endpoint.download("/files/1/content", to), key)


def test_a_file_comes_down_line_by_line_without_the_key(tmp_path: Path) -> None:
    """Longer than what is read at once, so that a key stands across two pieces."""
    line = json.dumps({"text": "½" * 50, "key": KEY, "again": "/"}, ensure_ascii=False)
    lines = [line.replace("/", "\\/") if n % 2 else line for n in range(30_000)]
    to = tmp_path / "answers.jsonl"
    raw = downloaded(lambda asked: Answer("\n".join(lines)), to)
    assert (raw.status, raw.body) == (200, "")
    text = to.read_text(encoding="utf-8")
    assert text.count("\n") == len(lines) - 1
    expected = {"text": "½" * 50, "key": "[key]", "again": "/"}
    assert all(json.loads(one) == expected for one in text.split("\n"))
    assert not holds(text[:1000], KEY)


def test_a_file_that_is_not_there_is_an_answer_with_words_and_no_file(tmp_path: Path) -> None:
    raw = downloaded(lambda asked: Answer(f"no file for {KEY}", 404), tmp_path / "answers.jsonl")
    assert (raw.status, raw.body) == (404, "no file for [key]")
    assert [*tmp_path.iterdir()] == []


def test_a_file_that_is_cut_on_its_way_is_a_connection(tmp_path: Path) -> None:
    raw = downloaded(lambda asked: Answer("a line\n" * 1000, how="cut"), tmp_path / "answers.jsonl")
    assert (raw.failure, raw.status) == ("connection", None)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(Unfinished, match=r"nowhere/answers\.jsonl could not be written: No such file"):
        downloaded(lambda asked: Answer("a line\n"), tmp_path / "nowhere" / "answers.jsonl")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_named() -> None:
    with pytest.raises(Unfinished, match=r"/dev/full could not be written: No space left"):
        downloaded(lambda asked: Answer("a line\n"), Path("/dev/full"))
