"""Per-pair β on TRL itself: equal to plain TRL where β is constant, to eq. 8 where it is not. CPU, fp32."""

from __future__ import annotations

import json
import math
from dataclasses import replace
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
from sp2dpo.loss import gradient_coefficient, pair_loss, sp2dpo_loss
from sp2dpo.methods.losses import Controls, PairBatch
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


def pairwise(
    student: str, data: Dataset, folder: Path, lora: Any = None, controls: Any = (), **more: Any
) -> PairwiseDPOTrainer:
    return PairwiseDPOTrainer(
        AutoModelForCausalLM.from_pretrained(student),
        args=PairwiseDPOConfig(**settings(folder, **more)),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(student),
        peft_config=lora,
        controls=controls,
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
    ours = pairwise(student, dataset(rows, [0.1] * len(rows)), tmp_path / "ours", layout="padded")
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


def test_a_dataset_with_images_is_refused(student: str, rows: Any, tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="has images"):
        pairwise(student, dataset(rows).add_column("images", [[]] * len(rows)), tmp_path)


def test_a_dataset_without_beta_is_refused(student: str, rows: Any, tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="no column 'beta'"):
        pairwise(student, Dataset.from_list(rows), tmp_path)


def test_a_loss_without_per_pair_beta_is_refused(student: str, rows: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="loss_type 'aot' has no per-pair β"):
        pairwise(student, dataset(rows), tmp_path, loss_type=["aot"])


def test_the_toy_is_the_same_every_time(student: str, rows: Any, tmp_path: Path) -> None:
    make_toy(tmp_path, [row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")], steps=4)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (Path(student) / name).read_bytes()


def test_weights_multiply_the_loss_of_their_pairs(student: str, rows: Any, tmp_path: Path) -> None:
    weight = [0.0, 2.0, 0.5, 1.0, 0.0, 3.0, 1.0, 0.5]
    data = dataset(rows, [0.1] * len(rows)).add_column("weight", weight)
    trainer = moved(pairwise(student, data, tmp_path, per_device_train_batch_size=8))
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, batch)
    each = pair_loss(0.1, margins_by_hand(trainer, batch))
    assert loss.item() == pytest.approx((batch["weight"] * each).mean().item(), rel=1e-5)


def test_a_margin_is_taken_from_the_log_ratios_inside_beta(student: str, rows: Any, tmp_path: Path) -> None:
    data = dataset(rows).add_column("margin", [0.5 * n for n in range(len(rows))])
    trainer = moved(pairwise(student, data, tmp_path, per_device_train_batch_size=8))
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    by_hand = pair_loss(batch["beta"], margins_by_hand(trainer, batch) - batch["margin"])
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(by_hand.mean().item(), rel=1e-5)


def test_a_pair_routed_to_sft_has_the_likelihood_of_its_chosen_response(
    student: str, rows: Any, tmp_path: Path
) -> None:
    data = dataset(rows).add_column("route", ["sft"] * len(rows))
    trainer = moved(pairwise(student, data, tmp_path, per_device_train_batch_size=8))
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    half = len(rows)
    labels = batch["input_ids"][:half].masked_fill(batch["completion_mask"][:half] == 0, -100)
    plain = AutoModelForCausalLM.from_pretrained(student)
    plain.load_state_dict(trainer.model.state_dict())
    each = [
        plain(input_ids=ids[None], labels=label[None]).loss
        for ids, label in zip(batch["input_ids"][:half], labels, strict=True)
    ]
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-5)


def test_keep_leaves_pairs_out_and_order_is_the_order_of_training(student: str, rows: Any, tmp_path: Path) -> None:
    data = dataset(rows).add_column("keep", [1, 1, 0, 1, 1, 1, 0, 1]).add_column("order", [5, 3, 9, 1, 0, 2, 9, 4])
    trainer = pairwise(student, data, tmp_path, per_device_train_batch_size=2, max_steps=3)
    trainer.train()
    assert [row for _, row, _ in trainer.margins] == [4, 3, 5, 1, 7, 0]


def test_metrics_by_category_are_those_of_its_pairs(student: str, rows: Any, tmp_path: Path) -> None:
    names = ["Safety", "Style", "Safety", "Style", "Safety", "Safety", "Style", "Style"]
    data = dataset(rows).add_column("category", names)
    trainer = pairwise(student, data, tmp_path, max_steps=2, logging_steps=2)
    trainer.train()
    logged = trainer.state.log_history[0]
    beta, margin = (np.array(column) for column in zip(*[(BETAS[r], m) for _, r, m in trainer.margins], strict=True))
    safety = np.array([names[row] == "Safety" for _, row, _ in trainer.margins])
    pull = beta / (1 + np.exp(beta * margin))
    assert logged["saturation/Safety"] == pytest.approx(pull[safety].mean(), rel=1e-5)
    assert logged["rewards/margins/Style"] == pytest.approx((beta * margin)[~safety].mean(), rel=1e-4, abs=1e-7)
    assert logged["rewards/accuracies/Safety"] == pytest.approx((margin > 0)[safety].mean())
    assert logged["beta_margin"] == pytest.approx(beta.mean() * np.abs(margin).mean(), rel=1e-5)


@pytest.mark.parametrize(
    ("method", "loss", "knobs"), [("ipo", "ipo", {}), ("robust", "robust", {"label_smoothing": 0.1})]
)
def test_a_method_that_trl_has_trains_like_trl(
    student: str, rows: Any, tmp_path: Path, method: str, loss: str, knobs: dict[str, Any]
) -> None:
    plain = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(student),
        args=DPOConfig(beta=0.1, loss_type=[loss], **knobs, **settings(tmp_path / "plain")),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(student),
    )
    plain.train()
    data = dataset(rows, [0.1] * len(rows))
    ours = pairwise(student, data, tmp_path / "ours", method=method, knobs=knobs, layout="padded")
    ours.train()
    assert losses(ours) == pytest.approx(losses(plain), rel=1e-6)
    for name, value in weights(ours).items():
        torch.testing.assert_close(value, weights(plain)[name], rtol=1e-5, atol=1e-7)


