"""Training with the temperatures of a schedule, on TRL. `import sp2dpo.train` loads no torch until a name is used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sp2dpo.errors import MissingExtra

if TYPE_CHECKING:
    from sp2dpo.train.trainer import PairwiseDPOConfig, PairwiseDPOTrainer

__all__ = ["PairwiseDPOConfig", "PairwiseDPOTrainer"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'sp2dpo.train' has no attribute '{name}'")
    try:
        return getattr(import_module("sp2dpo.train.trainer"), name)
    except ModuleNotFoundError as error:
        raise MissingExtra(f"sp2dpo.train.{name} (no module '{error.name}')", "train") from error
