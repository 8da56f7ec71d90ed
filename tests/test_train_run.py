"""`sp2dpo train` from a process and a schedule: what is refused before a step, what a run directory holds after."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import Sp2dpo
from sp2dpo.annotate.run import annotate
from sp2dpo.errors import MissingExtra, ProcessError, ScheduleError
from sp2dpo.hashing import sha256_file
from sp2dpo.process import load_process
from sp2dpo.rubric import CATEGORIES
from sp2dpo.runs import Run, open_run
from sp2dpo.schedule import EXCLUDED_SCHEMA
from sp2dpo.settings import Student, Train
from sp2dpo.stages import prepare_run, schedule_run
from sp2dpo.train.data import arm_columns, check_cover, training_table
from sp2dpo.train.interrupt import Interrupt
from sp2dpo.train.plan import plan_arms
from sp2dpo.train.run import check_settings, preview_run, train_run
from sp2dpo.train.toy import make_toy
from sp2dpo.verify import verify

EXAMPLE = Path(__file__).parents[1] / "examples/quickstart"
TRAIN = {
    "methods": ["dpo", "rand_beta", "sp2dpo"],
    "learning_rate": 1e-3,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "max_length": 128,
    "max_prompt_length": 64,
    "bf16": False,
    "gradient_checkpointing": False,
}


def make_run(folder: Path, train: dict[str, Any] | None = None, n: int = 8, **keys: Any) -> Run:
    """A run of the quickstart's first pairs up to its schedule."""
    lines = (EXAMPLE / "pairs.jsonl").read_text(encoding="utf-8").splitlines()[:n]
    folder.mkdir(exist_ok=True)
    (folder / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "answers.jsonl").write_bytes((EXAMPLE / "answers.jsonl").read_bytes())
    process = yaml.safe_load((EXAMPLE / "process.yaml").read_text(encoding="utf-8"))
    process |= {"train": TRAIN | (train or {}), "student": {"model": "student"}, **keys}
    texts = [json.loads(line) for line in lines]
    make_toy(folder / "student", [row["prompt"] + row["chosen"] for row in texts], steps=1)
    (folder / "process.yaml").write_text(yaml.safe_dump(process), encoding="utf-8")
    run = open_run(load_process(folder / "process.yaml"), folder / "run")
    prepare_run(run)
    annotate(run)
    schedule_run(run)
    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = make_run(tmp_path_factory.mktemp("trained"))
    train_run(run)
    return run


def test_each_method_leaves_a_model_its_margins_and_a_manifest(trained: Run) -> None:
    for method in TRAIN["methods"]:
        folder = trained.training(method)
        assert (folder / "model.safetensors").is_file()
        assert pq.read_table(folder / "margins.parquet").num_rows == 2 * 4
        manifest = json.loads((folder / "metrics.manifest.json").read_text(encoding="utf-8"))
        assert manifest["lambda"] == trained.process.lambda_hash
        assert "model.safetensors" in manifest["files"]


def test_the_methods_see_the_same_batches(trained: Run) -> None:
    seen = [pq.read_table(trained.training(m) / "margins.parquet")["row"].to_pylist() for m in TRAIN["methods"]]
    assert seen[0] == seen[1] == seen[2]


def test_a_finished_method_is_not_trained_again(trained: Run) -> None:
    before = {path: path.stat().st_mtime_ns for path in (trained.path / "train").rglob("*.safetensors")}
    assert all(one.already_done for one in train_run(trained))
    assert {path: path.stat().st_mtime_ns for path in (trained.path / "train").rglob("*.safetensors")} == before


def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    train = {"methods": ["sp2dpo"], "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    runs = [make_run(tmp_path / name, train) for name in ("whole", "cut")]
    for run in runs:
        train_run(run)
    cut = runs[1].training("sp2dpo")
    for left_over in ("metrics.manifest.json", "metrics.json", "model.safetensors", "margins.parquet"):
        (cut / left_over).unlink()
    for file in (cut / "checkpoint-4").iterdir():
        file.unlink()
    (cut / "checkpoint-4").rmdir()
    train_run(runs[1])
    one, other = ((run.training("sp2dpo") / "model.safetensors").read_bytes() for run in runs)
    assert one == other
    margins = [pq.read_table(run.training("sp2dpo") / "margins.parquet") for run in runs]
    assert margins[0].equals(margins[1])


def test_training_on_another_schedule_starts_afresh_and_keeps_the_old_model(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, {"methods": ["sp2dpo"]}) for name in ("fresh", "again")]
    train_run(runs[1], limit=4)
    before = (runs[1].training("sp2dpo") / "model.safetensors").read_bytes()
    train_run(runs[0])
    said: list[str] = []
    (again,) = train_run(runs[1], say=said.append)
    fresh, retrained = ((run.training("sp2dpo") / "model.safetensors").read_bytes() for run in runs)
    assert fresh == retrained != before
    assert again.set_aside is not None
    assert (again.set_aside / "model.safetensors").read_bytes() == before
    assert f"          sp2dpo had been trained on 4 rows of the schedule, not 8; that is now {again.set_aside}" in said


