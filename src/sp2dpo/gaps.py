"""From answers to gaps: one row for every pair × annotator × variant that has a valid answer. E.3.

Every gap is read again from the raw text of the answer; what the log says was read is only compared with it.
"""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa

from sp2dpo.calls import Call
from sp2dpo.errors import Unfinished
from sp2dpo.reply import parse_reply
from sp2dpo.tables import schema_of

__all__ = ["GAPS_SCHEMA", "gaps_table"]

GAPS_SCHEMA = schema_of(
    pair_id=pa.string(),
    annotator=pa.string(),
    variant=pa.string(),
    category=pa.string(),
    magnitude=pa.float64(),
    confidence=pa.float64(),
    effective_gap=pa.float64(),
)


def gaps_table(answers: Iterable[Call]) -> pa.Table:
    """Gaps in the order of the pair ids, annotators and variants.

    Raises:
        Unfinished: the log says of an answer what its text does not.
    """
    rows = [_row(call) for call in sorted(answers, key=lambda call: call.cell)]
    return pa.Table.from_pylist(rows, schema=GAPS_SCHEMA)


def _row(call: Call) -> dict[str, str | float]:
    gap = parse_reply(call.raw_text).gap
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
