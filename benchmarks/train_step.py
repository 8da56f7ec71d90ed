"""Training steps beside TRL's, on pairs as long as UltraFeedback's. One command, twenty minutes on one quiet core:

    python benchmarks/train_step.py [--quick] [--part step overhead end-to-end memory] [--threads N] [--write]

All variants have the same weights, pairs and seed. Where times are compared, the variants take turns in one process, in
an order that rotates, and TRL runs twice: what it says of itself is the error of the rest. Read the CPU seconds; they
change little when the machine does other work. `--write` puts the tables into docs/benchmarks.md; `--quick` is small,
to see that everything runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

for _name in ("OMP_NUM_THREADS", "TQDM_DISABLE", "HF_HUB_OFFLINE"):
    os.environ.setdefault(_name, "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from pages import ROOT, Row, table, where, write  # noqa: E402
from sp2dpo.train.terminal import quiet  # noqa: E402
from train_work import (  # noqa: E402
    VARIANTS,
    Sample,
    Shape,
    Stepper,
    Student,
    Took,
    make_dataset,
    make_sample,
    make_student,
    make_trainer,
    token_law,
)

__all__ = ["Size", "bootstrap", "spread"]

Series = NDArray[np.float64]


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    shape: Shape
    scale: float = 1.0
    batches: tuple[tuple[int, int], ...] = ((4, 6), (8, 4))
    """Pairs in a batch, and batches; even, for gradients are accumulated over two."""

    rounds: int = 300
    """Of short steps, where overhead is measured."""

    flags: tuple[str, ...] = ()
    """That ask for this size."""


TINY: Final = Shape(hidden=64, layers=2, vocab=512, heads=2, kv_heads=1, head_dim=32, intermediate=128)
FULL: Final = Size(Shape())
QUICK: Final = Size(TINY, scale=0.05, batches=((4, 2),), rounds=3, flags=("--quick",))

Measured = tuple[list[Row], list[str]]
"""Rows of a table, and lines below it."""


def bootstrap(measure: Callable[[NDArray[np.intp]], float], steps: int) -> str:
    """A measure over all steps, and its middle 95 % over 2,000 draws of steps with replacement."""
    dice = np.random.default_rng(0)
    low, high = np.quantile([measure(dice.integers(0, steps, steps)) for _ in range(2000)], [0.025, 0.975])
    return f"{measure(np.arange(steps)):.3f} [{low:.3f}, {high:.3f}]"


def spread(seconds: Series) -> str:
    """Median and quartiles."""
    low, median, high = np.quantile(seconds, [0.25, 0.5, 0.75])
    return f"{median:.3g} ({low:.3g} to {high:.3g})"


def target(what: str, value: float, wanted: str, reached: bool) -> str:
    """One line: a target, what was measured, and whether that reaches it."""
    return f"- {what}: {value:.2f}, wanted {wanted}: {'reached' if reached else 'NOT reached'}"


def take_turns(steppers: dict[str, Stepper], order: Sequence[int]) -> dict[str, list[Took]]:
    """The batches in this order, each by every variant; who begins changes with each."""
    took: dict[str, list[Took]] = {variant: [] for variant in steppers}
    names = [*steppers]
    for turn, n in enumerate(order):
        for variant in names[turn % len(names) :] + names[: turn % len(names)]:
            took[variant].append(steppers[variant](n))
    return took


def _cpu(took: Sequence[Took]) -> Series:
    return np.array([one.cpu for one in took])


def _wall(took: Sequence[Took]) -> Series:
    return np.array([one.wall for one in took])


# Step ----------------------------------------------------------------------------------------------------------------


def step(folder: Path, size: Size) -> Measured:
    """Forward, reference, backward and optimizer, from token ids to new weights; the reference is not precomputed."""
    rows, notes = [], []
    student = make_student(folder, size.shape)
    for lora in (False, True):
        for batch, batches in size.batches:
            sample = make_sample(batch, batches, size.scale)
            data = make_dataset(sample.lengths, size.shape.vocab)
            variants = [name for name in VARIANTS if not lora or name in ("trl", "grouped", "shared")]
            trainers = {name: make_trainer(name, student, data, batch, lora) for name in variants}
            took = take_turns(
                {name: Stepper(trainer, sample.batches(name)) for name, trainer in trainers.items()}, range(batches)
            )
            rows += [_step_row(name, took, sample, batch, lora) for name in variants]
            notes += _step_targets(took, "LoRA" if lora else "full", batch)
            del trainers
            gc.collect()
    for batch, _ in size.batches:
        _, random, grouped = token_law(batch)
        law = f"TRL random {random:.2f}, grouped {grouped:.2f}"
        notes.append(f"- tokens of 60,000 pairs at batch {batch}, of the shared layout's: {law}")
    return rows, notes


def _step_row(name: str, took: dict[str, list[Took]], sample: Sample, batch: int, lora: bool) -> Row:
    tokens = {variant: _tokens(sample, variant) for variant in (name, "trl")}

    def faster(seconds: Callable[[Sequence[Took]], Series]) -> str:
        """TRL's seconds, of this variant's, for all batches; drawn are the seconds a token of each."""
        one, other = (seconds(took[variant]) / tokens[variant] for variant in ("trl", name))
        return bootstrap(lambda n: float(tokens["trl"] @ one[n] / (tokens[name] @ other[n])), len(one))

    return {
        "trained": "LoRA" if lora else "full",
        "batch": batch,
        "variant": VARIANTS[name],
        "tokens, TRL random ÷ this": f"{tokens['trl'].sum() / tokens[name].sum():.2f}",
        "CPU s a step": spread(_cpu(took[name])),
        "seconds a step": spread(_wall(took[name])),
        "faster than TRL, CPU": faster(_cpu),
        "faster, clock": faster(_wall),
    }


def _tokens(sample: Sample, variant: str) -> Series:
    return np.array([float(sample.tokens(variant, batch)) for batch in sample.batches(variant)])


def _step_targets(took: dict[str, list[Took]], trained: str, batch: int) -> list[str]:
    ours = _cpu(took["shared"]).sum()
    lines = []
    for variant, wanted in (("trl", 3.3), ("grouped", 2.2)):
        ratio = _cpu(took[variant]).sum() / ours
        lines.append(
            target(f"{trained}, batch {batch}, faster than {VARIANTS[variant]}", ratio, f"≥ {wanted}", ratio >= wanted)
        )
    return lines


# Overhead ------------------------------------------------------------------------------------------------------------


def overhead(folder: Path, size: Size) -> Measured:
    """Per-pair β in TRL's layout beside plain TRL: short steps of a tiny student with a precomputed reference."""
    student = make_student(folder, TINY)
    sample = make_sample(4, 8, scale=0.25)
    data = make_dataset(sample.lengths, TINY.vocab)
    steppers = {
        name: Stepper(make_trainer(name, student, data, 4, lora=False, precompute_ref_log_probs=True), sample.random)
        for name in ("trl", "again", "padded")
    }
    take_turns(steppers, range(min(8, size.rounds)))
    took = take_turns(steppers, [n % 8 for n in range(size.rounds)])
    trl = _cpu(took["trl"])
    rows = []
    for name in ("again", "padded"):
        other = _cpu(took[name])
        low, high = np.quantile(other / trl, [0.25, 0.75])
        rows.append(
            {
                "beside TRL": VARIANTS[name],
                "steps of each": len(other),
                "ratio of CPU s, median [95 %]": _median(other / trl),
                "quartiles": f"{low:.3f} to {high:.3f}",
                "difference, ms a step": f"{1000 * np.median(other - trl):+.2f}",
            }
        )
    ratio = float(np.median(_cpu(took["padded"]) / trl))
    notes = [
        f"- a step of TRL takes {1000 * np.median(trl):.0f} ms of CPU here",
        target("overhead of per-pair β", ratio, "1.00 ± 0.01", abs(ratio - 1) <= 0.01),
    ]
    return rows, notes


