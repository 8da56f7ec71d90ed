"""The keys of λ's section `train` as TRL and PEFT take them.

They check them before anything is trained; `sp2dpo run` has them checked before anything is paid for, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from transformers.integrations import get_reporting_integration_callbacks

from sp2dpo.arms import WITH_KNOBS
from sp2dpo.errors import ProcessError
from sp2dpo.settings import Student, Train, train_keys
from sp2dpo.train.config import PairwiseDPOConfig
from sp2dpo.train.machine import settings_here
from sp2dpo.train.student import quantization_of
from sp2dpo.train.terminal import quiet

__all__ = ["Keys", "check_settings", "keys_of"]


@dataclass(frozen=True)
class Keys:
    """The keys of `train` by whose they are, as this machine can use them."""

    dpo: Mapping[str, Any]
    lora: Mapping[str, Any]
    notes: Sequence[str]


def keys_of(train: Train) -> Keys:
    """Split the keys, and put what this machine has in the place of what it lacks."""
    given = train.model_extra or {}
    dpo, notes = settings_here({name: value for name, value in given.items() if name in train_keys("dpo")})
    own = {"beta": train.beta, "max_prompt_length": train.max_prompt_length, "layout": train.layout}
    lora = {name: value for name, value in given.items() if name in train_keys("lora")}
    return Keys(dpo | own, lora, notes)


def check_settings(train: Train, student: Student, names: Sequence[str] | None = None) -> PairwiseDPOConfig:
    """Let TRL, PEFT and transformers check their keys under the loss of every arm, before a model is loaded.

    Args:
        names: the arms; None: those of λ.

    Returns:
        the keys as TRL takes them; they also choose how the processes of a launcher talk to each other.

    Raises:
        ProcessError: with their message; or a tracker of `report_to` that is not installed.
        InputError: no such arm.
        MissingExtra: `student.quantization` without bitsandbytes.
    """
    keys = keys_of(train)
    arms = {arm.loss: arm for arm in map(train.arm, names or train.methods)}  # a loss has the same knobs in every arm
    _check_loss_type(keys.dpo.get("loss_type", "sigmoid"))
    if student.quantization is not None:
        if not keys.lora:
            raise ProcessError("student.quantization makes weights that cannot be trained; add LoRA, train.r")
        quantization_of(student.quantization)
    try:
        with quiet():
            for arm in arms.values():
                config = PairwiseDPOConfig(output_dir="unused", **keys.dpo, method=arm.loss, knobs=dict(arm.knobs))
            if keys.lora:
                LoraConfig(**keys.lora)
    except (ValueError, TypeError, ImportError) as error:
        raise ProcessError(f"train: TRL or PEFT refuses these settings: {error}") from error
    if config.eval_strategy != "no" and not train.held_out:
        raise ProcessError("train.eval_strategy needs held-out pairs, and train.held_out is 0; set it, such as 0.05")
    _check_trackers([] if "report_to" not in keys.dpo else config.report_to)
    return config


def _check_loss_type(given: Any) -> None:
    """TRL's names of losses have no β for each pair; an arm has."""
    names = given if isinstance(given, list) else [given]
    if names == ["sigmoid"]:
        return
    known = [name for name in names if name in WITH_KNOBS]
    arms = f"train.methods: [{', '.join(known)}]" if known else f"train.methods; there are {', '.join(WITH_KNOBS)}"
    raise ProcessError(f"train.loss_type is {', '.join(map(str, names))}: leave it out, and name the loss in {arms}")


def _check_trackers(names: Sequence[str]) -> None:
    for name in names:
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except (ValueError, RuntimeError, ImportError) as error:
            raise ProcessError(f"train.report_to names '{name}', which cannot be used: {error}") from error
