"""Reference log-probabilities, computed once for a model and a pair, and kept for every later schedule.

TRL keys its own cache by the dataset with β in it, so each schedule costs it a reference pass, and where there are
several processes it needs a dataset on disk. This one is keyed by content (`reference_key`) and kept in files
(`reference_file`).

A number that is kept is never replaced. Its last bits depend on the batch that it was computed in, and the batches of a
pass follow from the set of pairs that are missing and the batch size alone. A pass that was killed has kept whole
batches, so that the next one has the others again, and the numbers are those of a pass that was not.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from trl.models import prepare_deepspeed

from sp2dpo.errors import DataError, ProcessError
from sp2dpo.numbers import some
from sp2dpo.progress import Progress
from sp2dpo.train.reference_file import SCHEMA, ReferenceFile
from sp2dpo.train.reference_key import PairKey, model_facts, pair_keys

__all__ = ["ReferenceCache", "cache_folder"]

FLUSH_EVERY_S: Final = 30.0
"""A pass that is killed has lost no more than it computed in this time."""

INDENT: Final = " " * 10
"""Of what is said about a training below its first line."""

LogProbs = tuple[float, float]

_said: set[str] = set()


def cache_folder() -> Path:
    """`$SP2DPO_CACHE/reference`, or `sp2dpo/reference` in the user's cache folder (`$XDG_CACHE_HOME`, `~/.cache`)."""
    if own := os.environ.get("SP2DPO_CACHE"):
        return Path(own) / "reference"
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "sp2dpo" / "reference"


