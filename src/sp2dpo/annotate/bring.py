"""Questions out to a JSONL file, and answers in from one: the lines of batch APIs and of `vllm run-batch`.

A line of questions: https://platform.openai.com/docs/api-reference/batch/request-input, a line of answers:
https://platform.openai.com/docs/api-reference/batch/request-output. `vllm run-batch` writes the latter too, except that
a failure has its words in `error` and no `body`. Reads no answer: what a line holds goes to the dialect like any other.
"""

from __future__ import annotations

import gzip
import json
import tempfile
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from sp2dpo.errors import DataError
from sp2dpo.hashing import sha256_json
from sp2dpo.llm import Raw, Reply, Request, storable
from sp2dpo.llm.chat import text_of, tokens_of
from sp2dpo.tables import write_atomic

__all__ = ["Answers", "custom_id", "export_requests", "open_answers", "raw_of", "request_line"]

_LONGEST_ID: Final = 64
"""Characters; the least that an API which states a limit takes."""

_TEXTS: Final = ("pair_id", "variant", "raw_text")
_ERROR_LENGTH: Final = 2000
_ROW_FAILURES: Final = {"batch_expired": "batch_expired", "request_timeout": "timeout"}


def custom_id(pair_id: str, variants: tuple[str, ...]) -> str:
    """The name of a call in a file: half of the pair's hash and the variant, or a short hash of several variants."""
    plain = f"{pair_id[:32]}.{variants[0]}"
    if len(variants) == 1 and len(plain) <= _LONGEST_ID:
        return plain
    return f"{pair_id[:32]}.{sha256_json(list(variants))[:16]}"


def request_line(request: Request) -> bytes:
    """A call as a line of a batch's input."""
    name = custom_id(request.pair_id, request.variants)
    line = {"custom_id": name, "method": "POST", "url": f"/v1{request.path}", "body": dict(request.body)}
    text = json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n"
    return text.encode("utf-8", "backslashreplace")


def export_requests(requests: Iterable[Request], path: Path) -> int:
    """Write questions as a batch's input, compressed if the name ends in `.gz`; returns how many."""
    count = 0

    def write(partial: Path) -> None:
        nonlocal count
        with partial.open("wb") as file, _writer(file, path) as lines:
            for count, request in enumerate(requests, 1):  # noqa: B007
                lines.write(request_line(request))

    write_atomic(path, write)
    return count


@contextmanager
def _writer(file: IO[bytes], path: Path) -> Iterator[Any]:
    if path.suffix != ".gz":
        yield file
        return
    with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as lines:
        yield lines


def raw_of(row: Mapping[str, Any]) -> Raw:
    """What a line of a batch's output says: an HTTP response, whatever its status, or why there is none."""
    response, error = row.get("response"), row.get("error")
    if isinstance(response, Mapping) and isinstance(response.get("status_code"), int):
        body, request_id = response.get("body"), response.get("request_id") or row.get("id")
        if body is None and error is not None:
            body = {"error": error}
        return Raw(
            status=response["status_code"],
            body=storable(body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)),
            request_id=storable(request_id)[:200] if isinstance(request_id, str) else None,
        )
    code = error.get("code") if isinstance(error, Mapping) else None
    words = json.dumps(error, ensure_ascii=False) if error else "the line has neither a response nor an error"
    return Raw(failure=_ROW_FAILURES.get(str(code), "batch_failed"), error=storable(words)[:_ERROR_LENGTH], sent=False)


@dataclass(frozen=True)
class _Line:
    """A line of answers: its question's name, and what it holds; `annotator` if the line names one."""

    name: str
    answer: Raw | Reply
    annotator: str | None = None


@contextmanager
def open_answers(path: Path, annotator: str) -> Iterator[Answers]:
    """Open a file of answers; every line is checked first, and then read again when its question takes it.

    A line is one of a batch's output, or has the texts `pair_id`, `variant` and `raw_text`, and optionally `annotator`
    (lines of others are left out), `served_model`, `finish_reason`, `system_fingerprint`, `prompt_tokens`,
    `completion_tokens`. A last line that was cut off is left out and counted as `torn`.

    Raises:
        DataError: a line is no answer, which is named by its number; or the file has no answer of this annotator.
    """
    with _binary(path) as (file, cut):
        yield Answers(file, path, annotator, cut)


@contextmanager
def _binary(path: Path) -> Iterator[tuple[IO[bytes], bool]]:
    """The file's bytes, to move about in, and whether their end is missing."""
    if not path.is_file():
        raise DataError(f"{path} is missing: no answers to import")
    if path.suffix != ".gz":
        with path.open("rb") as file:
            yield file, False
        return
    with tempfile.TemporaryFile() as plain:
        yield plain, _unpack(path, plain)


