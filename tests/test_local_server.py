"""The local server is a fair stand-in: it enforces schemas, repeats itself for the same seed, and heeds the prompt."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Final

import openai
import pytest

import local_server as module
from local_server import CATEGORIES, REPLIES, Tokenizer, local_server, train_tokenizer, write_model

GRID: Final = [n / 100 for n in range(101)]
SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "semantic_gap_category": {"type": "string", "enum": list(CATEGORIES)},
        "semantic_gap_magnitude": {"enum": GRID},
        "semantic_gap_confidence": {"enum": GRID},
    },
    "required": ["semantic_gap_category", "semantic_gap_magnitude", "semantic_gap_confidence"],
    "additionalProperties": False,
}
RESPONSE_FORMAT: Final = {
    "type": "json_schema",
    "json_schema": {"name": "semantic_gap", "strict": True, "schema": SCHEMA},
}
TOPICS: Final = ("the sea", "a lawyer's letter", "photosynthesis", "def f(x): return x", "Zürich in 1984", "guitars")


def complete(base_url: str, prompt: str, **options: Any) -> Any:
    client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=30.0)
    return client.chat.completions.create(
        model=module.MODEL,
        messages=[{"role": "user", "content": prompt}],
        temperature=0.1,
        seed=42,
        max_tokens=64,
        **options,
    )


def reply(base_url: str, prompt: str) -> str:
    return str(complete(base_url, prompt, response_format=RESPONSE_FORMAT).choices[0].message.content)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer()


def test_the_server_listens_on_the_loopback_address_only(server_url: str) -> None:
    assert server_url.startswith("http://127.0.0.1:")
    assert server_url.endswith("/v1")


def test_a_reply_under_the_schema_stops_by_itself_and_is_in_range(server_url: str) -> None:
    completion = complete(server_url, "Which is better?", response_format=RESPONSE_FORMAT)
    assert completion.choices[0].finish_reason == "stop"
    gap = json.loads(completion.choices[0].message.content)
    assert list(gap) == SCHEMA["required"]
    assert gap["semantic_gap_category"] in CATEGORIES
    assert gap["semantic_gap_magnitude"] in GRID
    assert gap["semantic_gap_confidence"] in GRID


def test_a_reply_takes_well_under_64_tokens(server_url: str) -> None:
    assert complete(server_url, "A or B?", response_format=RESPONSE_FORMAT).usage.completion_tokens < 48


def test_the_same_seed_gives_the_same_text(server_url: str) -> None:
    assert reply(server_url, "Tell me of the sea.") == reply(server_url, "Tell me of the sea.")


def test_different_prompts_give_different_gaps(server_url: str) -> None:
    gaps = [json.loads(reply(server_url, f"Please tell me something about {topic}. " * 20)) for topic in TOPICS]
    for field in SCHEMA["required"]:
        assert len({gap[field] for gap in gaps}) > 1, field


def test_without_a_schema_the_reply_is_not_an_object(server_url: str) -> None:
    with pytest.raises(json.JSONDecodeError):
        json.loads(complete(server_url, "Which is better?").choices[0].message.content)


def test_each_slot_takes_a_prompt_of_8000_tokens(server_url: str) -> None:
    completion = complete(server_url, "&" * 8000, response_format=RESPONSE_FORMAT)
    assert completion.usage.prompt_tokens > 8000
    assert completion.choices[0].finish_reason == "stop"


def test_a_prompt_over_the_context_is_a_client_error(server_url: str) -> None:
    with pytest.raises(openai.BadRequestError, match="exceed"):
        complete(server_url, "&" * (module.CONTEXT + 1))


def test_the_model_file_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_model(tmp_path / name, seed)
    first, same, other = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == same
    assert first != other


def test_the_tokenizer_has_no_duplicates_and_every_byte(tokenizer: Tokenizer) -> None:
    assert len(set(tokenizer.tokens)) == len(tokenizer.tokens)
    assert set(module.byte_alphabet()) <= set(tokenizer.tokens)


def test_every_word_of_a_reply_is_one_token(tokenizer: Tokenizer) -> None:
    pieces = {piece.replace(" ", "Ġ") for piece in module.PIECE.findall(REPLIES) if not piece.isspace()}
    assert pieces <= tokenizer.whole


def test_the_server_is_gone_when_the_block_ends_by_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), local_server(tmp_path) as base_url:
        raise ZeroDivisionError
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(base_url.replace("/v1", "/health"), timeout=5.0)


def test_a_start_that_fails_shows_the_log(tmp_path: Path) -> None:
    (tmp_path / f"{module.MODEL}.gguf").mkdir()
    with pytest.raises(RuntimeError, match="IsADirectoryError"), local_server(tmp_path):
        pass


def test_by_hand_it_stays_until_ctrl_c(tmp_path: Path) -> None:
    command = [sys.executable, module.__file__, "--port", "0", "--workdir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["model"] == module.MODEL
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
