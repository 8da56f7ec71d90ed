"""What several test files share: a real server, and small runs whose process file each test writes itself."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from hypothesis import settings

from sp2dpo import cli
from sp2dpo.process import load_process
from sp2dpo.runs import Run, open_run
from sp2dpo.stages import prepare_run
from teacher_server import Answer

# No deadlines: a busy machine is no defect. The same examples every time, so that a failure can be seen again.
settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")

# A shell starts what runs in the background with SIGINT ignored, and the commands that tests interrupt inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

KEY = "sk-recognise-me/0123456789"
GOOD = '{"semantic_gap_category": "Style", "semantic_gap_magnitude": 0.5, "semantic_gap_confidence": 0.4}'


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Reference log-probabilities of tests are nobody else's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SP2DPO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of a llama.cpp server with a tiny random model."""
    local_server = pytest.importorskip("local_server")
    with local_server.local_server(tmp_path_factory.mktemp("local-server")) as base_url:
        yield base_url


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    """A key in the environment that cannot be missed where it does not belong."""
    monkeypatch.setenv("TEACHER_KEY", KEY)
    return KEY


def teacher(name: str = "teacher", **more: Any) -> dict[str, Any]:
    """An annotator behind an address that no test reaches, unless it brings its own transport."""
    return {"name": name, "model": f"model-of-{name}", "base_url": f"http://{name}.invalid/v1"} | more


def completion(content: Any = GOOD, finish: str = "stop", **more: Any) -> Answer:
    """A chat completion of 1,000 tokens in and 50 out."""
    message = {"role": "assistant", "content": content} | more.pop("message", {})
    usage = {"prompt_tokens": 1000, "completion_tokens": 50}
    return Answer({"choices": [{"index": 0, "finish_reason": finish, "message": message}], "usage": usage} | more)


def rows(n: int) -> list[dict[str, str]]:
    return [{"prompt": f"question {i}", "chosen": f"good answer {i}", "rejected": f"bad answer {i}"} for i in range(n)]


def write_process(folder: Path, pairs: Sequence[Any] | None = None, **keys: Any) -> Path:
    """A process file of one annotator, one variant and two pairs; `keys` replace its keys, and parts of `panel`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row) + "\n" for row in (rows(2) if pairs is None else pairs))
    (folder / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    decoding = {"retry_attempts": 2, "retry_delay_base": 0}
    panel = {"variants": ["v1"], "annotators": [teacher()], "decoding": decoding} | keys.pop("panel", {})
    process = {"name": "small", "data": {"source": "pairs.jsonl"}, "panel": panel} | keys
    path = folder / "process.yaml"
    path.write_text(yaml.safe_dump(process, sort_keys=False), encoding="utf-8")
    return path


def private_mounts() -> bool:
    """Whether this machine lets a process have mounts of its own."""
    try:
        return subprocess.run(["unshare", "-rm", "true"], capture_output=True, timeout=30).returncode == 0
    except OSError:
        return False


needs_mounts = pytest.mark.skipif(not private_mounts(), reason="no private mounts on this machine")


class Ran(NamedTuple):
    """How a command ended, and what it wrote."""

    code: int
    out: str
    err: str


Sp2dpo = Callable[..., Ran]


@pytest.fixture
def sp2dpo(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sp2dpo:
    """Runs a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def command(*args: object) -> Ran:
        code = 0
        try:
            cli.main([str(arg) for arg in args])
        except SystemExit as ended:
            code = int(ended.code or 0)
        return Ran(code, *capsys.readouterr())

    return command


NewRun = Callable[..., Run]


@pytest.fixture
def new_run(tmp_path: Path) -> NewRun:
    """Makes a prepared run in `tmp_path/<where>/run` from a process file that `write_process` writes."""

    def make(where: str = ".", **keys: Any) -> Run:
        folder = tmp_path / where
        run = open_run(load_process(write_process(folder, **keys)), folder / "run")
        prepare_run(run)
        return run

    return make