def _median(ratios: Series) -> str:
    return bootstrap(lambda n: float(np.median(ratios[n])), len(ratios))


# End to end ----------------------------------------------------------------------------------------------------------

RECIPE: Final[dict[str, Any]] = {
    "precompute_ref_log_probs": True,
    "gradient_checkpointing": True,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 1,
    "train_sampling_strategy": "sequential",
}
"""The paper's (L.2), but fp32, no dropout, no warm-up and a high learning rate: losses that move within a few steps and
can be compared. The pairs come shuffled.
"""


def end_to_end(folder: Path, size: Size) -> Measured:
    """`trainer.train()` with the paper's LoRA, precomputed reference, gradient checkpointing and accumulation of 2."""
    rows, notes = [], []
    student = make_student(folder, size.shape)
    for batch, batches in size.batches:
        sample = make_sample(batch, batches // 2 * 2, size.scale)
        lengths = sample.lengths[[row for rows_ in sample.random for row in rows_]]
        cache = folder / f"reference-{batch}"
        runs = {
            name: _whole(name, student, make_dataset(lengths, size.shape.vocab, beta=0.1), batch, cache)
            for name in ("trl", "shared")
        }
        other = make_dataset(lengths, size.shape.vocab, beta=0.3)
        cached, _, _ = _whole("shared", student, other, batch, cache, train=False)
        for name, (made, trained, _) in runs.items():
            rows.append(_whole_row(VARIANTS[name], batch, made, trained, runs["trl"]))
        rows.append(_whole_row("sp2dpo, another β, reference cached", batch, cached, None, runs["trl"]))
        losses = [np.array(runs[name][2]) for name in ("trl", "shared")]
        off = float(np.abs(losses[1] / losses[0] - 1).max())
        notes.append(
            f"- batch {batch}, losses of {len(losses[0])} optimizer steps: relative difference at most {off:.1e}"
        )
        ratio = runs["trl"][1].cpu / runs["shared"][1].cpu
        notes.append(target(f"batch {batch}, end to end faster than TRL", ratio, "≥ 3.3", ratio >= 3.3))
    return rows, notes


def _whole(
    name: str, student: Student, data: Any, batch: int, cache: Path, train: bool = True
) -> tuple[Took, Took, list[float]]:
    """What it takes to make a trainer, and to train; the losses."""
    ours = {"reference_cache": str(cache)} if name == "shared" else {"beta": 0.1}
    wall, cpu = time.perf_counter(), time.process_time()
    trainer = make_trainer(name, student, data, batch, lora=True, **RECIPE, **ours)
    made = Took(time.perf_counter() - wall, time.process_time() - cpu)
    wall, cpu = time.perf_counter(), time.process_time()
    if train:
        trainer.train()
    trained = Took(time.perf_counter() - wall, time.process_time() - cpu)
    return made, trained, [log["loss"] for log in trainer.state.log_history if "loss" in log]


def _whole_row(name: str, batch: int, made: Took, trained: Took | None, trl: tuple[Took, Took, list[float]]) -> Row:
    row: Row = {
        "batch": batch,
        "trainer": name,
        "CPU s to make it, with the reference": f"{made.cpu:.1f}",
        "faster to make": f"{trl[0].cpu / made.cpu:.2f}",
    }
    if trained is None:
        return row
    both = (trl[0].cpu + trl[1].cpu) / (made.cpu + trained.cpu)
    return row | {
        "CPU s to train": f"{trained.cpu:.1f}",
        "faster to train": f"{trl[1].cpu / trained.cpu:.2f}",
        "by the clock": f"{trl[1].wall / trained.wall:.2f}",
        "faster in all": f"{both:.2f}",
    }


# Memory --------------------------------------------------------------------------------------------------------------


def memory(folder: Path, size: Size) -> Measured:
    """What a step on the largest batch needs beside weights and optimizer state, in a process of its own."""
    rows, notes = [], []
    for lora in [False] if size is QUICK else [False, True]:
        for batch, _ in size.batches:
            added = {name: _added(name, batch, lora, size) for name in ("trl", "grouped", "shared")}
            for name, mib in added.items():
                rows.append(
                    {
                        "trained": "LoRA" if lora else "full",
                        "batch": batch,
                        "variant": VARIANTS[name],
                        "added at the peak, MiB": f"{mib:.0f}",
                        "of TRL's": f"{mib / added['trl']:.2f}",
                    }
                )
            share = added["shared"] / added["trl"]
            what = f"{rows[-1]['trained']}, batch {batch}, added peak memory of TRL's"
            notes.append(target(what, share, "≤ 0.50", share <= 0.5))
    return rows, notes


def _added(name: str, batch: int, lora: bool, size: Size) -> float:
    case = json.dumps({"name": name, "batch": batch, "lora": lora})
    command = [sys.executable, __file__, *size.flags, "--threads", str(torch.get_num_threads()), "--measure", case]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, text=True)
    return float(done.stdout.split()[-1])


