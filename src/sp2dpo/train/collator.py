"""Batches: TRL's, and what this trainer adds to them, made in the workers of the loader."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from trl.trainer.dpo_trainer import DataCollatorForPreference

from sp2dpo.train.layout import KEY, plan

__all__ = ["COLUMNS", "CONTROLS", "PairwiseCollator"]

CONTROLS: Final = ("beta", "margin", "weight", "route", "label_smoothing")
"""Columns of the data that shape the loss of a pair."""

COLUMNS: Final = (*CONTROLS, "row", "category")
"""Keys of a batch that are this trainer's, not the model's."""


@dataclass
class PairwiseCollator(DataCollatorForPreference):  # type: ignore[misc]
    """TRL's batch with, each (B,) and where the data has it: `beta`, `margin`, `weight`, `label_smoothing` float32,
    `route` (true: SFT), `row`, `category` (place in `categories`, or −1); the plan of the shared layout if `shared`.
    """

    shared: bool = False
    categories: tuple[str, ...] = ()

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        for name in COLUMNS:
            if name in examples[0]:
                batch[name] = self._column(name, [example[name] for example in examples])
        if self.shared:
            batch[KEY] = plan(batch)
        return batch

    def _column(self, name: str, values: list[Any]) -> torch.Tensor:
        if name == "category":
            places = {name: n for n, name in enumerate(self.categories)}
            return torch.tensor([places.get(value, -1) for value in values])
        if name == "route":
            return torch.tensor([value == "sft" for value in values])
        return torch.tensor(values) if name == "row" else torch.tensor(values, dtype=torch.float32)
