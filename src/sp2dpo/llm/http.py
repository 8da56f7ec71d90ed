"""HTTP to an OpenAI-compatible endpoint. It never raises for what the other side does, and lets no key out.

Nothing is repeated here: each attempt is the engine's, and has its row in the log.
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import IO, Any, Final, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from sp2dpo.errors import ProcessError, Unfinished
from sp2dpo.llm import Limits, Raw, storable

__all__ = ["Endpoint", "read_key"]

_SHORTEST_KEY: Final = 8
"""A shorter one ("none", "EMPTY", "0") is no secret, and blacking it out would alter answers."""

_ERROR_LENGTH: Final = 2000
_ESCAPES: Final = ("\\u00", "\\/", "%", "&#")
_CHUNK: Final = 2**20
_CONNECT_S: Final = 30.0
_THIS_MACHINE: Final = re.compile(r"localhost|127\..*|::1")
T = TypeVar("T")


def read_key(variable: str | None, owner: str) -> str | None:
    """The key of `owner` from the environment; None if it names no variable.

    Raises:
        ProcessError: the variable is not set, or holds what no header can carry.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ProcessError(f"{owner} reads its key from {variable}, which is not set: export {variable}=…")
    if not (key.isascii() and key.isprintable()):
        raise ProcessError(f"{variable} holds characters that no key has: set it again, on one line")
    return key


