"""What λ asks for and this machine cannot do: what is done instead, and the words that say so."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch

__all__ = ["settings_here"]

PAGED = "paged_adamw_32bit"


def settings_here(keys: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Keys of `trl.DPOConfig` as this machine can use them, and one clause for each that trains by other means.

    The paged optimizer needs CUDA and bitsandbytes; without them AdamW of torch makes the same updates, with its state
    held in memory. Without an accelerator the CPU is named, which bf16 asks for; no key of the loss changes.
    """
    here, notes = dict(keys), []
    if here.get("optim") == PAGED and not (torch.cuda.is_available() and find_spec("bitsandbytes")):
        lacks = "bitsandbytes is not installed" if torch.cuda.is_available() else "there is no CUDA device"
        here["optim"] = "adamw_torch"
        notes.append(f"{lacks}: optim adamw_torch stands in for {PAGED} (the same updates, the state not paged)")
    if not torch.accelerator.is_available():
        here |= {"use_cpu": True, "dataloader_pin_memory": False}
        if here.get("bf16", not here.get("fp16")):
            notes.append("there is no accelerator: bf16 runs on the CPU, slowly")
    return here, notes