def largest_step(folder: Path, size: Size, name: str, batch: int, lora: bool) -> float:
    """MiB that one step on the largest batch of a variant adds to the resident memory of this process."""
    student = make_student(folder, size.shape)
    sample = make_sample(batch, dict(size.batches)[batch], size.scale)
    largest = max(sample.batches(name), key=lambda rows: sample.tokens(name, rows))
    trainer = make_trainer(name, student, make_dataset(sample.lengths, size.shape.vocab), batch, lora)
    stepper = Stepper(trainer, [largest])
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten; that of imports may be above a step's
    before = _status("VmRSS")
    stepper(0)
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    """KiB, as Linux has them. `ru_maxrss` will not do: it begins with that of the process that started this one."""
    match = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1])


# Tables --------------------------------------------------------------------------------------------------------------

PARTS: Final[dict[str, Callable[[Path, Size], Measured]]] = {
    "overhead": overhead,
    "step": step,
    "end-to-end": end_to_end,
    "memory": memory,
}


def main() -> None:
    """Measure, print and perhaps write."""
    parser = argparse.ArgumentParser(description="Measure training steps beside TRL's.")
    parser.add_argument("--quick", action="store_true", help="small, to see that everything runs")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=[*PARTS], help="these parts")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size = QUICK if args.quick else FULL
    with tempfile.TemporaryDirectory(prefix="sp2dpo-benchmark-") as folder, quiet():
        if args.measure:
            print(largest_step(Path(folder), size, **args.measure))
            return
        for name in args.part:
            machine = f"{where('torch', 'trl', 'transformers', 'peft')}, threads {args.threads}"
            rows, notes = PARTS[name](Path(folder) / name, size)
            text = f"{machine}\n\n{table(rows)}\n\n" + "\n".join(notes)
            print(f"\n{name}: {PARTS[name].__doc__}\n\n{text}", flush=True)
            if args.write:
                write(ROOT / "docs" / "benchmarks.md", f"train-{name}", text)


if __name__ == "__main__":
    main()
