"""Attention of a packed row on a GPU in one call: variable-length kernels, each checked here before it is used.

A kernel takes different lengths for queries and keys, and what it makes of them (which end of the keys the queries
stand at) is not the same in all versions; so each is compared with explicit masks once, forward and backward.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module
from inspect import signature
from typing import Final

import torch
from torch import Tensor

from sp2dpo.train.layout.attention import by_segment
from sp2dpo.train.layout.plan import plan
from sp2dpo.train.layout.row import Kernel, Row

__all__ = ["agrees", "kernels"]

logger = logging.getLogger(__name__)

TOLERANCE: Final = 0.03
"""Relative L2 difference from fp32 that bf16 rounding explains; a wrong mask is off by more than 0.3."""

_LENGTHS: Final = [[37, 20, 41], [0, 5, 9], [64, 1, 0], [130, 0, 70], [1, 1, 1]]


@cache
def kernels(device: torch.device, heads: int, groups: int, dim: int) -> dict[torch.dtype, Kernel]:
    """The kernels to use on a device for a shape of attention (heads, heads for one key, head dimension), by dtype."""
    if device.type != "cuda":
        return {}
    found: dict[torch.dtype, Kernel] = {}
    for dtype in (torch.bfloat16, torch.float16):
        kernel = _first_right(device, dtype, heads, groups, dim)
        if kernel is not None:
            found[dtype] = kernel
    return found


def _first_right(device: torch.device, dtype: torch.dtype, heads: int, groups: int, dim: int) -> Kernel | None:
    reasons = []
    for name, make in _CANDIDATES.items():
        try:
            kernel = make()
            difference = agrees(kernel, device, dtype, heads, groups, dim)
        except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            reasons.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            continue
        if difference < TOLERANCE:
            return kernel
        reasons.append(f"{name}: differs from explicit masks by {difference:.2g} (relative L2)")
    logger.warning("No variable-length attention for %s here, one call for each segment: %s", dtype, "; ".join(reasons))
    return None


def agrees(kernel: Kernel, device: torch.device, dtype: torch.dtype, heads: int, groups: int, dim: int) -> float:
    """How far output and gradients are from explicit masks in fp32: relative L2, at worst, with or without a window."""
    draw = torch.Generator().manual_seed(0)
    tokens = sum(sum(pair) for pair in _LENGTHS)
    row = _row(device)

    def random(count: int) -> Tensor:
        return torch.randn(1, tokens, count, dim, generator=draw).to(device, dtype).transpose(1, 2)

    query, key, value, upstream = random(heads), random(heads // groups), random(heads // groups), random(heads)
    worst = 0.0
    for window in (None, 16):
        got = _with_gradients(kernel, (query, key, value), upstream, row, window)
        want = _with_gradients(by_segment, tuple(x.float() for x in (query, key, value)), upstream, row, window)
        worst = max(worst, *((a.float() - b).norm().item() / b.norm().item() for a, b in zip(got, want, strict=True)))
    return worst


def _with_gradients(
    kernel: Kernel, states: tuple[Tensor, ...], upstream: Tensor, row: Row, window: int | None
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in states]
    with torch.enable_grad(), torch.autocast(upstream.device.type, enabled=False):
        query, key, value = leaves
        out = kernel(query, key, value, row, query.size(-1) ** -0.5, window)
        return [out, *torch.autograd.grad(out, leaves, upstream.transpose(1, 2).to(out.dtype))]


def _row(device: torch.device) -> Row:
    """A row of `_LENGTHS`, from sequences that differ after their common prefix."""
    width = max(p + max(c, r) for p, c, r in _LENGTHS)
    sides = [[[1] * p + [2 + side] * pair[side] for p, *pair in _LENGTHS] for side in (0, 1)]
    rows = [ids for side in sides for ids in side]
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in rows])
    layout = plan({"input_ids": ids, "attention_mask": ids.sign(), "completion_mask": ids.sign()})
    return Row.of({name: value.to(device) for name, value in layout.items()}, kernels={})


def _flat(x: Tensor) -> Tensor:
    """(1, heads, T, d) to (T, heads, d)."""
    return x[0].transpose(0, 1)


def _torch_varlen() -> Kernel:
    varlen_attn = import_module("torch.nn.attention.varlen").varlen_attn
    grouped = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}

    def kernel(query: Tensor, key: Tensor, value: Tensor, row: Row, scale: float, window: int | None) -> Tensor:
        keys, values = _flat(key)[row.keys], _flat(value)[row.keys]
        if not grouped:  # torch before it took groups
            keys, values = (x.repeat_interleave(query.size(1) // x.size(1), 1) for x in (keys, values))
        out: Tensor = varlen_attn(
            *(_flat(query), keys, values),
            *(row.query_ends, row.key_ends, *row.longest),
            scale=scale,
            window_size=_window(window),
            **grouped,
        )
        return out[None]

    return kernel


def _flash_attn() -> Kernel:
    flash_attn_varlen_func = import_module("flash_attn").flash_attn_varlen_func

    def kernel(query: Tensor, key: Tensor, value: Tensor, row: Row, scale: float, window: int | None) -> Tensor:
        out: Tensor = flash_attn_varlen_func(
            *(_flat(query), _flat(key)[row.keys], _flat(value)[row.keys]),
            *(row.query_ends, row.key_ends, *row.longest),
            softmax_scale=scale,
            causal=True,
            window_size=_window(window),
        )
        return out[None]

    return kernel


def _window(window: int | None) -> tuple[int, int]:
    """Tokens seen before and after a query's own: a window of w tokens includes its own."""
    return (-1 if window is None else window - 1, 0)


_CANDIDATES: Final[dict[str, Callable[[], Kernel]]] = {
    "torch.nn.attention.varlen": _torch_varlen,
    "flash_attn": _flash_attn,
}
