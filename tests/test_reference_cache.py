"""Reference log-probs: equal to TRL's own, computed once for a model and a pair, never read from a wrong file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from sp2dpo.errors import DataError, ProcessError
from sp2dpo.train import PairwiseDPOConfig, PairwiseDPOTrainer
from sp2dpo.train import reference as reference_module
from sp2dpo.train.reference import ReferenceCache, cache_folder
from sp2dpo.train.reference_file import SCHEMA, ReferenceFile
from sp2dpo.train.reference_key import pair_keys
from students import make_student

COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("student")
    make_student("llama", folder)
    return str(folder)


def pairs(numbers: Any = range(8)) -> list[dict[str, Any]]:
    """Pair n has a response that is longer the larger n is."""
    return [
        {
            "prompt": [{"role": "user", "content": f"What is {n} and one?"}],
            "chosen": [{"role": "assistant", "content": f"It is {n + 1}." + " Count on from there." * n}],
            "rejected": [{"role": "assistant", "content": "I am not able to help."}],
        }
        for n in numbers
    ]


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    quiet = {"report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "save_strategy": "no"}
    exact = {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "max_length": 512}
    size = {"per_device_train_batch_size": 4, "precompute_ref_log_probs": True}
    return {"output_dir": str(folder), **quiet, **exact, **size, **more}


class Counted(PairwiseDPOTrainer):
    """Counts the pairs that a reference pass sees."""

    def __init__(self, *args: Any, **more: Any) -> None:
        self.passed = 0
        super().__init__(*args, **more)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        self.passed += len(inputs["input_ids"]) // 2
        return super().compute_ref_log_probs(model, inputs)


Make = Callable[..., Counted]


@pytest.fixture(autouse=True)
def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has been said yet."""
    monkeypatch.setattr(reference_module, "_said", set())


@pytest.fixture
def make(student: str, tmp_path: Path) -> Make:
    """Makes a trainer, which computes the reference of its data as it is made."""

    def trainer(
        rows: Any = None, *, model: Any = None, lora: Any = None, tokenizer: Any = None, **more: Any
    ) -> Counted:
        rows = pairs() if rows is None else rows
        data = Dataset.from_list([{"beta": 0.1} | row for row in rows])
        return Counted(
            AutoModelForCausalLM.from_pretrained(student) if model is None else model,
            args=PairwiseDPOConfig(**settings(tmp_path / "out", **{"reference_cache": str(tmp_path / "cache")} | more)),
            train_dataset=data,
            processing_class=tokenizer or AutoTokenizer.from_pretrained(student),
            peft_config=lora,
        )

    return trainer


def reference(trainer: Any) -> list[list[float]]:
    return [list(trainer.train_dataset[name]) for name in COLUMNS]


def again(trainer: Counted, rows: Any = slice(None)) -> tuple[int, list[list[float]]]:
    """Looks the trainer's data, or some rows of it, up again: how many pairs were computed, and the numbers."""
    data = trainer.train_dataset.remove_columns(list(COLUMNS))
    before = trainer.passed
    found = ReferenceCache(trainer.args.reference_cache).log_probs(trainer, Dataset.from_dict(data[rows]), "train", 4)
    return trainer.passed - before, [list(found[name]) for name in COLUMNS]


def the_file(tmp_path: Path) -> Path:
    (path,) = (tmp_path / "cache").glob("*.parquet")
    return path


def test_the_numbers_are_those_that_trl_computes_itself(make: Make, student: str, tmp_path: Path) -> None:
    theirs = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(student),
        args=DPOConfig(**settings(tmp_path / "trl")),
        train_dataset=Dataset.from_list(pairs()),
        processing_class=AutoTokenizer.from_pretrained(student),
    )
    first, second = make(), make()
    np.testing.assert_allclose(reference(first), reference(theirs), rtol=1e-5)
    assert reference(second) == reference(first)
    assert (first.passed, second.passed) == (8, 0)


def test_another_schedule_order_batch_or_layout_costs_no_pass(make: Make) -> None:
    first = make()
    turned = [row | {"beta": 0.3, "weight": 2.0, "row": n} for n, row in enumerate(reversed(pairs()))]
    for layout in ("padded", "shared"):
        again = make(turned, per_device_train_batch_size=3, layout=layout, learning_rate=1.0)
        assert again.passed == 0
        assert reference(again) == [side[::-1] for side in reference(first)]


