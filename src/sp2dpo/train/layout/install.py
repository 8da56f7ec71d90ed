"""The packed row inside a model that TRL trains: hooks on its layers, and a door in front of TRL's fused forward.

A batch without a layout passes as if nothing were installed: configuration, generation, saving and masks stay as they
are. With one, TRL's forward runs on the packed row, the head only where a completion token is predicted, and what it
returns is laid out on TRL's grid again.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, Final

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from sp2dpo.train.layout.attention import NAME
from sp2dpo.train.layout.head import in_tiles
from sp2dpo.train.layout.kernels import kernels
from sp2dpo.train.layout.row import ROW, Row

__all__ = ["KEY", "attention_modules", "causal_lm", "install"]

KEY: Final = "sp2_layout"
"""Where a batch carries its plan."""

_FIELDS: Final = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def install(model: Any) -> None:
    """Let a model compute on packed rows; after TRL added its fused head. A second call changes nothing.

    The model may be plain, a PeftModel, or wrapped for distributed training.
    """
    model = causal_lm(model)
    if hasattr(model, "_sp2_layout"):
        return
    model._sp2_layout = True
    model.base_model.register_forward_hook(_keep_predictors, with_kwargs=True)
    for module in attention_modules(model):
        _switch_attention(module)
    fused = model.forward

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        layout = kwargs.pop(KEY, None)
        if layout is None or not kwargs.get("fused_lm_head"):
            return fused(*args, **kwargs)
        return _forward_packed(self, fused, layout, *args, **kwargs)

    model.forward = types.MethodType(forward, model)


def causal_lm(model: Any) -> PreTrainedModel:
    """The model with the head, inside whatever wraps it."""
    while isinstance(getattr(model, "module", None), nn.Module):  # DistributedDataParallel, DeepSpeedEngine
        model = model.module
    return model.get_base_model() if isinstance(model, PeftModel) else model


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The attention of the decoder's layers: those that look their function up by their configuration."""
    return [
        module
        for name, module in model.named_modules()
        if "Attention" in type(module).__name__
        and isinstance(getattr(module, "config", None), PreTrainedConfig)
        and hasattr(module, "layer_idx")
    ]


class _Switched:
    """A layer's configuration that names the packed attention, and is the layer's own in all else."""

    _attn_implementation = NAME

    def __init__(self, config: PreTrainedConfig) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def _switch_attention(module: nn.Module) -> None:
    """Show the layer the other name while it is called with a row; also when checkpointing calls it again."""
    own, switched = module.config, _Switched(module.config)

    def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if ROW in kwargs:
            module.__dict__["config"] = switched

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        module.__dict__["config"] = own

    module.register_forward_pre_hook(enter, with_kwargs=True)
    module.register_forward_hook(leave, always_call=True)


def _keep_predictors(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Of the backbone's hidden states only those that predict a completion token go on to the head."""
    row = kwargs.get(ROW)
    if row is not None:
        output.last_hidden_state = output.last_hidden_state.index_select(1, row.predictors)
    return output


def _forward_packed(
    model: PreTrainedModel,
    fused: Callable[..., Any],
    layout: dict[str, Tensor],
    *,
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    row = Row.of(layout, _kernels(model, input_ids.device))
    with in_tiles(input_ids.device):
        output = fused(
            input_ids=layout["input_ids"],
            position_ids=layout["position_ids"],
            # A mask of four dimensions goes through transformers as it is; the packed attention looks at none.
            attention_mask=input_ids.new_zeros(1, 1, 1, 1),
            shift_labels=layout["labels"],
            **{ROW: row},
            **kwargs,
        )
    return _on_grid(output, layout, labels[:, 1:].shape)


def _kernels(model: PreTrainedModel, device: torch.device) -> dict[torch.dtype, Any]:
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    groups = heads // (getattr(config, "num_key_value_heads", None) or heads)
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return kernels(device, heads, groups, dim)


def _on_grid(output: Any, layout: dict[str, Tensor], shape: torch.Size) -> Any:
    """TRL's output as its own padded path returns it: (2B, L−1), zero where there is no label."""
    sources, targets = layout["sources"], layout["targets"]
    for name in _FIELDS:
        values = getattr(output, name)
        if values is not None:
            grid = values.new_zeros(shape.numel())
            setattr(output, name, grid.index_copy(0, targets, values[0].index_select(0, sources)).view(shape))
    output.label_mask = torch.zeros(shape, dtype=torch.bool, device=targets.device)
    output.label_mask.view(-1)[targets] = True
    output.loss = -output.log_probs.sum() / max(len(targets), 1)
    return output
