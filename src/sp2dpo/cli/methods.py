"""The command `methods`: the catalogue of losses."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from sp2dpo.cli.terminal import AsJson, app, give, show
from sp2dpo.methods.catalogue import LOSSES, MARGINS, METHODS, Knob, Method, method_of


@app.command(epilog="sp2dpo methods simpo")
def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="one method: formula, knobs, source")] = None,
    as_json: AsJson = False,
) -> None:
    """The losses that can be trained with, and their knobs."""
    if name is not None:
        _one(method_of(name), as_json)
    elif as_json:
        give({each: _facts(method) for each, method in METHODS.items()}, True)
    else:
        table = Table("method", "loss of a pair", "knobs", box=SIMPLE_HEAD)
        for each, method in METHODS.items():
            table.add_row(each, method.formula, ", ".join(f"{knob.name} {_shown(knob)}" for knob in method.knobs))
        show(table)


def _one(method: Method, as_json: bool) -> None:
    facts = _facts(method)
    if as_json:
        give(facts, True)
        return
    knobs = facts.pop("knobs")
    lines = {
        **facts,
        "title": "",
        "u": MARGINS[method.u],
        "f": LOSSES[method.f],
        "signals": ", ".join(method.signals) or "none",
    }
    give({key: value for key, value in lines.items() if value}, False, method.title)
    if knobs:
        table = Table("knob", "default", "range", "unit", "meaning", box=SIMPLE_HEAD)
        for knob in method.knobs:
            table.add_row(knob.name, _shown(knob), str(knob.valid), knob.unit, knob.meaning)
        show(table)


def _facts(method: Method) -> dict[str, Any]:
    return {
        "name": method.name,
        "title": method.title,
        "formula": method.formula,
        "u": method.u,
        "f": method.f,
        "m": method.m,
        "knobs": {
            knob.name: {"default": knob.default, "range": str(knob.valid), "unit": knob.unit, "meaning": knob.meaning}
            for knob in method.knobs
        },
        "signals": list(method.signals),
        "reference": method.reference,
        "source": method.source,
        "trl": method.trl,
        "status": method.status,
    }


def _shown(knob: Knob) -> str:
    return str(knob.default).lower() if isinstance(knob.default, bool) else f"{knob.default:g}"