class RunningBeta:
    """A control of one number: β of all pairs from a running mean of the implicit margins."""

    def __init__(self) -> None:
        self.mean = 0.0

    def __call__(self, batch: PairBatch, controls: Controls, gather: Any) -> Controls:
        self.mean = 0.9 * self.mean + 0.1 * gather(batch.implicit_margin).mean().item()
        return replace(controls, beta=controls.beta * (1 + 0.6 * self.mean))

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = state["mean"]


def test_a_control_of_each_step_goes_on_from_a_checkpoint(student: str, rows: Any, tmp_path: Path) -> None:
    def trainer() -> PairwiseDPOTrainer:
        return pairwise(
            student, dataset(rows), tmp_path, controls=[RunningBeta()], save_strategy="steps", save_steps=2, max_steps=4
        )

    whole = trainer()
    whole.train()
    again = trainer()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert whole.controls[0].state_dict() == again.controls[0].state_dict() != {"mean": 0.0}
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(again).items())


@pytest.mark.parametrize("column", ["margin", "weight", "route", "keep", "order"])
def test_a_control_that_no_loss_can_use_is_refused_with_its_row(
    student: str, rows: Any, tmp_path: Path, column: str
) -> None:
    bad: list[Any] = ["elsewhere"] * len(rows) if column == "route" else [float("nan")] * len(rows)
    with pytest.raises(ScheduleError, match=f"row 0 of the train dataset has {column}"):
        pairwise(student, dataset(rows).add_column(column, bad), tmp_path)