class ReferenceCache:
    """Reference log-probs of the pairs of a dataset: those that are known read, the others computed and kept.

    Args:
        folder: where they are kept; None: `cache_folder()`; "off": nowhere.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self._setting = "SP2DPO_CACHE" if folder is None else "reference_cache"
        self.folder = None if folder == "off" else cache_folder() if folder is None else Path(folder)

    def log_probs(self, trainer: Any, dataset: Any, name: str, batch_size: int) -> Dataset:
        """A tokenized dataset with the columns `ref_chosen_logps` and `ref_rejected_logps` (float32, nats, summed).

        Every process has to call this with the same dataset. The first one reads and writes the files; a failure to
        write them is said and costs only the next run its time.

        Args:
            trainer: a TRL DPO trainer; its collator makes the batches and its `compute_ref_log_probs` the numbers.
            name: of the dataset, for messages.
            batch_size: pairs per device.

        Raises:
            DataError: a dataset without a length.
            ProcessError: FSDP that has read the weights in one process only.
        """
        if not isinstance(dataset, Dataset):
            raise DataError(
                f"the {name} dataset is a stream, whose reference log-probs cannot be computed before training; load "
                "it as a whole, or set precompute_ref_log_probs: false"
            )
        if trainer.is_fsdp_enabled and os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "").lower() == "true":
            raise ProcessError(
                "the reference pass comes before FSDP shares out the weights, which only the first process has read; "
                "set fsdp_cpu_ram_efficient_loading: false, or precompute_ref_log_probs: false"
            )
        facts = model_facts(trainer)
        main = trainer.accelerator.is_main_process
        shelf = _Shelf(self.folder, self._setting, facts, _keys(trainer, dataset)) if main else None
        missing: list[int] = _from_main(shelf.missing() if shelf else None)
        if missing:
            _compute(trainer, dataset, missing, batch_size, shelf)
        chosen, rejected = _from_main(shelf.columns() if shelf else None)
        return dataset.add_column("ref_chosen_logps", chosen).add_column("ref_rejected_logps", rejected)


class _Shelf:
    """What is known of the rows of one dataset, in the main process: from the file before, and computed since."""

    def __init__(
        self, folder: Path | None, setting: str, facts: dict[str, str] | None, keys: Sequence[PairKey]
    ) -> None:
        self._keys, self._folder, self._setting = keys, folder, setting
        self._file = ReferenceFile(folder, facts) if folder and facts else None
        if folder and not facts:
            words = "the reference model's weights cannot be read here; its log-probs are not kept"
            _say_once("weights", f"sp2dpo: {words}")
        self._known: dict[bytes, LogProbs] = self._read()
        self._new: list[PairKey] = []
        self._flushed = time.monotonic()

    def _read(self) -> dict[bytes, LogProbs]:
        if self._file is None:
            return {}
        try:
            rows = self._file.read()
        except OSError as error:
            self._without(error)
            return {}
        columns: list[list[Any]] = [rows[name].to_pylist() for name in ("pair", "chosen_logp", "rejected_logp")]
        return {pair: (chosen, rejected) for pair, chosen, rejected in zip(*columns, strict=True)}

    def missing(self) -> list[int]:
        """One row for each pair that is not known, in an order that does not depend on that of the rows.

        The longest first: what does not fit is seen at once.
        """
        first = {key.sha256: n for n, key in enumerate(self._keys)}
        rows = [n for sha256, n in first.items() if sha256 not in self._known]
        if rows:
            pairs = some(len(rows), "pair") if len(rows) == len(first) else f"{len(rows):,} of {len(first):,} pairs"
            _say(f"{INDENT}reference log-probs: {pairs} to compute")
        elif first:
            _say_once("cache", f"{INDENT}reference log-probs: from the cache")
        return sorted(rows, key=lambda n: (-self._keys[n].tokens, self._keys[n].sha256))

    def put(self, rows: Sequence[int], chosen: Sequence[float], rejected: Sequence[float]) -> None:
        for n, pair in zip(rows, zip(chosen, rejected, strict=True), strict=True):
            self._known[self._keys[n].sha256] = pair
            self._new.append(self._keys[n])
        if time.monotonic() - self._flushed >= FLUSH_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Write what was computed; a number that is not finite is not kept."""
        keys, self._new = self._new, []
        self._flushed = time.monotonic()
        rows = [(k.sha256, *self._known[k.sha256], k.chosen_tokens, k.rejected_tokens) for k in keys]
        rows = [row for row in rows if np.isfinite(row[1]) and np.isfinite(row[2])]
        if self._file is None or not rows:
            return
        columns = (pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), SCHEMA, strict=True))
        try:
            self._file.add(pa.table(list(columns), schema=SCHEMA))
        except OSError as error:
            self._without(error)

    def _without(self, error: OSError) -> None:
        self._file = None
        words = f"sp2dpo: reference log-probs cannot be kept ({error}); name another folder by {self._setting}"
        _say_once(f"folder {self._folder}", words)

    def columns(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        pairs = np.array([self._known[key.sha256] for key in self._keys], dtype=np.float32).reshape(-1, 2)
        return pairs[:, 0].copy(), pairs[:, 1].copy()


def _keys(trainer: Any, dataset: Dataset) -> list[PairKey]:
    collator = trainer.data_collator
    return pair_keys(
        dataset,
        max_length=collator.max_length,
        truncation_mode=collator.truncation_mode,
        ld_alpha=trainer.ld_alpha,
    )


def _compute(trainer: Any, dataset: Dataset, rows: list[int], batch_size: int, shelf: _Shelf | None) -> None:
    """The reference pass over some rows; what it has computed is kept, however it ends.

    Where several processes share the work the last batches are filled up with the last row: accelerate would fill them
    with the first ones, which are others in a pass that goes on after one that was killed.
    """
    processes = trainer.accelerator.num_processes
    fill = -len(rows) % (batch_size * processes) if processes > 1 else 0
    loader = DataLoader(
        dataset.select(rows + rows[-1:] * fill),
        batch_size=batch_size,
        collate_fn=trainer.data_collator,
        num_workers=trainer.args.dataloader_num_workers,
        pin_memory=trainer.args.dataloader_pin_memory,
        generator=torch.Generator(),  # a pass that is not needed must not change the random numbers of training
    )
    model, accelerator, done = _model(trainer), trainer.accelerator, 0
    with _shown(len(rows), shelf) as progress, _evaluating(model), _placed(trainer, model):
        try:
            for batch in accelerator.prepare(loader):
                logps = accelerator.gather_for_metrics(trainer.compute_ref_log_probs(model, batch))
                chosen, rejected = (side.float().tolist() for side in logps)
                these = rows[done : done + len(chosen)]
                if shelf and progress:
                    shelf.put(these, chosen[: len(these)], rejected[: len(these)])
                    progress.advance(len(these))
                done += len(these)
        finally:
            if shelf:
                shelf.flush()


@contextmanager
def _shown(total: int, shelf: _Shelf | None) -> Iterator[Progress | None]:
    """A bar in the main process."""
    if shelf is None:
        yield None
        return
    with Progress("reference", total) as progress:
        yield progress


def _model(trainer: Any) -> Any:
    """What TRL computes the reference with; under DeepSpeed its engine, made once."""
    if trainer.ref_model is None and trainer.is_deepspeed_enabled:
        if trainer._precompute_engine is None:
            trainer._precompute_engine = prepare_deepspeed(trainer.model, trainer.accelerator)
        return trainer._precompute_engine
    return trainer.model if trainer.ref_model is None else trainer.ref_model


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout. Differs: TRL leaves the model as it is, and one in training mode would be a noisy reference."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _placed(trainer: Any, model: torch.nn.Module) -> Iterator[None]:
    """Where the batches are. Under FSDP a model that is also the policy waits on the CPU until training shards it."""
    home, device = next(model.parameters()).device, trainer.accelerator.device
    moves = trainer.is_fsdp_enabled and trainer.ref_model is None and home.type == "cpu" != device.type
    if moves:
        model.to(device)
    try:
        yield
    finally:
        if moves:
            model.to(home)


def _from_main(value: Any) -> Any:
    """The main process's value, in every process."""
    box = [value]
    broadcast_object_list(box, from_process=0)
    return box[0]


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def _say_once(about: str, words: str) -> None:
    """In a process: a sweep looks up the pairs of each arm twice."""
    if about not in _said:
        _said.add(about)
        _say(words)
