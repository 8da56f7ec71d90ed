"""The model card of an arm: what it was made from, with the hashes of λ and of the schedule, and how to load it.

Takes the place of the cards that TRL and PEFT write. No torch.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

import jinja2
import yaml

from sp2dpo.methods.catalogue import METHODS
from sp2dpo.runs import Run
from sp2dpo.settings import ProcessFile, Student
from sp2dpo.tables import write_atomic
from sp2dpo.train.plan import Planned, beta_of, train_settings

__all__ = ["Form", "write_card"]

Form = Literal["adapter", "merged", "model"]

_LIBRARIES: Final = ("sp2dpo", "trl", "transformers", "peft", "torch", "datasets")

_SHOWN: Final = {
    "train_loss": "mean training loss",
    "held_out_loss": "held-out loss",
    "held_out_accuracy": "share of held-out pairs with Δ > 0",
    "held_out_margin": "mean Δ of the held-out pairs",
    "held_out_ranking": "share of held-out pairs whose chosen response is the more probable",
}
"""Metrics of the card, and what it calls them."""


def write_card(run: Run, planned: Planned, folder: Path, form: Form, metrics: Mapping[str, float], steps: int) -> None:
    """Write README.md into `folder`, which holds the adapter, the merged model or the whole model of an arm."""
    settings, train = run.process.settings, train_settings(run)
    student = settings.student
    assert student is not None
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sp2dpo.train", "."),
        autoescape=False,  # noqa: S701  Markdown
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text = environment.get_template("card.md.jinja").render(
        front_matter=_front_matter(run.process.settings, form),
        process=run.process,
        arm=planned.arm,
        form=form,
        formula=_formula(planned),
        base=_base(student),
        beta=_beta(planned),
        pairs=planned.pairs.num_rows,
        held_out=planned.held_out.num_rows,
        beta_held_out=train.beta,
        steps=steps,
        per_step=int(metrics["pairs_per_step"]),
        processes=int(metrics["processes"]),
        data=settings.data.source,
        data_revision=settings.data.revision,
        schedule_sha=planned.inputs[run.schedule.name],
        folder=f"{planned.folder.name}{'/merged' if form == 'merged' else ''}",
        merged=train.merge,
        metrics={words: f"{metrics[name]:.4f}" for name, words in _SHOWN.items() if name in metrics},
        toy=student.model == "toy",
        versions={"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _LIBRARIES},
    )
    whole = re.sub(r"\n{3,}", "\n\n", text)
    write_atomic(folder / "README.md", lambda partial: partial.write_text(whole, encoding="utf-8"))


def _base(student: Student) -> str:
    if student.revision is None:
        return "a toy" if student.model == "toy" else f"the local folder `{student.model}`"
    return f"[{student.model}](https://huggingface.co/{student.model}) at revision `{student.revision}`"


def _beta(planned: Planned) -> str:
    low, mean, high = beta_of(planned.pairs)
    return f"{mean:.4f}" if low == high else f"{low:.4f} to {high:.4f}, mean {mean:.4f}"


def _formula(planned: Planned) -> str:
    formula = METHODS[planned.arm.loss].formula
    return f"w_i·({formula}), w_i = β_i of the schedule over its mean" if planned.arm.weighted else formula


def _front_matter(settings: ProcessFile, form: Form) -> str:
    student, data = settings.student, settings.data
    assert student is not None
    relation = "adapter" if form == "adapter" else "finetune"
    keys = {
        **({"base_model": student.model, "base_model_relation": relation} if student.revision else {}),
        "library_name": "peft" if form == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dpo", "sp2dpo", "trl", *(["lora"] if form != "model" else [])],
        **({"datasets": [data.source]} if data.revision else {}),
    }
    return yaml.safe_dump(keys, sort_keys=False, allow_unicode=True).rstrip()
