"""Rows of similar length come together, each once in an epoch, in an order made of the seed and the epoch alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, RandomSampler
from transformers import AutoTokenizer

from sp2dpo.train import PairwiseDPOConfig, PairwiseDPOTrainer
from sp2dpo.train.sampling import EpochOrder, LengthGrouped
from students import make_student

EPOCHS = (0, 1, 2)


@given(
    lengths=st.lists(st.integers(1, 2048), min_size=1, max_size=60),
    batch=st.integers(1, 8),
    seed=st.integers(0, 2**31),
)
def test_every_row_comes_once_in_each_epoch(lengths: list[int], batch: int, seed: int) -> None:
    sampler = LengthGrouped(lengths, batch, seed)
    assert len(sampler) == len(lengths)
    for epoch in EPOCHS:
        sampler.set_epoch(epoch)
        assert sorted(sampler) == list(range(len(lengths)))


def test_an_order_depends_on_the_seed_and_the_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        torch.manual_seed(len(orders))  # what dropout has drawn before does not matter
        sampler = LengthGrouped(range(1, 60), 2, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    orders: list[list[int]] = []
    orders += [order(0, 0), order(0, 1), order(1, 0)]
    assert order(0, 1) == orders[1]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def sharded(sampler: Any, rows: int, process: int) -> Any:
    """The loader of one of two processes, as accelerate makes it."""
    loader = DataLoader(list(range(rows)), batch_size=2, sampler=sampler)
    return prepare_data_loader(loader, num_processes=2, process_index=process, use_seedable_sampler=True)


def batches(process: int, epoch: int, grouped: bool, skip: int = 0) -> list[list[int]]:
    """What a process sees in an epoch; with `skip`, as transformers goes on with it in a new process."""
    rows = 16
    torch.manual_seed(7)
    sampler = LengthGrouped(range(1, rows + 1), 4, seed=7) if grouped else RandomSampler(range(rows))
    loader = sharded(sampler, rows, process)
    state = SimpleNamespace(epoch=epoch + skip / 4)
    EpochOrder().on_epoch_begin(None, state, None, train_dataloader=loader)
    here = skip_first_batches(loader, skip) if skip else loader
    here.set_epoch(epoch)
    return [batch.tolist() for batch in here]


@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "random"])
def test_processes_share_an_epoch_and_go_on_with_it_where_they_stopped(grouped: bool) -> None:
    for epoch in EPOCHS:
        both = [batches(process, epoch, grouped) for process in (0, 1)]
        assert sorted(row for seen in both for batch in seen for row in batch) == list(range(16))
        for process in (0, 1):
            assert batches(process, epoch, grouped, skip=2) == both[process][2:]
    assert batches(0, 0, grouped) != batches(0, 1, grouped)


def test_the_trainer_groups_by_length_and_pads_less(tmp_path: Path) -> None:
    """TRL 1.16 ends with a ValueError here: its sampler is made after the column of lengths was dropped."""
    folder = tmp_path / "student"
    model = make_student("llama", folder, hidden=32)
    lengths = [1 + (37 * n) % 64 for n in range(64)]
    data = [
        {"prompt": "What is it?", "chosen": "yes " * length, "rejected": "no " * length, "beta": 0.1, "row": n}
        for n, length in enumerate(lengths)
    ]

    def padding(strategy: str) -> float:
        trainer = PairwiseDPOTrainer(
            model,
            args=PairwiseDPOConfig(
                output_dir=str(tmp_path),
                train_sampling_strategy=strategy,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                max_length=512,
                layout="padded",
                bf16=False,
                use_cpu=True,
                report_to="none",
                dataloader_pin_memory=False,
            ),
            train_dataset=Dataset.from_list(data),
            processing_class=AutoTokenizer.from_pretrained(folder),
        )
        seen = list(trainer.get_train_dataloader())
        assert sorted(row for batch in seen for row in batch["row"].tolist()) == list(range(64))
        masks = [batch["attention_mask"] for batch in seen]
        return sum(mask.numel() for mask in masks) / sum(int(mask.sum()) for mask in masks)

    grouped, random = padding("group_by_length"), padding("random")
    assert grouped < 0.85 * random


def test_a_length_is_that_of_the_pair_as_it_is_cut(tmp_path: Path) -> None:
    folder = tmp_path / "student"
    model = make_student("llama", folder, hidden=32)
    data = [{"prompt": "What is it?", "chosen": "yes " * 50, "rejected": "no " * n, "beta": 0.1} for n in (1, 50)]
    trainer = PairwiseDPOTrainer(
        model,
        args=PairwiseDPOConfig(
            output_dir=str(tmp_path), max_length=40, bf16=False, use_cpu=True, report_to="none", layout="padded"
        ),
        train_dataset=Dataset.from_list(data),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    prompt = len(trainer.train_dataset[0]["prompt_ids"])
    cut = prompt + batch["completion_mask"].sum(1).view(2, 2).sum(0)
    assert trainer.train_dataset["length"] == cut.tolist()
