"""Documentation against the code: pages are current, links lead somewhere, commands exist, README code runs."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from sp2dpo import cli
from sp2dpo.ensemble import median_over_prompts
from sp2dpo.process import load_process
from sp2dpo.runs import open_run
from sp2dpo.temperature import envelope, schedule_beta

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_script", ROOT / "scripts" / "docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


docs = _load()


def _page_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _code_blocks(page: Path, language: str = "") -> list[str]:
    return re.findall(rf"^```{language}[^\n]*\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def _prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def test_check_finds_nothing_stale_and_no_equation_missing() -> None:
    done = subprocess.run([sys.executable, "scripts/docs.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("", 0), done.stdout + done.stderr


def test_check_shows_the_diff_of_a_stale_page_and_the_command_to_run(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(docs, "FILES", {"page.md": lambda: "as made\n"})
    (tmp_path / "page.md").write_text("as found\n")
    assert docs.main(["--check"], tmp_path) == 1
    shown = capsys.readouterr().out
    assert "\n-as found\n+as made\n" in shown
    assert "python scripts/docs.py" in shown
    assert (tmp_path / "page.md").read_text() == "as found\n"


def test_without_the_train_extra_the_key_list_is_left_out_and_said_so(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(docs, "FILES", {"keys.json": docs.keys_json})
    monkeypatch.setattr(docs, "check_equations", lambda claims: None)
    assert docs.main(["--check"], tmp_path) == 0
    assert "keys.json was left out" in capsys.readouterr().err


def test_every_equation_of_the_paper_has_a_function() -> None:
    assert sorted(docs.EQUATIONS) == list(range(1, 61))
    docs.check_equations(docs.claims_of())


def test_an_equation_without_a_function_and_one_beyond_the_paper_are_named() -> None:
    claims = [docs.Claim(n, f"module.f{n}", ROOT, "") for n in range(1, 61)]
    with pytest.raises(docs.Wrong, match=r"equation 15$"):
        docs.check_equations([claim for claim in claims if claim.number != 15])
    with pytest.raises(docs.Wrong, match=r"no equation 61 \(module\.f61\)"):
        docs.check_equations([*claims, docs.Claim(61, "module.f61", ROOT, "")])


MODULE = '''
BOTH = 1
"""A constant.

