"""The report of a run: one HTML file that opens offline, and its manifest. J.4.

The same run gives the same bytes. The text of a pair is hostile input: everything is escaped, and the page's own policy
forbids scripts and every request.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

from sp2dpo.calls import open_calls
from sp2dpo.evidence import Evidence, read_evidence
from sp2dpo.hashing import sha256_file
from sp2dpo.report import charts, sections
from sp2dpo.report.account import accounts, notes_of_pairs
from sp2dpo.report.agreement import between_annotators, between_prompts
from sp2dpo.report.cards import LONGEST, visible
from sp2dpo.report.figures import LINES
from sp2dpo.report.marks import read_marks
from sp2dpo.report.money import money_rows
from sp2dpo.report.provenance import files_of, inputs_of, settings_of, versions_of
from sp2dpo.report.summary import WIDE, in_short, warnings
from sp2dpo.report.tally import Tally, spend, tally_calls
from sp2dpo.report.training import courses
from sp2dpo.runs import read_run
from sp2dpo.tables import write_atomic, write_manifest

__all__ = ["build_report"]


def build_report(run_dir: Path) -> Path:
    """Write `report.html` and then its manifest; returns the path of the page.

    Raises:
        Sp2dpoError: no run directory, or one without a schedule; the message names the command that makes it.
    """
    run = read_run(run_dir)
    evidence = read_evidence(run)
    with open_calls(run.calls) as log:
        tally = tally_calls(log, evidence)
        calls_hash = log.content_hash()
    html = _template().render(_context(evidence, tally, calls_hash))
    write_atomic(run.report, lambda partial: partial.write_text(html, encoding="utf-8"))
    write_manifest(
        run.report,
        files={run.report.name: sha256_file(run.report)},
        inputs=inputs_of(run, calls_hash),
        lambda_hash=run.process.lambda_hash,
    )
    return run.report


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sp2dpo.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": _count, "dec": _dec, "percent": _percent, "visible": visible}
    return environment.get_template("template.html")


def _or_dash(show: Callable[[Any], str], value: float | None) -> str:
    return "–" if value is None else show(value).replace("-", "−")


def _count(value: int | None) -> str:
    return _or_dash("{:,}".format, value)


def _dec(value: float | None, places: int = 4) -> str:
    return _or_dash(f"{{:,.{places}f}}".format, value)


def _percent(value: float | None) -> str:
    return _or_dash("{:.0%}".format, value)


def _context(evidence: Evidence, tally: Tally, calls_hash: str) -> dict[str, Any]:
    run, marks = evidence.run, read_marks(evidence)
    rows, methods = sections.category_rows(evidence), courses(evidence.run, evidence.n)
    trained = [course for course in methods if course.trained]
    prompts = between_prompts(evidence)
    reversed = sections.reversed_section(evidence, marks)
    top, low = sections.extremes(evidence, marks)
    return {
        "run": run,
        "settings": run.process.settings,
        "lam": run.process.lambda_hash,
        "warnings": warnings(evidence),
        "in_short": in_short(evidence, tally, rows, reversed, marks, methods),
        "evidence": evidence,
        "accounts": accounts(evidence, tally),
        "notes": notes_of_pairs(evidence),
        "tally": tally,
        "spent": spend(tally, run.process.settings.panel.annotators),
        "money": money_rows(run, tally),
        "categories": rows,
        "beta_chart": charts.beta_chart(evidence),
        "top": top,
        "low": low,
        "longest": LONGEST,
        "marks": marks,
        "reversed": reversed,
        "reversed_chart": charts.reversed_chart(evidence, marks),
        "disagreement_charts": charts.disagreement_charts(evidence),
        "agreements": prompts + between_annotators(evidence),
        "agreement_charts": charts.agreement_charts(prompts),
        "disagreed": sections.most_disagreed(evidence, marks),
        "wide": WIDE,
        "methods": methods,
        "trained": trained,
        "dashes": LINES,
        "training_rows": sections.training_rows(evidence, marks, trained),
        "training_charts": charts.training_charts(evidence, marks, trained),
        "decoding": settings_of(tally),
        "files": files_of(run, calls_hash),
        "versions": versions_of(run),
        "process_text": (run.path / "process.yaml").read_text(encoding="utf-8"),
    }