def test_only_pairs_that_are_new_are_computed_and_equal_ones_once(make: Make) -> None:
    first = make(pairs([0, 5, 2, 5, 6, 5]))
    assert first.passed == 4
    chosen, rejected = reference(first)
    assert chosen[1] == chosen[3] == chosen[5] != chosen[4]
    assert rejected[1] == rejected[3] == rejected[5]
    second = make(pairs([6, 1, 2, 3]))
    assert second.passed == 2
    assert [reference(second)[0][0], reference(second)[0][2]] == [chosen[4], chosen[2]]


def test_a_shorter_max_length_computes_only_the_pairs_that_it_cuts(make: Make) -> None:
    trainer = make()
    lengths = [len(p) + max(len(c), len(r)) for p, c, r in _ids(trainer)]
    trainer.data_collator.max_length = sorted(lengths)[4]
    assert again(trainer)[0] == 3
    assert again(trainer)[0] == 0
    trainer.data_collator.truncation_mode = "keep_end"
    assert again(trainer)[0] == 3


def _ids(trainer: Any) -> list[tuple[list[int], list[int], list[int]]]:
    return [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in trainer.train_dataset]


def test_another_chat_template_is_another_pass(make: Make, student: str) -> None:
    make()
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|{{ m['role'] }}|>", "<|{{ m['role'] }}|> ")
    assert make(tokenizer=tokenizer).passed == 8


def test_one_bit_of_the_weights_changed_in_memory_is_another_reference(make: Make) -> None:
    trainer = make()
    weight = trainer.model.model.layers[1].mlp.up_proj.weight
    weight.data.view(torch.int32)[3, 3] ^= 1  # behind autograd's back: no version counter moves
    assert again(trainer)[0] == 8
    weight.data.view(torch.int32)[3, 3] ^= 1
    assert again(trainer) == (0, reference(trainer))


def test_a_configuration_that_computes_otherwise_is_another_reference(make: Make) -> None:
    trainer = make()
    trainer.model.config.use_cache = not trainer.model.config.use_cache
    assert again(trainer)[0] == 0
    trainer.model.config.rms_norm_eps = 1e-3
    assert again(trainer)[0] == 8


def test_another_precision_or_ld_alpha_is_another_reference(make: Make) -> None:
    trainer = make()
    assert make(bf16=True).passed == 8
    trainer.ld_alpha = 0.5
    half = again(trainer)
    assert half[0] == 8
    trainer.ld_alpha = 0.25
    assert again(trainer)[0] == 8
    trainer.ld_alpha = 0.5
    assert again(trainer) == (0, half[1])


def test_lora_and_full_fine_tuning_share_the_reference_of_their_student(make: Make) -> None:
    full = make()
    adapted = make(lora=LoraConfig(**LORA), seed=2)
    assert adapted.passed == 0
    assert reference(adapted) == reference(full)


def test_modules_that_peft_trains_whole_are_not_the_reference(make: Make) -> None:
    make()
    lora = LoraConfig(**LORA, modules_to_save=["embed_tokens"])
    assert make(lora=lora).passed == 0


def test_an_adapter_that_is_trained_on_is_part_of_the_reference(make: Make, student: str, tmp_path: Path) -> None:
    """TRL keeps a copy of it as the reference; its weights are in the key, and the numbers are those of the adapter."""
    full = make()
    torch.manual_seed(0)
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(student), LoraConfig(**LORA, init_lora_weights=False))
    peft.save_pretrained(tmp_path / "adapter")

    def retrained() -> Any:
        return PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(student), tmp_path / "adapter", is_trainable=True
        )

    first = make(model=retrained())
    assert first.passed == 8
    assert not np.allclose(reference(first), reference(full), rtol=1e-4)
    assert make(model=retrained()).passed == 0
    weights = dict(first.model.named_parameters())
    place = next(name for name in weights if "lora_B" in name and "default" in name)
    weights[place].data += 1.0
    assert again(first)[0] == 0
    weights[place.replace("default", "ref")].data += 1.0
    assert again(first)[0] == 8


def test_a_model_left_in_training_mode_has_a_reference_without_dropout(make: Make, student: str) -> None:
    calm = make(reference_cache="off")
    model = AutoModelForCausalLM.from_pretrained(student, attention_dropout=0.5).train()
    noisy = make(model=model, disable_dropout=False, reference_cache="off", layout="padded")
    np.testing.assert_allclose(reference(noisy), reference(calm), rtol=1e-5)
    assert model.training


