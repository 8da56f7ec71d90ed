"""Attention over a packed row, under a name of transformers' AttentionInterface: [P|C] over itself, R over [P|R].

Runs only where a row is among the keywords; everything else keeps the attention that the model was loaded with.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from sp2dpo.train.layout.row import ROW, Row

__all__ = ["NAME", "Unsupported", "by_segment"]

NAME: Final = "sp2dpo_shared"

_NEUTRAL: Final = frozenset({"position_ids", "cache_position", "use_cache", "num_items_in_batch", "return_dict"})
"""Keywords that travel with every layer and do not change what attention computes."""


class Unsupported(Exception):
    """A layer asks for attention that the packed row has no form of; the message is a clause that says which."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """What a layer calls: (1, heads, T, d) queries, keys and values to (1, T, heads, d).

    Raises:
        Unsupported: dropout, two-way attention, or a keyword that may change the result.
    """
    row: Row = more.pop(ROW)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    _refuse(dropout, causal, more)
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.size(-1) ** -0.5 if scaling is None else scaling
    kernel = row.kernels.get(query.dtype, by_segment) if query.size(-1) == value.size(-1) else by_segment
    return kernel(query, key, value, row, scale, sliding_window), None


def _refuse(dropout: float, causal: bool, more: dict[str, Any]) -> None:
    if dropout:
        raise Unsupported("its attention has dropout")
    if not causal:
        raise Unsupported("its attention is not causal")
    for name, value in more.items():
        if name not in _NEUTRAL and value is not None and value is not False:
            raise Unsupported(f"its attention takes '{name}'")


def by_segment(query: Tensor, key: Tensor, value: Tensor, row: Row, scale: float, window: int | None) -> Tensor:
    """Two calls of torch's attention for each pair; exact in every precision, on every device."""
    sizes = [size for prefix, chosen, rejected in row.lengths for size in (prefix + chosen, rejected)]
    queries, keys, values = (torch.split(x, sizes, dim=2) for x in (query, key, value))
    parts = []
    for n, (prefix, _, _) in enumerate(row.lengths):
        first, second = 2 * n, 2 * n + 1
        if sizes[first]:
            parts.append(_segment(queries[first], keys[first], values[first], row, scale, window))
        if sizes[second]:
            k, v = (torch.cat([x[first][:, :, :prefix], x[second]], dim=2) for x in (keys, values))
            parts.append(_segment(queries[second], k, v, row, scale, window))
    return torch.cat(parts, dim=1)


def _segment(query: Tensor, key: Tensor, value: Tensor, row: Row, scale: float, window: int | None) -> Tensor:
    """The last tokens of a sequence over all of it."""
    asked, tokens, groups = query.size(2), key.size(2), query.size(1) // key.size(1)
    if groups > 1 and query.device.type != "cpu":  # elsewhere a mask and grouped heads exclude the fused kernels
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    reach = window if window is not None and window < tokens else None
    square = asked == tokens and reach is None
    mask = None if square else row.mask(asked, tokens, reach, query)
    out = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=square, scale=scale, enable_gqa=query.size(1) != key.size(1)
    )
    return out.transpose(1, 2)


AttentionInterface.register(NAME, attend)