@pytest.mark.parametrize(
    ("note", "words"),
    [
        ({"schedule.parquet": "0"}, "another schedule.parquet"),
        ({"pairs.parquet": "0", "rows": "1"}, "another pairs.parquet and 1 row of the schedule, not 8"),
        ({"rows": None}, "inputs that it does not name"),
        ({}, ""),
    ],
)
def test_what_is_in_the_way_says_which_input_is_another(scheduled: Run, note: dict[str, Any], words: str) -> None:
    (planned,) = plan_arms(scheduled, ["dpo"])
    kept = {name: value for name, value in {**planned.inputs, **note}.items() if value is not None}
    planned.folder.mkdir(parents=True)
    try:
        (planned.folder / "inputs.json").write_text(json.dumps(kept), encoding="utf-8")
        assert planned.in_the_way == words
    finally:
        shutil.rmtree(planned.folder.parent)


def test_a_category_with_bounds_of_its_own_trains_by_them(tmp_path: Path) -> None:
    wide = {name: {"beta_min": 0.35, "beta_max": 0.5} for name in CATEGORIES}
    run = make_run(tmp_path, {"methods": ["sp2dpo"]}, n=4, schedule={"envelopes": wide})
    train_run(run)
    assert (run.training("sp2dpo") / "model.safetensors").is_file()
    beta = pq.read_table(run.schedule)["beta"].to_numpy()
    assert beta.min() >= 0.35


def test_a_schedule_that_was_edited_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path, n=4)
    schedule = pq.read_table(run.schedule)
    pq.write_table(schedule.set_column(schedule.column_names.index("beta"), "beta", pa.array([0.1] * 4)), run.schedule)
    with pytest.raises(ScheduleError, match="not the file that its manifest describes"):
        train_run(run)
    assert not (run.path / "train").exists()


def test_a_process_without_a_student_cannot_train(tmp_path: Path) -> None:
    run = make_run(tmp_path, n=4)
    process = yaml.safe_load((tmp_path / "process.yaml").read_text(encoding="utf-8"))
    bare = {name: value for name, value in process.items() if name not in ("student", "train")}
    (tmp_path / "bare.yaml").write_text(yaml.safe_dump(bare), encoding="utf-8")
    with pytest.raises(ProcessError, match="no 'student' and 'train'"):
        train_run(Run(run.path, load_process(tmp_path / "bare.yaml")))


def test_a_sweep_that_is_interrupted_ends_there_and_goes_on_from_it(tmp_path: Path) -> None:
    train = SWEEP | {"methods": ["dpo", "sp2dpo"], "max_steps": 12, "save_steps": 3, "logging_steps": 3}
    runs = {name: make_run(tmp_path / name, train) for name in ("whole", "cut")}
    train_run(runs["whole"])
    words = [sys.executable, "-m", "sp2dpo", *command(runs["cut"])]
    dpo, last = runs["cut"].training("dpo"), runs["cut"].training("sp2dpo")
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (dpo / "checkpoint-3" / "margins.parquet").exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "the same command goes on" in said
    assert not last.exists()
    assert not (dpo / "metrics.manifest.json").exists()
    said_again: list[str] = []
    again = train_run(runs["cut"], say=said_again.append)
    assert [one.already_done for one in again] == [False, False]
    for arm in ("dpo", "sp2dpo"):
        for name in ("model.safetensors", "margins.parquet", "held_out.parquet"):
            assert sha256_file(runs["cut"].training(arm) / name) == sha256_file(runs["whole"].training(arm) / name)
    whole, cut = (json.loads((run.training("dpo") / "metrics.json").read_text()) for run in runs.values())
    assert cut["train_loss"] == pytest.approx(whole["train_loss"], rel=0.05)
    of_the_last_leg = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
    assert whole.keys() - cut.keys() == of_the_last_leg
    assert not [line for line in said_again if "train     dpo: 0 s" in line]
    shutil.rmtree(runs["cut"].training("sp2dpo"))
    assert "as those that are done" not in preview_run(runs["cut"]).line(preview_run(runs["cut"]).sweep[:1])


