"""Progress on a terminal of 80 columns: what is told about the work never costs its count or its times."""

from __future__ import annotations

import io
import re
import sys

import pytest

from sp2dpo.progress import Progress


class Terminal(io.StringIO):
    """Says of itself that it is a terminal; rich takes its width from the environment."""

    def isatty(self) -> bool:
        return True

    @property
    def last(self) -> list[str]:
        """The lines as they stand in the end."""
        drawn = self.getvalue().rpartition("\x1b[2K")[2]
        return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn).splitlines() if line.strip()]


def narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """In place of stderr; no fixture, since pytest sets its own stderr between fixtures and test."""
    made = Terminal()
    monkeypatch.setattr(sys, "stderr", made)
    for name, value in {"COLUMNS": "80", "LINES": "24", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return made


TIMES = r"\d:\d\d:\d\d eta (\d:\d\d:\d\d|-:--:--)$"
FAILURES = {"not_recorded": 652, "out_of_range": 109, "several_objects": 106, "empty": 65}


@pytest.mark.parametrize(
    ("what", "done", "total"),
    [("annotate", 3_052, 9_000), ("annotate", 61_023, 549_207), ("train sp2dpo-beta", 12, 48)],
)
def test_the_count_and_the_times_are_whole_beside_long_notes(
    monkeypatch: pytest.MonkeyPatch, what: str, done: int, total: int
) -> None:
    terminal = narrow_terminal(monkeypatch)
    with Progress(what, total) as progress:
        for kind, n in FAILURES.items():
            for _ in range(n):
                progress.note(kind, 12.34)
        progress.say("", "loss 0.693 margin 0.012 accuracy 0.512")
        progress.advance(done)
    bar, *notes = terminal.last
    assert bar.startswith(f"{what} ")
    assert re.search(rf" {done}/{total} {TIMES}", bar)
    assert len(bar) <= 80
    said = " ".join(notes)
    assert said.startswith("$12.34 not_recorded:652 out_of_range:109 several_objects:106 empty:65")
    assert said.endswith("loss 0.693 margin 0.012 accuracy 0.512")


def test_without_notes_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = narrow_terminal(monkeypatch)
    with Progress("annotate", 10) as progress:
        progress.note("ok", 0.0)
        progress.advance(10)
    assert len(terminal.last) == 1
    assert re.search(rf" 10/10 {TIMES}", terminal.last[0])
