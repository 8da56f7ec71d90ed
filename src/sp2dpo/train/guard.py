"""Stops a training that has gone wrong before the weights are updated: with the step, the pairs, and where to look.

Numbers in, an error out. Knows nothing of trainers. Where there are several processes, each has to be given the numbers
of all of them: then all stop, and none waits for another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from sp2dpo.errors import TrainingError

__all__ = ["EXPLODED", "check_gradient", "check_loss"]

EXPLODED: Final = 1000.0
"""A batch has exploded whose mean loss is over this many times what the untrained student has on it (ln 2 for DPO)."""

NAMED: Final = 5

LOOK: Final = (
    "look at learning_rate (lower) and warmup_steps (longer), at β of these pairs, at completions without a token, and "
    "at the dtype (fp16 overflows where bf16 and float32 do not); no weight was updated with this step, and no "
    "checkpoint holds it; under the same settings the same step comes again"
)

Describe = Callable[[int], str]


def check_loss(losses: Tensor, at_reference: Tensor, rows: Tensor, *, step: int, describe: Describe) -> None:
    """Refuse the losses of a batch that are not finite, or that exploded.

    Costs one wait for the device.

    Args:
        losses: (B,), of each pair, weighted, before the mean.
        at_reference: (B,), of the same pairs with the same weights at u = 0, where the policy is the reference.
        rows: (B,), rows of the schedule.
        step: the optimizer step that is being computed, from 1.
        describe: words for a row: its pair id, β and margin.

    Raises:
        TrainingError: names the step and up to five of the pairs, the worst first.
    """
    losses = losses.detach()
    broken = ~torch.isfinite(losses)
    exploded = losses.mean() > EXPLODED * at_reference.detach().mean()
    if not (broken.any() | exploded).item():
        return
    if broken.any():
        which = rows[broken].tolist()
        what = f"the loss of {len(which)} of {len(losses)} pairs is not a finite number"
    else:
        which = rows[losses.argsort(descending=True)].tolist()
        ratio = (losses.mean() / at_reference.mean()).item()
        what = (
            f"the loss is {losses.mean().item():.4g}, {ratio:,.0f} times that of the untrained student on these pairs"
        )
    raise TrainingError(f"step {step}: {what}: {_named(which, describe)}; {LOOK}")


def check_gradient(norm: Any, rows: Sequence[int], *, step: int, describe: Describe) -> None:
    """Refuse a gradient that is not finite although the losses were; after clipping, before the optimizer.

    Not for fp16 with loss scaling, which skips such steps and goes on with a smaller scale.

    Args:
        norm: of the whole gradient, a tensor or a number; None (DeepSpeed before its first step): nothing is checked.
        rows: of the pairs of this step, from all processes and micro-batches.

    Raises:
        TrainingError: names the step and up to five of the pairs.
    """
    if norm is None:
        return
    value = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if not math.isfinite(value):
        raise TrainingError(f"step {step}: the norm of the gradient is {value}: {_named(rows, describe)}; {LOOK}")


def _named(rows: Sequence[int], describe: Describe) -> str:
    more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
    return ", ".join(describe(row) for row in rows[:NAMED]) + more
