"""Small trainings that one process, or each of several, runs for the tests: the same pairs in every global batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor

from sp2dpo.methods.losses import Controls, PairBatch
from sp2dpo.train import PairwiseDPOConfig, PairwiseDPOTrainer
from sp2dpo.train.student import load_student
from students import PROJECTIONS, make_tokenizer

GLOBAL_BATCH = 4


class Sifting:
    """Leaves out pairs of low margin for now, and makes β follow a running mean over all processes."""

    def __init__(self) -> None:
        self.mean = torch.zeros(())
        self.pairs = 0

    def __call__(self, batch: PairBatch, controls: Controls, gather: Callable[[Tensor], Tensor]) -> Controls:
        everyone = gather(batch.mean_logp_margin)
        self.pairs += len(everyone)
        self.mean = self.mean + 0.5 * (everyone.abs().mean() - self.mean)
        keep = (batch.mean_logp_margin > everyone.median()).float()
        return replace(controls, beta=controls.beta * (1 + self.mean), keep=keep)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "pairs": self.pairs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean, self.pairs = state["mean"], state["pairs"]


FULL: dict[str, Any] = {"gradient_checkpointing": False, "learning_rate": 5e-5}
LORA: dict[str, Any] = {
    "lora": True,
    "gradient_checkpointing": True,
    "precompute_ref_log_probs": True,
    "learning_rate": 1e-3,
}
CASES: dict[str, dict[str, Any]] = {
    "full": FULL,
    "full_precomputed": {**FULL, "precompute_ref_log_probs": True},
    "lora": LORA,
    "lora_accumulated": {**LORA, "gradient_accumulation_steps": 2, "global_batch": 2 * GLOBAL_BATCH},
    "lora_by_length": {**LORA, "train_sampling_strategy": "group_by_length"},
    "sifting": {**FULL, "sifting": True},
    "drop_last": {**LORA, "rows": 14, "dataloader_drop_last": True},
    "remainder": {**LORA, "rows": 14, "gradient_accumulation_steps": 2, "global_batch": 2 * GLOBAL_BATCH},
}


def pairs(n: int) -> Dataset:
    """An in-memory dataset of n pairs of unlike lengths, two categories and unlike β."""
    rows = [
        {
            "prompt": [{"role": "user", "content": "What is the name of the river? " * (1 + i % 4)}],
            "chosen": [{"role": "assistant", "content": "The answer is short. " * (1 + i % 3)}],
            "rejected": [{"role": "assistant", "content": "Write a story about a dog. " * (1 + (i * 7) % 5)}],
            "beta": 0.03 + 0.27 * i / n,
            "category": "Style" if i % 3 else "Safety",
            "row": i,
        }
        for i in range(n)
    ]
    return Dataset.from_list(rows)


def train(folder: Path, processes: int, *, lora: bool = False, sifting: bool = False, **more: Any) -> dict[str, Any]:
    """Train on this process's share of each global batch.

    Returns: what the process saw: `log`, `margins`, `layout`, `weights` (their sums) and `controls`.
    """
    rows, in_step = more.pop("rows", 16), more.pop("global_batch", GLOBAL_BATCH)
    accumulation = more.get("gradient_accumulation_steps", 1)
    control = [Sifting()] if sifting else []
    quiet = {"report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "save_strategy": "no"}
    exact = {"bf16": False, "use_cpu": True, "max_length": 256, "seed": 3, "logging_steps": 1}
    args = PairwiseDPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=in_step // accumulation // processes,
        num_train_epochs=2,
        reference_cache=str(folder / "reference"),
        ddp_find_unused_parameters=False,
        **(quiet | exact | more),
    )
    trainer = PairwiseDPOTrainer(
        load_student(str(folder.parent / "student")),
        args=args,
        train_dataset=pairs(rows),
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=PROJECTIONS, task_type="CAUSAL_LM") if lora else None,
        controls=control,
    )
    trainer.train()
    trained = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
    if trainer.is_world_process_zero():
        torch.save(trained, folder / "weights.pt")
    return {
        "log": trainer.state.log_history,
        "margins": trainer.margins,
        "layout": trainer.layout,
        "weights": {name: value.double().sum().item() for name, value in trained.items()},
        "controls": [[float(value) for value in c.state_dict().values()] for c in control],
    }
