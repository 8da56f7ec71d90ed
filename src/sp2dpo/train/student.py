"""The student: a causal language model from the hub or a folder, in a stated dtype, quantized if that is asked for.

Knows nothing of runs, schedules or adapters.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from sp2dpo.errors import MissingExtra, ProcessError, nearest

__all__ = ["load_student", "quantization_of"]


def load_student(
    path_or_id: str,
    revision: str | None = None,
    *,
    quantization: Mapping[str, Any] | None = None,
    init: Mapping[str, Any] | None = None,
) -> Any:
    """Load the model that is trained.

    Load it after the trainer's arguments are made: they choose the device of each process, and under ZeRO-3 and FSDP
    how much of the weights each process reads.

    Args:
        path_or_id: a folder, or `org/name` on the hub.
        revision: commit of a hub model.
        quantization: keys of `transformers.BitsAndBytesConfig`; None: none.
        init: keys of `from_pretrained` (`train.model_init_kwargs`), such as `dtype` and `attn_implementation`. Without
            `dtype` the weights are float32, as in TRL; transformers alone would take the dtype of the checkpoint.

    Raises:
        ProcessError: a key that is given twice or is none, or a model that cannot be had; with the library's reason.
        MissingExtra: quantization without bitsandbytes.
    """
    keys = {"dtype": "float32", **(init or {})}
    for key, place in (("revision", "student.revision"), ("quantization_config", "student.quantization")):
        if key in keys:
            raise ProcessError(f"train.model_init_kwargs holds '{key}'; give {place} instead")
    if keys["dtype"] != "auto" and not isinstance(getattr(torch, str(keys["dtype"]), None), torch.dtype):
        raise ProcessError(
            f"train.model_init_kwargs.dtype is {keys['dtype']!r}; give float32, bfloat16, float16 or auto"
        )
    if quantization is not None:
        keys["quantization_config"] = quantization_of(quantization)
    try:
        return AutoModelForCausalLM.from_pretrained(path_or_id, revision=revision, **keys)
    except (OSError, ValueError, TypeError, ImportError, RuntimeError) as error:
        said = " ".join(str(error).split())[:300]
        at = f" at revision {revision}" if revision else ""
        raise ProcessError(f"the student {path_or_id}{at} cannot be loaded: {said}") from error


def quantization_of(keys: Mapping[str, Any]) -> BitsAndBytesConfig:
    """The configuration that `student.quantization` stands for.

    Raises:
        ProcessError: an unknown key, a value that transformers refuses, or keys that quantize nothing.
        MissingExtra: bitsandbytes is not installed.
    """
    known = [name for name in inspect.signature(BitsAndBytesConfig).parameters if name != "kwargs"]
    for key in keys:
        if key not in known:
            raise ProcessError(f"unknown key 'student.quantization.{key}'{nearest(key, known)}")
    try:
        config = BitsAndBytesConfig(**keys)
    except (ValueError, TypeError, AttributeError) as error:
        raise ProcessError(f"student.quantization: transformers refuses it: {error}") from error
    if config.quantization_method() is None:
        raise ProcessError(
            "student.quantization quantizes nothing: give load_in_4bit: true with bnb_4bit_quant_type nf4 or fp4, or "
            "load_in_8bit: true"
        )
    if find_spec("bitsandbytes") is None:
        raise MissingExtra("student.quantization", "bitsandbytes")
    return config
