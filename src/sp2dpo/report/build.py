"""The report of a run: one HTML file that opens offline, its figures as files, and its manifest. J.4.

The same run gives the same bytes. The text of a pair is hostile input: everything is escaped or packed, and the page's
own policy forbids every request and every script but the one that is hashed in it.
"""

from __future__ import annotations

import base64
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import jinja2

from sp2dpo.audit.agreement import agreement
from sp2dpo.audit.errors import label_errors
from sp2dpo.calls import open_calls
from sp2dpo.errors import InputError
from sp2dpo.evidence import Evidence, read_evidence
from sp2dpo.hashing import sha256_file
from sp2dpo.numbers import count, dec, percent, signed, some
from sp2dpo.report import charts, sections, training_charts
from sp2dpo.report.account import accounts, notes_of_pairs
from sp2dpo.report.agreement import between_annotators, between_prompts
from sp2dpo.report.cards import LONGEST, visible
from sp2dpo.report.charts import Chart
from sp2dpo.report.data_charts import data_charts
from sp2dpo.report.explorer import Block, Texts, columns_of_run, facts, odd_calls, openings, script
from sp2dpo.report.explorer_texts import pack_texts
from sp2dpo.report.figures_folder import write_figures
from sp2dpo.report.marks import Marks, read_marks
from sp2dpo.report.measured import reading, training_groups, training_of
from sp2dpo.report.money import money_rows
from sp2dpo.report.panel import panel_of, predictors_of
from sp2dpo.report.pipeline import pipeline_of, schedule_settings, worked
from sp2dpo.report.provenance import files_of, inputs_of, settings_of, versions_of
from sp2dpo.report.summary import WIDE, agreeing, in_short, warnings
from sp2dpo.report.tally import Tally, spend, tally_calls
from sp2dpo.report.training import Course, courses
from sp2dpo.rubric import CATEGORIES
from sp2dpo.runs import read_run
from sp2dpo.tables import write_atomic, write_manifest

__all__ = ["MAX_MB", "build_report"]

MAX_MB: Final = 20.0
"""Size of the page in megabytes (10⁶ bytes) within which the texts of pairs must fit: what most mail takes."""


def build_report(run_dir: Path, max_mb: float = MAX_MB) -> Path:
    """Write `report.html`, the folder `figures`, and then their manifest; returns the path of the page.

    All judgements of all pairs are in the page; the texts of pairs are as far as they fit.

    Raises:
        Sp2dpoError: no run directory, or one without a schedule; the message names the command that makes it.
        InputError: the page is larger than `max_mb` even without the texts.
    """
    run = read_run(run_dir)
    evidence = read_evidence(run)
    with open_calls(run.calls) as log:
        tally = tally_calls(log, evidence)
        calls_hash = log.content_hash()
    context = _context(evidence, tally, calls_hash)
    page = _template().render(context)
    blocks = _blocks(evidence, tally, context, len(page.encode()), max_mb)
    html = "".join([page, *(one.html for one in blocks), f"<script>{script()}</script>\n</body>\n</html>\n"])
    write_atomic(run.report, lambda partial: partial.write_text(html, encoding="utf-8"))
    paths = [run.report, *write_figures(run, context["all_charts"])]
    write_manifest(
        run.report,
        files={path.relative_to(run.path).as_posix(): sha256_file(path) for path in paths},
        inputs=inputs_of(run, calls_hash),
        lambda_hash=run.process.lambda_hash,
    )
    return run.report


def _blocks(evidence: Evidence, tally: Tally, context: dict[str, Any], page: int, max_mb: float) -> list[Block]:
    """The data of the page: numbers of all pairs, and as many texts as fit."""
    marks, errors = context["marks"], context["errors"]
    numbers = [*columns_of_run(evidence, marks, errors), openings(evidence)]
    odd = odd_calls(evidence, tally.odd)
    first = sections.first_read(evidence, marks, errors)

    def about(texts: Texts | None) -> Block:
        return facts(evidence, context["pipeline"], marks, errors, odd, texts)

    fixed = page + len(script().encode()) + sum(len(one.html) for one in [*numbers, about(None)]) + 500
    texts, policy = pack_texts(evidence, first, int(max_mb * 1e6) - fixed, fixed)
    size = (fixed + sum(len(one.html) for one in texts)) / 1e6
    if size > max_mb:
        raise InputError(
            f"the report takes {size:.1f} MB even without the texts of the pairs, and --max-mb is {max_mb:g}; "
            f"give {size + 0.1:.1f} or more"
        )
    return [about(policy), *numbers, *texts]


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sp2dpo.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": count, "dec": dec, "percent": percent, "visible": visible}
    environment.filters |= {"signed": signed, "some": some, "reading": reading}
    return environment.get_template("template.html")


