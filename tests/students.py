"""Tiny random students for all tests: the four architectures of the paper's students, made in milliseconds.

Weights are drawn wider than usual, so that tokens differ in probability and gradients are not noise.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
)

ARCHITECTURES = ("llama", "qwen3", "mistral", "gemma3", "gemma3_conditional")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""The modules that the paper's LoRA adapts; every architecture here has all of them."""

WINDOW = 12
"""Sliding window of `mistral` (all layers) and of every second layer of `gemma3`, in tokens."""

HEAD_DIM = 16

_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_TEXT = """What is the name of the river that runs through the city? The answer is short and the answer is long.
Explain to a child how a plant grows; write a short story about a dog and a cat in the garden. Here are three reasons:
first, second, third. I am not able to help with that, because it could hurt someone. def add(a, b): return a + b"""


@cache
def make_tokenizer() -> Any:
    """A byte-level tokenizer of about 300 tokens with a chat template; it reads any text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        min_frequency=2,
        special_tokens=["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([_TEXT], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def make_student(
    architecture: str,
    folder: Path | str | None = None,
    *,
    vocab: int = 400,
    hidden: int = 64,
    layers: int = 2,
    seed: int = 0,
) -> Any:
    """A random fp32 model of an architecture; with a folder, saved there with its tokenizer and loaded from there.

    `vocab` may be larger than the tokenizer's, `hidden` is a multiple of 32. The same arguments give the same weights.
    """
    config = _config(architecture, vocab, hidden, layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _MODELS[architecture](config)
    if folder is None:
        return model
    make_tokenizer().save_pretrained(folder)
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, dtype=torch.float32)


_MODELS: dict[str, Any] = {
    "llama": LlamaForCausalLM,
    "qwen3": Qwen3ForCausalLM,
    "mistral": MistralForCausalLM,
    "gemma3": Gemma3ForCausalLM,
    "gemma3_conditional": Gemma3ForConditionalGeneration,
}


def _config(architecture: str, vocab: int, hidden: int, layers: int) -> Any:
    tokenizer = make_tokenizer()
    if vocab < len(tokenizer):
        raise ValueError(f"vocab {vocab} is smaller than the tokenizer's {len(tokenizer)}")
    shape = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD_DIM,
        "num_key_value_heads": hidden // HEAD_DIM // 2,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 2048,
        "initializer_range": 0.1,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    hybrid = ["sliding_attention" if n % 2 == 0 else "full_attention" for n in range(layers)]
    gemma = {**shape, "sliding_window": WINDOW, "layer_types": hybrid, "query_pre_attn_scalar": HEAD_DIM}
    match architecture:
        case "llama":
            return LlamaConfig(**shape)
        case "qwen3":
            return Qwen3Config(**shape)
        case "mistral":
            return MistralConfig(**shape, sliding_window=WINDOW)
        case "gemma3":
            return Gemma3TextConfig(**gemma)
        case "gemma3_conditional":
            return Gemma3Config(
                text_config=Gemma3TextConfig(**gemma),
                vision_config=SiglipVisionConfig(
                    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28
                ),
                mm_tokens_per_image=1,
                image_token_index=vocab - 1,
                boi_token_index=vocab - 3,
                eoi_token_index=vocab - 2,
            )
    raise ValueError(f"no student of architecture '{architecture}'; there are {', '.join(ARCHITECTURES)}")
