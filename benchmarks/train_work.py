"""What the benchmarks of training share: pairs as long as UltraFeedback's, a random student, trainers by variant.

The lengths are a fitted model, in tokens: prompts log-normal (median 90, σ 1.22) and 12 of a template; responses
log-normal (median 240, σ 0.615), chosen and rejected correlated by 0.5. Its median of prompt and chosen is 397, and of
prompt by completion 0.43; published for UltraFeedback: 409 and 0.42 (github.com/frankxwang/dpo-prefix-sharing).
"""

from __future__ import annotations

import copy
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, PrinterCallback, Qwen3Config
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import DPOConfig, DPOTrainer

from sp2dpo.train import PairwiseDPOConfig, PairwiseDPOTrainer

__all__ = [
    "MAX_LENGTH",
    "PROJECTIONS",
    "VARIANTS",
    "Sample",
    "Shape",
    "Stepper",
    "Student",
    "Took",
    "draw_lengths",
    "make_dataset",
    "make_sample",
    "make_student",
    "make_trainer",
    "padded_tokens",
    "shared_tokens",
    "token_law",
]

VARIANTS: Final = {
    "trl": "TRL, random batches",
    "again": "TRL again (A/A control)",
    "grouped": "TRL, batches grouped by length",
    "padded": "sp2dpo, padded",
    "shared": "sp2dpo, shared layout",
}
MAX_LENGTH: Final = 2048
MAX_PROMPT: Final = 1536
MEGA_BATCH: Final = 50
"""Batches that transformers' sampler sorts by length at a time."""

PROJECTIONS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Lengths = NDArray[np.int64]
"""(pairs, 3): tokens of prompt, chosen and rejected."""


@dataclass(frozen=True)
class Shape:
    """Of a student like Qwen3: random weights, tied embeddings."""

    hidden: int = 256
    layers: int = 4
    vocab: int = 8192
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    intermediate: int = 768


@dataclass(frozen=True)
class Sample:
    """Pairs and their batches: the grouped ones, and the same pairs shuffled."""

    lengths: Lengths
    grouped: list[list[int]]
    random: list[list[int]]

    def batches(self, variant: str) -> list[list[int]]:
        """As a variant meets them."""
        return self.grouped if variant == "grouped" else self.random

    def tokens(self, variant: str, batch: list[int]) -> int:
        """That the model computes for a batch, padding included."""
        return (shared_tokens if variant == "shared" else padded_tokens)(self.lengths[batch])

    def ratios(self) -> NDArray[np.float64]:
        """Tokens a pair in the shared layout; tokens of random and of grouped batches, of those."""
        shared = shared_tokens(self.lengths)
        padded = [sum(padded_tokens(self.lengths[batch]) for batch in some) for some in (self.random, self.grouped)]
        return np.array([shared / len(self.lengths), padded[0] / shared, padded[1] / shared])


def draw_lengths(pairs: int, seed: int, scale: float = 1.0) -> Lengths:
    """Lengths of so many pairs, all of them cut as the paper cuts: prompts to 1536 tokens, with a response to 2048."""
    dice = np.random.default_rng(seed)
    prompt = scale * (12 + 90 * np.exp(1.22 * dice.standard_normal(pairs)))
    both = dice.multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]], pairs)
    prompt = np.clip(prompt, 4, MAX_PROMPT * scale)[:, None]
    responses = np.clip(scale * 240 * np.exp(0.615 * both), 4, MAX_LENGTH * scale - prompt)
    return np.hstack([prompt, responses]).astype(np.int64)


def padded_tokens(lengths: Lengths) -> int:
    """Of a batch of two rows a pair, each as long as the longest."""
    return int(2 * len(lengths) * _row(lengths).max())


def shared_tokens(lengths: Lengths) -> int:
    """Of a batch in which each prompt and each response stands once."""
    return int(lengths.sum())