def _context(evidence: Evidence, tally: Tally, calls_hash: str) -> dict[str, Any]:
    run, marks, errors = evidence.run, read_marks(evidence), label_errors(evidence)
    rows, every_arm, sums = sections.category_rows(evidence), courses(evidence), accounts(evidence, tally)
    spent, files = spend(tally, run.process.settings.panel.annotators), files_of(run, calls_hash)
    trained, training = [arm for arm in every_arm if arm.trained], training_of(evidence, marks, every_arm)
    agreed, pipeline = agreement(evidence), pipeline_of(evidence)
    reversed = sections.reversed_section(evidence, marks)
    top, low = sections.extremes(evidence, marks)
    return {
        **_charts(evidence, marks, trained),
        "run": run,
        "settings": run.process.settings,
        "lam": run.process.lambda_hash,
        "script_hash": base64.b64encode(sha256(script().encode()).digest()).decode(),
        "warnings": warnings(evidence),
        "in_short": in_short(evidence, tally, spent, sums, rows, agreed, errors, reversed, marks, training, files),
        "evidence": evidence,
        "accounts": sums,
        "notes": notes_of_pairs(evidence),
        "tally": tally,
        "spent": spent,
        "money": money_rows(run, tally),
        "categories": rows,
        "category_places": {name: place for place, name in enumerate(CATEGORIES)},
        "errors": errors,
        "doubted": sections.doubted(evidence, marks, errors),
        "top": top,
        "low": low,
        "longest": LONGEST,
        "marks": marks,
        "reversed": reversed,
        "agreed": agreed,
        "among": agreeing(agreed),
        "panel": panel_of(evidence),
        "predictors": predictors_of(evidence),
        "disagreed": sections.most_disagreed(evidence, marks),
        "wide": WIDE,
        "training": training,
        "moved": [(arm.arm, arm) for arm in training.trained if arm.steps],
        "groups": list(training_groups(evidence, marks)),
        "drawn": [arm for arm in trained if arm.moved],
        "main_arms": [arm.method for arm in training_charts.main_arms(trained)],
        "pipeline": pipeline,
        "steps": worked(evidence, pipeline, sections.highest(evidence)),
        "schedule_settings": schedule_settings(run.process.settings.schedule),
        "decoding": settings_of(tally),
        "files": files,
        "versions": versions_of(run),
        "process_text": (run.path / "process.yaml").read_text(encoding="utf-8"),
    }


def _charts(evidence: Evidence, marks: Marks, trained: list[Course]) -> dict[str, Any]:
    """The charts by the place where they are shown, and all of them in this order."""
    source = charts.source_chart(evidence)
    reversed = charts.reversed_chart(evidence, marks)
    pairwise = charts.agreement_charts(between_annotators(evidence)) + charts.agreement_charts(
        between_prompts(evidence)
    )
    shown: dict[str, Any] = {
        "beta_chart": charts.beta_chart(evidence),
        "policy_charts": [charts.policy_chart(evidence), *([source] if source else [])],
        "reversed_chart": reversed,
        "agreement_charts": pairwise,
        "disagreement_charts": charts.disagreement_charts(evidence),
        "data_charts": data_charts(evidence),
        "overall_charts": training_charts.overall_charts(evidence, trained),
        "group_charts": training_charts.group_charts(evidence, marks, trained),
        "log_charts": training_charts.log_charts(trained),
    }
    every: list[Chart] = [shown["beta_chart"], *shown["policy_charts"], *([reversed] if reversed else []), *pairwise]
    every += shown["disagreement_charts"]
    every += [chart for _, drawn in shown["data_charts"] for chart in drawn]
    every += shown["overall_charts"] + shown["group_charts"] + shown["log_charts"]
    return {**shown, "all_charts": every}
