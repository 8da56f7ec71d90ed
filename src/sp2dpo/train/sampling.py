"""The order of rows in an epoch: of similar length together, and the same order when an epoch is gone on with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback
from transformers.trainer_pt_utils import get_length_grouped_indices

__all__ = ["EpochOrder", "LengthGrouped"]


class LengthGrouped(Sampler[int]):
    """`group_by_length` of transformers, whose order depends on the seed and the epoch alone.

    Differs: upstream draws the order from the generator that dropout draws from too. Then a resumed epoch has another
    order than it began with, and processes whose batches differ in length train on some pairs twice, on others never.

    Args:
        lengths: of the rows, in tokens.
        batch_size: rows of one optimizer step in one process.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths = list(lengths)
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        seed = int(np.random.SeedSequence([self._seed, self._epoch]).generate_state(1)[0])
        generator = torch.Generator().manual_seed(seed)
        yield from get_length_grouped_indices(self._lengths, self._batch_size, generator=generator)


class EpochOrder(TrainerCallback):  # type: ignore[misc]
    """Tells a sampler its epoch.

    accelerate does so too, but not for a sampler other than its own in an epoch that several processes go on with.
    """

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **more: Any) -> None:
        place: Any = getattr(train_dataloader, "batch_sampler", None)
        while hasattr(place, "batch_sampler"):
            place = place.batch_sampler
        sampler: Any = getattr(place, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(int(state.epoch or 0))
