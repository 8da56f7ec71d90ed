"""`sp2dpo train` from a process and a schedule: what is refused before a step, what a run directory holds after."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from sp2dpo.annotate.run import annotate
from sp2dpo.errors import MissingExtra, ProcessError, ScheduleError
from sp2dpo.process import load_process
from sp2dpo.rubric import CATEGORIES
from sp2dpo.runs import Run, open_run
from sp2dpo.schedule import EXCLUDED_SCHEMA
from sp2dpo.settings import Train
from sp2dpo.stages import prepare_run, schedule_run
from sp2dpo.train.data import check_cover, training_table
from sp2dpo.train.run import check_settings, train_run
from sp2dpo.train.toy import make_toy

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
    (again,) = train_run(runs[1])
    fresh, retrained = ((run.training("sp2dpo") / "model.safetensors").read_bytes() for run in runs)
    assert fresh == retrained != before
    assert again.set_aside is not None
    assert (again.set_aside / "model.safetensors").read_bytes() == before


def test_lora_leaves_an_adapter(tmp_path: Path) -> None:
    lora = {"methods": ["sp2dpo"], "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    run = make_run(tmp_path, lora, n=4)
    train_run(run)
    config = json.loads((run.training("sp2dpo") / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"]) == (4, 8)


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
        check_settings(Train.model_validate(TRAIN | bad))
