"""Where the shared layout is not used: a clause for each case, so that a log can say why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft import PeftModel, PeftType

from sp2dpo.train.layout.install import attention_modules, causal_lm
from sp2dpo.train.layout.miniature import objection

__all__ = ["why_not"]


def why_not(model: Any, args: Any) -> str | None:
    """Why a model cannot train on packed rows under these arguments: one clause; None if it can.

    `args` is TRL's configuration. Costs about a second for each architecture, once; draws no random numbers.
    """
    plain = causal_lm(model)
    clauses = (*_of_arguments(args), *_of_adapters(model), *_of_model(plain, args))
    return next(iter(clauses), None) or objection(plain, dropout=not args.disable_dropout)


def _of_arguments(args: Any) -> Iterator[str]:
    if args.truncation_mode != "keep_start":
        yield f"truncation_mode is '{args.truncation_mode}'"
    if args.pad_to_multiple_of is not None:
        yield "pad_to_multiple_of asks for padded rows"
    if args.torch_compile:
        yield "torch_compile would compile anew for every batch"
    parallel = getattr(args, "parallelism_config", None)
    for name, kind in (("cp", "context"), ("sp", "sequence"), ("tp", "tensor")):
        if getattr(parallel, f"{name}_size", 1) > 1:
            yield f"{kind} parallelism splits the rows"


def _of_adapters(model: Any) -> Iterator[str]:
    if not isinstance(model, PeftModel):
        return
    for config in model.peft_config.values():
        if config.peft_type != PeftType.LORA:
            yield f"its adapter is of type {config.peft_type.value}, not LoRA"
        elif config.alora_invocation_tokens is not None:
            yield "its adapter (aLoRA) reads places in the row"


def _of_model(model: Any, args: Any) -> Iterator[str]:
    config = model.config.get_text_config()
    other = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
    if other:
        yield f"it has layers of type {', '.join(other)}"
    if _has_router_loss(config, args):
        yield "a router loss counts the tokens of the rows"
    if any(getattr(module, "attention_dropout", 0.0) for module in attention_modules(model)):
        yield "its attention has dropout"
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        yield "it is split across devices"


def _has_router_loss(config: Any, args: Any) -> bool:
    """As TRL decides it: 0.0 turns the loss off, None takes the architecture's own coefficient."""
    own = getattr(config, "router_aux_loss_coef", 0.0)
    asked = own if args.router_aux_loss_coef is None else args.router_aux_loss_coef
    return hasattr(config, "output_router_logits") and (asked != 0.0 or config.output_router_logits)