def _unpack(path: Path, plain: IO[bytes]) -> bool:
    try:
        with gzip.open(path) as packed:
            while chunk := packed.read1(2**20):
                plain.write(chunk)
    except EOFError:
        return True
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is no gzip file: {error}") from error
    return False


class Answers:
    """Answers by question. Kept in memory: sixteen bytes a line.

    `duplicates` counts lines about a question that an earlier line answers; `torn` is the number of a last line that
    was cut off; `others` counts lines of other annotators.
    """

    def __init__(self, file: IO[bytes], path: Path, annotator: str, cut: bool = False) -> None:
        self._file, self._path = file, path
        self.torn: int | None = None
        self.others = 0
        keys, places = array("Q"), array("q")
        for place, line in self._lines(cut):
            if line.annotator in (None, annotator):
                keys.append(_key(line.name))
                places.append(place)
            else:
                self.others += 1
        if not keys:
            raise DataError(f"{path} has no answers of annotator '{annotator}'; of others: {self.others}")
        order = np.argsort(np.asarray(keys, dtype=np.uint64), kind="stable")
        self._keys = np.asarray(keys, dtype=np.uint64)[order]
        self._places = np.asarray(places, dtype=np.int64)[order]
        self._taken = np.zeros(len(order), dtype=bool)
        self.duplicates = int((self._keys[1:] == self._keys[:-1]).sum())

    def __len__(self) -> int:
        """Different questions that the file answers."""
        return len(self._keys) - self.duplicates

    @property
    def unused(self) -> int:
        """Answers that no question took: of other pairs or variants, or to what is not open."""
        return len(self) - int(self._taken.sum())

    def take(self, request: Request) -> Raw | dict[str, Reply] | None:
        """The response to a call, or replies by variant where the file has the bare texts; None if it has neither."""
        answer = self._find(custom_id(request.pair_id, request.variants))
        if isinstance(answer, Raw):
            return answer
        found = {v: self._find(custom_id(request.pair_id, (v,))) for v in request.variants}
        return {v: reply for v, reply in found.items() if isinstance(reply, Reply)} or None

    def _find(self, name: str) -> Raw | Reply | None:
        key = np.uint64(_key(name))
        for n in range(int(np.searchsorted(self._keys, key)), len(self._keys)):
            if self._keys[n] != key:
                break
            self._file.seek(int(self._places[n]))
            line = _read(json.loads(self._file.readline()))
            if line.name == name:
                self._taken[n] = True
                return line.answer
        return None

    def _lines(self, cut: bool) -> Iterator[tuple[int, _Line]]:
        """Each line, checked, and where it begins."""
        self._file.seek(0)
        place, number = 0, 0
        for number, data in enumerate(self._file, 1):
            try:
                if data.strip():
                    yield place, _read(json.loads(data))
            except _NoAnswer as error:
                raise DataError(f"{self._path}, line {number}: {error}") from error
            except (ValueError, RecursionError) as error:
                if data.endswith(b"\n"):
                    raise DataError(f"{self._path}, line {number}: not JSON ({error})") from error
                self.torn = number
            place += len(data)
        if cut and self.torn is None:
            self.torn = number + 1


class _NoAnswer(ValueError):
    """A line that is JSON and no answer."""


def _read(row: Any) -> _Line:
    if not isinstance(row, dict):
        raise _NoAnswer("an answer is a JSON object")
    if "custom_id" in row:
        return _from_batch(row)
    for name in _TEXTS:
        if not isinstance(row.get(name), str):
            raise _NoAnswer(f"an answer needs custom_id and response, or the texts {', '.join(_TEXTS)}; no {name}")
    tokens, owner = tokens_of(row), row.get("annotator")
    reply = Reply(
        raw_text=storable(row["raw_text"]),
        served_model=text_of(row.get("served_model")),
        finish_reason=text_of(row.get("finish_reason")),
        system_fingerprint=text_of(row.get("system_fingerprint")),
        prompt_tokens=tokens["prompt_tokens"],
        completion_tokens=tokens["completion_tokens"],
    )
    return _Line(custom_id(row["pair_id"], (row["variant"],)), reply, None if owner is None else str(owner))


def _from_batch(row: Mapping[str, Any]) -> _Line:
    if not isinstance(row["custom_id"], str):
        raise _NoAnswer("custom_id is no text")
    if "response" not in row and "error" not in row:
        raise _NoAnswer("neither response nor error: a line of questions, not of answers?")
    return _Line(row["custom_id"], raw_of(row))


def _key(name: str) -> int:
    return int.from_bytes(sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big")
