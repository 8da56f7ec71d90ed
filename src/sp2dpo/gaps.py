"""From answers to gaps: one row for every pair × annotator × variant that has a valid answer. E.3.

Every gap is read again from the raw text of the answer; what the log says was read is only compared with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import islice
from typing import Final

import pyarrow as pa

from sp2dpo.calls import Call
from sp2dpo.decision import parse_decision
from sp2dpo.errors import Unfinished
from sp2dpo.reply import Parsed, parse_reply
from sp2dpo.tables import schema_of

__all__ = ["GAPS_SCHEMA", "gaps_table", "read_answer"]

GAPS_SCHEMA = schema_of(
    pair_id=pa.string(),
    annotator=pa.string(),
    variant=pa.string(),
    category=pa.string(),
    magnitude=pa.float64(),
    confidence=pa.float64(),
    effective_gap=pa.float64(),
)


_ROWS_AT_ONCE: Final = 10_000


def gaps_table(answers: Iterable[Call]) -> pa.Table:
    """Gaps in the order of the answers, which is that of the pair ids, annotators and variants in `CallLog.answers`.

    Raises:
        Unfinished: the log says of an answer what its text does not.
    """
    rows = map(_row, answers)
    pieces = iter(lambda: list(islice(rows, _ROWS_AT_ONCE)), [])
    batches = [pa.RecordBatch.from_pylist(piece, schema=GAPS_SCHEMA) for piece in pieces]
    return pa.Table.from_batches(batches, schema=GAPS_SCHEMA)


def read_answer(call: Call) -> Parsed:
    """What the text of a call says, by the kind of its annotator."""
    return _read(call.kind, call.raw_text)


@lru_cache(maxsize=2**16)
def _read(kind: str, raw_text: str | None) -> Parsed:
    """Parsed once for all the calls that say the same, which most do: numbers have two decimals as a rule."""
    return parse_decision(raw_text) if kind == "decisions" else parse_reply(raw_text)


def _row(call: Call) -> dict[str, str | float]:
    gap = read_answer(call).gap
    if gap is None or (gap.category, gap.magnitude, gap.confidence) != (call.category, call.magnitude, call.confidence):
        raise Unfinished(
            f"calls.sqlite: the answer of {call.annotator}/{call.variant} to pair {call.pair_id} reads as {gap}, but "
            f"the log says {call.category}, {call.magnitude}, {call.confidence}: the log was changed"
        )
    return {
        "pair_id": call.pair_id,
        "annotator": call.annotator,
        "variant": call.variant,
        "category": gap.category,
        "magnitude": gap.magnitude,
        "confidence": gap.confidence,
        "effective_gap": gap.effective,
    }
