"""A tiny student made on the spot, for a first look and for tests: no download, minutes on two cores.

It is a toy: a random 2-layer model that read the run's own responses for a moment. Nothing about quality follows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sp2dpo.progress import Progress

__all__ = ["make_toy"]

SEED: Final = 42

_TEMPLATE: Final = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def make_toy(
    folder: Path, conversations: Sequence[Sequence[dict[str, str]]], *, steps: int = 120, batch: int = 8
) -> None:
    """Make a tokenizer and a model from conversations and save both; the same input gives the same student."""
    torch.manual_seed(SEED)
    tokenizer = _tokenizer(conversations)
    model = LlamaForCausalLM(_config(tokenizer))
    _read(model, tokenizer, conversations, steps, batch)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def _tokenizer(conversations: Sequence[Sequence[dict[str, str]]]) -> Any:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((m["content"] for c in conversations for m in c), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def _config(tokenizer: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )


def _read(
    model: Any, tokenizer: Any, conversations: Sequence[Sequence[dict[str, str]]], steps: int, batch: int
) -> None:
    """A short pass of next-token prediction over the conversations."""
    ids = [tokenizer.apply_chat_template(c, tokenize=True, return_dict=True)["input_ids"][:512] for c in conversations]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batches = _batches(ids, batch)
    with Progress("make the toy student", steps) as progress:
        for _ in range(steps):
            rows = next(batches)
            padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], True, tokenizer.pad_token_id)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(r), dtype=torch.long) for r in rows], True, 0)
            loss = model(input_ids=padded, attention_mask=mask, labels=padded.masked_fill(mask == 0, -100)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            progress.advance()


def _batches(ids: list[list[int]], batch: int) -> Iterator[list[list[int]]]:
    """Batches of similar length, in random order, forever."""
    ids = sorted(ids, key=len)
    groups = [ids[n : n + batch] for n in range(0, len(ids), batch)]
    while True:
        for n in torch.randperm(len(groups)).tolist():
            yield groups[n]