def test_the_checkpoint_of_an_interrupt_goes_when_none_were_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, TRAIN | {"methods": ["dpo"], "max_steps": 4, "save_strategy": "no"})
    step_end = Interrupt.on_step_end

    def asked_in_the_second_step(self: Interrupt, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.asked = state.global_step == 2
        step_end(self, args, state, control, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Interrupt, "on_step_end", asked_in_the_second_step)
        with pytest.raises(KeyboardInterrupt):
            train_run(run)
    assert (run.training("dpo") / "checkpoint-2").is_dir()
    train_run(run)
    assert not [*run.training("dpo").glob("checkpoint-*")]


# Sweeps ----------------------------------------------------------------------------------------------------------

ARMS = ["untuned", "dpo_0.5", "rand_beta", "constant_beta", "shuffled_beta", "weighted_loss", "sp2dpo", "simpo"]
SWEEP = {"methods": ARMS, "held_out": 0.25, "precompute_ref_log_probs": True, "logging_steps": 1}
SWEEP |= {"save_strategy": "steps", "save_steps": 1}


class Swept:
    """A run whose arms were trained, what was said meanwhile, and what came of each arm."""

    def __init__(self, run: Run) -> None:
        self.run, self.said = run, list[str]()
        self.trained = {one.method: one for one in train_run(run, say=self.said.append)}

    def table(self, arm: str, name: str) -> pa.Table:
        return pq.read_table(self.run.training(arm) / f"{name}.parquet")

    def metrics(self, arm: str) -> dict[str, float]:
        return dict(json.loads((self.run.training(arm) / "metrics.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Swept:
    return Swept(make_run(tmp_path_factory.mktemp("swept"), SWEEP, n=16))


def test_a_sweep_trains_every_arm_of_the_process(swept: Swept) -> None:
    assert list(swept.trained) == ARMS
    assert not any(one.problem for one in swept.trained.values())


def test_each_arm_is_told_of_with_its_loss_and_what_was_held_out(swept: Swept) -> None:
    assert re.match(
        r"train     7 arms to train, 2 steps of 4 pairs \(12 pairs, 4 held out\); about \d+\.\d MB of disk each",
        swept.said[0],
    )
    for arm in ARMS[1:]:
        (line,) = (line for line in swept.said if line.startswith(f"train     {arm}: ") and "held-out loss" in line)
        assert re.search(r"\d s, loss \d\.\d{4}, held-out loss \d\.\d{4}, held-out accuracy", line)


def test_no_arm_trains_on_a_pair_that_is_held_out(swept: Swept) -> None:
    out = set(swept.table("sp2dpo", "held_out")["row"].to_pylist())
    assert len(out) == 4
    for arm in ARMS[1:]:
        assert set(swept.table(arm, "held_out")["row"].to_pylist()) == out
        assert not set(swept.table(arm, "margins")["row"].to_pylist()) & out


def test_every_file_of_a_sweep_is_described_by_a_manifest(swept: Swept) -> None:
    lines = list(verify(swept.run.path, workers=None))
    assert not [line for line in lines if line.startswith(("uncovered", "stale"))]
    manifest = json.loads((swept.run.training("sp2dpo") / "metrics.manifest.json").read_text(encoding="utf-8"))
    assert {"checkpoint-1/margins.parquet", "held_out.parquet", "README.md"} <= set(manifest["files"])


def test_a_changed_file_of_a_checkpoint_is_found(tmp_path: Path) -> None:
    run = make_run(tmp_path, SWEEP | {"methods": ["sp2dpo"]}, n=8)
    train_run(run)
    (run.training("sp2dpo") / "checkpoint-1" / "trainer_state.json").write_text("{}", encoding="utf-8")
    with pytest.raises(Exception, match=r"checkpoint-1/trainer_state\.json"):
        list(verify(run.path, workers=None))


def test_what_was_trained_is_what_the_arm_says(swept: Swept) -> None:
    """The margins of the first step are zero, so the loss there is Σ w_i·ln 2 over the batch: each arm alike."""
    first = {arm: swept.table(arm, "margins").slice(0, 4) for arm in ARMS[1:]}
    assert all(table["margin"].to_pylist() == pytest.approx([0.0] * 4, abs=1e-4) for table in first.values())
    assert len({tuple(table["row"].to_pylist()) for table in first.values()}) == 1
    models = {arm: sha256_file(swept.run.training(arm) / "model.safetensors") for arm in ARMS[1:]}
    assert len(set(models.values())) == len(models)


def test_weighting_takes_the_first_step_of_sp2dpo_and_no_other_arm_does(swept: Swept) -> None:
    """At margins of zero both pull by β_i/2, eq. 8 and 9; Adam's first step is that of the gradient."""
    at = {
        arm: torch.cat([value.flatten() for value in load(swept.run.training(arm) / "checkpoint-1").values()])
        for arm in ("sp2dpo", "weighted_loss", "shuffled_beta", "constant_beta")
    }
    start = torch.cat([value.flatten() for value in load(swept.run.process.base / "student").values()])
    move = {arm: (value - start).double() for arm, value in at.items()}
    apart = {arm: float((value - move["sp2dpo"]).norm() / move["sp2dpo"].norm()) for arm, value in move.items()}
    assert apart["weighted_loss"] < 1e-3
    assert min(apart["shuffled_beta"], apart["constant_beta"]) > 0.01


def load(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype="float32").state_dict())


def test_a_sweep_done_once_is_not_done_again_and_another_arm_joins_it(swept: Swept) -> None:
    before = {path: path.stat().st_mtime_ns for path in (swept.run.path / "train").rglob("*") if path.is_file()}
    said: list[str] = []
    trained = train_run(swept.run, [*ARMS, "dpo_0.1"], say=said.append)
    assert [one.method for one in trained if not one.already_done] == ["dpo_0.1"]
    assert re.search(r"1 arm to train, .* each, as those that are done$", said[0])
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (swept.run.training("dpo_0.1") / "metrics.manifest.json").is_file()


def test_the_shuffled_arm_was_trained_with_the_shuffled_beta(swept: Swept) -> None:
    """The saturation that was logged at the first step, where it is the mean of β_i/2, is that of `arm_columns`."""
    history = json.loads((swept.run.training("shuffled_beta") / "checkpoint-1/trainer_state.json").read_text())
    seen = swept.table("shuffled_beta", "margins").slice(0, 4)["row"].to_numpy()
    out = np.isin(np.arange(16), swept.table("shuffled_beta", "held_out")["row"].to_numpy())
    train = swept.run.process.settings.train
    assert train is not None
    columns = arm_columns(pq.read_table(swept.run.schedule), train.arm("shuffled_beta"), held_out=out, seed=42)
    logged = [entry["saturation"] for entry in history["log_history"] if "saturation" in entry]
    assert logged[0] == pytest.approx(columns.beta[seen].mean() / 2, rel=1e-4)


# Held out --------------------------------------------------------------------------------------------------------


def log_prob(model: Any, tokenizer: Any, prompt: list[dict[str, str]], reply: list[dict[str, str]]) -> float:
    """Log-probability of a reply from plain logits, cut as the settings say; without TRL or this project's trainer."""
    head = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template(prompt + reply, return_dict=True)["input_ids"]
    kept = head[-64:]
    ids = torch.tensor([[*kept, *whole[len(head) :]][:128]])
    with torch.no_grad():
        logp = model(ids).logits[0, :-1].log_softmax(-1)
    return float(logp.gather(1, ids[0, 1:, None])[len(kept) - 1 :].sum())


def by_hand(run: Run, folder: Path, rows: list[int]) -> list[tuple[float, float]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(run.process.base / "student")
    pairs = {row["pair_id"]: row for row in pq.read_table(run.pairs).to_pylist()}
    found = [pairs[pair] for pair in pq.read_table(run.schedule)["pair_id"].take(rows).to_pylist()]
    return [tuple(log_prob(model, tokenizer, p["prompt"], p[side]) for side in ("chosen", "rejected")) for p in found]  # type: ignore[misc]


@pytest.mark.parametrize("arm", ["sp2dpo", "simpo", "untuned"])
def test_held_out_log_ratios_are_those_of_plain_logits(swept: Swept, arm: str) -> None:
    table = swept.table(arm, "held_out")
    rows = table["row"].to_pylist()
    student = swept.run.process.base / "student"
    reference = np.array(by_hand(swept.run, student, rows))
    policy = np.array(by_hand(swept.run, student if arm == "untuned" else swept.run.training(arm), rows))
    found = np.array([table[f"{side}_log_prob"].to_numpy() for side in ("chosen", "rejected")]).T
    ratio = np.array([table[f"{side}_log_ratio"].to_numpy() for side in ("chosen", "rejected")]).T
    assert found == pytest.approx(policy, rel=1e-5)
    assert ratio == pytest.approx(policy - reference, abs=5e-3)
    assert np.abs(ratio).max() > 0.1 or arm == "untuned"


def test_held_out_metrics_follow_from_the_log_ratios_at_one_beta_for_all_arms(swept: Swept) -> None:
    for arm in ARMS:
        table, metrics = swept.table(arm, "held_out"), swept.metrics(arm)
        delta = table["chosen_log_ratio"].to_numpy().astype(float) - table["rejected_log_ratio"].to_numpy()
        assert metrics["held_out_loss"] == pytest.approx(-np.log(1 / (1 + np.exp(-0.1 * delta))).mean(), rel=1e-6)
        assert metrics["held_out_accuracy"] == (delta > 0).mean()
        assert metrics["held_out_margin"] == pytest.approx(delta.mean(), abs=1e-6)
        assert metrics["held_out_pairs"] == 4


def test_the_untuned_student_is_at_ln_2_and_leaves_no_model(swept: Swept) -> None:
    assert swept.metrics("untuned")["held_out_loss"] == pytest.approx(np.log(2), abs=1e-12)
    assert not list(swept.run.training("untuned").glob("*.safetensors"))


def test_the_reference_is_the_same_whether_it_is_precomputed_or_not(swept: Swept, tmp_path: Path) -> None:
    run = make_run(tmp_path, SWEEP | {"methods": ["sp2dpo"], "precompute_ref_log_probs": False}, n=16)
    train_run(run)
    there = pq.read_table(run.training("sp2dpo") / "held_out.parquet")
    for name in ("chosen_log_ratio", "rejected_log_prob"):
        assert there[name].to_numpy() == pytest.approx(swept.table("sp2dpo", "held_out")[name].to_numpy(), abs=5e-3)


def test_held_out_pairs_can_be_watched_during_training(tmp_path: Path) -> None:
    train = {"methods": ["sp2dpo"], "held_out": 0.25, "eval_strategy": "steps", "eval_steps": 1}
    run = make_run(tmp_path, train)
    train_run(run)
    state = json.loads((run.training("sp2dpo") / "trainer_state.json").read_text(encoding="utf-8"))
    watched = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    metrics = json.loads((run.training("sp2dpo") / "metrics.json").read_text(encoding="utf-8"))
    assert len(watched) == 2
    assert all(np.isfinite(watched))
    assert watched[-1] != metrics["held_out_loss"]  # one is under the β of the arm, the other under that of all arms


# LoRA ------------------------------------------------------------------------------------------------------------

LORA = {"methods": ["sp2dpo"], "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "max_steps": 6}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = make_run(tmp_path_factory.mktemp("adapted"), LORA | {"held_out": 0.25})
    train_run(run)
    return run


def test_lora_leaves_an_adapter(adapted: Run) -> None:
    config = json.loads((adapted.training("sp2dpo") / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"]) == (4, 8)


def test_the_merged_model_gives_the_logits_of_the_adapter_on_its_base(adapted: Run) -> None:
    folder, student = adapted.training("sp2dpo"), adapted.process.base / "student"
    base = AutoModelForCausalLM.from_pretrained(student, dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype="float32")
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        plain = base(ids).logits
        adapter = PeftModel.from_pretrained(base, str(folder))(ids).logits
        assert torch.allclose(merged(ids).logits, adapter, atol=1e-4)
    assert (plain - adapter).abs().max() > 1e-2


def test_the_merged_model_has_the_dtype_of_the_student_and_its_tokenizer(adapted: Run) -> None:
    merged, student = adapted.training("sp2dpo") / "merged", adapted.process.base / "student"
    assert json.loads((merged / "config.json").read_text())["dtype"] == "float32"
    assert AutoTokenizer.from_pretrained(merged).chat_template == AutoTokenizer.from_pretrained(student).chat_template
    assert not (merged / "adapter_config.json").exists()


def test_without_merge_there_is_the_adapter_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path, LORA | {"merge": False, "max_steps": 1}, n=4)
    train_run(run)
    assert not (run.training("sp2dpo") / "merged").exists()


# The card --------------------------------------------------------------------------------------------------------


def test_the_card_states_the_process_and_the_schedule_in_place_of_the_librarys_own(swept: Swept) -> None:
    card = (swept.run.training("weighted_loss") / "README.md").read_text(encoding="utf-8")
    for fact in (swept.run.process.lambda_hash, sha256_file(swept.run.schedule), "β_i of the schedule over its mean"):
        assert fact in card
    assert "12 trained, 4 held out" in card
    assert "This model is a fine-tuned version" not in card


@pytest.mark.parametrize("form", ["", "merged"])
def test_the_code_of_a_card_loads_the_model(adapted: Run, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(adapted.path / "train")
    card = (adapted.training("sp2dpo") / form / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["model"].num_parameters() > 0
    assert names["tokenizer"].chat_template
    assert code.count("from transformers import") == 1
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == ("transformers" if form else "peft")
    assert "base_model" not in front  # that of this run is a folder of this machine


# What goes wrong -------------------------------------------------------------------------------------------------

BROKEN = {"methods": ["simpo", "sp2dpo"], "knobs": {"simpo": {"gamma": 1e300}}, "max_steps": 1}


def test_an_arm_that_breaks_leaves_the_others_to_go_on(tmp_path: Path) -> None:
    run = make_run(tmp_path, BROKEN, n=4)
    broken, trained = train_run(run)
    assert broken.problem is not None
    assert "step 1" in broken.problem
    assert f"pair {pq.read_table(run.schedule)['pair_id'][0].as_py()[:12]} " in broken.problem
    assert trained.problem is None
    assert not (run.training("simpo") / "metrics.manifest.json").exists()
    assert (run.training("sp2dpo") / "metrics.manifest.json").is_file()


def test_the_command_tells_of_the_broken_arm_and_ends_with_1(tmp_path: Path, sp2dpo: Sp2dpo) -> None:
    run = make_run(tmp_path / "broken", BROKEN, n=4)
    ran = sp2dpo("train", run.process.base / "process.yaml", "--run-dir", run.path, "--json")
    assert ran.code == 1
    assert "1 arm of 2 could not be trained: simpo" in ran.err
    told = json.loads(ran.out)
    assert "step 1" in told["simpo"]["problem"]
    assert told["sp2dpo"]["metrics"]["train_loss"] == pytest.approx(np.log(2), abs=1e-4)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"report_to": "wandb"}, "pip install wandb"),
        ({"report_to": ["tensorbored"]}, "tensorbored"),
        ({"eval_strategy": "epoch"}, "train.held_out is 0"),
        ({"layout": "shared", "truncation_mode": "keep_end"}, "layout 'shared'"),
    ],
)
@pytest.mark.filterwarnings("ignore:The `'keep_end'`:FutureWarning")
def test_settings_that_cannot_work_are_refused_before_a_step(
    tmp_path: Path, bad: Mapping[str, Any], words: str
) -> None:
    run = make_run(tmp_path, dict(bad), n=4)
    with pytest.raises(ProcessError, match=words):
        train_run(run)
    assert not list((run.path / "train").rglob("*.safetensors"))


def test_a_training_is_not_gone_on_with_by_another_number_of_processes(tmp_path: Path) -> None:
    run = make_run(tmp_path, SWEEP | {"methods": ["sp2dpo"]}, n=8)
    train_run(run)
    folder = run.training("sp2dpo")
    note = json.loads((folder / "inputs.json").read_text(encoding="utf-8"))
    assert note["processes"] == 1
    (folder / "inputs.json").write_text(json.dumps(note | {"processes": 4}), encoding="utf-8")
    (folder / "metrics.manifest.json").unlink()
    with pytest.raises(ProcessError, match="begun with 4 processes, and these are 1"):
        train_run(run)


# The command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scheduled(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("scheduled"), {"methods": ["sp2dpo"], "max_steps": 1}, n=8)


def command(run: Run, *flags: str) -> tuple[str, ...]:
    return "train", str(run.process.base / "process.yaml"), "--run-dir", str(run.path), *flags


def files_of(run: Run) -> set[Path]:
    return set(run.path.rglob("*"))


def test_a_dry_run_says_what_would_be_trained_and_writes_nothing(scheduled: Run, sp2dpo: Sp2dpo) -> None:
    before = files_of(scheduled)
    ran = sp2dpo(
        *command(scheduled, "--method", "constant_beta", "--method", "ipo", "--limit", "6", "--dry-run", "--json")
    )
    told = json.loads(ran.out)
    beta = pq.read_table(scheduled.schedule)["beta"].to_numpy()[:6]
    assert [arm["method"] for arm in told["arms"]] == ["constant_beta", "ipo"]
    assert told["arms"][0]["beta_mean"] == pytest.approx(beta.mean(), rel=1e-6)
    assert [told["arms"][1][f"beta_{name}"] for name in ("min", "mean", "max")] == [0.1] * 3
    assert "β" in told["arms"][0]["what"]
    assert [(arm["pairs"], arm["steps"], arm["state"]) for arm in told["arms"]] == [(6, 1, "not begun")] * 2
    assert told["pairs_per_step"] == 4
    assert files_of(scheduled) == before


def test_a_dry_run_comes_before_the_toy_is_made(tmp_path: Path, sp2dpo: Sp2dpo) -> None:
    run = make_run(tmp_path, n=8, student={"model": "toy"})
    assert not (run.path / "student").exists()
    ran = sp2dpo(*command(run, "--dry-run"))
    assert ran.code == 0, ran.err
    assert "3 arms to train, 2 steps of 4 pairs" in ran.out
    told = json.loads(sp2dpo(*command(run, "--dry-run", "--json")).out)
    assert told["disk_bytes_per_arm"] is None


def test_a_dry_run_fits_a_terminal_of_80_columns(
    scheduled: Run, sp2dpo: Sp2dpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ran = sp2dpo(*command(scheduled, "--controls", "--dry-run"))
    (row,) = (line for line in ran.out.splitlines() if line.startswith("  shuffled_beta "))
    assert re.search(r" to \d\.\d{4}, mean \d\.\d{4} +8 +1 +not begun *$", row)


def test_the_limit_of_a_training_is_no_beginning_of_a_longer_one(sp2dpo: Sp2dpo) -> None:
    text = " ".join(sp2dpo("train", "--help").out.split())
    assert "train on the first N pairs: a run of its own" in text
    assert "the rest can follow later" not in text


def test_the_controls_without_held_out_pairs_are_those_that_can_be_trained(scheduled: Run, sp2dpo: Sp2dpo) -> None:
    ran = sp2dpo(*command(scheduled, "--controls", "--dry-run"))
    assert ran.code == 0
    assert "untuned is left out" in ran.err
    rows = [line.split()[0] for line in ran.out.splitlines() if line.startswith("  ") and line[2:3].isalpha()]
    assert rows[1:] == [
        "dpo_0.1",
        "dpo_0.3",
        "dpo_0.5",
        "rand_beta",
        "constant_beta",
        "shuffled_beta",
        "weighted_loss",
        "sp2dpo",
    ]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--controls", "--method", "dpo"), "give it, or --method"),
        (("--method", "sp3dpo"), "did you mean 'sp2dpo'"),
        (("--method", "untuned"), "train.held_out is 0"),
    ],
)
def test_flags_that_cannot_work_are_refused(scheduled: Run, sp2dpo: Sp2dpo, flags: tuple[str, ...], words: str) -> None:
    ran = sp2dpo(*command(scheduled, *flags))
    assert ran.code == 2
    assert words in ran.err


def test_a_method_named_by_a_flag_is_trained_in_place_of_those_of_the_process(tmp_path: Path, sp2dpo: Sp2dpo) -> None:
    run = make_run(tmp_path / "one", {"methods": ["sp2dpo"], "max_steps": 1}, n=8)
    ran = sp2dpo(*command(run, "--method", "dpo_0.3", "--limit", "4"))
    assert ran.code == 0, ran.err
    assert [path.name for path in (run.path / "train").iterdir()] == ["dpo_0.3"]
    assert pq.read_table(run.training("dpo_0.3") / "margins.parquet")["row"].to_pylist() != []
    assert "dpo_0.3" in ran.out
    note = json.loads((run.training("dpo_0.3") / "inputs.json").read_text(encoding="utf-8"))
    assert note["rows"] == "4"


def test_of_several_processes_only_the_main_one_speaks(
    scheduled: Run, sp2dpo: Sp2dpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert sp2dpo(*command(scheduled, "--dry-run")) == (0, "", "")
    refused = sp2dpo(*command(scheduled, "--method", "sp3dpo"))
    assert refused.code == 2
    assert "sp3dpo" in refused.err


# Before a sweep --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "train",
    [
        {"max_steps": -1, "num_train_epochs": 3, "gradient_accumulation_steps": 2},
        {"max_steps": -1, "num_train_epochs": 1.5, "dataloader_drop_last": True},
        {"max_steps": 3, "gradient_accumulation_steps": 3},
    ],
)
def test_the_steps_that_are_foretold_are_those_that_are_taken(tmp_path: Path, train: dict[str, Any]) -> None:
    run = make_run(tmp_path, {"methods": ["dpo"], "held_out": 0.3, **train}, n=14)
    told = preview_run(run)
    train_run(run)
    state = json.loads((run.training("dpo") / "trainer_state.json").read_text(encoding="utf-8"))
    assert told.steps == state["max_steps"] == state["global_step"]
    assert told.pairs_per_step == json.loads((run.training("dpo") / "metrics.json").read_text())["pairs_per_step"]


@pytest.mark.parametrize(
    ("train", "kept"),
    [
        (
            {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1},
            ("*.safetensors", "*/*.safetensors", "*/*.pt"),
        ),
        (LORA | {"save_strategy": "no", "max_steps": 2}, ("merged/*.safetensors",)),
    ],
)
def test_the_disk_that_is_foretold_is_what_is_taken(
    tmp_path: Path, train: dict[str, Any], kept: tuple[str, ...]
) -> None:
    run = make_run(tmp_path, {**train, "methods": ["sp2dpo"]}, n=8)
    told = preview_run(run).disk
    train_run(run)
    taken = sum(path.stat().st_size for pattern in kept for path in run.training("sp2dpo").glob(pattern))
    assert told == pytest.approx(taken, rel=0.05)


@pytest.fixture(scope="module")
def tables(trained: Run) -> tuple[pa.Table, pa.Table]:
    return pq.read_table(trained.pairs), pq.read_table(trained.schedule)


def joined(pairs: pa.Table, schedule: pa.Table, method: str = "sp2dpo") -> pa.Table:
    return training_table(pairs, schedule, method, beta=0.1, beta_min=0.03, beta_max=0.3)


def with_beta(schedule: pa.Table, n: int, value: float | None, column: str = "beta") -> pa.Table:
    values = schedule[column].to_pylist()
    values[n] = value
    return schedule.set_column(schedule.column_names.index(column), column, pa.array(values, pa.float64()))


def test_each_method_reads_its_column(tables: tuple[pa.Table, pa.Table]) -> None:
    pairs, schedule = tables
    assert joined(pairs, schedule)["beta"].to_pylist() == pytest.approx(schedule["beta"].to_pylist())
    random = joined(pairs, schedule, "rand_beta")["beta"].to_pylist()
    assert random == pytest.approx(schedule["beta_random"].to_pylist())
    assert joined(pairs, schedule, "dpo")["beta"].to_pylist() == pytest.approx([0.1] * schedule.num_rows)


def test_text_is_joined_by_pair_and_not_by_position(tables: tuple[pa.Table, pa.Table]) -> None:
    pairs, schedule = tables
    backwards = pairs.take(list(range(pairs.num_rows))[::-1])
    assert joined(backwards, schedule).equals(joined(pairs, schedule))


BAD_BETAS = [(None, "missing"), (float("nan"), "NaN"), (0.0, "positive"), (-0.1, "positive"), (0.31, "outside")]


@pytest.mark.parametrize(("value", "words"), BAD_BETAS)
def test_a_bad_beta_is_refused_with_its_pair(tables: tuple[pa.Table, pa.Table], value: Any, words: str) -> None:
    pairs, schedule = tables
    with pytest.raises(ScheduleError, match=words) as refused:
        joined(pairs, with_beta(schedule, 2, value))
    assert schedule["pair_id"][2].as_py() in str(refused.value)


def drop_pair(pairs: pa.Table) -> pa.Table:
    return pairs.slice(1)


def change_text(pairs: pa.Table) -> pa.Table:
    rows = pairs.to_pylist()
    rows[0]["chosen"][0]["content"] += "."
    return pa.Table.from_pylist(rows, schema=pairs.schema)


@pytest.mark.parametrize(("change", "words"), [(drop_pair, "not among the pairs"), (change_text, "its hash differs")])
def test_a_schedule_of_other_pairs_is_refused(
    tables: tuple[pa.Table, pa.Table], change: Callable[[pa.Table], pa.Table], words: str
) -> None:
    pairs, schedule = tables
    with pytest.raises(ScheduleError, match=words) as refused:
        joined(change(pairs), schedule)
    assert schedule["pair_id"][0].as_py() in str(refused.value)


def test_a_schedule_without_beta_is_refused(tables: tuple[pa.Table, pa.Table]) -> None:
    pairs, schedule = tables
    with pytest.raises(ScheduleError, match="no column 'beta'"):
        joined(pairs, schedule.drop_columns(["beta"]))


def test_two_rows_with_the_same_text_both_train(tables: tuple[pa.Table, pa.Table]) -> None:
    pairs, schedule = tables
    twice = joined(pa.concat_tables([pairs, pairs.slice(0, 1)]), pa.concat_tables([schedule, schedule.slice(0, 1)]))
    assert twice.num_rows == schedule.num_rows + 1


def test_the_missing_extra_is_named_when_torch_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import sp2dpo.train

    def without_torch(name: str) -> None:
        raise ModuleNotFoundError("no torch", name="torch")

    monkeypatch.setattr(sp2dpo.train, "import_module", without_torch)
    with pytest.raises(MissingExtra, match=r"pip install 'sp2dpo\[train\]'"):
        _ = sp2dpo.train.PairwiseDPOTrainer


def test_a_schedule_that_leaves_out_a_pair_silently_is_refused(tables: tuple[pa.Table, pa.Table]) -> None:
    pairs, schedule = tables
    excluded = EXCLUDED_SCHEMA.empty_table()
    check_cover(pairs, schedule, excluded)
    with pytest.raises(ScheduleError, match="does not cover") as refused:
        check_cover(pairs, schedule.slice(1), excluded)
    assert schedule["pair_id"][0].as_py() in str(refused.value)
    listed = pa.Table.from_pylist([{"pair_id": schedule["pair_id"][0].as_py()}], schema=EXCLUDED_SCHEMA)
    check_cover(pairs, schedule.slice(1), listed)


@pytest.mark.parametrize("bad", [{"lr_scheduler_type": "cosinus"}, {"eval_strategy": "never"}])
def test_settings_that_trl_or_peft_refuse_are_found_before_anything_is_paid_for(bad: dict[str, Any]) -> None:
    with pytest.raises(ProcessError, match="refuses these settings"):
        check_settings(Train.model_validate(TRAIN | bad), Student(model="toy"))


@pytest.mark.parametrize(
    ("bad", "names", "words"),
    [
        ({"methods": ["ipo", "dpo"], "ld_alpha": 0.5}, None, "ld_alpha"),
        ({"methods": ["dpo", "simpo"], "ld_alpha": 0.5}, None, "ld_alpha"),
        ({"methods": ["dpo"], "ld_alpha": 0.5}, ["ipo"], "ld_alpha"),
        ({"label_smoothing": 0.1}, None, "label_smoothing"),
        ({"loss_type": "ipo"}, None, r"train\.methods: \[ipo\]"),
        ({"loss_type": ["sigmoid", "ipo"]}, None, r"train\.methods: \[ipo\]"),
        ({"loss_type": "hinge"}, None, "train.methods; there are ipo, simpo"),
    ],
)
def test_a_setting_that_one_arm_of_a_sweep_cannot_have_is_found_before_any(
    bad: dict[str, Any], names: list[str] | None, words: str
) -> None:
    student = Student(model="toy")
    with pytest.raises(ProcessError, match=words) as refused:
        check_settings(Train.model_validate(TRAIN | bad), student, names)
    assert "'method'" not in str(refused.value)


def test_a_setting_that_no_arm_of_a_sweep_minds_is_none_to_refuse() -> None:
    train = Train.model_validate(TRAIN | {"methods": ["ipo", "dpo"], "ld_alpha": 0.5})
    assert check_settings(train, Student(model="toy"), ["dpo", "rand_beta"]).ld_alpha == 0.5


def test_quantized_weights_without_an_adapter_are_refused_before_anything_is_paid_for() -> None:
    with pytest.raises(ProcessError, match="add LoRA"):
        check_settings(Train.model_validate(TRAIN), Student(model="toy", quantization={"load_in_4bit": True}))
