"""What only a GPU can show of training: that it is right there, and how fast it is. `benchmarks/gpu.sh` runs it.

    python benchmarks/gpu_checks.py --out FOLDER [--cpu] [--only CHECK ...]

Each check is a process of its own, so that a crash or a hang costs only that check. What was found is in FOLDER after
each of them, as gpu.json and gpu.md; what they said besides, in gpu.log. `--cpu` rehearses all of it with tiny models.
Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

if "--cpu" in sys.argv:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
for _name in ("TQDM_DISABLE", "HF_HUB_OFFLINE"):
    os.environ.setdefault(_name, "1")

import torch  # noqa: E402
import yaml  # noqa: E402

from gpu_exact import CUDA, Rows, attention, exact, fallback, found, optimizer, qlora, skipped  # noqa: E402
from pages import ROOT, Row, table, where  # noqa: E402
from students import make_student as make_tiny  # noqa: E402
from train_step import TINY  # noqa: E402
from train_work import VARIANTS, Shape, Stepper, make_dataset, make_sample, make_student, make_trainer  # noqa: E402

MINUTES: Final = 9.0
LONGEST: Final = 240.0
"""Seconds for one check."""


# Launchers -----------------------------------------------------------------------------------------------------------


def launch() -> Rows:
    """`sp2dpo train` by the shipped configurations of accelerate, two steps each, with the shipped recipe."""
    with tempfile.TemporaryDirectory() as folder:
        process = _process(Path(folder))
        for verb in ("annotate", "schedule"):
            good, said = _command("-m", "sp2dpo", verb, str(process), "--run-dir", str(Path(folder) / "run"))
            if not good:
                yield found(f"sp2dpo {verb}", False, said)
                return
        train = ["sp2dpo.train", str(process), "--limit", "16", "--json", "--run-dir"]
        cases: dict[str, tuple[str | None, list[str]]] = {"one process": (None, ["-m", *train])}
        cases["torchrun"] = (None, _torchrun(train))
        for config in sorted((ROOT / "examples" / "accelerate").glob("*.yaml")):
            cases[config.name] = (_not_here(config), _accelerate(config, train))
        for what, (reason, command) in cases.items():
            if reason:
                yield skipped(what, reason)
                continue
            run = shutil.copytree(Path(folder) / "run", Path(folder) / what.replace(" ", "-"))
            alone = _one_gpu() if what == "one process" else {}
            good, said = _command(*command, str(run), SP2DPO_CACHE=str(run / "cache"), **alone)
            metrics = run / "train" / "sp2dpo" / "metrics.json"
            if good and metrics.is_file():
                told = json.loads(metrics.read_text())
                yield found(what, told["train_loss"] == told["train_loss"], f"train_loss {told['train_loss']:.4f}")
            else:
                yield found(what, False, said)


def _process(folder: Path) -> Path:
    """The pairs and answers of the quickstart, the recipe of examples/paper, and a tiny student."""
    make_tiny("qwen3", folder / "student")
    quickstart = ROOT / "examples" / "quickstart"
    settings = yaml.safe_load((quickstart / "process.yaml").read_text())
    recipe = yaml.safe_load((ROOT / "examples" / "paper" / "qwen3-4b.yaml").read_text())["train"]
    for name in ("pairs.jsonl", "answers.jsonl"):
        shutil.copy(quickstart / name, folder)
    settings |= {"student": {"model": "student"}, "train": recipe}
    small = {"methods": ["sp2dpo"], "max_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "no"}
    settings["train"] = recipe | small | {"max_length": 384, "max_prompt_length": 160, "dataloader_num_workers": 1}
    (folder / "process.yaml").write_text(yaml.safe_dump(settings))
    return folder / "process.yaml"


def _processes() -> int:
    return torch.cuda.device_count() if CUDA else 2


def _torchrun(train: Sequence[str]) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={_processes()}", "-m", *train]


def _accelerate(config: Path, train: Sequence[str]) -> list[str]:
    many = ["--num_processes", str(_processes()), *([] if CUDA else ["--cpu"])]
    return ["-m", "accelerate.commands.launch", "--config_file", str(config), *many, "-m", *train]


def _not_here(config: Path) -> str | None:
    kind = yaml.safe_load(config.read_text())["distributed_type"]
    if kind == "DEEPSPEED" and find_spec("deepspeed") is None:
        return "deepspeed is not installed"
    return None if CUDA or kind == "MULTI_GPU" else "accelerate ignores it without a GPU"


def _one_gpu() -> dict[str, str]:
    """TRL refuses a process that sees several."""
    return {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}


def _command(*words: str, **env: str) -> tuple[bool, str]:
    """Run Python; whether that went well, and the last line about an error. All of what it said goes to the log."""
    try:
        done = subprocess.run(
            [sys.executable, *words], capture_output=True, text=True, timeout=90, env=os.environ | env
        )
    except subprocess.TimeoutExpired as late:
        return False, f"not done after {late.timeout:.0f} s"
    print(done.stdout, done.stderr, file=sys.stderr)
    errors = [line.strip() for line in done.stderr.splitlines() if "Error:" in line or "sp2dpo:" in line]
    return done.returncode == 0, (errors or [f"exit code {done.returncode}; see gpu.log"])[-1]


# Time ----------------------------------------------------------------------------------------------------------------


def time_lora() -> Rows:
    """Steps of LoRA."""
    yield from _times(lora=True)


def time_full() -> Rows:
    """Steps of full fine-tuning."""
    yield from _times(lora=False)


def _times(lora: bool) -> Rows:
    """Each variant in turn, TRL first and last; the reference is not precomputed."""
    big = CUDA and torch.cuda.get_device_properties(0).total_memory > 60e9
    shape = TINY
    if CUDA:
        shape = Shape(1536, 28, 151_936, 12, 2, 128, 8960) if big else Shape(1024, 28, 151_936, 16, 8, 128, 3072)
    dtype = torch.bfloat16 if CUDA and lora else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        student = make_student(Path(folder), shape, dtype)
        size = sum(p.numel() for p in student.model.parameters()) / 1e9
        for batch, batches in ((4, 10), (8, 5)) if CUDA else ((4, 2),):
            sample = make_sample(batch, batches, 1.0 if CUDA else 0.05)
            data = make_dataset(sample.lengths, shape.vocab)
            peers: dict[str, tuple[float, float]] = {}
            for variant in ("trl", "grouped", "padded", "shared", "again"):
                keys = {"gradient_checkpointing": CUDA and not big}
                took = _time(variant, student, data, sample, batch, lora, keys)
                peers[variant] = took
                yield _time_row(variant, batch, lora, size, sample, peers)


def _time(
    variant: str, student: Any, data: Any, sample: Any, batch: int, lora: bool, keys: dict[str, Any]
) -> tuple[float, float]:
    """Seconds for all batches, the median of three passes after one that is not counted; and GiB added at the peak."""
    stepper = Stepper(make_trainer(variant, student, data, batch, lora, **keys), sample.batches(variant))
    before = 0
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    passes = [sum(stepper(n).wall for n in range(len(stepper.batches))) for _ in range(4)]
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if CUDA else 0.0
    del stepper
    if CUDA:
        torch.cuda.empty_cache()
    return sorted(passes[1:])[1], peak


def _time_row(
    variant: str, batch: int, lora: bool, size: float, sample: Any, peers: dict[str, tuple[float, float]]
) -> Row:
    (seconds, peak), trl = peers[variant], peers["trl"]
    tokens = {name: sum(sample.tokens(name, rows) for rows in sample.batches(name)) for name in (variant, "trl")}
    row: Row = {
        "trained": f"{'LoRA' if lora else 'full'}, {size:.2f} B",
        "batch": batch,
        "variant": VARIANTS[variant],
        "tokens, TRL random ÷ this": f"{tokens['trl'] / tokens[variant]:.2f}",
        "ms a pair": f"{1000 * seconds / len(sample.lengths):.1f}",
        "faster than TRL": f"{trl[0] / seconds:.2f}",
        "faster than TRL grouped": f"{peers['grouped'][0] / seconds:.2f}" if "grouped" in peers else "",
        "added at the peak, GiB": f"{peak:.2f}",
    }
    wanted = {"shared": ((2.3, trl[0] / seconds), (1.4, peers.get("grouped", trl)[0] / seconds))}.get(variant)
    if wanted:
        row["wanted"] = ", ".join(f"≥ {n}: {'reached' if ratio >= n else 'NOT reached'}" for n, ratio in wanted)
    return row


# Report --------------------------------------------------------------------------------------------------------------

CHECKS: Final[dict[str, Callable[[], Rows]]] = {
    "attention": attention,
    "exact": exact,
    "fallback": fallback,
    "time-lora": time_lora,
    "time-full": time_full,
    "launch": launch,
    "optimizer": optimizer,
    "qlora": qlora,
}
"""In the order of their worth, should the time not last."""


def machine() -> str:
    """The GPU, the date and the versions."""
    gpu = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}" if CUDA else "no GPU: a rehearsal"
    return f"{gpu}; {where('torch', 'trl', 'transformers', 'peft', 'accelerate', 'bitsandbytes', 'deepspeed')}"


def run_check(name: str, out: Path, seconds: float) -> list[Row]:
    """The rows of a check; its process has so many seconds."""
    rows, began = out / f"{name}.jsonl", time.monotonic()
    rows.touch()
    command = [sys.executable, __file__, "--out", str(out), "--one", name, *([] if CUDA else ["--cpu"])]
    end = ""
    with (out / "gpu.log").open("a") as log:
        print(f"== {name}", file=log, flush=True)
        env = os.environ | ({} if name == "launch" else _one_gpu())
        with subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True) as process:
            try:
                code = process.wait(seconds)
                end = f"exit code {code}; see gpu.log" if code else ""
            except subprocess.TimeoutExpired:
                end = f"ended after {seconds:.0f} s; see gpu.log"
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # and whatever it started
    made = [json.loads(line) for line in rows.read_text().splitlines()]
    rows.unlink()
    if end:
        made.append(found("the check itself", False, end))
    print(f"{name}: {len(made)} rows, {time.monotonic() - began:.0f} s", flush=True)
    return [{"check": name, **row} for row in made]


def report(out: Path, rows: Sequence[Row], about: str) -> None:
    """gpu.json and gpu.md."""
    checks = [row for row in rows if "state" in row]
    times = [{name: row[name] for name in row if name != "check"} for row in rows if "state" not in row]
    (out / "gpu.json").write_text(json.dumps({"machine": about, "checks": checks, "times": times}, indent=1))
    tables = [table(some) for some in (times, checks) if some]
    (out / "gpu.md").write_text("\n\n".join([about, *tables, ""]))


def main() -> None:
    """Run checks, or one of them in this process."""
    parser = argparse.ArgumentParser(description="Check and time training on a GPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.md")
    parser.add_argument("--cpu", action="store_true", help="a rehearsal: tiny models, no GPU")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=[*CHECKS])
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all of it")
    parser.add_argument("--one", choices=CHECKS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        with (args.out / f"{args.one}.jsonl").open("a") as lines:
            for row in CHECKS[args.one]():
                print(json.dumps(row), file=lines, flush=True)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "gpu.log").write_text("")
    if not CUDA and not args.cpu:
        sys.exit("torch sees no CUDA device; --cpu rehearses the checks without one")
    about, ends = machine(), time.monotonic() + 60 * args.minutes
    rows: list[Row] = []
    for name in args.only:
        rows += run_check(name, args.out, min(LONGEST, max(ends - time.monotonic(), 1.0)))
        report(args.out, rows, about)
    with suppress(BrokenPipeError):
        print((args.out / "gpu.md").read_text())
    sys.exit(any(row.get("state") == "FAILED" for row in rows))


if __name__ == "__main__":
    main()
