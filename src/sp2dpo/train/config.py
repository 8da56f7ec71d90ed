"""Settings of the trainer: TRL's own, and what TRL has no key for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from trl import DPOConfig

from sp2dpo.methods.catalogue import method_of

__all__ = ["LAYOUTS", "PairwiseDPOConfig"]

LAYOUTS: Final = ("auto", "shared", "padded")


@dataclass
class PairwiseDPOConfig(DPOConfig):  # type: ignore[misc]
    """`trl.DPOConfig` with the keys below.

    Raises:
        ValueError: an unknown layout or method, a knob that the method does not take, or a key of TRL that would
            reshape the loss of a method that is not DPO.
    """

    max_prompt_length: int | None = field(
        default=None, metadata={"help": "A longer prompt keeps its last tokens; None keeps all."}
    )
    layout: str = field(
        default="auto",
        metadata={
            "help": "'shared': prompts computed once, rows packed; 'padded': as TRL; 'auto': shared if it can be."
        },
    )
    method: str = field(default="sp2dpo", metadata={"help": "The loss, by its name in sp2dpo.methods."})
    knobs: dict[str, Any] | None = field(default=None, metadata={"help": "Knobs of the method."})
    reference_cache: str | None = field(
        default=None, metadata={"help": "Folder of reference log-probs; None: the user's cache folder; 'off': none."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout is '{self.layout}'; it must be one of {', '.join(LAYOUTS)}")
        method_of(self.method).settings(self.knobs or {})
        losses = self.loss_type if isinstance(self.loss_type, list) else [self.loss_type]
        if losses != ["sigmoid"]:
            raise ValueError(
                f"loss_type '{', '.join(losses)}' has no per-pair β here; name one of sp2dpo.methods by 'method'"
            )
        if self.label_smoothing:
            raise ValueError("label_smoothing does nothing to DPO's loss; it is a knob of the methods cdpo and robust")
        if self.reshaped and self.method not in ("sp2dpo", "dpo"):
            raise ValueError(
                f"keys of TRL that shape DPO's loss do nothing under method '{self.method}': {', '.join(self.reshaped)}"
            )

    @property
    def reshaped(self) -> list[str]:
        """Keys by which TRL's loss is not −log σ(βΔ) of summed log-probs."""
        plain = {"ld_alpha": None, "use_weighting": False, "f_divergence_type": "reverse_kl", "loss_weights": None}
        return [name for name, value in plain.items() if getattr(self, name) != value]
