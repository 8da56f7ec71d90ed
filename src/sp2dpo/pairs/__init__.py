"""The pairs stage: a preference dataset, however it is laid out, to `pairs.parquet`. Sec. E.2.

Loads, normalises, filters and counts; knows nothing of annotators, gaps or β.
"""

from sp2dpo.pairs.filters import FILTERS
from sp2dpo.pairs.prepare import Prepared, pair_id, prepare
from sp2dpo.pairs.store import MESSAGES, PAIRS_SCHEMA, check_pairs, read_pairs, write_prepared

__all__ = [
    "FILTERS",
    "MESSAGES",
    "PAIRS_SCHEMA",
    "Prepared",
    "check_pairs",
    "pair_id",
    "prepare",
    "read_pairs",
    "write_prepared",
]