class Endpoint:
    """An endpoint below `base_url`.

    Args:
        key: sent as a bearer token; removed from all that comes back.
        timeout: seconds for one whole exchange.
        connector: replaces aiohttp's connector, for tests; closed with the endpoint.
    """

    def __init__(
        self, base_url: str, key: str | None, timeout: float, connector: aiohttp.BaseConnector | None = None
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self._key = key
        self._timeout = timeout
        self._connector = connector
        self._session: aiohttp.ClientSession | None = None
        self._proxy = _proxy_of(self.base_url)
        self._secret = _Secret(key) if key is not None and len(key) >= _SHORTEST_KEY else None

    def __repr__(self) -> str:
        return f"Endpoint({self.base_url!r})"

    def _open(self) -> aiohttp.ClientSession:
        """The session; made on first use, because it belongs to the running event loop."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=self._connector or aiohttp.TCPConnector(limit=0, ttl_dns_cache=300),
                timeout=aiohttp.ClientTimeout(total=self._timeout, sock_connect=min(_CONNECT_S, 0.9 * self._timeout)),
                headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session

    async def __aenter__(self) -> Endpoint:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def post(self, path: str, body: Mapping[str, Any]) -> Raw:
        """Send `body` as JSON."""
        data = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")
        return await self._exchange("POST", path, data=data, headers={"Content-Type": "application/json"})

    async def get(self, path: str, **query: str) -> Raw:
        """Read a resource."""
        return await self._exchange("GET", path, params=query)

    async def upload(self, path: str, file: Path, **fields: str) -> Raw:
        """Send a file as a form, read from disk as it goes."""
        with file.open("rb") as content:
            form = aiohttp.FormData(fields)
            form.add_field("file", content, filename=file.name, content_type="application/jsonl")
            return await self._exchange("POST", path, data=form)

    async def download(self, path: str, to: Path) -> Raw:
        """Write the body of a response to a file, without the key in it; `Raw.body` stays empty unless it fails.

        Raises:
            Unfinished: the file cannot be written.
        """
        return await self._exchange("GET", path, to=to)

    async def _exchange(self, method: str, path: str, to: Path | None = None, **options: Any) -> Raw:
        started = time.monotonic()
        failure, error, sent = "connection", "", True
        try:
            async with self._open().request(
                method, self.base_url + path, allow_redirects=False, proxy=self._proxy, **options
            ) as response:
                if to is not None and response.status == 200:
                    await self._save(response, to)
                    data = b""
                else:
                    data = await response.read()
                return self._raw(response, data, time.monotonic() - started)
        except aiohttp.ConnectionTimeoutError:
            failure, error, sent = "timeout", "no connection in time", False
        except TimeoutError:
            failure, error = "timeout", f"no answer within {self._timeout:g} s"
        except (aiohttp.ClientError, OSError, ValueError) as problem:  # never kept or raised: it holds the headers
            error = f"{type(problem).__name__}: {problem}"
            sent = not isinstance(problem, aiohttp.ClientConnectorError)
        return Raw(
            failure=failure, error=self.clean(error)[:_ERROR_LENGTH], latency_s=time.monotonic() - started, sent=sent
        )

    def _raw(self, response: aiohttp.ClientResponse, data: bytes, latency_s: float) -> Raw:
        headers = response.headers
        return Raw(
            status=response.status,
            body=self.clean(data.decode("utf-8", "backslashreplace")),
            retry_after=_retry_after(headers),
            limits=_limits(headers),
            request_id=self._header(headers, "x-request-id"),
            latency_s=latency_s,
        )

    def _header(self, headers: Mapping[str, str], name: str) -> str | None:
        value = headers.get(name)
        return None if value is None else self.clean(value)[:200]

    async def _save(self, response: aiohttp.ClientResponse, to: Path) -> None:
        """Line by line, because a key may stand across two chunks, never across two lines."""
        with _guarded(to, lambda: to.open("wb", buffering=0)) as file:
            rest = b""
            async for chunk in response.content.iter_chunked(_CHUNK):
                lines, newline, rest = (rest + chunk).rpartition(b"\n")
                self._write(file, to, lines + newline)
            self._write(file, to, rest)

    def _write(self, file: IO[bytes], path: Path, data: bytes) -> None:
        left = self.clean(data.decode("utf-8", "backslashreplace")).encode("utf-8")
        while left:
            left = left[_guarded(path, partial(file.write, left)) :]

    def clean(self, text: str) -> str:
        """`text` as it may be kept: without the key, wherever and however the other side repeats it."""
        return storable(text if self._secret is None else self._secret.out_of(text))


def _proxy_of(url: str) -> str | None:
    """The proxy that the environment names for an address; none for this machine's own.

    Not aiohttp's `trust_env`: that also sends the passwords of ~/.netrc, or fails where there is a key.
    """
    with suppress(ValueError):
        parts = urlsplit(url)
        host = parts.hostname or ""
        if not _THIS_MACHINE.fullmatch(host) and not proxy_bypass(host):
            return getproxies().get(parts.scheme)
    return None


def _guarded(path: Path, write: Callable[[], T]) -> T:
    try:
        return write()
    except OSError as error:
        raise Unfinished(f"{path} could not be written: {error.strerror}; nothing that was paid for is lost") from error


class _Secret:
    """A key as it is, as JSON, a URL or HTML may write each of its letters (however often over), and in base64."""

    def __init__(self, key: str) -> None:
        quoted, encoded = json.dumps(key)[1:-1], list(_in_base64(key))
        self._signs = (key, quoted, *encoded, *_ESCAPES)
        forms = ["".join(map(_ways, key)), *map(re.escape, (quoted, quoted.replace("/", "\\/"), *encoded))]
        self._forms = re.compile("|".join(forms))

    def out_of(self, text: str) -> str:
        """The text without it."""
        return self._forms.sub("[key]", text) if any(sign in text for sign in self._signs) else text


def _ways(letter: str) -> str:
    code, plain = f"{ord(letter):02x}", re.escape(letter)
    escapes = rf"(?<!\\)\\++(?:{plain}|u00(?i:{code}))"
    return rf"(?:{plain}|{escapes}|%(?:25)*(?i:{code})|&#(?:0*{ord(letter)}|[xX]0*(?i:{code}));)"


def _in_base64(key: str) -> Iterator[str]:
    """What any text that holds the key has in its base64, at each of the three places where the key may begin."""
    for lead in range(3):
        code = base64.b64encode(bytes(lead) + key.encode()).decode().rstrip("=")
        yield code[(0, 2, 3)[lead] : len(code) - ((lead + len(key)) % 3 > 0)]


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, from `retry-after-ms` or `retry-after` as a number or a date."""
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    text = headers.get("retry-after")
    seconds = _number(text)
    if seconds is None and text:
        with suppress(ValueError, OverflowError):
            at = parsedate_to_datetime(text)
            seconds = max(0.0, (at.replace(tzinfo=at.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
    return seconds


def _limits(headers: Mapping[str, str]) -> Limits | None:
    found = {what: _number(headers.get(f"x-ratelimit-limit-{what}")) for what in ("requests", "tokens")}
    return Limits(**found) if any(value is not None for value in found.values()) else None


def _number(text: str | None) -> float | None:
    """A finite number that is not negative."""
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) and number >= 0 else None