def test_keys_of_trl_that_reshape_the_loss_act_as_there(student: str, rows: Any, tmp_path: Path) -> None:
    plain = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(student),
        args=DPOConfig(beta=0.1, ld_alpha=0.5, **settings(tmp_path / "plain")),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(student),
    )
    plain.train()
    ours = pairwise(student, dataset(rows, [0.1] * len(rows)), tmp_path / "ours", ld_alpha=0.5, layout="padded")
    ours.train()
    assert losses(ours) == losses(plain)
    with pytest.raises(ValueError, match="under method 'simpo': ld_alpha"):
        PairwiseDPOConfig(method="simpo", ld_alpha=0.5, **settings(tmp_path))
    with pytest.raises(ValueError, match="weight, which do nothing under TRL's ld_alpha"):
        pairwise(student, dataset(rows).add_column("weight", [2.0] * len(rows)), tmp_path, ld_alpha=0.5)


def test_controls_that_would_do_nothing_are_refused(student: str, rows: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="controls of each step do nothing under TRL's ld_alpha"):
        pairwise(student, dataset(rows), tmp_path, controls=[RunningBeta()], ld_alpha=0.5)
    with pytest.raises(ValueError, match="a knob of the methods cdpo and robust"):
        PairwiseDPOConfig(label_smoothing=0.3, **settings(tmp_path))
    with pytest.raises(ValueError, match="label_smoothing, which does nothing in the method 'sp2dpo'"):
        pairwise(student, dataset(rows).add_column("label_smoothing", [0.4] * len(rows)), tmp_path)


def test_label_smoothing_of_each_pair_is_that_of_the_method(student: str, rows: Any, tmp_path: Path) -> None:
    def last(data: Dataset, **knobs: float) -> float:
        trainer = pairwise(student, data, tmp_path, method="cdpo", knobs=knobs)
        trainer.train()
        return losses(trainer)[-1]

    of_pairs = last(dataset(rows).add_column("label_smoothing", [0.4] * len(rows)))
    assert of_pairs == pytest.approx(last(dataset(rows), label_smoothing=0.4), rel=1e-6)
    assert of_pairs != pytest.approx(last(dataset(rows), label_smoothing=0.1), rel=1e-3)


def test_a_stream_is_refused(student: str, rows: Any, tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="the train dataset is a stream"):
        pairwise(student, dataset(rows).to_iterable_dataset(), tmp_path)


def test_a_dataset_that_keeps_no_pair_is_refused(student: str, rows: Any, tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="keeps no pair"):
        pairwise(student, dataset(rows).add_column("keep", [0] * len(rows)), tmp_path)


@pytest.mark.parametrize("column", ["beta", "order", "row"])
def test_words_in_place_of_numbers_are_refused(student: str, rows: Any, tmp_path: Path, column: str) -> None:
    data = dataset(rows)
    data = (data.remove_columns(column) if column in data.column_names else data).add_column(
        column, ["0.1"] * len(rows)
    )
    with pytest.raises(ScheduleError, match=f"row 0 of the train dataset has {column} 0.1"):
        pairwise(student, data, tmp_path)


def test_an_order_leaves_the_settings_of_the_caller_alone(student: str, rows: Any, tmp_path: Path) -> None:
    trainer = pairwise(student, dataset(rows).add_column("order", list(range(len(rows)))), tmp_path)
    assert trainer.args.train_sampling_strategy == "random"


def test_saturation_is_that_of_the_loss_with_all_its_controls(student: str, rows: Any, tmp_path: Path) -> None:
    data = dataset(rows).add_column("margin", [50.0] * len(rows)).add_column("weight", [2.0] * len(rows))
    data = data.add_column("route", ["preference", "sft"] * (len(rows) // 2))
    trainer = pairwise(student, data, tmp_path, max_steps=1, per_device_train_batch_size=8)
    trainer.train()
    beta = np.array(BETAS[::2])
    assert trainer.state.log_history[0]["saturation"] == pytest.approx((2 * beta / (1 + np.exp(-50 * beta))).mean())
