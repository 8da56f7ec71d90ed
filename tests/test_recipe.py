"""The recipe of the paper as shipped (L.2): what its files say, what TRL and PEFT make of it, and some steps of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig

from sp2dpo.process import load_process
from sp2dpo.runs import differences
from sp2dpo.settings import train_keys
from sp2dpo.train import PairwiseDPOConfig, PairwiseDPOTrainer
from sp2dpo.train.machine import settings_here
from sp2dpo.train.run import check_settings
from sp2dpo.train.student import load_student
from students import PROJECTIONS, make_student, make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # Python 3.12, of torch's loader

EXAMPLES = Path(__file__).parents[1] / "examples"
RECIPES = {path.stem: path for path in sorted((EXAMPLES / "paper").glob("*.yaml"))}

PAPER = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "target_modules": PROJECTIONS,
    "bf16": True,
    "optim": "paged_adamw_32bit",
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "max_length": 2048,
    "max_prompt_length": 1536,
    "num_train_epochs": 1,
    "precompute_ref_log_probs": True,
    "gradient_checkpointing": True,
    "train_sampling_strategy": "group_by_length",
    "dataloader_persistent_workers": True,
    "dataloader_pin_memory": True,
    "save_steps": 250,
    "save_total_limit": 3,
    "logging_steps": 10,
    "merge": True,
}
"""L.2: what all students and methods share, under TRL's and PEFT's names."""

BATCHES = {"qwen3-4b": (8, 2), "gemma-3-4b": (4, 4), "llama-3.1-8b": (4, 4), "mistral-7b": (4, 4)}
"""Batch and accumulation; the paper has none for Mistral, and 2 beside 4 for Gemma's accumulation."""

OF_A_STUDENT = {
    "name",
    "student.model",
    "student.revision",
    "train.per_device_train_batch_size",
    "train.gradient_accumulation_steps",
    "train.exclude_modules",  # Gemma 3 has a vision tower
}


def written(name: str) -> dict[str, Any]:
    keys: dict[str, Any] = yaml.safe_load(RECIPES[name].read_text(encoding="utf-8"))
    return keys


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_process_that_trl_and_peft_accept(name: str) -> None:
    settings = load_process(RECIPES[name]).settings
    assert settings.train is not None
    check_settings(settings.train, settings.student)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_numbers_of_the_paper(name: str) -> None:
    train = written(name)["train"]
    assert {key: train[key] for key in PAPER} == PAPER
    assert (train["per_device_train_batch_size"], train["gradient_accumulation_steps"]) == BATCHES[name]
    assert train["per_device_train_batch_size"] * train["gradient_accumulation_steps"] * 4 == 64


def test_the_recipes_differ_in_nothing_but_the_student() -> None:
    assert RECIPES.keys() == BATCHES.keys()
    first, *others = map(written, RECIPES)
    assert {key for other in others for key in differences(first, other)} == OF_A_STUDENT


@pytest.mark.parametrize("name", RECIPES)
def test_data_and_student_are_pinned_to_commits(name: str) -> None:
    for section in (written(name)["data"], written(name)["student"]):
        assert len(bytes.fromhex(section["revision"])) == 20


def test_the_comments_tell_what_differs_from_the_paper_for_each_student() -> None:
    text = {name: path.read_text(encoding="utf-8") for name, path in RECIPES.items()}
    assert "the paper has 2 for DPO and 4 for SP²DPO" in text["gemma-3-4b"]
    assert "not in the paper" in text["mistral-7b"]
    assert all("the paper does not state it" in each for each in text.values())


def test_paged_adamw_has_a_stand_in_where_there_is_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here, (note, *_) = settings_here({"optim": "paged_adamw_32bit", "learning_rate": 1e-6})
    assert (here["optim"], here["learning_rate"]) == ("adamw_torch", 1e-6)
    assert "no CUDA" in note
    assert "adamw_torch" in note


def test_paged_adamw_has_a_stand_in_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("sp2dpo.train.machine.find_spec", lambda name: None)
    here, (note, *_) = settings_here({"optim": "paged_adamw_32bit"})
    assert here["optim"] == "adamw_torch"
    assert "bitsandbytes is not installed" in note


def test_paged_adamw_stays_where_it_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("sp2dpo.train.machine.find_spec", lambda name: object())
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    asked = {"optim": "paged_adamw_32bit", "bf16": True, "dataloader_pin_memory": True}
    assert settings_here(asked) == (asked, [])


def test_other_optimizers_are_left_as_they_are() -> None:
    assert settings_here({"optim": "adamw_8bit"})[0]["optim"] == "adamw_8bit"


SIDES = ("prompt", "chosen", "rejected")


