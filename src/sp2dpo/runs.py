"""The run directory: one folder, one λ. Names of its files; nothing of what is in them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sp2dpo.errors import RunDirError
from sp2dpo.process import Process, process_of
from sp2dpo.prompts import write_pack
from sp2dpo.tables import write_atomic

__all__ = ["Run", "differences", "dump", "open_run", "read_run"]


@dataclass(frozen=True)
class Run:
    """A run directory and the process that it belongs to."""

    path: Path
    process: Process

    @property
    def pairs(self) -> Path:
        return self.path / "pairs.parquet"

    @property
    def calls(self) -> Path:
        return self.path / "calls.sqlite"

    @property
    def gaps(self) -> Path:
        return self.path / "gaps.parquet"

    @property
    def schedule(self) -> Path:
        return self.path / "schedule.parquet"

    @property
    def excluded(self) -> Path:
        return self.path / "excluded.csv"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def command(self, verb: str) -> str:
        """The command line that runs a stage in this directory, for messages."""
        return f"sp2dpo {verb} PROCESS.yaml --run-dir {shlex.quote(str(self.path))}"

    def training(self, method: str) -> Path:
        return self.path / "train" / method


def read_run(path: Path) -> Run:
    """An existing run directory, with the process that it was made by."""
    return Run(path, process_of(path))


def open_run(process: Process, path: Path | None = None) -> Run:
    """The run directory of a process, made on first use.

    Raises:
        RunDirError: the directory belongs to another λ; the keys that differ are named.
    """
    path = path or Path("runs") / process.settings.name
    if (path / "process.yaml").is_file():
        _check_same(process, path)
    elif path.is_dir() and any(path.iterdir()):
        raise RunDirError(f"{path} holds files but no process.yaml; choose another --run-dir")
    else:
        path.mkdir(parents=True, exist_ok=True)
        write_pack(process.pack, path / "prompts")
        write_atomic(path / "process.yaml", lambda partial: partial.write_text(dump(process), encoding="utf-8"))
    return Run(path, process)


def dump(process: Process) -> str:
    """The text of `process.yaml` in a run directory."""
    head = "# The process (λ) as resolved. Written by sp2dpo; a change here is found by `sp2dpo verify`.\n"
    return head + yaml.safe_dump(
        {**process.resolved, "lambda": process.lambda_hash},
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=None,
    )


def _check_same(process: Process, path: Path) -> None:
    other = process_of(path)
    if other.lambda_hash == process.lambda_hash:
        return
    keys = sorted(differences(other.resolved, process.resolved))
    raise RunDirError(
        f"{path} was made with another process (λ {other.lambda_hash[:12]}, not {process.lambda_hash[:12]}); "
        f"different: {', '.join(keys)}. Choose another --run-dir; answers to questions that did not change are taken "
        f"over at no cost with: sp2dpo annotate PROCESS.yaml --run-dir NEW --reuse {path}"
    )


def differences(one: Any, other: Any, key: str = "") -> Iterator[str]:
    """Keys, with dots between levels, at which two resolved processes differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in one.keys() | other.keys():
            yield from differences(one.get(name), other.get(name), f"{key}.{name}".lstrip("."))
    elif json.dumps(one, sort_keys=True) != json.dumps(other, sort_keys=True):
        yield key
