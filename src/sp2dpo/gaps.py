"""From answers to gaps: one row for every pair × annotator × variant that has a valid answer. E.3.

Every gap is read again from the raw text of the answer; what the log says was read is only compared with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sp2dpo.calls import CallLog
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

_CELL: Final = ("pair_id", "annotator", "variant")
_READ: Final = ("category", "magnitude", "confidence")
_ANSWERS: Final = {
    **{name: GAPS_SCHEMA.field(name).type for name in (*_CELL, *_READ)},
    "kind": pa.string(),
    "raw_text": pa.string(),
}


def gaps_table(log: CallLog) -> pa.Table:
    """Gaps in the order of the pair ids, annotators and variants; of several valid answers to a question, the first.

    Raises:
        Unfinished: the log says of an answer what its text does not.
    """
    answers = _answers(log)
    answers = answers.take(pc.sort_indices(answers, sort_keys=[(name, "ascending") for name in _CELL]))
    answers = _checked(answers.combine_chunks().filter(_first(answers)))
    gap = pc.multiply(answers["magnitude"], answers["confidence"])
    return answers.select([*_CELL, *_READ]).append_column("effective_gap", gap).cast(GAPS_SCHEMA)


def _answers(log: CallLog) -> pa.Table:
    """What the log says of every valid answer."""
    names, types = zip(*_ANSWERS.items(), strict=True)
    schema = schema_of(**_ANSWERS)
    columns = (zip(*rows, strict=True) for rows in log.valid(names))
    made = ([pa.array(values, kind) for values, kind in zip(some, types, strict=True)] for some in columns)
    return pa.Table.from_batches((pa.RecordBatch.from_arrays(arrays, schema=schema) for arrays in made), schema)


def _first(sorted_answers: pa.Table) -> NDArray[np.bool_]:
    """Which rows are not about the same question as the row before."""
    rows = sorted_answers.num_rows
    first = np.ones(rows, bool)
    if rows > 1:
        columns = [sorted_answers[name] for name in _CELL]
        same = [pc.equal(column.slice(1), column.slice(0, rows - 1)).to_numpy() for column in columns]
        first[1:] = ~np.logical_and.reduce(same)
    return first


def _checked(answers: pa.Table) -> pa.Table:
    """The answers, each text read again."""
    kinds: list[Any] = answers["kind"].unique().to_pylist()
    for kind in kinds:
        ours = answers.filter(pc.equal(answers["kind"], kind)).combine_chunks()
        texts = ours["raw_text"].combine_chunks().dictionary_encode()
        read = [_told(kind, text) for text in texts.dictionary.to_pylist()]
        for name, values in zip(_READ, zip(*read, strict=True), strict=True):
            told = pa.array(values, _ANSWERS[name]).take(texts.indices)
            same: Any = pc.equal(told, ours[name])
            wrong = ours.filter(pc.invert(pc.fill_null(same, False)))
            if wrong.num_rows:
                _refuse(wrong.slice(0, 1).to_pylist()[0])
    return answers


def _told(kind: Any, text: Any) -> tuple[str | None, float | None, float | None]:
    gap = read_answer(kind, text).gap
    return (None, None, None) if gap is None else (gap.category, gap.magnitude, gap.confidence)


def _refuse(answer: Mapping[str, Any]) -> None:
    raise Unfinished(
        f"calls.sqlite: the answer of {answer['annotator']}/{answer['variant']} to pair {answer['pair_id']} reads as "
        f"{read_answer(answer['kind'], answer['raw_text']).gap}, but the log says "
        f"{', '.join(str(answer[name]) for name in _READ)}: the log was changed"
    )


@lru_cache(maxsize=2**16)
def read_answer(kind: str, raw_text: str | None) -> Parsed:
    """What the text of an answer says, by the kind of its annotator.

    Read once for all the answers that say the same, which most do: numbers have two decimals as a rule.
    """
    return parse_decision(raw_text) if kind == "decisions" else parse_reply(raw_text)
