"""Log-probabilities on a CPU in tiles that stay in its cache, where TRL's head makes many passes over far larger ones.

Same numbers, about half the time, a fraction of the memory. TRL's own head does the rest: other devices and precisions,
logits that are scaled or capped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import Tensor
from trl.trainer import utils as trl

__all__ = ["in_tiles"]

_TILE: Final = 2**21
"""Logits in a tile, 8 MiB."""

Fields = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@contextmanager
def in_tiles(device: torch.device) -> Iterator[None]:
    """Within, TRL's fused head on a CPU computes in small tiles; its backward does so wherever it is called."""
    theirs = getattr(trl, "_ChunkedLogProbFunction", None)
    if device.type != "cpu" or theirs is None:
        yield
        return

    def apply(*given: Any) -> Any:
        match given:
            case hidden, weight, None, targets, 1.0, _, None, 1.0, outputs if _in_fp32(hidden, weight):
                return _Tiled.apply(hidden, weight, targets, outputs)  # type: ignore[no-untyped-call]
        return theirs.apply(*given)

    trl._ChunkedLogProbFunction = SimpleNamespace(apply=apply)
    try:
        yield
    finally:
        trl._ChunkedLogProbFunction = theirs


def _in_fp32(hidden: Tensor, weight: Tensor) -> bool:
    return hidden.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


class _Tiled(torch.autograd.Function):
    """log p(target), and of the distribution: entropy H, log Σp², mean logit, and whether the target is its top."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, outputs: tuple[str, ...]) -> Fields:
        ctx.set_materialize_grads(False)
        log_z, at_target = hidden.new_empty(len(hidden)), hidden.new_empty(len(hidden))
        entropy, squares, mean = (
            torch.empty_like(log_z) if name in outputs else None
            for name in ("entropy", "log_sum_sq_probs", "mean_logits")
        )
        top = torch.empty_like(targets, dtype=torch.bool) if "is_top1" in outputs else None
        for tile in _tiles(hidden, weight):
            z = hidden[tile] @ weight.T
            at_target[tile] = z.gather(1, targets[tile, None])[:, 0]
            if mean is not None:
                mean[tile] = z.mean(1)
            highest, best = z.max(1)
            if top is not None:
                top[tile] = best == targets[tile]
            e = z.sub_(highest[:, None]).exp()
            total = e.sum(1)
            log_z[tile] = highest + total.log()
            if squares is not None:
                squares[tile] = e.square().sum(1).log() - 2 * total.log()
            if entropy is not None:
                entropy[tile] = total.log() - e.mul_(z).sum(1) / total
        ctx.save_for_backward(hidden, weight, targets, log_z, entropy)
        ctx.mark_non_differentiable(*(x for x in (squares, mean, top) if x is not None))
        return at_target - log_z, entropy, squares, mean, top

    @staticmethod
    def backward(
        ctx: Any, to_log_prob: Tensor | None, to_entropy: Tensor | None, *_: None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, targets, log_z, entropy = ctx.saved_tensors
        to_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for tile in _tiles(hidden, weight):
            log_p = (hidden[tile] @ weight.T).sub_(log_z[tile, None])
            to_logits = torch.zeros_like(log_p) if to_log_prob is None else log_p.exp().mul_(-to_log_prob[tile, None])
            if to_log_prob is not None:
                to_logits.scatter_add_(1, targets[tile, None], to_log_prob[tile, None])
            if to_entropy is not None:
                to_logits -= to_entropy[tile, None] * log_p.exp() * (log_p + entropy[tile, None])
            if to_hidden is not None:
                torch.mm(to_logits, weight, out=to_hidden[tile])
            if to_weight is not None:
                to_weight.addmm_(to_logits.T, hidden[tile])
        return to_hidden, to_weight, None, None


def _tiles(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    rows = max(32, _TILE // len(weight))
    return (slice(start, start + rows) for start in range(0, len(hidden), rows))
