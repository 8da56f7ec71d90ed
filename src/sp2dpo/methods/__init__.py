"""Preference losses as one, for any training loop. `import sp2dpo.methods` loads no torch until a loss is used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sp2dpo.errors import MissingExtra
from sp2dpo.methods.catalogue import METHODS, Method, method_of

if TYPE_CHECKING:
    from sp2dpo.methods.losses import mean_loss, pair_losses

__all__ = ["METHODS", "Method", "mean_loss", "method_of", "pair_losses"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'sp2dpo.methods' has no attribute '{name}'")
    try:
        return getattr(import_module("sp2dpo.methods.losses"), name)
    except ModuleNotFoundError as error:
        raise MissingExtra(f"sp2dpo.methods.{name} (no module '{error.name}')", "train") from error