def test_a_pass_leaves_the_random_numbers_of_training_as_they_are(make: Make) -> None:
    """Otherwise dropout in a first run would differ from that in the next, which finds its reference in the cache."""
    trainer = make()
    states = []
    for cache in (trainer.args.reference_cache, "off"):
        trainer.args.reference_cache = cache
        torch.manual_seed(1)
        again(trainer)
        states.append(torch.random.get_rng_state())
    assert torch.equal(*states)


def test_a_dataset_given_to_evaluate_is_looked_up_too(make: Make) -> None:
    trainer = make()
    assert trainer.passed == 8
    trainer.evaluate(Dataset.from_list([row | {"beta": 0.2} for row in pairs(range(2, 10))]))
    assert trainer.passed == 10


def test_the_file_is_plain_parquet_that_says_its_model(make: Make, tmp_path: Path) -> None:
    trainer = make()
    table = pq.read_table(the_file(tmp_path))
    assert table.schema.names == ["pair", "chosen_logp", "rejected_logp", "chosen_tokens", "rejected_tokens"]
    assert sorted(table["chosen_logp"].to_pylist()) == sorted(reference(trainer)[0])
    assert sorted(table["chosen_tokens"].to_pylist()) == sorted(len(c) for _, c, _ in _ids(trainer))
    assert b'"class":"LlamaForCausalLM"' in table.schema.metadata[b"sp2dpo.reference"]


def _torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[60] ^= 1  # in the first page: the hashes of the pairs
    path.write_bytes(bytes(data))


def _of_another_model(path: Path) -> None:
    other = ReferenceFile(path.parent, {"weights": "others"})
    other.add(pq.read_table(path).cast(SCHEMA))
    other.path.replace(path)


def _not_finite(path: Path) -> None:
    table = pq.read_table(path)
    column = pa.array([float("nan")] * table.num_rows, pa.float32())
    pq.write_table(table.set_column(1, SCHEMA.field("chosen_logp"), column), path)


