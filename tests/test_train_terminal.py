"""What a person sees while a student trains: the layout, what it saves, one bar, margins and accuracy by category."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from sp2dpo.train import PairwiseDPOConfig, PairwiseDPOTrainer
from sp2dpo.train.terminal import by_category, layout_line, overall, quiet, watch
from students import make_student, make_tokenizer

LOGS = {
    "loss": 0.61234,
    "rewards/accuracies": 0.71,
    "rewards/margins": -0.0004,
    "grad_norm": 1.2,
    "learning_rate": 3e-6,
    "rewards/margins/Style": 0.1,
    "rewards/accuracies/Style": 0.5,
    "rewards/margins/Safety": -0.8,
    "rewards/accuracies/Safety": 0.25,
    "saturation/Style": 0.04,
}


class Terminal(io.StringIO):
    """Says of itself that it is a terminal; rich takes its width from the environment."""

    def isatty(self) -> bool:
        return True


def trainer_of(folder: Path, **more: Any) -> PairwiseDPOTrainer:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is the river number {n}?"}],
            "chosen": [{"role": "assistant", "content": "The answer is long. " * (n + 1)}],
            "rejected": [{"role": "assistant", "content": "I am not able to help."}],
            "beta": 0.1,
            "row": n,
            "category": ("Style", "Safety")[n % 2],
        }
        for n in range(4)
    ]
    own = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-3} | more
    still = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "dataloader_pin_memory": False}
    exact = {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "reference_cache": "off"}
    with quiet():
        return PairwiseDPOTrainer(
            make_student("llama", folder / "student"),
            args=PairwiseDPOConfig(output_dir=str(folder), **still, **exact, **own),
            train_dataset=Dataset.from_list(rows),
            processing_class=make_tokenizer(),
        )


def test_a_log_line_is_loss_accuracy_and_margin_then_each_category_in_the_order_of_priority() -> None:
    assert overall(LOGS) == "loss 0.612 accuracy 0.71 margin 0.000 grad norm 1.20"
    assert by_category(LOGS) == "Safety 0.25 −0.80 · Style 0.50 +0.10"
    assert by_category({"loss": 0.5}) == ""


def test_the_shared_layout_tells_the_tokens_that_it_saves(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    rows = trainer.train_dataset
    once = sum(len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    twice = once + sum(len(row["prompt_ids"]) for row in rows)
    said = f"{once:,} tokens an epoch; {twice:,} with each prompt twice, and padding besides"
    assert layout_line(trainer) == f"shared layout: {said}"


def test_the_tokens_that_max_length_cuts_do_not_count(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, max_length=40)
    whole = [(len(r["prompt_ids"]), len(r["chosen_ids"]), len(r["rejected_ids"])) for r in trainer.train_dataset]
    once = sum(p + min(c, 40 - p) + min(r, 40 - p) for p, c, r in whole)
    assert once < sum(map(sum, whole))
    assert f" {once:,} tokens an epoch" in layout_line(trainer)


def test_the_padded_layout_tells_why(tmp_path: Path) -> None:
    assert layout_line(trainer_of(tmp_path, layout="padded")) == "padded layout: padded was asked for"


def test_without_a_terminal_there_are_two_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = trainer_of(tmp_path)
    capsys.readouterr()
    with quiet(), watch(trainer, "train sp2dpo"):
        trainer.train()
    seen = capsys.readouterr()
    head, last = seen.err.splitlines()
    assert head.startswith("          4 pairs, 2 steps; shared layout: ")
    number = r"−?\d+\.\d+"
    told = rf"loss {number} accuracy {number} margin {number} grad norm {number}"
    assert re.fullmatch(rf"train sp2dpo: {told} \| Safety {number} [+−]?{number} · Style {number} [+−]?{number}", last)
    assert seen.out == ""


def test_on_a_terminal_the_last_numbers_stand_below_the_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(tmp_path)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    for name, value in {"COLUMNS": "80", "LINES": "24", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    with quiet(), watch(trainer, "train sp2dpo"):
        trainer.train()
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue().rpartition("\x1b[2K")[2])
    bar, *notes = [line.rstrip() for line in drawn.splitlines() if line.strip()]
    assert re.match(r"train sp2dpo .* 2/2 0:00:\d\d eta 0:00:00$", bar)
    assert re.match(r"loss .* \| Safety .* · Style ", " ".join(notes))
    assert all(len(line) <= 80 for line in [bar, *notes])


def test_a_training_that_fails_gives_the_terminal_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(tmp_path)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(trainer, "training_step", lambda *_: 1 / 0)
    with quiet(), pytest.raises(ZeroDivisionError), watch(trainer, "train sp2dpo"):
        trainer.train()
    hidden, shown = (terminal.getvalue().rfind(f"\x1b[?25{way}") for way in "lh")
    assert -1 < hidden < shown


def test_other_processes_than_the_main_one_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = trainer_of(tmp_path)
    trainer.state.is_world_process_zero = False
    watching = watch(trainer, "train sp2dpo")
    capsys.readouterr()
    watching.on_train_begin(trainer.args, trainer.state, trainer.control)
    watching.on_log(trainer.args, trainer.state, trainer.control, logs=LOGS)
    watching.on_train_end(trainer.args, trainer.state, trainer.control)
    assert capsys.readouterr() == ("", "")
