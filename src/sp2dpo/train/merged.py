"""A LoRA adapter merged into its base: one model that transformers alone can load."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoTokenizer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

from sp2dpo.train.student import load_student

__all__ = ["merge"]


def merge(adapter: Path, into: Path, student: str, revision: str | None, init: Mapping[str, Any]) -> None:
    """Load the base anew, on the CPU and not quantized, add the adapter to its weights, and save it with its tokenizer.

    The weights have the dtype of the student's own checkpoint, unless `init` names another; a merged weight is rounded
    to it once. The folder appears whole or not at all.
    """
    if is_deepspeed_zero3_enabled():
        unset_hf_deepspeed_config()  # it would spread the weights over processes, and this is one of them
    base = load_student(student, revision, init={"dtype": "auto", **init, "device_map": "cpu"})
    partial = into.with_name(into.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(into, ignore_errors=True)
    PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().save_pretrained(partial)
    AutoTokenizer.from_pretrained(str(adapter)).save_pretrained(partial)
    partial.rename(into)