@pytest.mark.parametrize(
    "damage", [_torn, _flipped, _of_another_model, _not_finite, lambda path: path.write_bytes(b"")]
)
def test_a_file_that_cannot_be_trusted_is_set_aside_and_said(
    make: Make, tmp_path: Path, damage: Callable[[Path], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make()
    damage(the_file(tmp_path))
    assert again(trainer) == (8, reference(trainer))
    assert list((tmp_path / "cache").glob("*.damaged-1"))
    assert "is damaged" in capsys.readouterr().err
    assert again(trainer)[0] == 0


def _said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Lines on stderr about the reference."""
    return [line for line in capsys.readouterr().err.splitlines() if "reference log-probs" in line]


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch, make: Make) -> Callable[..., None]:
    """Makes a trainer whose reference pass ends after some pairs."""

    def make_and_kill(rows: Any, after: int, **more: Any) -> None:
        plain = Counted.compute_ref_log_probs

        def stops(self: Counted, model: Any, inputs: dict[str, Any]) -> Any:
            if self.passed == after:
                raise KeyboardInterrupt
            return plain(self, model, inputs)

        with monkeypatch.context() as patch:
            patch.setattr(Counted, "compute_ref_log_probs", stops)
            with pytest.raises(KeyboardInterrupt):
                make(rows, **more)

    return make_and_kill


def test_a_pass_that_is_interrupted_keeps_what_it_computed(
    make: Make, killed: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    killed(pairs(), after=4, per_device_train_batch_size=2)
    assert _said(capsys) == ["          reference log-probs: 8 pairs to compute"]
    assert make().passed == 4
    assert _said(capsys) == ["          reference log-probs: 4 of 8 pairs to compute"]


def test_a_pass_that_was_killed_ends_with_the_bits_of_one_that_was_not(make: Make, killed: Callable[..., None]) -> None:
    """Also where the rows come in another order, and several have one length."""
    rows = pairs([3, 5, 4, 2, 7, 6, 1, 8])
    whole = make(rows, per_device_train_batch_size=3, reference_cache="off")
    killed(rows, after=3, per_device_train_batch_size=3)
    rest = make(rows[::-1], per_device_train_batch_size=3)
    assert rest.passed == 5
    assert reference(rest) == [side[::-1] for side in reference(whole)]


TWO = """
import json, sys
from pathlib import Path
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from sp2dpo.train import PairwiseDPOConfig
from test_reference_cache import Counted, pairs, reference, settings

folder, student = Path(sys.argv[1]), sys.argv[2]
seen = []

class Stops(Counted):
    def compute_ref_log_probs(self, model, inputs):
        if len(seen) == self.args.seed:
            raise KeyboardInterrupt
        seen.append(inputs["input_ids"].tolist())
        return super().compute_ref_log_probs(model, inputs)

def ran(cache, stop_after=99):
    seen.clear()
    more = {"per_device_train_batch_size": 2, "reference_cache": str(folder / cache), "seed": stop_after}
    trainer = Stops(
        AutoModelForCausalLM.from_pretrained(student),
        args=PairwiseDPOConfig(**settings(folder / "out", **more)),
        train_dataset=Dataset.from_list([{"beta": 0.1} | row for row in pairs(range(11))]),
        processing_class=AutoTokenizer.from_pretrained(student),
    )
    return list(seen), reference(trainer), trainer.accelerator

whole, numbers, accelerator = ran("whole")
try:
    ran("killed", stop_after=1)
except KeyboardInterrupt:
    pass
accelerator.wait_for_everyone()
rest, again, accelerator = ran("killed")
told = {"whole": len(whole), "same_batches": rest == whole[1:], "same_numbers": numbers == again}
(folder / f"rank{accelerator.process_index}.json").write_text(json.dumps(told))
"""


def test_a_killed_pass_of_two_processes_goes_on_with_the_same_batches(student: str, tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(TWO, encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(__file__).parent)}
    line = [sys.executable, *launcher, str(tmp_path / "two.py"), str(tmp_path), student]
    ran = subprocess.run(line, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for rank in (0, 1):
        told = json.loads((tmp_path / f"rank{rank}.json").read_text(encoding="utf-8"))
        assert told == {"whole": 3, "same_batches": True, "same_numbers": True}
    (table,) = (pq.read_table(path) for path in (tmp_path / "killed").glob("*.parquet"))
    assert table.num_rows == 11


def test_the_batches_of_a_pass_do_not_depend_on_the_order_of_the_rows(make: Make) -> None:
    def batches(rows: list[dict[str, Any]]) -> list[list[list[int]]]:
        seen: list[list[list[int]]] = []
        trainer = make(rows, reference_cache="off")
        collate = trainer.data_collator

        def heard(examples: list[dict[str, Any]]) -> Any:
            seen.append([example["prompt_ids"] for example in examples])
            return collate(examples)

        trainer.data_collator = _Heard(collate, heard)
        again(trainer)
        return seen

    rows = [row | {"chosen": row["rejected"]} for row in pairs([3, 5, 4, 2, 7, 6, 1, 8])]  # all of one length
    assert batches(rows) == batches(rows[::-1])


class _Heard:
    """A collator of which each call is heard."""

    def __init__(self, collate: Any, heard: Callable[[list[dict[str, Any]]], Any]) -> None:
        self._collate, self._heard = collate, heard

    def __getattr__(self, name: str) -> Any:
        return getattr(self._collate, name)

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        return self._heard(examples)


def test_another_batch_moves_only_the_last_bits(make: Make) -> None:
    """So much may a run differ from another whose cache came from other datasets."""
    numbers = [make(per_device_train_batch_size=size, reference_cache="off") for size in (1, 3, 8)]
    for other in numbers[1:]:
        np.testing.assert_allclose(reference(other), reference(numbers[0]), rtol=1e-5)


def test_what_came_from_the_cache_is_said_once_in_a_process(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    make()
    capsys.readouterr()
    for _ in range(2):
        make()
    assert _said(capsys) == ["          reference log-probs: from the cache"]


def test_a_pass_writes_as_it_goes(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sp2dpo.train.reference.FLUSH_EVERY_S", 0.0)
    plain = Counted.compute_ref_log_probs
    written: list[int] = []

    def look(self: Counted, model: Any, inputs: dict[str, Any]) -> Any:
        written.append(sum(pq.read_metadata(p).num_rows for p in (tmp_path / "cache").glob("*.parquet")))
        return plain(self, model, inputs)

    monkeypatch.setattr(Counted, "compute_ref_log_probs", look)
    make(per_device_train_batch_size=2)
    assert written == [0, 2, 4, 6]


def test_a_number_that_is_not_finite_is_used_but_not_kept(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Counted.compute_ref_log_probs

    def broken(self: Counted, model: Any, inputs: dict[str, Any]) -> Any:
        chosen, rejected = plain(self, model, inputs)
        return torch.where(torch.arange(len(chosen)) == 0, torch.nan, chosen), rejected

    monkeypatch.setattr(Counted, "compute_ref_log_probs", broken)
    trainer = make()
    assert np.isnan(reference(trainer)[0]).sum() == 2
    monkeypatch.setattr(Counted, "compute_ref_log_probs", plain)
    computed, (chosen, _) = again(trainer)
    assert computed == 2
    assert np.isfinite(chosen).all()


def test_a_folder_that_cannot_be_written_is_said_once_with_its_setting_and_training_goes_on(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no_folder").write_text("")
    trainer = make(reference_cache=str(tmp_path / "no_folder" / "cache"))
    again(trainer)
    assert np.isfinite(reference(trainer)).all()
    _, said, _ = _said(capsys)
    assert said.startswith("sp2dpo: reference log-probs cannot be kept (")
    assert said.endswith("; name another folder by reference_cache")
    monkeypatch.setenv("SP2DPO_CACHE", str(tmp_path / "no_folder"))
    again(make(reference_cache=None))
    _, said, _ = _said(capsys)
    assert said.endswith("; name another folder by SP2DPO_CACHE")


def test_off_keeps_nothing(make: Make, tmp_path: Path) -> None:
    trainer = make(reference_cache="off")
    assert (trainer.passed, again(trainer)) == (8, (8, reference(trainer)))
    assert not (tmp_path / "cache").exists()


def test_the_users_folder_is_the_default_and_can_be_moved(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("SP2DPO_CACHE", raising=False)
    make(reference_cache=None)
    assert cache_folder() == tmp_path / "xdg/sp2dpo/reference"
    assert len(list(cache_folder().glob("*.parquet"))) == 1
    monkeypatch.setenv("SP2DPO_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own/reference"


def test_a_stream_is_refused() -> None:
    stream = IterableDataset.from_generator(lambda: iter(pairs()))
    with pytest.raises(DataError, match="stream"):
        ReferenceCache("off").log_probs(None, stream, "train", 4)


WRITER = """
import sys, pyarrow as pa
from pathlib import Path
from sp2dpo.train.reference_file import SCHEMA, ReferenceFile
file, first = ReferenceFile(Path(sys.argv[1]), {"weights": "w"}), int(sys.argv[2])
for n in range(first, first + 20):
    row = {"pair": (n % 30).to_bytes(32, "big"), "chosen_logp": -1.0 * (n % 30), "rejected_logp": -2.0}
    file.add(pa.Table.from_pylist([row | {"chosen_tokens": 1, "rejected_tokens": 2}], schema=SCHEMA))
"""


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [subprocess.Popen([*command, str(10 * n)]) for n in range(3)]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0]
    table = ReferenceFile(tmp_path, {"weights": "w"}).read()
    assert sorted(table["chosen_logp"].to_pylist(), reverse=True) == [-1.0 * n for n in range(30)]


IDS = st.lists(st.integers(1, 3), min_size=1, max_size=4)
PAIRS = st.tuples(IDS, IDS, IDS)


@given(
    one=PAIRS,
    other=PAIRS,
    max_length=st.none() | st.integers(1, 6),
    mode=st.sampled_from(["keep_start", "keep_end"]),
)
def test_two_pairs_have_one_key_just_where_the_collator_makes_them_one(
    one: Any, other: Any, max_length: int | None, mode: str
) -> None:
    rows = [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), pair, strict=True)) for pair in (one, other)]
    collate = DataCollatorForPreference(pad_token_id=0, max_length=max_length, truncation_mode=mode)
    batches = [collate([row]) for row in rows]
    same = all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])
    keys = pair_keys(Dataset.from_list(rows), max_length=max_length, truncation_mode=mode, ld_alpha=None)
    assert (keys[0].sha256 == keys[1].sha256) == same
    for key, batch in zip(keys, batches, strict=True):
        assert key.tokens == batch["attention_mask"].sum()
        assert [key.chosen_tokens, key.rejected_tokens] == batch["completion_mask"].sum(dim=1).tolist()


def test_weights_that_only_the_first_process_has_read_are_no_reference(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make()
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(ProcessError, match="fsdp_cpu_ram_efficient_loading: false"):
        ReferenceCache("off").log_probs(trainer, trainer.train_dataset, "train", 4)
