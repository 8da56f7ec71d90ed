"""What a run has to say about itself, gathered once for the card and for the Croissant metadata. Writes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

import pyarrow as pa

from sp2dpo.calls import open_calls
from sp2dpo.errors import RunDirError, Unfinished
from sp2dpo.evidence import Evidence, read_evidence
from sp2dpo.hashing import sha256_file
from sp2dpo.pairs import read_pairs
from sp2dpo.report.provenance import Setting, settings_of
from sp2dpo.report.tally import Served, Tally, tally_calls
from sp2dpo.rubric import CATEGORIES
from sp2dpo.runs import Run, read_run
from sp2dpo.stages import read_excluded, read_schedule
from sp2dpo.tables import read_manifest
from sp2dpo.train.data import training_table

__all__ = ["CategoryRow", "Drop", "Facts", "read_current", "read_facts", "trained_pairs"]


@dataclass(frozen=True)
class CategoryRow:
    """β of the pairs of one category."""

    name: str
    n: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Drop:
    """Rows of the source that were left out at a stage for the same reason."""

    stage: str
    reason: str
    n: int


@dataclass(frozen=True)
class Facts:
    """A run whose schedule is as its manifest says."""

    run: Run
    evidence: Evidence
    tally: Tally
    calls_hash: str
    pairs_manifest: Mapping[str, Any]
    schedule_manifest: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.run.process.settings.name

    @property
    def created(self) -> str:
        """The day on which the schedule was made, as YYYY-MM-DD."""
        return str(self.schedule_manifest["created"])[:10]

    @property
    def source(self) -> str:
        """The hub id, or the bare name of the file or folder."""
        data = self.run.process.settings.data
        return data.source if data.revision else PurePath(data.source).name

    @property
    def raw(self) -> int:
        return int(self.pairs_manifest["counts"]["raw"])

    @cached_property
    def drops(self) -> list[Drop]:
        """Every reason, the most frequent first."""
        groups = read_excluded(self.run).group_by(["stage", "reason"], use_threads=False).aggregate([([], "count_all")])
        drops = [Drop(row["stage"], row["reason"], row["count_all"]) for row in groups.to_pylist()]
        return sorted(drops, key=lambda drop: (-drop.n, drop.stage, drop.reason))

    @property
    def categories(self) -> list[CategoryRow]:
        """The categories that occur, in the order of priority."""
        beta, of_i = self.evidence.beta_i, self.evidence.category_i
        found = [(name, beta[of_i == name]) for name in CATEGORIES if (of_i == name).any()]
        return [CategoryRow(n, len(of), float(of.mean()), float(of.min()), float(of.max())) for n, of in found]

    @property
    def served(self) -> list[Served]:
        """Which model answered under which name, in the order of the panel."""
        order = {name: n for n, name in enumerate(self.evidence.annotators)}
        return sorted(self.tally.served.values(), key=lambda one: (order.get(one.annotator, len(order)), one.first))

    @property
    def decoding(self) -> list[Setting]:
        return settings_of(self.tally)


def read_current(path: Path) -> Run:
    """A run whose schedule is the one that its manifest describes.

    Raises:
        RunDirError: no run directory, or no schedule yet.
        Unfinished: a file of the schedule, or what it was made from, is not as the manifest says; it is named.
    """
    run = read_run(path)
    manifest = read_manifest(run.schedule)
    if manifest is None:
        raise RunDirError(f"{path} has no finished schedule; make it with: sp2dpo schedule PROCESS.yaml")
    with open_calls(run.calls) as log:
        now = {run.calls.name: log.content_hash()}
    for name, sha in {**manifest["inputs"], **manifest["files"]}.items():
        found = now.get(name) or (sha256_file(path / name) if (path / name).is_file() else "missing")
        if found != sha:
            raise Unfinished(_changed(path / name, found, sha))
    if manifest["lambda"] != run.process.lambda_hash:
        raise Unfinished(_changed(run.schedule, manifest["lambda"], run.process.lambda_hash))
    return run


def _changed(path: Path, found: str, described: str) -> str:
    return (
        f"{path} is not what the schedule's manifest describes (hash {found[:12]}, not {described[:12]}), so nothing "
        f"is published. To see what differs: sp2dpo verify {path.parent}. If answers were added since, make the "
        "schedule again: sp2dpo schedule PROCESS.yaml"
    )


def read_facts(run: Run) -> Facts:
    """Everything that the card tells, from the files of the run.

    Raises:
        Sp2dpoError: a file of the run is missing or does not fit; the message names the command that makes it.
    """
    evidence = read_evidence(run)
    with open_calls(run.calls) as log:
        tally = tally_calls(log, evidence)
        calls_hash = log.content_hash()
    return Facts(run, evidence, tally, calls_hash, read_manifest(run.pairs) or {}, read_manifest(run.schedule) or {})


def trained_pairs(run: Run) -> pa.Table:
    """`prompt`, `chosen`, `rejected`, `beta` (float32) and `row`, as training reads them, in the schedule's order.

    Raises:
        ScheduleError: a β or a text that training would refuse.
    """
    low, high = run.process.settings.schedule.widest_envelope
    pairs = read_pairs(run.pairs, "sp2dpo annotate PROCESS.yaml")
    return training_table(pairs, read_schedule(run), "sp2dpo", beta=0.0, beta_min=low, beta_max=high)
