"""A loss or gradient that would spoil the weights stops the training before it does, with what one needs to know."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from sp2dpo.errors import TrainingError
from sp2dpo.train import PairwiseDPOConfig, PairwiseDPOTrainer
from sp2dpo.train.guard import EXPLODED, check_gradient, check_loss
from students import make_student

LN2 = math.log(2)


def describe(row: int) -> str:
    return f"pair p{row} (β 0.1)"


def check(losses: list[float], at_reference: float = LN2) -> None:
    rows = torch.arange(10, 10 + len(losses))
    check_loss(torch.tensor(losses), torch.full((len(losses),), at_reference), rows, step=7, describe=describe)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_names_the_step_and_its_pairs(broken: float) -> None:
    with pytest.raises(TrainingError, match=r"step 7: the loss of 2 of 4 pairs is not a finite number") as caught:
        check([0.7, broken, 0.5, broken])
    assert "pair p11 (β 0.1), pair p13 (β 0.1); look at learning_rate" in str(caught.value)
    assert "p10" not in str(caught.value)
    assert "last checkpoint" not in str(caught.value)  # there may be none
    assert caught.value.exit_code == 1


def test_an_exploded_loss_names_its_worst_pairs_first() -> None:
    with pytest.raises(TrainingError, match=r"the loss is 1\.684e\+04, 24,288 times that of the untrained") as caught:
        check([1.0, 1e3, 1e5, 3.0, 2.0, 4.0])
    text = str(caught.value)
    assert "p12 (β 0.1), pair p11 (β 0.1), pair p15 (β 0.1), pair p13 (β 0.1), pair p14 (β 0.1) and 1 more" in text


def test_a_loss_explodes_at_a_thousand_times_that_of_the_untrained_student() -> None:
    check([0.999 * EXPLODED * LN2] * 4)
    with pytest.raises(TrainingError):
        check([1.001 * EXPLODED * LN2] * 4)
    check([0.0, 0.0], at_reference=0.0)


@pytest.mark.parametrize("norm", [torch.tensor(math.nan), math.inf])
def test_a_gradient_that_is_no_number_names_the_step_and_up_to_five_pairs(norm: Any) -> None:
    with pytest.raises(TrainingError, match=r"step 3: the norm of the gradient is (nan|inf): pair p0 .* and 4 more"):
        check_gradient(norm, range(9), step=3, describe=describe)


@pytest.mark.parametrize("norm", [None, 0.0, torch.tensor(1e30)])
def test_a_gradient_that_is_a_number_passes(norm: Any) -> None:
    check_gradient(norm, [1], step=3, describe=describe)


@pytest.fixture
def trainer(tmp_path: Path) -> PairwiseDPOTrainer:
    """Three steps of two pairs; pair ids `a` to `f`."""
    folder = tmp_path / "student"
    model = make_student("llama", folder, hidden=32)
    data = [
        {"prompt": "What is it?", "chosen": "yes " * n, "rejected": "no", "beta": 0.1 * n, "row": n, "pair_id": pair}
        for n, pair in enumerate("abcdef", start=1)
    ]
    return PairwiseDPOTrainer(
        model,
        args=PairwiseDPOConfig(
            output_dir=str(tmp_path / "run"),
            per_device_train_batch_size=2,
            num_train_epochs=1,
            bf16=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            train_sampling_strategy="sequential",
            layout="padded",
        ),
        train_dataset=Dataset.from_list(data),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )


def test_training_stops_before_the_weights_are_updated_with_a_broken_loss(trainer: PairwiseDPOTrainer) -> None:
    plain = trainer.create_optimizer

    def spoil(self: Any, args: Any, kwargs: Any) -> None:
        with torch.no_grad():
            trainer.model.model.norm.weight.fill_(math.nan)
        steps.append(1)

    def create_optimizer(*args: Any) -> Any:
        optimizer = plain(*args)
        optimizer.register_step_post_hook(spoil)
        return optimizer

    steps: list[int] = []
    trainer.create_optimizer = create_optimizer
    with pytest.raises(TrainingError, match=r"step 2: the loss of 2 of 2 pairs .* pair c \(β 0\.3, margin nan\)"):
        trainer.train()
    assert steps == [1]


def test_training_stops_before_the_weights_are_updated_with_a_broken_gradient(trainer: PairwiseDPOTrainer) -> None:
    weight = trainer.model.model.embed_tokens.weight
    before = weight.detach().clone()
    weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainingError, match=r"step 1: the norm of the gradient is nan: pair a, pair b; look at"):
        trainer.train()
    assert torch.equal(trainer.model.model.embed_tokens.weight, before)
