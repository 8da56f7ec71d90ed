"""Per-pair β on TRL itself: equal to plain TRL where β is constant, to eq. 8 where it is not. CPU, fp32."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from sp2dpo.errors import ScheduleError
from sp2dpo.loss import gradient_coefficient, sp2dpo_loss
from sp2dpo.train import PairwiseDPOConfig, PairwiseDPOTrainer
from sp2dpo.train.toy import make_toy

PAIRS = Path(__file__).parents[1] / "examples/quickstart/pairs.jsonl"
BETAS = [0.03, 0.3, 0.165, 0.1, 0.05, 0.25, 0.2, 0.07]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    pairs = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    short = sorted(pairs, key=lambda pair: len(str(pair)))[: len(BETAS)]
    return [{name: pair[name] for name in ("prompt", "chosen", "rejected")} for pair in short]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> str:
    folder = tmp_path_factory.mktemp("student")
    make_toy(folder, [row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")], steps=4)
    return str(folder)


def dataset(rows: list[dict[str, Any]], betas: Any = BETAS) -> Dataset:
    return Dataset.from_list([row | {"beta": b, "row": n} for n, (row, b) in enumerate(zip(rows, betas, strict=True))])


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    common = {"per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-3, "logging_steps": 1, "seed": 7}
    quiet = {"report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "save_strategy": "no"}
    exact = {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "max_length": 512}
    return {"output_dir": str(folder), **common, **quiet, **exact, **more}


def pairwise(student: str, data: Dataset, folder: Path, lora: Any = None, **more: Any) -> PairwiseDPOTrainer:
    return PairwiseDPOTrainer(
        AutoModelForCausalLM.from_pretrained(student),
        args=PairwiseDPOConfig(**settings(folder, **more)),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(student),
        peft_config=lora,
    )


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_constant_beta_column_trains_like_trl_to_the_last_bit(student: str, rows: Any, tmp_path: Path) -> None:
    plain = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(student),
        args=DPOConfig(beta=0.1, **settings(tmp_path / "plain")),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(student),
    )
    plain.train()
    ours = pairwise(student, dataset(rows, [0.1] * len(rows)), tmp_path / "ours")
    ours.train()
    for theirs, mine in zip(plain.state.log_history, ours.state.log_history, strict=True):
        kept = [key for key in theirs if "runtime" not in key and "per_second" not in key]
        assert {key: mine[key] for key in kept} == {key: theirs[key] for key in kept}
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(ours).items())


def test_per_pair_beta_trains_to_other_weights_than_its_mean(student: str, rows: Any, tmp_path: Path) -> None:
    mixed = pairwise(student, dataset(rows), tmp_path / "mixed")
    mixed.train()
    mean = pairwise(student, dataset(rows, [sum(BETAS) / len(BETAS)] * len(rows)), tmp_path / "mean")
    mean.train()
    assert not all(torch.equal(value, weights(mean)[name]) for name, value in weights(mixed).items())


def test_the_first_loss_is_ln_2_whatever_the_beta(student: str, rows: Any, tmp_path: Path) -> None:
    for betas in (BETAS, [0.001] * len(rows), [50.0] * len(rows)):
        trainer = pairwise(student, dataset(rows, betas), tmp_path, max_steps=1)
        trainer.train()
        assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)


def moved(trainer: PairwiseDPOTrainer) -> PairwiseDPOTrainer:
    """Push the policy off its reference, so that margins are not zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return trainer


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def margins_by_hand(trainer: PairwiseDPOTrainer, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Δ_i from plain logits and log_softmax, one sequence at a time, without any of TRL."""

    def logp(model: torch.nn.Module, n: int) -> torch.Tensor:
        length = int(batch["attention_mask"][n].sum())
        ids = batch["input_ids"][n, :length]
        logps = torch.log_softmax(model(input_ids=ids[None]).logits[0, :-1], -1)
        taken = logps.gather(1, ids[1:, None])[:, 0]
        return (taken * batch["completion_mask"][n, 1:length]).sum()

    half = len(batch["input_ids"]) // 2
    with torch.no_grad():
        ref = torch.stack([logp(trainer.ref_model, n) for n in range(2 * half)])
    ratio = torch.stack([logp(trainer.model, n) for n in range(2 * half)]) - ref
    return ratio[:half] - ratio[half:]


def test_loss_and_gradient_are_equations_5_and_8(student: str, rows: Any, tmp_path: Path) -> None:
    trainer = moved(pairwise(student, dataset(rows), tmp_path, per_device_train_batch_size=8))
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, batch)
    by_trl = gradients(trainer.model, loss)
    margin = margins_by_hand(trainer, batch)
    assert margin.abs().min() > 1e-3
    assert loss.item() == pytest.approx(sp2dpo_loss(batch["beta"], margin).item(), rel=1e-5)
    by_eq_8 = gradients(trainer.model, (gradient_coefficient(batch["beta"], margin.detach()) * margin).mean())
    assert torch.linalg.norm(by_trl - by_eq_8) / torch.linalg.norm(by_eq_8) < 1e-4


def test_the_noted_margins_belong_to_their_rows(student: str, rows: Any, tmp_path: Path) -> None:
    trainer = moved(pairwise(student, dataset(rows), tmp_path, per_device_train_batch_size=8))
    batch = next(iter(trainer.get_train_dataloader()))
    expected = margins_by_hand(trainer, batch).tolist()
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch)
    noted = {row: margin for _, row, margin in trainer.margins}
    assert noted == pytest.approx(dict(zip(batch["row"].tolist(), expected, strict=True)), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("lora", [None, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])])
def test_precomputed_reference_gives_the_same_losses(student: str, rows: Any, tmp_path: Path, lora: Any) -> None:
    both = (False, True)
    runs = [pairwise(student, dataset(rows), tmp_path / str(p), lora, precompute_ref_log_probs=p) for p in both]
    for trainer in runs:
        trainer.train()
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-5)
    assert losses(runs[0])[-1] != pytest.approx(math.log(2), abs=1e-4)


def test_evaluation_reads_beta_too(student: str, rows: Any, tmp_path: Path) -> None:
    trainer = PairwiseDPOTrainer(
        AutoModelForCausalLM.from_pretrained(student),
        args=PairwiseDPOConfig(**settings(tmp_path)),
        train_dataset=dataset(rows),
        eval_dataset=dataset(rows, [0.3] * len(rows)),
        processing_class=AutoTokenizer.from_pretrained(student),
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert trainer.margins == []


def test_resuming_ends_like_an_uninterrupted_run(student: str, rows: Any, tmp_path: Path) -> None:
    save = {"save_strategy": "steps", "save_steps": 2}
    whole = pairwise(student, dataset(rows), tmp_path / "whole", **save)
    whole.train()
    again = pairwise(student, dataset(rows), tmp_path / "whole", **save)
    again.resume_margins(tmp_path / "whole/checkpoint-2")
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(again).items())
    assert again.margins == pytest.approx(np.array(whole.margins), rel=1e-6)


def test_prompts_keep_their_end_and_no_row_is_lost(student: str, rows: Any, tmp_path: Path) -> None:
    free = pairwise(student, dataset(rows), tmp_path, max_length=None).train_dataset
    cut = pairwise(student, dataset(rows), tmp_path, max_prompt_length=5).train_dataset
    assert [ids[-5:] for ids in free["prompt_ids"]] == list(cut["prompt_ids"])
    assert list(free["chosen_ids"]) == list(cut["chosen_ids"])


def test_a_prompt_that_fills_max_length_is_refused_not_dropped(student: str, rows: Any, tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="set max_prompt_length below max_length"):
        pairwise(student, dataset(rows), tmp_path, max_length=4)


@pytest.mark.parametrize("bad", [None, float("nan"), 0.0, -0.1, float("inf")])
def test_a_beta_that_no_loss_can_use_is_refused_with_its_row(student: str, rows: Any, tmp_path: Path, bad: Any) -> None:
    with pytest.raises(ScheduleError, match="row 3 of the train dataset"):
        pairwise(student, dataset(rows, [*BETAS[:3], bad, *BETAS[4:]]), tmp_path)


def test_a_dataset_without_beta_is_refused(student: str, rows: Any, tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="no column 'beta'"):
        pairwise(student, Dataset.from_list(rows), tmp_path)


def test_a_loss_without_per_pair_beta_is_refused(student: str, rows: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="aot"):
        pairwise(student, dataset(rows), tmp_path, loss_type=["aot"])


def test_the_toy_is_the_same_every_time(student: str, rows: Any, tmp_path: Path) -> None:
    make_toy(tmp_path, [row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")], steps=4)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (Path(student) / name).read_bytes()
