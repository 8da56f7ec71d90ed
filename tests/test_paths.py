"""Paths that cannot be written: one line that names them, nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import Sp2dpo
from report_runs import make_run, pair

COMMANDS = {
    "audit errors": ("audit", "errors", "{run}", "-o", "{path}.csv"),
    "audit errors for Argilla": ("audit", "errors", "{run}", "-o", "{path}.json"),
    "audit sample": ("audit", "sample", "{run}", "-o", "{path}.csv"),
    "compare": ("compare", "{run}", "-o", "{path}.html"),
    "publish": ("publish", "{run}", "-o", "{path}"),
    "prepare": ("prepare", "{run}/../pairs.jsonl", "-o", "{path}.parquet"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_below_a_file_is_one_line_that_names_it(sp2dpo: Sp2dpo, tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "p", [pair(n) for n in range(4)])
    (tmp_path / "afile").write_text("mine")
    words = [word.format(run=run.path, path=tmp_path / "afile" / "x") for word in COMMANDS[name]]
    ran = sp2dpo(*words)
    assert ran.code == 2
    assert "afile" in ran.err.splitlines()[-1]
    assert ran.err.splitlines()[-1].startswith("sp2dpo: ")
    assert (tmp_path / "afile").read_text() == "mine"


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("publish", "audit sample")])
def test_an_output_that_is_a_folder_is_refused_and_leaves_no_partial_file(
    sp2dpo: Sp2dpo, tmp_path: Path, name: str
) -> None:
    run = make_run(tmp_path / "p", [pair(n) for n in range(4)])
    words = [word.format(run=run.path, path=tmp_path / "x") for word in COMMANDS[name]]
    Path(words[-1]).mkdir()
    ran = sp2dpo(*words)
    assert ran.code == 2
    assert ran.err.splitlines()[-1] == f"sp2dpo: {words[-1]}: Is a directory; choose another path"
    assert list(tmp_path.rglob("*.partial")) == []
