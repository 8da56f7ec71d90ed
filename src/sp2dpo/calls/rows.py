"""What the call log holds, as values: a call, an event of a batch job, and the sums that are made of them.

Knows nothing of SQLite or files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Final

from sp2dpo.hashing import canonical_json

__all__ = [
    "COLUMNS",
    "VALID",
    "Asked",
    "Attempts",
    "BatchEvent",
    "Call",
    "Cell",
    "CellState",
    "Count",
    "Usage",
    "line_of",
    "row_of",
]

Cell = tuple[str, str, str]
"""(pair_id, annotator, variant): one question of the panel."""

VALID: Final = ("ok", "repaired")

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Call:
    """One attempt at one question.

    `outcome` is `ok`, `repaired` or a kind of failure; `origin` is `live`, `recorded`, `reused`, `imported` or
    `predicted`; `kind` is that of the annotator; `transport` is `sync`, `batch`, `ray` or `import`, and None where
    nothing was sent.
    `cost_bound_usd` is the most that it can have cost where `cost_usd` is unknown and it may have been billed.
    """

    pair_id: str
    annotator: str
    variant: str
    attempt: int
    origin: str
    requested_model: str
    served_model: str | None
    endpoint: str
    request_hash: str
    params_requested: str
    params_sent: str
    started_at: str
    latency_s: float
    http_status: int | None
    finish_reason: str | None
    outcome: str
    mends: str
    raw_text: str | None
    category: str | None
    magnitude: float | None
    confidence: float | None
    prompt_tokens: int | None
    completion_tokens: int | None
    cost_usd: float | None
    system_fingerprint: str | None
    error: str | None
    kind: str = "chat_json"
    transport: str | None = None
    params_ignored: str = "[]"
    reasoning_tokens: int | None = None
    cost_bound_usd: float | None = None
    request_id: str | None = None

    @property
    def cell(self) -> Cell:
        return self.pair_id, self.annotator, self.variant

    @property
    def valid(self) -> bool:
        return self.outcome in VALID


@dataclass(frozen=True, slots=True)
class CellState:
    """How a question stands: how often it was asked, whether one attempt was valid, and how the last one ended."""

    asked: int
    valid: bool
    last_outcome: str


@dataclass(frozen=True)
class Count:
    """Attempts of one annotator with one outcome and origin, and what they add up to.

    `cost_bound_usd` is the sum of the bounds of those whose cost is unknown.
    """

    annotator: str
    outcome: str
    origin: str
    attempts: int
    cost_usd: float
    cost_bound_usd: float
    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int


@dataclass(frozen=True)
class Usage:
    """What the live calls of an annotator used; `counted` of them came with a number of tokens."""

    attempts: int
    valid: int
    counted: int
    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int


@dataclass(frozen=True)
class Attempts:
    """So many attempts that are alike, and when the first and the last of them began."""

    annotator: str
    variant: str
    kind: str
    origin: str
    requested_model: str
    served_model: str | None
    outcome: str
    attempts: int
    first: str
    last: str


@dataclass(frozen=True)
class Asked:
    """So many attempts with the same settings, as JSON."""

    annotator: str
    params_requested: str
    params_sent: str
    params_ignored: str
    attempts: int


@dataclass(frozen=True)
class BatchEvent:
    """A step in the life of a batch job. `event` is `intended`, `submitted`, `collected` or `gone`.

    `shard` is the hash of the questions that the job asks; `batch_id` is None until the endpoint gave one; `detail` is
    JSON.
    """

    annotator: str
    event: str
    shard: str
    at: str
    batch_id: str | None = None
    detail: str = "{}"


COLUMNS: Final = {field.name: str(field.type).removesuffix(" | None") for field in fields(Call)}
"""Every column of `calls` that is a field of `Call`, with `str`, `int` or `float`."""

_DEFAULTS: Final = {field.name: field.default for field in fields(Call) if field.default is not MISSING}


def row_of(call: Call) -> tuple[Any, ...]:
    """The values of a call in the order of the columns, as they will come back from the file.

    Raises:
        ValueError: a value that the file cannot hold; the column is named.
    """
    return tuple(
        None if value is None else _stored(name, kind, value)
        for (name, kind), value in zip(COLUMNS.items(), vars(call).values(), strict=True)
    )


def line_of(row: Sequence[Any]) -> str:
    """What a row adds to the hash: a line of canonical JSON, without the columns that are at their default."""
    named = zip(COLUMNS, row, strict=True)
    return canonical_json({k: v for k, v in named if k not in _DEFAULTS or v != _DEFAULTS[k]}) + "\n"


def _stored(name: str, kind: str, value: Any) -> str | int | float:
    if kind == "str" and isinstance(value, str) and (value.isascii() or not _SURROGATE.search(value)):
        return value
    if kind == "int" and type(value) is int and -(2**63) <= value < 2**63:
        return value
    if kind == "float" and type(value) in (int, float) and math.isfinite(value):
        return float(value) + 0.0  # SQLite has no negative zero
    raise ValueError(f"the call log cannot hold this {type(value).__name__} in its column {name} ({kind})")
