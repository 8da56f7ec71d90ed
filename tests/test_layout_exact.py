"""The shared layout gives TRL's losses and gradients. The oracle is TRL alone: one pair at a time, with its scalar β.

fp32 on a CPU: losses agree to 1e-6, gradients to 2e-6 in relative L2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from sp2dpo.train import PairwiseDPOConfig, PairwiseDPOTrainer
from students import ARCHITECTURES, PROJECTIONS, WINDOW, make_student, make_tokenizer

LOSS, GRADIENT = 1e-6, 2e-6
NATS = 1e-4
"""What summed log-probs of about 200 nats may differ by."""

RIVER = "What is the name of the river that runs through the city?"
PAIRS = [
    {"prompt": RIVER, "chosen": " It is the river of the city, short and wide.", "rejected": " It is the answer."},
    {"prompt": "A cat and a dog:", "chosen": " a story, first of a cat and then of a dog in it", "rejected": " no"},
    {"prompt": "def add(a, b):", "chosen": " return a + b", "rejected": " return a - b # not what was asked for"},
    {"prompt": RIVER[:40], "chosen": " The same words", "rejected": " The same words"},
]
BETAS = [0.03, 0.3, 0.165, 0.1]
MAX_LENGTH = 48
"""Cuts a response of the first pair short."""

METRICS = ("logps/chosen", "logps/rejected", "rewards/chosen", "rewards/margins", "rewards/accuracies")
"""Metrics that are means over pairs."""

ALL = [0, 1, 2, 3]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A student of each architecture, and beside it the one that is its reference."""
    folders = {}
    for architecture in ARCHITECTURES:
        folders[architecture] = tmp_path_factory.mktemp(architecture)
        make_student(architecture, folders[architecture] / "student")
        make_student(architecture, folders[architecture] / "reference", seed=1)
    return folders


