"""Disk that an arm will take, from the sizes of the student's files and from λ. No torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Final

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

__all__ = ["bytes_of_arm", "in_words", "parameters_of"]

_WIDTHS: Final = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
_TRAINED_WIDTH: Final = 4
"""Bytes of a parameter while it is trained; Adam keeps two more numbers of that width in a checkpoint."""


def parameters_of(student: str, revision: str | None) -> tuple[int, int] | None:
    """Parameters of a student and the bytes of each in its checkpoint, by its files; None if they are not here yet.

    A student without a revision is a folder: on the hub each has one.
    """
    folder = Path(student)
    if not folder.is_dir():
        if revision is None:
            return None
        try:
            folder = Path(snapshot_download(student, revision=revision, local_files_only=True))
        except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
            return None
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if not weights or not (folder / "config.json").is_file():
        return None
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    width = _WIDTHS.get(str(config.get("dtype") or config.get("torch_dtype")), _TRAINED_WIDTH)
    return weights // width, width


def bytes_of_arm(parameters: int, width: int, config: Any, steps: int, *, lora: bool, merge: bool) -> int:
    """What one arm leaves on disk, adapters not counted: the merged model, or the model and its checkpoints."""
    if lora:
        return parameters * width if merge else 0
    return parameters * _TRAINED_WIDTH * (1 + 3 * _checkpoints(config, steps))


def _checkpoints(config: Any, steps: int) -> int:
    by = {"steps": steps // max(int(config.save_steps), 1), "epoch": math.ceil(config.num_train_epochs), "best": 1}
    made = by.get(str(getattr(config.save_strategy, "value", config.save_strategy)), 0)
    return int(made if config.save_total_limit is None else min(made, config.save_total_limit))


def in_words(size: float) -> str:
    """Bytes as a person writes them, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
