"""A proof on a small scale: a random model of the same architecture, a batch in padded rows and then in a packed one.

Whatever in an architecture a packed row would change (attention that is not looked up by name, positions taken from
places in the row, states carried from token to token) shows here in fp32, in about a second, on any machine.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from sp2dpo.train.layout.attention import Unsupported
from sp2dpo.train.layout.install import KEY, install
from sp2dpo.train.layout.plan import plan

__all__ = ["objection"]

TOLERANCE: Final = 1e-4
"""Relative L2 difference of log-probs and gradients that fp32 rounding explains."""

_WINDOW: Final = 4
_VOCAB: Final = 64
_LARGEST: Final = 60_000_000
_BROKEN: Final = (TypeError, ValueError, RuntimeError, KeyError, AttributeError, IndexError, NotImplementedError)
_known: dict[tuple[type, str, bool], str | None] = {}


def objection(model: PreTrainedModel, *, dropout: bool) -> str | None:
    """A clause that says why a packed row is no exact form of padded rows in this architecture; None: it is one.

    `dropout`: the model trains with the dropout of its configuration.
    """
    key = (type(model), model.config.to_json_string(use_diff=False), dropout)
    if key not in _known:
        with _without_deepspeed():
            _known[key] = _judge(model, dropout)
    return _known[key]


@contextmanager
def _without_deepspeed() -> Iterator[None]:
    """ZeRO-3 would look for its marks on the parameters of the small model, which it does not share out."""
    config = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        held = config() if config is not None else None
        if held is not None:
            deepspeed.set_hf_deepspeed_config(held)


def _judge(model: PreTrainedModel, dropout: bool) -> str | None:
    try:
        small = _miniature(model)
        if not dropout:
            disable_dropout_in_model(small)
    except _BROKEN as error:
        return f"a small {type(model).__name__} to try it on cannot be made ({_said(error)})"
    try:
        difference = _difference(small)
    except Unsupported as refusal:
        return str(refusal)
    except _BROKEN as error:
        return f"{type(model).__name__} does not run on packed rows ({_said(error)})"
    if not difference < TOLERANCE:
        return f"{type(model).__name__} computes something else on packed rows (relative difference {difference:.1g})"
    return None


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def _miniature(model: PreTrainedModel) -> PreTrainedModel:
    """All its layers, two heads wide; windows of a few tokens, so that a short batch goes beyond them."""
    config = copy.deepcopy(model.config)
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if part is not None:
            _shrink(part)
    text = config.get_text_config()
    text.vocab_size = _VOCAB
    for name in ("sliding_window", "attention_chunk_size"):
        if getattr(text, name, None):
            setattr(text, name, _WINDOW)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        size = sum(p.numel() for p in type(model)(config).parameters())
    if size > _LARGEST:
        raise ValueError(f"it still has {size:,} parameters")
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        small: PreTrainedModel = type(model)(config).float().eval()
    add_fused_lm_head(small)
    install(small)
    return small


def _shrink(config: PreTrainedConfig) -> None:
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "quantization_config"):
        if hasattr(config, name):
            setattr(config, name, None)
    for name in ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"):
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, 8)
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if getattr(config, "num_key_value_heads", None) is not None:
        config.num_key_value_heads = 2 if config.num_key_value_heads == heads else 1
    config.num_attention_heads = 2
    config.hidden_size = 2 * dim


def _difference(small: PreTrainedModel) -> float:
    batch = _batch()
    packed = {**batch, KEY: plan(batch)}
    with torch.random.fork_rng(devices=[]):  # trained, if only to see whether its attention has dropout
        _scores(small.train(), packed)
    there, here = _scores(small.eval(), batch), _scores(small, packed)
    return max(_relative(a, b) for a, b in zip(here, there, strict=True))


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def _batch() -> dict[str, Any]:
    """Two pairs whose prompts are longer than the window; the second pair's responses begin alike."""
    token = torch.randint(_VOCAB, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [token[:7], token[7:18]]
    answers = [[token[18:24], token[24:27]], [token[28:33], token[28:30] + token[33:40]]]
    rows = [prompt + answer[side] for side in (0, 1) for prompt, answer in zip(prompts, answers, strict=True)]
    width = max(map(len, rows))
    begins = [len(prompt) for prompt in prompts] * 2
    return {
        "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[int(t < len(row)) for t in range(width)] for row in rows]),
        "completion_mask": torch.tensor(
            [[int(begin <= t < len(row)) for t in range(width)] for row, begin in zip(rows, begins, strict=True)]
        ),
    }


def _scores(small: PreTrainedModel, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Log-probs on the grid, and the gradient of a sum of them in which no two count the same."""
    inputs = {name: value for name, value in batch.items() if name != "completion_mask"}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    parameters = [p for p in small.parameters() if p.requires_grad]
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        log_probs = small(**inputs, labels=labels, fused_lm_head=True, use_cache=False).log_probs
        total = (log_probs * torch.arange(1.0, log_probs.numel() + 1).view_as(log_probs)).sum()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    return log_probs.detach(), torch.cat([g.flatten() for g in gradients if g is not None])