def token_law(batch: int, pairs: int = 60_000) -> NDArray[np.float64]:
    """`Sample.ratios` of UltraFeedback as a whole: what a sample should show."""
    lengths = draw_lengths(pairs // batch * batch, seed=0)
    return Sample(lengths, _grouped(lengths, batch, 0), _cut(np.arange(len(lengths)), batch)).ratios()


def make_sample(batch: int, batches: int, scale: float = 1.0) -> Sample:
    """A sample whose ratios are those of `token_law`, as nearly as 200 seeds have them.

    Its grouped batches stand at even distances in one group of 50 that transformers' own function sorts: as grouped as
    they would be in the whole. TRL 1.16 cannot make them itself; its DPO trainer drops the lengths before it groups.
    """
    law = token_law(batch) * [scale, 1, 1]
    samples = [_sample(batch, batches, seed, scale) for seed in range(200)]
    return min(samples, key=lambda sample: float(np.abs(sample.ratios() / law - 1).max()))


def _sample(batch: int, batches: int, seed: int, scale: float) -> Sample:
    lengths = draw_lengths(MEGA_BATCH * batch, seed, scale)
    groups = _grouped(lengths, batch, seed)
    at = (np.arange(batches) + 0.5) * MEGA_BATCH / batches
    rows = [row for n in at for row in groups[int(n)]]
    shuffled = np.random.default_rng(seed).permutation(len(rows))
    return Sample(lengths[rows], _cut(np.arange(len(rows)), batch), _cut(shuffled, batch))


def _grouped(lengths: Lengths, batch: int, seed: int) -> list[list[int]]:
    chance = torch.Generator().manual_seed(seed)
    return _cut(np.array(get_length_grouped_indices(_row(lengths).tolist(), batch, MEGA_BATCH, chance)), batch)


def _cut(rows: NDArray[Any], batch: int) -> list[list[int]]:
    return [rows[n : n + batch].tolist() for n in range(0, len(rows), batch)]


def _row(lengths: Lengths) -> Lengths:
    row: Lengths = lengths[:, 0] + lengths[:, 1:].max(axis=1)
    return row


# Student and data ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Student:
    """A model that every trainer gets a copy of, its tokenizer, and a folder to leave things in."""

    model: Any
    tokenizer: Any
    folder: Path


def make_student(folder: Path, shape: Shape, dtype: torch.dtype = torch.float32) -> Student:
    """Random weights on the device that trains, the same for the same shape, and a tokenizer of one word a token."""
    vocab = {"<pad>": 0, "<eos>": 1, **{f"w{n}": n for n in range(2, shape.vocab)}}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))  # noqa: S106
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")  # noqa: S106
    config = Qwen3Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return Student(AutoModelForCausalLM.from_config(config, dtype=dtype), tokenizer, folder)


def make_dataset(lengths: Lengths, vocab: int, beta: float | None = None) -> Dataset:
    """Pairs of random words in these lengths, with one β or with any of 0.03 to 0.3.

    Its fingerprint is new each time: no trainer finds the reference of another in TRL's cache.
    """
    dice = np.random.default_rng(0)
    columns: dict[str, list[Any]] = {name: [] for name in ("prompt", "chosen", "rejected", "beta", "row")}
    for n, (prompt, chosen, rejected) in enumerate(lengths.tolist()):
        columns["prompt"].append(_words(dice, prompt, vocab) + " ")
        columns["chosen"].append(_words(dice, chosen - 1, vocab) + " <eos>")
        columns["rejected"].append(_words(dice, rejected - 1, vocab) + " <eos>")
        columns["beta"].append(dice.uniform(0.03, 0.3) if beta is None else beta)
        columns["row"].append(n)
    return Dataset(Dataset.from_dict(columns).data, fingerprint=uuid.uuid4().hex)


def _words(dice: np.random.Generator, words: int, vocab: int) -> str:
    return " ".join(f"w{n}" for n in dice.integers(2, vocab, words))


# Trainers ------------------------------------------------------------------------------------------------------------


def make_trainer(variant: str, student: Student, dataset: Dataset, batch: int, lora: bool, **keys: Any) -> DPOTrainer:
    """The trainer of a variant: TRL's own, or this project's with its layout; the same weights, data and seed."""
    cuda = torch.cuda.is_available()
    common: dict[str, Any] = {
        "output_dir": str(student.folder / "out"),
        "per_device_train_batch_size": batch,
        "max_length": MAX_LENGTH,
        "bf16": cuda,
        "use_cpu": not cuda,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        **keys,
    }
    rest: dict[str, Any] = {"processing_class": student.tokenizer}
    if lora:
        rest["peft_config"] = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=list(PROJECTIONS))
    else:
        rest["ref_model"] = copy.deepcopy(student.model)
    model = copy.deepcopy(student.model)
    if variant in ("padded", "shared"):
        args = PairwiseDPOConfig(**{"layout": variant, "reference_cache": "off", **common})
        trainer = PairwiseDPOTrainer(model, args=args, train_dataset=dataset, **rest)
    else:
        texts = dataset.select_columns(["prompt", "chosen", "rejected"])
        trainer = DPOTrainer(model, args=DPOConfig(**common), train_dataset=texts, **rest)
    trainer.remove_callback(PrinterCallback)
    return trainer


@dataclass(frozen=True)
class Took:
    """Seconds of the clock and of all processors."""

    wall: float
    cpu: float


def _tokens(row: dict[str, Any]) -> int:
    return sum(len(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))


class Stepper:
    """One trainer from token ids to new weights. A first step, on the shortest pair, is made at once."""

    def __init__(self, trainer: DPOTrainer, batches: list[list[int]]) -> None:
        self.trainer = trainer
        self.batches = [[trainer.train_dataset[row] for row in batch] for batch in batches]
        trainer.create_optimizer()
        self._model, self._optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.current_gradient_accumulation_steps = 1
        self._step([min(trainer.train_dataset, key=_tokens)])

    def __call__(self, n: int) -> Took:
        """Collate, forward, reference, backward and optimizer step of batch n."""
        wall, cpu = time.perf_counter(), time.process_time()
        self._step(self.batches[n])
        return Took(time.perf_counter() - wall, time.process_time() - cpu)

    def _step(self, rows: list[Any]) -> None:
        self.trainer.training_step(self._model, self.trainer.data_collator(rows))
        self._optimizer.step()
        self._optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
