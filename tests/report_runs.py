"""Run directories for the tests of the report: a few pairs with recorded answers, made in a moment, not trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from sp2dpo.annotate.run import annotate
from sp2dpo.arms import arm_of
from sp2dpo.hashing import sha256_file
from sp2dpo.pairs import pair_id
from sp2dpo.process import load_process
from sp2dpo.runs import Run, open_run
from sp2dpo.stages import prepare_run, read_schedule, schedule_run
from sp2dpo.tables import write_manifest, write_table
from sp2dpo.train.data import HELD_OUT_SCHEMA, arm_columns

KEYS = ("semantic_gap_category", "semantic_gap_magnitude", "semantic_gap_confidence")

HOSTILE = (
    "</script><script>alert(1)</script> {{ 7*7 }} {% raw %} <img src=x onerror=alert(2)> "
    "<style>body{display:none}</style> <details open ontoggle=alert(3)> </div></main> "
    + "w" * 3000
    + " \x00\x07\x1b[31m \u202edesrever\u202c שלום עולם"
)

Answer = Callable[[int, str, str], str]


def pair(n: int, text: str = "", **own: Any) -> dict[str, Any]:
    """One row of a source, with a prompt_id that tells its number."""
    return {
        "prompt_id": f"p{n}",
        "prompt": [{"role": "user", "content": f"Question {n} {text}"}],
        "chosen": [{"role": "assistant", "content": f"Good answer {n} {text}"}],
        "rejected": [{"role": "assistant", "content": f"Bad answer {n} {text}"}],
        **own,
    }


def judged(category: str, magnitude: float, confidence: float) -> str:
    return json.dumps(dict(zip(KEYS, (category, magnitude, confidence), strict=True)))


def by_number(n: int, annotator: str, variant: str) -> str:
    """Safety for even pairs and Style for odd ones, with magnitudes that grow with the number of the pair."""
    return judged("Style" if n % 2 else "Safety", min(n / 10, 1.0), 0.9)


def make_run(
    folder: Path,
    rows: Sequence[dict[str, Any]],
    answer: Answer = by_number,
    *,
    annotators: Sequence[str] = ("a",),
    variants: Sequence[str] = ("v1", "v2", "v3"),
    methods: Sequence[str] = (),
    known_reversed: str | None = None,
    schedule: Mapping[str, Any] | None = None,
    train: Mapping[str, Any] | None = None,
) -> Run:
    """A scheduled run; an answer that is empty is left out of the recording."""
    folder.mkdir(parents=True, exist_ok=True)
    _lines(folder / "pairs.jsonl", rows)
    for a in annotators:
        asked = [(n, row, v) for n, row in enumerate(rows) for v in variants]
        _lines(
            folder / f"{a}.jsonl",
            [{"pair_id": _id(row), "variant": v, "raw_text": text} for n, row, v in asked if (text := answer(n, a, v))],
        )
    recorded = [{"name": a, "kind": "recorded", "model": f"model-of-{a}", "calls": f"{a}.jsonl"} for a in annotators]
    settings: dict[str, Any] = {"name": "small", "data": {"source": "pairs.jsonl"}}
    settings["panel"] = {"variants": list(variants), "annotators": recorded}
    if schedule:
        settings["schedule"] = dict(schedule)
    if methods:
        settings |= {"student": {"model": "toy"}, "train": {"methods": list(methods), **(train or {})}}
    if known_reversed:
        settings["report"] = {"known_reversed": known_reversed}
    (folder / "process.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return _scheduled(folder / "process.yaml", folder / "run")


def with_predictor(run: Run, *, alone: bool = False) -> Run:
    """The same pairs judged by the panel of a run and by `local`, a predictor that is fitted to it; or by that one."""
    from sp2dpo.distill.make import distill_run

    folder = run.path.parent
    distill_run(run, folder / "predictor")
    settings = yaml.safe_load((folder / "process.yaml").read_text(encoding="utf-8"))
    local = {"name": "local", "kind": "distilled", "model": "predictor"}
    settings["panel"]["annotators"] = [local] if alone else [*settings["panel"]["annotators"], local]
    (folder / "predicted.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return _scheduled(folder / "predicted.yaml", folder / "predicted")


def _scheduled(process: Path, path: Path) -> Run:
    run = open_run(load_process(process), path)
    prepare_run(run)
    annotate(run)
    schedule_run(run)
    return run


def _lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _id(row: Mapping[str, Any]) -> str:
    return pair_id(row["prompt"], row["chosen"], row["rejected"])


def put_margins(
    run: Run,
    method: str,
    margins: Sequence[tuple[int, int, float]],
    *,
    held_out: Mapping[int, float] | None = None,
    log: Sequence[Mapping[str, float]] = (),
    **inputs: str,
) -> None:
    """What a finished training leaves for the report: margins as (step, row of the schedule, Δ) and a manifest.

    Args:
        held_out: Δ after training by row of the schedule.
        log: entries of the trainer's log.
        inputs: more inputs of the manifest.
    """
    folder = run.training(method)
    folder.mkdir(parents=True, exist_ok=True)
    if margins:
        step, row, margin = zip(*margins, strict=True)
        table = pa.table({"step": step, "row": row, "margin": pa.array(margin, pa.float32())})
        write_table(folder / "margins.parquet", table)
    if held_out is not None:
        write_table(folder / "held_out.parquet", _held_out(held_out))
    if log:
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": list(log)}), encoding="utf-8")
    write_manifest(
        folder / "metrics.json",
        files={path.name: sha256_file(path) for path in sorted(folder.glob("*.parquet"))},
        inputs={run.schedule.name: sha256_file(run.schedule), **inputs},
        lambda_hash=run.process.lambda_hash,
    )


def _held_out(margins: Mapping[int, float]) -> pa.Table:
    """Half of each margin comes from a chosen response that grew likelier, half from the other."""
    half = [margin / 2 for margin in margins.values()]
    columns = [[*margins], half, [-value for value in half], [-20.0 + value for value in half], [-20.5] * len(half)]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, HELD_OUT_SCHEMA, strict=True)]
    return pa.table(arrays, schema=HELD_OUT_SCHEMA)


def put_arms(run: Run, names: Sequence[str], *, share: float = 0.25, passes: int = 3, batch: int = 4) -> None:
    """A plausible sweep: margins that grow as each pair's own pull lets them, and held-out pairs that follow."""
    schedule = read_schedule(run)
    random, n, settings = np.random.default_rng(0), schedule.num_rows, run.process.settings
    out = random.permutation(n) < round(share * n)
    train = settings.train
    assert train is not None
    worth = np.clip(1.2 * schedule["effective_gap"].to_numpy() + random.normal(0, 0.4, n), -0.6, None)
    noise = random.normal(0, 0.6, (passes + 1, n))
    for name in names:
        arm = arm_of(name, beta=train.beta, knobs=train.knobs)
        beta, weight = arm_columns(schedule, arm, held_out=out, seed=settings.schedule.random_seed)
        delta, margins, log = np.zeros(n), [], []
        for epoch in range(passes if arm.trained else 0):
            for at in np.array_split(
                np.random.default_rng(epoch).permutation(np.flatnonzero(~out)), (~out).sum() / batch
            ):
                step = len({step for step, _, _ in margins})
                margins += [(step, int(row), float(delta[row] + noise[epoch, row])) for row in at]
                pull = weight[at] / (1 + np.exp(beta[at] * delta[at]))
                delta[at] += 8 * pull
                delta += 1.5 * pull.mean() * worth
                loss = float((weight[at] * np.logaddexp(0, -beta[at] * delta[at])).mean())
                log.append({"step": step + 1, "loss": loss, "grad_norm": 9 * loss, "learning_rate": 1e-4 / (step + 1)})
        held = {int(row): float(delta[row] + arm.trained * noise[-1, row]) for row in np.flatnonzero(out)}
        put_margins(run, name, margins, held_out=held if share else None, log=log)
