"""One packed row on its way through a model: what every attention layer of one forward and backward pass needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

__all__ = ["ROW", "Kernel", "Row"]

ROW: Final = "sp2_row"
"""The keyword under which a row reaches the attention layers, through checkpointing and every wrapper."""

Kernel = Callable[[Tensor, Tensor, Tensor, "Row", float, int | None], Tensor]
"""(query, key, value, row, scale, window) to the attended values: (1, heads, T, d) each, (1, T, heads, d) back."""


@dataclass(frozen=True)
class Row:
    """A plan at work: `lengths` on the host, tensors on the device, and the kernels to use there for a dtype."""

    lengths: list[list[int]]
    query_ends: Tensor
    key_ends: Tensor
    keys: Tensor
    predictors: Tensor
    kernels: dict[torch.dtype, Kernel]
    _masks: dict[tuple[int, int, int | None, torch.dtype], Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, layout: dict[str, Tensor], kernels: dict[torch.dtype, Kernel]) -> Row:
        return cls(
            lengths=layout["lengths"].tolist(),
            query_ends=layout["query_ends"],
            key_ends=layout["key_ends"],
            keys=layout["keys"],
            predictors=layout["predictors"][0],
            kernels=kernels,
        )

    @property
    def longest(self) -> tuple[int, int]:
        """Tokens of the longest segment: queries, keys."""
        return max(max(p + c, r) for p, c, r in self.lengths), max(p + max(c, r) for p, c, r in self.lengths)

    def mask(self, asked: int, keys: int, window: int | None, like: Tensor) -> Tensor:
        """Additive mask (asked, keys) of the last `asked` of `keys` tokens; made once and shared by all layers."""
        key = (asked, keys, window, like.dtype)
        if key not in self._masks:
            self._masks[key] = causal_mask(asked, keys, window, like)
        return self._masks[key]


def causal_mask(asked: int, keys: int, window: int | None, like: Tensor) -> Tensor:
    """0 where query i, which is token keys − asked + i, sees token j: j ≤ i, and i − j < window. −∞ elsewhere."""
    behind = torch.arange(keys - asked, keys, device=like.device)[:, None] - torch.arange(keys, device=like.device)
    hidden = behind < 0 if window is None else (behind < 0) | (behind >= window)
    return torch.zeros_like(hidden, dtype=like.dtype).masked_fill_(hidden, float("-inf"))
