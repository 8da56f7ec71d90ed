"""Training arms: the method, its baselines and its controls, each a way to give every pair a β and a weight.

Sec. 5.1 and eq. 9. Names and numbers only: `sp2dpo.train.data` makes the columns. Knows nothing of files or torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from sp2dpo.errors import InputError, nearest
from sp2dpo.methods.catalogue import METHODS

__all__ = ["ARMS", "CONTROLS", "WITH_KNOBS", "Arm", "arm_of"]

Source = Literal["none", "one", "mean", "beta", "beta_random", "shuffled"]


@dataclass(frozen=True)
class Arm:
    """One training run of a sweep.

    `source` says where β_i comes from: `one` value for all pairs, the `mean` of the schedule over the trained pairs,
    a column of the schedule (`beta`, `beta_random`), or `shuffled`: the column `beta`, permuted among the pairs.
    An arm whose source is `none` is not trained, only measured. `knobs` are those of `loss` beside β.
    """

    name: str
    says: str
    source: Source
    beta: float | None = None
    weighted: bool = False
    loss: str = "sp2dpo"
    knobs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def trained(self) -> bool:
        return self.source != "none"


ARMS: Final = {
    arm.name: arm
    for arm in (
        Arm("untuned", "the student as it is, measured on the held-out pairs", "none"),
        Arm("dpo", "one β for all pairs", "one"),
        Arm("rand_beta", "β drawn at random for each pair", "beta_random"),
        Arm("constant_beta", "the mean β of the schedule for all pairs", "mean"),
        Arm("shuffled_beta", "the β of the schedule, each at another pair", "shuffled"),
        Arm("weighted_loss", "the mean β for all pairs, each loss times β of the pair over it", "mean", weighted=True),
        Arm("sp2dpo", "the β of the schedule", "beta"),
    )
}
"""Arms that share one loss and differ in β and weight; beside them are `dpo_<β>`, such as dpo_0.3, and `WITH_KNOBS`."""

CONTROLS: Final = (
    "untuned",
    "dpo_0.1",
    "dpo_0.3",
    "dpo_0.5",
    "rand_beta",
    "constant_beta",
    "shuffled_beta",
    "weighted_loss",
    "sp2dpo",
)
"""What `sp2dpo train --controls` trains."""

WITH_KNOBS: Final = tuple(
    name for name, method in METHODS.items() if name not in ARMS and "beta" in {knob.name for knob in method.knobs}
)
"""Methods of the catalogue that are arms by their own name: one β for all pairs, and knobs of their own."""

_DPO_AT: Final = re.compile(r"dpo_(\d+(?:\.\d+)?)")


def arm_of(name: str, *, beta: float = 0.1, knobs: Mapping[str, Mapping[str, Any]] | None = None) -> Arm:
    """The arm of that name.

    Args:
        beta: the one β of the arm `dpo`.
        knobs: for each method of the catalogue that is an arm, the knobs that are not at their default.

    Raises:
        InputError: no such arm; a β that is not positive, or is written so that one arm would have two names.
    """
    if name in ARMS:
        return replace(ARMS[name], beta=beta) if name == "dpo" else ARMS[name]
    if name.startswith("dpo_"):
        return _dpo_at(name)
    if name in WITH_KNOBS:
        return _of_catalogue(name, dict((knobs or {}).get(name, {})))
    known = (*ARMS, "dpo_<β>", *WITH_KNOBS)
    raise InputError(f"no training method '{name}'{nearest(name, known)}; there are {', '.join(known)}")


def _dpo_at(name: str) -> Arm:
    written = _DPO_AT.fullmatch(name)
    if written is None or float(written[1]) <= 0:
        raise InputError(f"method '{name}': after dpo_ comes the β of all pairs, a number above 0, such as dpo_0.3")
    beta = float(written[1])
    if written[1] != f"{beta:g}":
        raise InputError(f"method '{name}' is written dpo_{beta:g}, so that it has one name and one folder")
    return replace(ARMS["dpo"], name=name, beta=beta)


def _of_catalogue(name: str, knobs: Mapping[str, Any]) -> Arm:
    method = METHODS[name]
    settings = method.settings(knobs)
    beta = float(settings.pop("beta"))
    return Arm(name, method.title, "one", beta, loss=name, knobs=settings)