def short(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    return [message | {"content": message["content"][: len(message["content"]) // 6]} for message in messages]


def trainer_of(name: str, student: str, folder: Path, **keys: Any) -> PairwiseDPOTrainer:
    """The recipe's own `train` section with a tiny student, in fp32 on the CPU; `keys` replace some of it."""
    train = written(name)["train"] | {"bf16": False, "model_init_kwargs": None, "use_cpu": True} | keys
    dpo, _ = settings_here({key: value for key, value in train.items() if key in train_keys("dpo")})
    own = {"max_prompt_length": train["max_prompt_length"], "reference_cache": "off", "disable_tqdm": True}
    lora = {key: value for key, value in train.items() if key in train_keys("lora")}
    lines = (EXAMPLES / "quickstart/pairs.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [{key: short(pair[key]) for key in SIDES} | {"beta": 0.1} for pair in map(json.loads, lines[:80])]
    make_student(student, folder / "student")
    return PairwiseDPOTrainer(
        load_student(str(folder / "student"), init=train["model_init_kwargs"]),
        args=PairwiseDPOConfig(output_dir=str(folder / "out"), **dpo, **own),
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **lora),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> PairwiseDPOTrainer:
    """One epoch of Qwen3's recipe over 80 pairs, with a checkpoint at every step."""
    often = {"save_steps": 1, "logging_steps": 1, "dataloader_num_workers": 1}
    trainer = trainer_of("qwen3-4b", "qwen3", tmp_path_factory.mktemp("recipe"), **often)
    trainer.train()
    return trainer


def test_the_recipe_trains_with_the_batch_of_the_file(trained: PairwiseDPOTrainer) -> None:
    losses = [entry["loss"] for entry in trained.state.log_history if "loss" in entry]
    assert len(losses) == 80 // (8 * 2)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] != pytest.approx(math.log(2), abs=1e-5)


def test_the_recipe_keeps_the_student_in_bf16_and_its_adapter_in_fp32(tmp_path: Path) -> None:
    own = {key: written("qwen3-4b")["train"][key] for key in ("bf16", "model_init_kwargs")}
    more = {"max_steps": 1, "gradient_accumulation_steps": 1, "dataloader_num_workers": 1, "logging_steps": 1}
    trainer = trainer_of("qwen3-4b", "qwen3", tmp_path, **own, **more)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in trainer.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)


def test_the_recipe_takes_the_shared_layout(trained: PairwiseDPOTrainer) -> None:
    assert (trained.layout, trained.layout_reason) == ("shared", "")


@pytest.mark.parametrize(("name", "student"), [("qwen3-4b", "qwen3"), ("gemma-3-4b", "gemma3_conditional")])
def test_only_lora_on_the_seven_projections_of_the_text_model_is_trained(
    name: str, student: str, tmp_path: Path
) -> None:
    model = trainer_of(name, student, tmp_path, precompute_ref_log_probs=False).model
    trainable = {key for key, value in model.named_parameters() if value.requires_grad}
    assert len(trainable) == 2 * 2 * len(PROJECTIONS)  # layers, A and B
    assert {key.split(".lora_")[0].rsplit(".", 1)[1] for key in trainable} == set(PROJECTIONS)
    assert not any("vision" in key for key in trainable)


def test_without_its_exclusion_gemma_would_train_projections_that_text_never_reaches(tmp_path: Path) -> None:
    model = trainer_of(
        "gemma-3-4b", "gemma3_conditional", tmp_path, precompute_ref_log_probs=False, exclude_modules=None
    ).model
    assert any("vision" in key for key, value in model.named_parameters() if value.requires_grad)


def test_the_dropout_of_lora_is_active_in_training_only(trained: PairwiseDPOTrainer) -> None:
    model, ids = trained.model, torch.arange(20, 40)[None]
    dropouts = [module.p for key, module in model.named_modules() if key.endswith("lora_dropout.default")]
    assert dropouts == [0.05] * 2 * len(PROJECTIONS)
    with torch.no_grad():
        model.train()
        torch.manual_seed(1)
        one, other = (model(input_ids=ids).logits for _ in range(2))
        assert not torch.equal(one, other)
        model.eval()
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_trl_by_itself_would_switch_the_dropout_off(tmp_path: Path) -> None:
    model = trainer_of("qwen3-4b", "qwen3", tmp_path, precompute_ref_log_probs=False, disable_dropout=True).model
    assert {module.p for key, module in model.named_modules() if key.endswith("lora_dropout.default")} == {0.0}


def test_a_checkpoint_is_left_at_each_save_and_three_are_kept(trained: PairwiseDPOTrainer) -> None:
    kept = sorted(path.name for path in Path(trained.args.output_dir).glob("checkpoint-*"))
    assert kept == ["checkpoint-3", "checkpoint-4", "checkpoint-5"]


def test_the_rate_warms_up_over_a_tenth_of_the_steps_and_falls_as_a_cosine(trained: PairwiseDPOTrainer) -> None:
    steps, peak = 937, 5e-6
    warm = math.ceil(0.1 * steps)
    trained.lr_scheduler = None
    schedule = trained.create_scheduler(steps, torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=peak))
    rate = schedule.lr_lambdas[0]
    assert [rate(0), rate(warm / 2), rate(warm)] == pytest.approx([0, 0.5, 1])
    for step in (warm, 300, 500, 900, steps):
        expected = 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))
        assert rate(step) == pytest.approx(expected, abs=1e-9)


def test_batches_are_grouped_by_length(trained: PairwiseDPOTrainer) -> None:
    tokens = np.array(trained.train_dataset["length"])

    def padding(order: Any) -> int:
        batches = tokens[list(order)].reshape(-1, 8)
        return int((batches.max(1, keepdims=True) - batches).sum())

    sampler = trained._get_train_sampler()
    assert sampler is not None
    assert sorted(order := list(sampler)) == list(range(80))
    assert padding(order) < 0.6 * padding(range(80))
