"""An interrupted training goes on as if it had not been: same batches, same weights to the last bit, same margins."""

from __future__ import annotations

import os
import pkgutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from sp2dpo.train import PairwiseDPOConfig, PairwiseDPOTrainer
from sp2dpo.train.interrupt import interruptible, last_complete
from students import make_student

ROWS = 10
STEPS = 6
"""Two epochs of 5 batches of 2 pairs, accumulated by 2: the last step of an epoch has one batch."""

FULL = {"layout": "padded", "disable_dropout": False}
ADAPTED = {
    "layout": "shared",
    "disable_dropout": False,
    "train_sampling_strategy": "group_by_length",
    "precompute_ref_log_probs": True,
}
LORA = {"r": 4, "lora_dropout": 0.2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("student")
    make_student("llama", folder, hidden=32)
    return str(folder)


def data() -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"What is {n} and one?"}],
                "chosen": [{"role": "assistant", "content": f"It is {n + 1}." + " Count on." * (7 * n % ROWS)}],
                "rejected": [{"role": "assistant", "content": "I am not able to help."}],
                "beta": 0.05 + 0.02 * n,
                "row": n,
            }
            for n in range(ROWS)
        ]
    )


def trainer_of(student: str, folder: Path, lora: bool, **more: Any) -> PairwiseDPOTrainer:
    common = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 2}
    common |= {"report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "save_strategy": "no"}
    common |= {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "max_length": 512}
    common |= {"learning_rate": 1e-3, "lr_scheduler_type": "cosine", "warmup_steps": 2, "seed": 3}
    common |= {"reference_cache": str(folder.parent / "cache")}
    evaluated = data() if "eval_strategy" in more else None
    return PairwiseDPOTrainer(
        AutoModelForCausalLM.from_pretrained(student, attention_dropout=0.0 if lora else 0.2),
        args=PairwiseDPOConfig(output_dir=str(folder), **common | more),
        train_dataset=data(),
        eval_dataset=evaluated,
        processing_class=AutoTokenizer.from_pretrained(student),
        peft_config=LoraConfig(**LORA) if lora else None,
    )


Make = Callable[..., PairwiseDPOTrainer]


@pytest.fixture
def make(student: str, tmp_path: Path) -> Make:
    def trainer(name: str = "run", lora: bool = False, **more: Any) -> PairwiseDPOTrainer:
        return trainer_of(student, tmp_path / name, lora, **FULL | more)

    return trainer


class At(TrainerCallback):
    """Does something once, in the middle of a step: between two batches of its accumulation, or before its first."""

    def __init__(self, step: int, act: Callable[[], Any], event: str = "on_step_begin") -> None:
        self._step = step
        self._act = act
        setattr(self, event, self._once)

    def _once(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == self._step - 1:
            self._step = 0
            self._act()


def press(number: int = signal.SIGINT) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def go(trainer: PairwiseDPOTrainer, *callbacks: TrainerCallback) -> bool:
    """Train, from the last checkpoint if there is one. Returns whether it came to its end."""
    for callback in callbacks:
        trainer.add_callback(callback)
    try:
        with interruptible(trainer):
            trainer.train(resume_from_checkpoint=last_complete(Path(trainer.args.output_dir)))
    except KeyboardInterrupt:
        return False
    return True


def weights(trainer: PairwiseDPOTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def assert_same(one: PairwiseDPOTrainer, other: PairwiseDPOTrainer) -> None:
    assert one.state.global_step == other.state.global_step
    assert one.margins == other.margins
    theirs = weights(other)
    assert [name for name, value in weights(one).items() if not torch.equal(value, theirs[name])] == []


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_interrupted_at_every_step_it_ends_with_the_weights_of_an_uninterrupted_run(make: Make, lora: bool) -> None:
    kind = ADAPTED if lora else FULL
    whole = make("whole", lora, **kind)
    assert go(whole)
    assert whole.state.global_step == STEPS
    for step in range(1, STEPS):
        event = "on_substep_end" if step % 3 else "on_step_begin"  # the third step of an epoch has one batch
        assert not go(make(lora=lora, **kind), At(step, press(), event))
    last = make(lora=lora, **kind)
    assert go(last, At(STEPS, press()))  # in the last step: nothing is left to go on with
    assert_same(last, whole)
    logged = [entry["loss"] for entry in last.state.log_history if "loss" in entry]
    assert sum(logged) / STEPS == pytest.approx(whole.state.log_history[-1]["train_loss"])


def test_dropout_and_order_make_a_difference_that_the_equality_would_show(make: Make) -> None:
    runs = [make(f"run{n}", disable_dropout=n == 1, seed=3 + n // 2) for n in range(3)]
    assert all(go(run) for run in runs)
    for other in runs[1:]:
        with pytest.raises(AssertionError):
            assert_same(runs[0], other)


def test_a_training_that_crashes_goes_on_from_its_last_checkpoint(make: Make) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    whole = make("whole", **saving)
    go(whole)

    def crash() -> None:
        raise RuntimeError("out of memory")

    for step in (2, 4, 6):
        with pytest.raises(RuntimeError, match="out of memory"):
            go(make(**saving), At(step, crash, "on_step_begin"))
    last = make(**saving)
    assert go(last)
    assert_same(last, whole)
    table = pq.read_table(Path(last.args.output_dir) / f"checkpoint-{STEPS}" / "margins.parquet")
    assert list(zip(*table.to_pydict().values(), strict=True)) == whole.margins


def test_a_training_whose_last_step_is_saved_takes_no_step_more(make: Make) -> None:
    """It ends within an epoch, and was killed after its last checkpoint."""
    whole = make(max_steps=4, save_strategy="steps", save_steps=2)
    go(whole)
    again = make(max_steps=4, save_strategy="steps", save_steps=2)
    assert go(again)
    assert_same(again, whole)


class Killed(BaseException):
    """Stands for SIGKILL in the middle of a checkpoint: no code of the trainer's catches it."""


STAGES = {
    "model": "transformers.modeling_utils.PreTrainedModel.save_pretrained",
    "optimizer": "transformers.trainer.Trainer._save_optimizer_and_scheduler",
    "random numbers": "transformers.trainer.Trainer._save_rng_state",
    "state": "transformers.trainer.TrainerState.save_to_json",
    "margins": "sp2dpo.train.trainer.write_table",
    "removal of older ones": "shutil.rmtree",
}


@pytest.mark.parametrize("stage", STAGES)
def test_killed_while_a_checkpoint_is_written_it_goes_on_from_the_one_before(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_steps": 3}
    whole = make("whole", **saving)
    go(whole)
    trainer = make(**saving)

    def kill(*args: Any, **more: Any) -> None:
        if trainer.state.global_step == 2:
            raise Killed
        plain(*args, **more)

    plain = pkgutil.resolve_name(STAGES[stage])
    monkeypatch.setattr(STAGES[stage], kill)
    with pytest.raises(Killed):
        go(trainer)
    monkeypatch.setattr(STAGES[stage], plain)
    complete = last_complete(tmp_path / "run")
    assert complete is not None
    assert complete.name == ("checkpoint-2" if stage == "removal of older ones" else "checkpoint-1")
    last = make(**saving)
    assert go(last)
    assert_same(last, whole)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]


def test_a_checkpoint_that_is_not_whole_is_removed_and_never_chosen(tmp_path: Path) -> None:
    assert last_complete(tmp_path / "nowhere") is None
    for step, names in {
        2: ["rng_state.pth", "margins.parquet"],
        10: ["rng_state.pth"],
        12: ["margins.parquet"],
    }.items():
        (tmp_path / f"checkpoint-{step}").mkdir()
        for name in names:
            (tmp_path / f"checkpoint-{step}" / name).touch()
    (tmp_path / "checkpoint-best").mkdir()
    assert last_complete(tmp_path) == tmp_path / "checkpoint-2"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"checkpoint-2", "checkpoint-12", "checkpoint-best"}, "one with weights only stays"


def test_sigterm_is_an_interrupt_too_and_handlers_are_put_back(make: Make) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert not go(make(), At(2, press(signal.SIGTERM)))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_interrupt_ends_at_once(make: Make, tmp_path: Path) -> None:
    trainer = make()
    assert not go(trainer, At(2, press()), At(2, press(), "on_substep_end"))
    assert trainer.state.global_step == 1
    assert last_complete(tmp_path / "run") is None


def test_a_signal_in_the_last_step_lets_the_training_end_and_is_told(make: Make, tmp_path: Path) -> None:
    trainer = make(max_steps=2)
    trainer.add_callback(At(2, press()))
    with interruptible(trainer) as interrupt:
        trainer.train()
    assert interrupt.asked
    assert trainer.state.global_step == 2


BEST = {
    "save_strategy": "epoch",
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "save_total_limit": 1,
}


@pytest.mark.parametrize("saving", [BEST, {"save_strategy": "no"}], ids=["best", "none"])
def test_an_interrupt_within_an_epoch_does_not_do_what_its_end_would(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saving: dict[str, Any]
) -> None:
    epoch_wise = {"eval_strategy": "epoch", "logging_strategy": "epoch", **saving}
    whole = make("whole", **epoch_wise)
    go(whole)
    plain, saves = PairwiseDPOTrainer._save_checkpoint, []
    monkeypatch.setattr(PairwiseDPOTrainer, "_save_checkpoint", lambda *args: (saves.append(step), plain(*args)))
    for step in (1, 3, 4):
        stopped = make(**epoch_wise)
        assert not go(stopped, At(step, press()))
        evaluated = [entry["step"] for entry in stopped.state.log_history if "eval_loss" in entry]
        assert evaluated == [3] * (step >= 3)
        assert last_complete(tmp_path / "run") == tmp_path / f"run/checkpoint-{step}"
    assert saves == [1, 3, 3, 4], "after the third step, the last of its epoch, also with what its end has changed"
    last = make(**epoch_wise)
    assert go(last)
    assert_same(last, whole)


SCRIPT = """
import os, signal, sys
from pathlib import Path
import test_resume
from sp2dpo.train.interrupt import interruptible, last_complete

student, folder, stop, step = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
saving = {"save_strategy": "steps", "save_steps": 1} if stop == "SIGKILL" else {"dataloader_num_workers": 1}
trainer = test_resume.trainer_of(student, folder, True, **test_resume.ADAPTED | saving)

def tell():
    print("here", flush=True)
    sys.stdin.readline()

trainer.add_callback(test_resume.At(step, tell, "on_substep_end"))
with interruptible(trainer):
    trainer.train(resume_from_checkpoint=last_complete(folder))
"""


@pytest.mark.parametrize("stop", ["SIGINT", "SIGKILL"])
def test_a_process_that_is_stopped_goes_on_in_another(make: Make, student: str, tmp_path: Path, stop: str) -> None:
    command = [sys.executable, "-c", SCRIPT, student, str(tmp_path / "run"), stop, "5"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, env=env, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        os.killpg(process.pid, signal.Signals[stop])  # as a terminal does: the workers of the loader have it too
        _, err = process.communicate("go on\n" if stop == "SIGINT" else None, timeout=120)
    assert process.returncode == -signal.Signals[stop]
    assert err.count("this step ends and a checkpoint is saved") == (stop == "SIGINT")
    kept = last_complete(tmp_path / "run")
    assert kept is not None
    assert kept.name == ("checkpoint-5" if stop == "SIGINT" else "checkpoint-4")
    whole = make("whole", True, **ADAPTED)
    assert go(whole)
    last = make("run", True, **ADAPTED)
    assert go(last)
    assert_same(last, whole)


TWO = """
import os, sys
from pathlib import Path
import torch.distributed
import test_resume as t

student, root, second = sys.argv[1], Path(sys.argv[2]), os.environ["RANK"] == "1"

def make(name):
    return t.trainer_of(student, root / name, True, **t.ADAPTED | {"per_device_train_batch_size": 1})

whole = make("whole")
assert t.go(whole)
stopped = make("run")
assert not t.go(stopped, *[t.At(5, t.press())] * second)
assert stopped.state.global_step == 5
last = make("run")
assert t.go(last)
t.assert_same(last, whole)
assert sorted(row for _, row, _ in last.margins) == sorted([*range(t.ROWS)] * 2)
torch.distributed.destroy_process_group()
"""


def test_a_signal_to_one_of_two_processes_stops_both_and_both_go_on(student: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    env |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", TWO, student, str(tmp_path)]
    processes = [
        subprocess.Popen(command, env=env | {"RANK": n, "LOCAL_RANK": n}, stderr=subprocess.PIPE, text=True)
        for n in ("0", "1")
    ]
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