class Gradients(TrainerCallback):  # type: ignore[misc]
    """What the optimizer is about to use."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, **more: Any) -> None:
        self.steps.append(gradient(model))


def gradient(model: Any) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None])


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    quiet = {"report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "save_strategy": "no"}
    exact = {"bf16": False, "use_cpu": True, "max_length": MAX_LENGTH, "gradient_checkpointing": False}
    steps = {"learning_rate": 1e-3, "max_grad_norm": 0.0, "logging_steps": 1, "train_sampling_strategy": "sequential"}
    return {"output_dir": str(folder), **quiet, **exact, **steps, **more}


def parts(folders: dict[str, Path], architecture: str, adapted: bool) -> dict[str, Any]:
    """The student, its reference and its adapter; a fully trained student has a reference that differs from it."""
    load = type(make_student(architecture)).from_pretrained
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=rf".*language_model.*({'|'.join(PROJECTIONS)})")
    if architecture != "gemma3_conditional":
        lora.target_modules = set(PROJECTIONS)
    return {
        "model": load(folders[architecture] / "student", dtype=torch.float32),
        "ref_model": None if adapted else load(folders[architecture] / "reference", dtype=torch.float32),
        "peft_config": lora if adapted else None,
        "processing_class": make_tokenizer(),
    }


def stir(model: Any) -> None:
    """Adapters begin at zero, where half of their gradients vanish; move them away from there."""
    draw = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.03 * torch.randn(parameter.shape, generator=draw)


def trl(folders: dict[str, Path], architecture: str, folder: Path, *, adapted: bool = False, **more: Any) -> Any:
    trainer = DPOTrainer(
        args=DPOConfig(**settings(folder, **more)),
        train_dataset=Dataset.from_list(PAIRS),
        **parts(folders, architecture, adapted),
    )
    stir(trainer.model)
    return trainer


def oracle(trainer: Any, pairs: list[int]) -> tuple[float, torch.Tensor, dict[str, float]]:
    """Mean loss, its gradient and mean metrics of pairs that TRL sees one at a time, each with its scalar β."""
    loss = 0.0
    trainer.model.train()
    for n in pairs:
        trainer.beta = BETAS[n]
        each = trainer.compute_loss(trainer.model, trainer.data_collator([trainer.train_dataset[n]])) / len(pairs)
        each.backward()
        loss += each.item()
    metrics = {name: sum(values) / len(values) for name, values in trainer._metrics["train"].items()}
    return loss, gradient(trainer.model), metrics


def shared(
    folders: dict[str, Path], architecture: str, folder: Path, *, adapted: bool = False, **more: Any
) -> PairwiseDPOTrainer:
    data = Dataset.from_list([pair | {"beta": beta} for pair, beta in zip(PAIRS, BETAS, strict=True)])
    trainer = PairwiseDPOTrainer(
        args=PairwiseDPOConfig(layout="shared", reference_cache="off", **settings(folder, **more)),
        train_dataset=data,
        eval_dataset=data,
        **parts(folders, architecture, adapted),
    )
    stir(trainer.model)
    return trainer


def one_batch(trainer: Any, batch: Any) -> tuple[float, torch.Tensor]:
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), gradient(trainer.model)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradient_of_a_batch_are_those_of_trl_run_pair_by_pair(
    folders: dict[str, Path], tmp_path: Path, architecture: str, adapted: bool
) -> None:
    loss, want, _ = oracle(trl(folders, architecture, tmp_path / "trl", adapted=adapted), ALL)
    trainer = shared(folders, architecture, tmp_path / "shared", adapted=adapted, per_device_train_batch_size=4)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[1] > 2 * WINDOW
    got, gradients = one_batch(trainer, batch)
    assert got == pytest.approx(loss, rel=LOSS)
    assert relative(gradients, want) < GRADIENT


@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
@pytest.mark.parametrize(("architecture", "adapted"), [("mistral", False), ("gemma3", True)])
def test_gradient_checkpointing_changes_nothing(
    folders: dict[str, Path], tmp_path: Path, architecture: str, adapted: bool, reentrant: bool
) -> None:
    checkpointed = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    loss, want, _ = oracle(trl(folders, architecture, tmp_path / "trl", adapted=adapted, **checkpointed), ALL)
    both = [
        one_batch(trainer, next(iter(trainer.get_train_dataloader())))
        for more in ({}, checkpointed)
        for trainer in [shared(folders, architecture, tmp_path, adapted=adapted, per_device_train_batch_size=4, **more)]
    ]
    assert both[0][0] == both[1][0] == pytest.approx(loss, rel=LOSS)
    assert torch.equal(both[0][1], both[1][1])
    assert relative(both[1][1], want) < GRADIENT


@pytest.mark.parametrize("precomputed", [False, True], ids=["reference beside", "reference precomputed"])
@pytest.mark.parametrize(("architecture", "adapted"), [("qwen3", True), ("gemma3_conditional", False)])
def test_a_step_of_accumulated_batches_is_that_of_trl_run_pair_by_pair(
    folders: dict[str, Path], tmp_path: Path, architecture: str, adapted: bool, precomputed: bool
) -> None:
    more = {"adapted": adapted, "precompute_ref_log_probs": precomputed}
    loss, want, metrics = oracle(trl(folders, architecture, tmp_path / "trl", **more), ALL)
    accumulated: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1}
    trainer = shared(folders, architecture, tmp_path / "shared", **accumulated, **more)
    seen = Gradients()
    trainer.add_callback(seen)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(loss, rel=LOSS)
    assert relative(seen.steps[0], want) < GRADIENT
    assert {n: log[n] for n in METRICS} == pytest.approx({n: metrics[n] for n in METRICS}, abs=NATS)


@pytest.mark.parametrize("precomputed", [False, True], ids=["reference beside", "reference precomputed"])
def test_evaluation_is_that_of_trl_run_pair_by_pair(
    folders: dict[str, Path], tmp_path: Path, precomputed: bool
) -> None:
    more = {"precompute_ref_log_probs": precomputed}
    loss, _, metrics = oracle(trl(folders, "gemma3", tmp_path / "trl", **more), ALL)
    trainer = shared(folders, "gemma3", tmp_path / "shared", per_device_eval_batch_size=4, **more)
    told = trainer.evaluate()
    assert told["eval_loss"] == pytest.approx(loss, rel=LOSS)
    assert {n: told[f"eval_{n}"] for n in METRICS} == pytest.approx({n: metrics[n] for n in METRICS}, abs=NATS)