Eq. 14, 21.
"""

class Outer:
    """A class."""
    def inner(self):
        """A method that names eq. 5 in its prose.

        Eq. 29.
        """
'''


def test_claims_are_read_from_constants_and_methods_and_not_from_prose(tmp_path) -> None:
    (tmp_path / "one.py").write_text(MODULE)
    claims = [(claim.number, claim.name, claim.says) for claim in docs.claims_of(tmp_path)]
    prose = "A method that names eq. 5 in its prose."
    assert claims == [(14, "one.BOTH", "A constant."), (21, "one.BOTH", "A constant."), (29, "one.Outer.inner", prose)]


@pytest.mark.parametrize("line", ["Eq. 15 and 26.", "Eq. 15, 26", "eq. 15.", "Eqs. 15, 26.", "Eq. 15-17."])
def test_a_claim_that_is_written_otherwise_is_refused_rather_than_overlooked(tmp_path, line) -> None:
    (tmp_path / "one.py").write_text(f'def f():\n    """F.\n\n    {line}\n    """\n')
    with pytest.raises(docs.Wrong, match=re.escape(line)):
        docs.claims_of(tmp_path)


def test_a_column_without_a_word_and_a_word_without_a_column_are_named() -> None:
    with pytest.raises(docs.Wrong, match="without a word: new; not in the code: margin"):
        docs.words("margins", ["step", "row", "new"])


def test_case_3_of_appendix_k_follows_the_errata_and_not_the_print() -> None:
    gaps = [[[1.0, 0.855, 1.0], [0.855, 0.81, 0.9025], [0.9, 1.0, 1.0]]]
    beta_openai = envelope(median_over_prompts(gaps))[0, 1]
    printed = (docs.PAGES / "equations.md").read_text(encoding="utf-8")
    assert f"β {beta_openai:.5f}" in printed
    assert f"β {schedule_beta(gaps)[0]:.5f}" in printed
    assert (f"{beta_openai:.5f}", f"{schedule_beta(gaps)[0]:.5f}") == ("0.26085", "0.28695")


def test_the_paper_lists_64_schedule_columns() -> None:
    assert docs.paper_columns() == 2 + 5 * 3 * 3 + 4 * 3 + (3 + 1) + 1 == 64


PAIR = '{"prompt": "p", "chosen": "c", "rejected": "r"}\n'
PROCESS = """name: small
data: {source: pairs.jsonl}
panel: {variants: [v1], annotators: [{name: one, kind: recorded, model: m, calls: answers.jsonl}]}
"""
ANSWER = '{"semantic_gap_category": "Style", "semantic_gap_magnitude": 0.5, "semantic_gap_confidence": 0.5}'


def test_every_file_that_a_run_leaves_is_on_the_columns_page(tmp_path) -> None:
    from sp2dpo.annotate.run import annotate
    from sp2dpo.pairs import read_pairs
    from sp2dpo.stages import prepare_run, schedule_run

    (tmp_path / "pairs.jsonl").write_text(PAIR)
    (tmp_path / "answers.jsonl").write_text("{}")
    (tmp_path / "process.yaml").write_text(PROCESS)
    run = open_run(load_process(tmp_path / "process.yaml"), tmp_path / "run")
    prepare_run(run)
    pair = read_pairs(run.pairs, "")["pair_id"][0].as_py()
    answer = ANSWER.replace('"', '\\"')
    (tmp_path / "answers.jsonl").write_text(f'{{"pair_id": "{pair}", "variant": "v1", "raw_text": "{answer}"}}\n')
    annotate(run)
    schedule_run(run)
    left = {path.name + "/" * path.is_dir() for path in run.path.iterdir() if not path.name.endswith(".manifest.json")}
    assert left <= set(docs.WORDS["file"])
    assert {"pairs.parquet", "calls.sqlite", "gaps.parquet", "schedule.csv", "excluded.csv"} <= left


def test_help_is_as_wide_on_every_terminal(monkeypatch) -> None:
    wide = docs.cli_page()
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert docs.cli_page() == wide


def test_the_readme_is_under_200_lines() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 200


@pytest.mark.parametrize("page", PAGES, ids=_page_name)
def test_every_relative_link_leads_to_a_file(page) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", _prose(page))
    paths = [target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:", target)]
    assert [path for path in paths if path and not (page.parent / path).exists()] == []


def test_python_of_the_readme_runs(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    namespace: dict[str, object] = {"__name__": "readme"}
    for number, block in enumerate(_code_blocks(ROOT / "README.md", "python"), 1):
        exec(compile(block, f"README.md, python block {number}", "exec"), namespace)


def _commands(page: Path) -> Iterator[str]:
    """What stands behind `sp2dpo` in blocks of code and in `code` within lines."""
    lines = [line.strip().removeprefix("$ ") for block in _code_blocks(page) for line in block.splitlines()]
    inline = re.findall(r"`([^`\n]+)`", _prose(page))
    for text in (*lines, *inline):
        if text.startswith("sp2dpo "):
            yield re.split(r"\s#|\s+or\s\s|[|;&>]", text.removeprefix("sp2dpo "))[0]


def _unknown(command: str) -> list[str]:
    """Words of a command line that the command line does not know: its verb, or options of that verb."""
    verb: Any = typer.main.get_command(cli.app)
    rest = shlex.split(command)
    while hasattr(verb, "commands") and rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        if name not in verb.commands:
            return [name]
        verb = verb.commands[name]
    known = {"--help", *(name for parameter in verb.params for name in parameter.opts)}
    return [word for word in rest if word.startswith("-") and word.partition("=")[0] not in known]


@pytest.mark.parametrize("page", PAGES, ids=_page_name)
def test_every_command_named_exists_with_its_options(page) -> None:
    assert {command: _unknown(command) for command in _commands(page) if _unknown(command)} == {}


def test_a_command_or_option_that_does_not_exist_is_seen(tmp_path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Say `sp2dpo anotate p.yaml`, or `sp2dpo audit erors RUN`:\n"
        "```sh\n$ sp2dpo run p.yaml --limit 3 --fast  # quick\n```\n"
    )
    assert [_unknown(command) for command in _commands(page)] == [["--fast"], ["anotate"], ["erors"]]
