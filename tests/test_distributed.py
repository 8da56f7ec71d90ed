"""Two processes train as one does: the trainer, the sharded model, and the whole command under both launchers. CPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

import distributed_cases
import sharded_cases
from distributed_cases import CASES
from report_runs import make_run, pair
from sp2dpo.annotate.run import annotate
from sp2dpo.process import load_process
from sp2dpo.runs import open_run
from sp2dpo.stages import prepare_run, schedule_run
from sp2dpo.verify import verify
from students import PROJECTIONS, make_student

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "examples/accelerate"
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "one": [],
    "accelerate": [
        *("-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "ddp.yaml")),
        *("--num_processes", "2", "--main_process_port", "0"),
    ],
}
SAME = sorted(set(CASES) - {"remainder", "drop_last"})
"""Cases in which two processes see the pairs that one sees, at every step."""


def launch(launcher: str, *command: object, **variables: object) -> subprocess.CompletedProcess[str]:
    """The processes of a script or module; their output is shown if they fail."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    env |= {name: str(value) for name, value in variables.items()}
    line = [sys.executable, *LAUNCHERS[launcher], *map(str, command)]
    ran = subprocess.run(line, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran


Seen = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both processes ran every case."""
    folder = tmp_path_factory.mktemp("two")
    make_student("qwen3", folder / "student")
    launch("torchrun", HERE / "distributed_worker.py", folder)
    return folder


def two(folder: Path, name: str) -> list[Seen]:
    return [json.loads((folder / name / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]


@pytest.fixture(scope="module")
def ones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Seen]]:
    """The same cases in this process, each with the folder that has its weights."""
    root = tmp_path_factory.mktemp("one")
    make_student("qwen3", root / "student")
    ran = {}
    for name, case in CASES.items():
        (root / name).mkdir()
        ran[name] = (root / name, distributed_cases.train(root / name, 1, **case))
    return ran


def of_steps(seen: Seen) -> list[dict[str, float]]:
    """What was logged at each step, without the estimate of operations, which is that of one process."""
    return [{k: v for k, v in entry.items() if k != "total_flos"} for entry in seen["log"] if "loss" in entry]


@pytest.mark.parametrize("name", SAME)
def test_losses_and_metrics_of_every_step_are_those_of_one_process(folder: Path, ones: Any, name: str) -> None:
    one, (first, second) = of_steps(ones[name][1]), map(of_steps, two(folder, name))
    assert len(one) == 8 // CASES[name].get("gradient_accumulation_steps", 1)
    assert one[-1]["loss"] < 0.6
    for theirs, mine in zip(one, first, strict=True):
        assert mine == pytest.approx(theirs, rel=2e-3, abs=2e-4)
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=5e-5, abs=1e-6)
    assert [entry["loss"] for entry in second] == [entry["loss"] for entry in first]


@pytest.mark.parametrize("name", SAME)
def test_the_weights_end_as_those_of_one_process(folder: Path, ones: Any, name: str) -> None:
    one, other = torch.load(ones[name][0] / "weights.pt"), torch.load(folder / name / "weights.pt")
    off = sum((other[key] - one[key]).double().pow(2).sum() for key in one).sqrt()
    assert off / sum(one[key].double().pow(2).sum() for key in one).sqrt() < 1e-6
    first, second = two(folder, name)
    assert first["weights"] == second["weights"]


@pytest.mark.parametrize("name", SAME)
def test_both_processes_use_the_shared_layout(folder: Path, name: str) -> None:
    assert [seen["layout"] for seen in two(folder, name)] == ["shared", "shared"]


@pytest.mark.parametrize("name", SAME)
def test_margins_are_those_of_one_process_in_both(folder: Path, ones: Any, name: str) -> None:
    one = {(step, row): margin for step, row, margin in ones[name][1]["margins"]}
    assert len(one) == 2 * 16
    for seen in two(folder, name):
        margins = {(step, row): margin for step, row, margin in seen["margins"]}
        assert len(margins) == len(seen["margins"])
        assert margins == pytest.approx(one, rel=1e-3, abs=1e-3)


def test_each_pair_is_noted_once_an_epoch_when_the_last_batch_is_not_full(folder: Path, ones: Any) -> None:
    for seen in (ones["remainder"][1], *two(folder, "remainder")):
        assert Counter(row for _, row, _ in seen["margins"]) == Counter(2 * list(range(14)))


def test_no_margin_is_lost_when_the_last_batch_is_dropped(folder: Path, ones: Any) -> None:
    for seen in (ones["drop_last"][1], *two(folder, "drop_last")):
        noted = [(step, row) for step, row, _ in seen["margins"]]
        assert len(set(noted)) == len(noted) == 2 * 12


def test_a_control_of_steps_has_one_state_in_all_processes(folder: Path, ones: Any) -> None:
    first, second = two(folder, "sifting")
    assert first["controls"] == second["controls"]
    assert first["controls"][0] == pytest.approx(ones["sifting"][1]["controls"][0], rel=1e-5)


@pytest.mark.parametrize("name", sharded_cases.CASES)
def test_a_sharded_student_has_the_loss_and_gradients_of_a_whole_one(folder: Path, name: str) -> None:
    first, second = two(folder, name)
    assert first["pairs"] != second["pairs"]
    assert first["loss"] != second["loss"]
    for seen in (first, second):
        assert seen["kinds"] == ["DTensor"]
        assert seen["rows"] == [1]  # the packed row of the shared layout, not two rows a pair
        assert seen["gradients"][0] == seen["gradients"][1] > 20
        assert seen["loss_difference"] < 1e-6
        assert seen["gradient_relative_l2"] < 2e-6


def prepared(folder: Path, train: dict[str, Any], student: str = "toy") -> Path:
    """A process file whose run, in `folder/run`, is scheduled and not trained yet."""
    make_run(folder, [pair(n, "word " * (n % 4)) for n in range(10)])
    process = yaml.safe_load((folder / "process.yaml").read_text(encoding="utf-8"))
    fixed = {"learning_rate": 1e-3, "num_train_epochs": 2, "logging_steps": 1, "bf16": False, "max_length": 128}
    process |= {"student": {"model": student}, "train": fixed | train}
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(process), encoding="utf-8")
    run = open_run(load_process(path), folder / "trained")
    prepare_run(run)
    annotate(run)
    schedule_run(run)
    return path


TRAIN = {
    "methods": ["dpo_0.3", "sp2dpo"],
    "precompute_ref_log_probs": True,
    "held_out": 0.2,
    "r": 4,
    "target_modules": PROJECTIONS,
    "ddp_find_unused_parameters": False,
}


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, subprocess.CompletedProcess[str]]]:
    """`sp2dpo train` in one process and in two of each launcher, at the same global batch; the first makes the toy."""
    ran = {}
    for launcher in LAUNCHERS:
        folder = tmp_path_factory.mktemp(launcher)
        student = str(ran["torchrun"][0] / "student") if ran else "toy"
        process = prepared(folder, TRAIN | {"per_device_train_batch_size": 4 if launcher == "one" else 2}, student)
        line = ["-m", "sp2dpo.train", process, "--run-dir", folder / "trained", "--json"]
        ran[launcher] = folder / "trained", launch(launcher, *line, SP2DPO_CACHE=folder / "cache")
    return ran


def below(folder: Path) -> set[str]:
    """Paths of the files below a folder; the random state of each process counts as that of one."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {re.sub(r"rng_state_\d", "rng_state", name) for name in names}


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_the_command_leaves_the_files_that_one_process_leaves(commands: Any, launcher: str) -> None:
    one, folder = (commands[name][0] for name in ("one", launcher))
    assert below(folder / "train") == below(one / "train")
    assert "sp2dpo/metrics.manifest.json" in below(folder / "train")
    list(verify(folder, workers=None))


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_the_command_trains_what_one_process_trains(commands: Any, launcher: str) -> None:
    for method in TRAIN["methods"]:
        one, two = (commands[name][0] / "train" / method for name in ("one", launcher))
        theirs, mine = load_file(one / "adapter_model.safetensors"), load_file(two / "adapter_model.safetensors")
        off = sum((mine[key] - theirs[key]).double().pow(2).sum() for key in theirs).sqrt()
        assert off / sum(theirs[key].double().pow(2).sum() for key in theirs).sqrt() < 1e-5
        metrics = [json.loads((folder / "metrics.json").read_text(encoding="utf-8")) for folder in (one, two)]
        for key in ("train_loss", "held_out_loss", "held_out_margin", "held_out_accuracy", "pairs_per_step"):
            assert metrics[1][key] == pytest.approx(metrics[0][key], rel=1e-3, abs=1e-4)
        assert [each["processes"] for each in metrics] == [1, 2]
        margins = pq.read_table(two / "margins.parquet")
        assert len(set(zip(*margins.select(["step", "row"]).to_pydict().values(), strict=True))) == 2 * 8


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_the_command_speaks_once(commands: Any, launcher: str) -> None:
    one, two = (commands[name][1] for name in ("one", launcher))
    assert json.loads(two.stdout).keys() == set(TRAIN["methods"])
    assert told(two) == told(one)
    assert sum(line.startswith("train  ") for line in told(two)) > len(TRAIN["methods"])
    for method in TRAIN["methods"]:  # where its bar ends
        assert two.stderr.count(f"\ntrain {method}: loss") == one.stderr.count(f"\ntrain {method}: loss") == 1


def told(ran: subprocess.CompletedProcess[str]) -> list[str]:
    """The project's own lines, without numbers and paths."""
    ours = [line for line in ran.stderr.splitlines() if line.startswith(("λ", "train  ", "   ", "sp2dpo:"))]
    return [re.sub(r"/\S+|[\d.,]+|λ \w+", "#", line) for line in ours]


def environment(config: str, monkeypatch: pytest.MonkeyPatch) -> Namespace:
    """Set what `accelerate launch --config_file` would set for its processes; returns the launcher's arguments."""
    line = [
        "--config_file",
        str(CONFIGS / f"{config}.yaml"),
        "--main_process_port",
        "0",
        "-m",
        "sp2dpo.train",
        "p.yaml",
    ]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(line))
    args.deepspeed_fields_from_accelerate_config = ""
    set_now = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    for name, value in set_now.items():
        monkeypatch.setenv(name, value)
    return args


@pytest.mark.parametrize("config", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_a_shipped_configuration_leaves_precision_to_the_process_file(config: str, monkeypatch: Any) -> None:
    args = environment(config, monkeypatch)
    assert (args.num_processes, args.mixed_precision) == (4, "no")
    kinds = {"ddp": args.multi_gpu, "fsdp2": args.use_fsdp}
    assert kinds.get(config, args.use_deepspeed)


def test_the_fsdp_configuration_shards_layers_and_saves_whole_models(monkeypatch: pytest.MonkeyPatch) -> None:
    environment("fsdp2", monkeypatch)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.cpu_ram_efficient_loading) == (2, True, False)
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_leaves_accumulation_and_clipping_to_the_process_file(stage: int, monkeypatch: Any) -> None:
    environment(f"deepspeed_zero{stage}", monkeypatch)
    config = DeepSpeedPlugin().deepspeed_config
    assert {config[key] for key in ("gradient_accumulation_steps", "gradient_clipping", "train_batch_size")} == {"auto"}
    zero = config["zero_optimization"]
    assert (zero["stage"], zero["stage3_gather_16bit_weights_on_model_save"]) == (stage, stage == 3)
