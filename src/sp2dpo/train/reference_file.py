"""Reference log-probs of one model on disk: a Parquet file that any process may read and several may add to.

A file is replaced whole, under a lock, with checksums on its pages. One that is torn, or is not what its name says, is
set aside and never read from. Knows nothing of trainers.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import filelock
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sp2dpo.hashing import canonical_json, sha256_json
from sp2dpo.tables import schema_of, write_atomic

__all__ = ["SCHEMA", "ReferenceFile"]

SCHEMA: Final = schema_of(
    pair=pa.binary(32),
    chosen_logp=pa.float32(),
    rejected_logp=pa.float32(),
    chosen_tokens=pa.int32(),
    rejected_tokens=pa.int32(),
)
"""`pair`: sha256 of the token ids; log-probs in nats, summed over the completion's tokens."""

MODEL: Final = b"sp2dpo.reference"
"""Key of the Parquet metadata that says which model the numbers are of."""

LOCK_TIMEOUT_S: Final = 60.0


class ReferenceFile:
    """The numbers of one reference model, in `folder/<hash of what the model is>.parquet`."""

    def __init__(self, folder: Path, model: Mapping[str, str]) -> None:
        self.path = folder / f"{sha256_json(dict(model))[:32]}.parquet"
        self._model = canonical_json(dict(model)).encode()
        self._lock = filelock.FileLock(self.path.with_suffix(".lock"), timeout=LOCK_TIMEOUT_S)

    def read(self) -> pa.Table:
        """All rows; none where there is no file yet, or a damaged one, which is set aside.

        Raises:
            OSError: the folder cannot be used.
        """
        with suppress(pa.ArrowException, ValueError, OSError):
            return self._checked()
        if not self.path.exists():
            return SCHEMA.empty_table()
        with self._lock:
            return self._trusted()

    def add(self, rows: pa.Table) -> None:
        """Add rows; of a pair that is there already the earlier numbers stay.

        Raises:
            OSError: the folder cannot be written, or another process has held the lock for a minute.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            there = self._trusted()
            new = rows.filter(pc.invert(pc.is_in(rows["pair"], there["pair"].combine_chunks())))
            whole = pa.concat_tables([there, new]).replace_schema_metadata({MODEL: self._model})
            write_atomic(self.path, lambda partial: pq.write_table(whole, partial, write_page_checksum=True))

    def _trusted(self) -> pa.Table:
        """Under the lock: the rows, or none after a damaged file was set aside."""
        try:
            return self._checked()
        except FileNotFoundError:
            return SCHEMA.empty_table()
        except PermissionError:
            raise
        except (pa.ArrowException, ValueError, OSError) as error:
            reason = " ".join(str(error).split())
        names = (self.path.with_suffix(f".damaged-{n}") for n in itertools.count(1))
        aside = self.path.rename(next(name for name in names if not name.exists()))
        words = f"{self.path} is damaged ({reason}); it is {aside.name} now, and what it held is computed again"
        print(f"sp2dpo: {words}", file=sys.stderr, flush=True)
        return SCHEMA.empty_table()

    def _checked(self) -> pa.Table:
        with pq.ParquetFile(self.path, page_checksum_verification=True) as file:
            table = file.read()
        if (table.schema.metadata or {}).get(MODEL) != self._model:
            raise ValueError("made by another model")
        plain: pa.Table = table.replace_schema_metadata(None)
        if plain.schema != SCHEMA or plain["pair"].null_count or not _finite(plain):
            raise ValueError("not a table of reference log-probs")
        return plain


def _finite(table: pa.Table) -> bool:
    columns: list[Any] = [table["chosen_logp"], table["rejected_logp"]]
    return all(not c.null_count and (pc.all(pc.is_finite(c)).as_py() is not False) for c in columns)
