"""Pairs and schedule joined into what the trainer reads. Refuses whatever would train on a β that was not meant.

Tables in, a table out; no torch.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import pyarrow as pa

from sp2dpo.errors import ScheduleError, nearest
from sp2dpo.pairs import pair_id
from sp2dpo.tables import schema_of

__all__ = ["MARGINS_SCHEMA", "METHODS", "check_beta", "check_cover", "training_table"]

METHODS: Final = {"dpo": None, "rand_beta": "beta_random", "sp2dpo": "beta"}
"""Method → the column of the schedule that is its β; None: one β for all, `train.beta`."""


MARGINS_SCHEMA: Final = schema_of(step=pa.int64(), row=pa.int64(), margin=pa.float32())
"""`margins.parquet`: the implicit margin Δ, in nats and without β, of a row of the schedule at a training step."""


def training_table(
    pairs: pa.Table, schedule: pa.Table, method: str, *, beta: float, beta_min: float, beta_max: float
) -> pa.Table:
    """Rows of the schedule in its order: `prompt`, `chosen`, `rejected`, `beta` (float32), `row` (of the schedule).

    Raises:
        ScheduleError: β missing, not finite, not positive or outside the envelope; a pair of the schedule that is not
            among the pairs; a pair whose text is not the one that was judged. The pair is named.
    """
    ids = [str(pair) for pair in schedule["pair_id"].to_pylist()]
    at = {pair: n for n, pair in enumerate(pairs["pair_id"].to_pylist())}
    for pair in ids:
        if pair not in at:
            raise ScheduleError(
                f"pair {pair} of the schedule is not among the pairs: the schedule was made from another dataset, or "
                "from other text; make it again with: sp2dpo schedule PROCESS.yaml"
            )
    rows = pairs.select(["prompt", "chosen", "rejected"]).take([at[pair] for pair in ids])
    _check_text(ids, rows)
    column = METHODS[method]
    values = [beta] * len(ids) if column is None else _column(schedule, column)
    check_beta(values, ids, beta_min, beta_max, column or "train.beta", within_envelope=column is not None)
    table = rows.append_column("beta", pa.array(values, pa.float32()))
    return table.append_column("row", pa.array(np.arange(len(ids)), pa.int64()))


def check_cover(pairs: pa.Table, schedule: pa.Table, excluded: pa.Table) -> None:
    """Refuse a schedule that leaves out a pair without saying so.

    Raises:
        ScheduleError: a pair is neither in the schedule nor among the excluded; it is named.
    """
    known = set(schedule["pair_id"].to_pylist()) | set(excluded["pair_id"].to_pylist())
    left_out = [pair for pair in pairs["pair_id"].to_pylist() if pair not in known]
    if left_out:
        raise ScheduleError(
            f"the schedule does not cover the pairs: {len(left_out)} are neither in it nor in excluded.csv, the first "
            f"is {left_out[0]}; make it again with sp2dpo schedule, or list them in excluded.csv"
        )


def _column(schedule: pa.Table, column: str) -> list[float]:
    if column not in schedule.column_names:
        raise ScheduleError(f"the schedule has no column '{column}'{nearest(column, schedule.column_names)}")
    if not pa.types.is_floating(schedule[column].type):
        raise ScheduleError(f"column '{column}' of the schedule holds {schedule[column].type}, not numbers")
    return [math.nan if value is None else value for value in schedule[column].to_pylist()]


def _check_text(ids: list[str], rows: pa.Table) -> None:
    for n, row in enumerate(rows.to_pylist()):
        if pair_id(row["prompt"], row["chosen"], row["rejected"]) != ids[n]:
            raise ScheduleError(
                f"the text of pair {ids[n]} is not the text that was judged (its hash differs): pairs.parquet was "
                "changed after the schedule was made; prepare it again, in a new --run-dir"
            )


def check_beta(
    values: list[float],
    ids: list[str],
    beta_min: float,
    beta_max: float,
    column: str,
    *,
    within_envelope: bool = True,
) -> None:
    """Refuse the first β that no loss can use or that lies outside the envelope.

    Raises:
        ScheduleError: names the column, the pair and the value.
    """
    slack = 1e-6
    for pair, value in zip(ids, values, strict=True):
        if math.isnan(value):
            raise ScheduleError(f"{column} of pair {pair} is missing or NaN; every training pair needs a β")
        if not 0.0 < value < math.inf:
            raise ScheduleError(f"{column} of pair {pair} is {value}; β must be positive and finite")
        if within_envelope and not beta_min - slack <= value <= beta_max + slack:
            raise ScheduleError(
                f"{column} of pair {pair} is {value}, outside the envelope [{beta_min}, {beta_max}] of λ"
            )
