"""The texts of all pairs within a bound of bytes: whole for the pairs that matter most, else how each side begins.

Texts lie in chunks of the schedule's order, so that the page unpacks only the one of the pair that is opened.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sp2dpo.evidence import Array, Evidence
from sp2dpo.report.cards import visible
from sp2dpo.report.explorer import Block, Texts, block

__all__ = ["CHUNK", "pack_texts"]

CHUNK: Final = 200
"""Pairs in a block."""

_ALL: Final = 2**40
"""Characters that no text has."""

_MOST_OF_ROOM: Final = 0.05
"""A pair whose texts take more than this part of the room is not among the whole ones where not all are."""

_EXCERPTS: Final = (2000, 1000, 600, 300, 200, 120, 80, 50, 25, 0)
_OWN: Final = ("pair_id", "prompt_id", "prompt", "chosen", "rejected")
_SIDES: Final = ("prompt", "chosen", "rejected")
_SAMPLED: Final = 6
_SOURCE_VALUE: Final = 500


@dataclass(frozen=True)
class _Plan:
    """Characters kept of each side of each pair: (N,)."""

    limit_i: NDArray[np.int64]
    excerpt: int | None


def pack_texts(evidence: Evidence, first: Sequence[int], room: int, fixed: int) -> tuple[list[Block], Texts]:
    """Blocks of at most `room` bytes, whole texts for the pairs `first` first and then in the order of the schedule.

    Where not even bare ids fit, the blocks hold these alone. `fixed` is the size of all else, to tell that of a page
    with every text.
    """
    length_is = np.stack([_lengths(evidence, side) for side in _SIDES], axis=1)
    packer = _Packer(evidence)
    whole = _Plan(np.full(evidence.n, _ALL), None)
    needed = packer.estimate(whole, length_is)
    plan, target = whole, 0.97 * room
    if needed > 1.3 * room:
        plan = _fit(packer, length_is, first, target)
    while True:
        blocks = packer.pack(plan)
        size = sum(len(one.html) for one in blocks)
        if size <= room or (plan.excerpt == 0 and not (plan.limit_i > 0).any()):
            break
        target *= 0.97 * room / size if plan is not whole else 1.0
        plan = _fit(packer, length_is, first, target)
    kept = int((length_is <= plan.limit_i[:, None]).all(axis=1).sum())
    all_mb = int(np.ceil(1.1 * (fixed + needed) / 1e6))
    return blocks, Texts(kept, None if kept == evidence.n else plan.excerpt, CHUNK, all_mb)


def _lengths(evidence: Evidence, side: str) -> NDArray[np.int64]:
    """Characters of one side of each scheduled pair: (N,)."""
    messages: Any = evidence.pairs[side].combine_chunks()
    content = pc.utf8_length(pc.struct_field(messages.flatten(), "content")).to_numpy(zero_copy_only=False)
    ends = messages.offsets.to_numpy() - messages.offsets[0].as_py()
    total = np.concatenate([[0], np.cumsum(content, dtype=np.int64)])
    length_i: NDArray[np.int64] = (total[ends[1:]] - total[ends[:-1]])[evidence.at_i]
    return length_i


def _fit(packer: _Packer, length_is: NDArray[np.int64], first: Sequence[int], target: float) -> _Plan:
    """Excerpts as long as the pairs `first`, whole, leave room for, and at least half of it; then more whole pairs."""
    n = len(length_is)
    whole_i = packer.sizes(_Plan(np.full(n, _ALL), None), length_is)
    for_excerpts = target - min(whole_i[list(set(first))].sum(), target / 2)
    for excerpt in _EXCERPTS:
        plan = _Plan(np.full(n, excerpt), excerpt)
        size_i = packer.sizes(plan, length_is)
        if size_i.sum() <= for_excerpts:
            break
    more_i = whole_i - size_i
    order = np.array(list(dict.fromkeys([*first, *range(n)])), np.int64)
    order = order[more_i[order] <= _MOST_OF_ROOM * target]
    fits = np.cumsum(np.maximum(more_i[order], 0)) <= target - size_i.sum()
    limit_i = plan.limit_i.copy()
    limit_i[order[fits]] = _ALL
    return _Plan(limit_i, plan.excerpt)


class _Packer:
    """Makes the blocks of a plan, and foretells their size from a few of them."""

    def __init__(self, evidence: Evidence) -> None:
        self._evidence = evidence
        names = [f.name for f in evidence.pairs.schema if f.name not in _OWN and not pa.types.is_nested(f.type)]
        self._pairs = evidence.pairs.select([*_OWN, *names]).combine_chunks()
        self._starts = range(0, evidence.n, CHUNK)
        self._rates: dict[int | None, tuple[float, float]] = {}

    def pack(self, plan: _Plan) -> list[Block]:
        return [self._block(plan, start) for start in self._starts]

    def estimate(self, plan: _Plan, length_is: NDArray[np.int64]) -> float:
        return float(self.sizes(plan, length_is).sum())

    def sizes(self, plan: _Plan, length_is: NDArray[np.int64]) -> Array:
        """Bytes in the page of each pair, about, of a plan that treats all pairs alike: (N,)."""
        kept_i = np.minimum(length_is, plan.limit_i[:, None]).sum(axis=1)
        if plan.excerpt not in self._rates:
            sampled = self._starts[:: -(-len(self._starts) // _SAMPLED)]
            rows = np.concatenate([np.arange(s, min(s + CHUNK, len(kept_i))) for s in sampled])
            bare = self._sampled(_Plan(np.zeros_like(kept_i), 0), sampled) / len(rows)
            size = self._sampled(plan, sampled)
            self._rates[plan.excerpt] = bare, max(size - bare * len(rows), 0.0) / max(int(kept_i[rows].sum()), 1)
        bare, rate = self._rates[plan.excerpt]
        sizes: Array = bare + rate * kept_i
        return sizes

    def _sampled(self, plan: _Plan, starts: Sequence[int]) -> int:
        return sum(len(self._block(plan, start).html) for start in starts)

    def _block(self, plan: _Plan, start: int) -> Block:
        at = self._evidence.at_i[start : start + CHUNK]
        rows = self._pairs.take(at).to_pylist()
        limits = plan.limit_i[start : start + CHUNK].tolist()
        return block(f"texts-{start // CHUNK}", [_record(row, limit) for row, limit in zip(rows, limits, strict=True)])


def _record(row: dict[str, Any], limit: int) -> list[Any]:
    """`[pair_id, prompt_id, prompt, chosen, rejected, source's own columns]`; ids of excerpts are cut."""
    whole = limit == _ALL
    ids = (
        [row["pair_id"], visible(row["prompt_id"])] if whole else [row["pair_id"][:16], visible(row["prompt_id"])[:40]]
    )
    own = (
        {name: _own(value) for name, value in row.items() if name not in _OWN and value is not None} if whole else None
    )
    return [*ids, *(_side(row[side], limit) for side in _SIDES), own]


def _own(value: Any) -> Any:
    """A value that JSON and a browser's numbers keep as it is, else its text."""
    exact = isinstance(value, bool) or (isinstance(value, int | float) and abs(value) < 2**53)
    return value if exact else visible(str(value))[:_SOURCE_VALUE]


def _side(messages: Sequence[dict[str, str]], limit: int) -> list[Any]:
    """`[characters left out, role, text, role, text, …]`, the first `limit` characters of the messages."""
    shown: list[Any] = [max(sum(len(m["content"]) for m in messages) - limit, 0)]
    for message, room in _taken(messages, limit):
        shown += [message["role"], visible(message["content"][:room])]
    return shown


def _taken(messages: Sequence[dict[str, str]], limit: int) -> Iterator[tuple[dict[str, str], int]]:
    left = limit
    for message in messages:
        if left <= 0 and message is not messages[0]:
            return
        yield message, max(left, 0)
        left -= len(message["content"])
