"""Run directories for the tests of the report: a few pairs with recorded answers, made in a moment, not trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from sp2dpo.annotate.run import annotate
from sp2dpo.hashing import sha256_file
from sp2dpo.pairs import pair_id
from sp2dpo.process import load_process
from sp2dpo.runs import Run, open_run
from sp2dpo.stages import prepare_run, schedule_run
from sp2dpo.tables import write_manifest, write_table

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
        settings |= {"student": {"model": "toy"}, "train": {"methods": list(methods)}}
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


def put_margins(run: Run, method: str, margins: Sequence[tuple[int, int, float]]) -> None:
    """What a finished training leaves for the report: margins as (step, row of the schedule, Δ) and a manifest."""
    folder = run.training(method)
    step, row, margin = zip(*margins, strict=True)
    table = pa.table({"step": step, "row": row, "margin": pa.array(margin, pa.float32())})
    write_table(folder / "margins.parquet", table)
    write_manifest(
        folder / "metrics.json",
        files={"margins.parquet": sha256_file(folder / "margins.parquet")},
        inputs={run.schedule.name: sha256_file(run.schedule)},
        lambda_hash=run.process.lambda_hash,
    )
