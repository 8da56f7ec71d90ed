"""DPO with its control in the data: TRL's trainer, told β_i, margins, weights and routes from columns. Sec. 4.2, eq. 5.

TRL prepares the data, runs the model, logs, saves and resumes. The loss of a batch is this package's one form,
w·f(β(u − m)), over the log-probs that TRL's forward gave; with equal β_i it is TRL's own result to the last bit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers.trainer_utils import rotate_checkpoints
from trl import DPOTrainer

from sp2dpo.methods.losses import Controls, PairBatch, StepControl, losses, mean_loss
from sp2dpo.tables import write_table
from sp2dpo.train import layout
from sp2dpo.train.collator import COLUMNS, PairwiseCollator
from sp2dpo.train.columns import categories_of, check_columns, in_order, names_of, refuse_long_prompts
from sp2dpo.train.config import PairwiseDPOConfig
from sp2dpo.train.guard import check_gradient, check_loss
from sp2dpo.train.interrupt import SEAL, last_complete
from sp2dpo.train.reference import ReferenceCache
from sp2dpo.train.sampling import EpochOrder, LengthGrouped
from sp2dpo.train.tally import Tally, margins_table, pull

__all__ = ["PairwiseDPOConfig", "PairwiseDPOTrainer", "margins_table"]

logger = logging.getLogger(__name__)

UNSUSPECTED: Final = 100.0
"""A mean loss below this, in nats, is not compared with that of the untrained student, which costs a second loss."""


class _PairBeta:
    """β_i in the place of TRL's scalar: a factor that also sees the log-ratios it is multiplied with."""

    def __init__(self, beta: Tensor) -> None:
        self._beta = beta
        self._factors: list[Tensor] = []

    def __mul__(self, log_ratios: Tensor) -> Tensor:
        self._factors.append(log_ratios.detach())
        return self._beta * log_ratios

    @property
    def margins(self) -> Tensor:
        """Δ_i: TRL ends with the chosen and the rejected log-ratios, times β, for its reward metrics."""
        chosen, rejected = self._factors[-2:]
        return chosen - rejected


class _Heard:
    """A model that keeps what its last forward gave."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.outputs: Any = None

    def __call__(self, **inputs: Any) -> Any:
        self.outputs = self._model(**inputs)
        return self.outputs


class PairwiseDPOTrainer(DPOTrainer):  # type: ignore[misc]
    """`trl.DPOTrainer` that reads, per pair, from columns of its datasets:

    `beta` (required; positive, finite), `margin` (in log-ratio units, inside β), `weight` (≥ 0), `keep` (pairs with 0
    are left out of training), `route` ("preference" or "sft"), `order` (pairs are trained in this order),
    `label_smoothing` (ε of the pair, for methods that have it), `row` (an integer by which `margins` names the pair),
    `pair_id` (by which messages do) and `category` (metrics are logged by it too).

    TRL's `rewards/…` are log-ratios times β of the column, whatever the method; `saturation` is of the loss itself.

    `margins` has the implicit margins Δ_i of every training batch as it was seen. `layout` is the layout in use,
    "shared" or "padded", and `layout_reason` why it is not the shared one.

    Args:
        categories: names in the order in which they are logged; None: those of the datasets.
        controls: what changes β, margin, weight or keep at each step, in turn; saved and resumed with checkpoints.

    Raises:
        ScheduleError: no column `beta`, or a value that no loss can use; before any step.
        ValueError: `layout="shared"` for a model or setting that does not support it; a control that would do nothing.
        TrainingError: a loss or gradient that is not finite, or a loss that explodes.

    Eq. 1, 5.
    """

    def __init__(
        self,
        model: Any,
        *,
        args: PairwiseDPOConfig,
        train_dataset: Any,
        eval_dataset: Any = None,
        categories: Sequence[str] | None = None,
        controls: Sequence[StepControl] = (),
        **more: Any,
    ) -> None:
        if controls and args.reshaped:
            raise ValueError(f"controls of each step do nothing under TRL's {args.reshaped[0]}")
        evals = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
        datasets = {"train": train_dataset} | {name: each for name, each in evals.items() if each is not None}
        for name, dataset in datasets.items():
            check_columns(dataset, name, args)
        self.data_collator: Any
        self.beta: Any  # TRL's scalar; a tensor in its place while a loss is computed
        self.margins: list[tuple[int, int, float]] = []
        self.layout, self.layout_reason = "", ""
        self.controls = tuple(controls)
        self.categories = categories_of([*datasets.values()]) if categories is None else tuple(categories)
        self._tallies = {"train": Tally(), "eval": Tally()}
        self._names = names_of(train_dataset)
        self._rows: list[int] = []  # of the optimizer step that is being computed
        self._ordered = "order" in train_dataset.column_names
        train_dataset = in_order(train_dataset)
        super().__init__(model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, **more)
        self._set_up()
        self.add_callback(EpochOrder())

    def _set_up(self) -> None:
        """Choose the layout; before the first forward, which may be that of the reference."""
        if self.layout:
            return
        reason = layout.why_not(self.model, self.args) if self.args.layout != "padded" else "padded was asked for"
        if reason and self.args.layout == "shared":
            raise ValueError(f"layout 'shared' cannot be used: {reason}; use 'auto' or 'padded'")
        self.layout, self.layout_reason = ("padded", reason) if reason else ("shared", "")
        if reason:
            logger.log(logging.WARNING if self.args.layout == "auto" else logging.INFO, "padded layout: %s", reason)
        else:
            layout.install(self.model)
            if self.ref_model is not None:
                layout.install(self.accelerator.unwrap_model(self.ref_model))
        plain = self.data_collator
        self.data_collator = PairwiseCollator(
            pad_token_id=plain.pad_token_id,
            max_length=plain.max_length,
            truncation_mode=plain.truncation_mode,
            pad_to_multiple_of=plain.pad_to_multiple_of,
            shared=self.layout == "shared",
            categories=self.categories,
        )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [
            name for name in (*COLUMNS, self.args.length_column_name) if name not in self._signature_columns
        ]

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """Tokenize as TRL does, cut prompts to their end, note lengths. A row without a completion token is refused.

        Differs: TRL drops such rows without a word, and then fewer pairs train than the schedule has.
        """
        max_length, args.max_length = args.max_length, None
        try:
            dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        finally:
            args.max_length = max_length
        keep = args.max_prompt_length
        if keep is not None:
            dataset = dataset.map(lambda row: {"prompt_ids": row["prompt_ids"][-keep:]}, desc="Cutting prompts")
        if max_length is not None and args.truncation_mode == "keep_start":
            refuse_long_prompts(dataset, dataset_name, max_length)
        lengths = [
            len(p) + min(len(c), room) + min(len(r), room)
            for p, c, r in zip(dataset["prompt_ids"], dataset["chosen_ids"], dataset["rejected_ids"], strict=True)
            for room in [max(0, max_length - len(p)) if max_length is not None else len(c) + len(r)]
        ]
        if args.length_column_name in dataset.column_names:
            dataset = dataset.remove_columns(args.length_column_name)
        return dataset.add_column(args.length_column_name, lengths)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Reference log-probs from a cache that is keyed by what they depend on; TRL's is keyed by the dataset."""
        self._set_up()
        return ReferenceCache(self.args.reference_cache).log_probs(self, dataset, name, batch_size)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Differs: rows of similar length come together in an order that a resumed run repeats."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self._ordered:
            return SequentialSampler(dataset)
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        together = self.args.train_batch_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthGrouped(dataset[self.args.length_column_name], together, seed)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        return super().compute_ref_log_probs(model, {k: v for k, v in inputs.items() if k not in COLUMNS})

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        rest = {name: value for name, value in inputs.items() if name not in COLUMNS}
        if not self.precompute_ref_logps:
            ref_chosen, ref_rejected = self.compute_ref_log_probs(self.ref_model or self.model, rest)
            rest |= {"ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected}
        controls = Controls(
            beta=inputs["beta"],
            margin=inputs.get("margin"),
            weight=inputs.get("weight"),
            sft=inputs.get("route"),
            label_smoothing=inputs.get("label_smoothing"),
        )
        heard, pair_beta = _Heard(model), _PairBeta(controls.beta)
        with _in_place(self, beta=pair_beta, precompute_ref_logps=True):
            result = super().compute_loss(heard, rest, return_outputs, num_items_in_batch)
        loss, outputs = result if return_outputs else (result, None)
        if self.args.reshaped:
            each = loss.detach().expand_as(controls.beta)
            untrained = partial(torch.full_like, each, math.log(2))
        else:
            batch = _batch(heard.outputs, rest)
            controls = self._of_this_step(batch, controls)
            each, untrained = self._each(batch, controls), partial(self._each_untrained, batch, controls)
            loss = self._mean(each, controls.keep)
            if self.aux_loss_enabled:
                loss += self.router_aux_loss_coef * heard.outputs.aux_loss
        self._note(inputs, controls, pair_beta.margins, each.detach(), untrained)
        return (loss, outputs) if return_outputs else loss

    def _of_this_step(self, batch: PairBatch, controls: Controls) -> Controls:
        if self.model.training:
            for control in self.controls:
                controls = control(batch.detach(), controls, self.accelerator.gather)
        return controls

    def _each(self, batch: PairBatch, controls: Controls) -> Tensor:
        """Losses of the pairs of a batch, (B,)."""
        return losses(self.args.method, batch, controls, self.args.knobs or {})

    def _each_untrained(self, batch: PairBatch, controls: Controls) -> Tensor:
        """The same where the policy is the reference."""
        assert batch.ref_chosen_logps is not None
        assert batch.ref_rejected_logps is not None
        there = replace(batch, chosen_logps=batch.ref_chosen_logps, rejected_logps=batch.ref_rejected_logps)
        return self._each(there, controls)

    def _mean(self, each: Tensor, keep: Tensor | None) -> Tensor:
        """Over the kept pairs of all processes, whose gradients are averaged afterwards."""
        if keep is None:
            return mean_loss(each)
        everywhere = self.accelerator.gather(keep).sum().clamp(min=1)
        here: Tensor = keep.sum() * self.accelerator.num_processes / everywhere
        return mean_loss(each, keep) * here

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """What transformers logs, between backward and the optimizer's step; refused if it is not finite."""
        norm = super()._get_grad_norm(model, grad_norm)
        rows, self._rows = self._rows, []
        if self.accelerator.scaler is None:  # fp16's scaler skips such steps itself
            check_gradient(norm, rows, step=self.state.global_step + 1, describe=self._named)
        return norm

    def _named(self, row: int) -> str:
        if row < 0:
            return "a pair without a row number"
        return self._names.get(row, f"row {row}")

    def _note(
        self,
        inputs: Mapping[str, Tensor],
        controls: Controls,
        margins: Tensor,
        each: Tensor,
        untrained: Callable[[], Tensor],
    ) -> None:
        """Keep β and Δ of a batch, of all processes, for the metrics and for `margins`; stop at a loss gone wrong."""
        seen = {"beta": inputs["beta"], "margin": margins, "used": controls.beta, "loss": each}
        seen["pull"] = pull(controls, margins)
        seen |= {name: inputs[name] for name in ("row", "category") if name in inputs}
        seen = {name: value.cpu() for name, value in self._of_all_processes(seen).items()}
        if self.model.training:
            self._check(seen, untrained)
        tally = self._tallies["train" if self.model.training else "eval"]
        for name in ("beta", "margin", "used", "pull", "category"):
            if name in seen:
                getattr(tally, name).append(seen[name])
        if self.model.training and "row" in seen:
            step = self.state.global_step
            rows = zip(seen["row"].tolist(), seen["margin"].tolist(), strict=True)
            self.margins += [(step, row, margin) for row, margin in rows]

    def _check(self, seen: Mapping[str, Tensor], untrained: Callable[[], Tensor]) -> None:
        """Stop before the weights are updated; all processes at once, for all have seen the same."""
        each = seen["loss"]
        rows = seen.get("row", torch.full(each.shape, -1))
        self._rows += rows.tolist()
        if each.mean() < UNSUSPECTED:  # false for NaN
            return
        told = dict(zip(rows.tolist(), zip(seen["used"].tolist(), seen["margin"].tolist(), strict=True), strict=True))

        def describe(row: int) -> str:
            return "{} (β {:.4g}, margin {:.4g})".format(self._named(row), *told[row])

        there = self._of_all_processes({"loss": untrained().detach()})["loss"].cpu()
        check_loss(each, there, rows, step=self.state.global_step + 1, describe=describe)

    def _of_all_processes(self, seen: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gathered, without the pairs that fill up the last batch of an epoch a second time.

        accelerate cuts them off by the last batch that was fetched, and in training transformers fetches all batches of
        a step first; so there they are counted.
        """
        if not self.model.training:
            return dict(self.accelerator.gather_for_metrics(seen))
        if self.args.dataloader_drop_last:
            return dict(self.accelerator.gather(seen))
        left = len(self.train_dataset) - len(self.margins) % len(self.train_dataset)
        return {name: value[:left] for name, value in self.accelerator.gather(seen).items()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode, prefix = ("train", "") if self.model.training else ("eval", "eval_")
        if self._tallies[mode].beta:
            told = self._tallies[mode].metrics(self.categories, saturates=self.args.method in ("sp2dpo", "dpo"))
            logs.update({f"{prefix}{name}": value for name, value in told.items()})
            self._tallies[mode] = Tally()
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: Any = None, **more: Any) -> Any:
        """As in transformers; margins and the state of controls go on from the checkpoint too."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete(Path(self.args.output_dir))
        if resume_from_checkpoint:
            folder = Path(resume_from_checkpoint)
            seen = pq.read_table(folder / SEAL).to_pydict()
            self.margins = list(zip(seen["step"], seen["row"], seen["margin"], strict=True))
            states = torch.load(folder / "controls.pt", weights_only=True) if self.controls else []
            for control, state in zip(self.controls, states, strict=True):
                control.load_state_dict(state)
            resume_from_checkpoint = str(folder)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **more)

    def _run_epoch(self, **given: Any) -> Any:
        """Differs: a run that goes on from its very last step has none left; transformers would take one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(**given)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As TRL does, and `margins.parquet` last: a checkpoint that has it is whole. Older ones go only then."""
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero():
            (folder / SEAL).unlink(missing_ok=True)  # the same step is saved again
        self.accelerator.wait_for_everyone()
        with _in_place(self.args, save_total_limit=None):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            if self.controls:
                torch.save([control.state_dict() for control in self.controls], folder / "controls.pt")
            write_table(folder / SEAL, margins_table(self.margins))
            best, limit = self.state.best_model_checkpoint, self.args.save_total_limit
            rotate_checkpoints(str(folder.parent), limit, best_model_checkpoint=best, use_mtime=True)


@contextmanager
def _in_place(of: Any, **values: Any) -> Iterator[None]:
    """Attributes that have other values while TRL's own code runs."""
    before = {name: getattr(of, name) for name in values}
    for name, value in values.items():
        setattr(of, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(of, name, value)


def _batch(outputs: Any, inputs: Mapping[str, Tensor]) -> PairBatch:
    """From the log-probs of tokens, zero outside of completions, and those of the reference."""
    mask = inputs["completion_mask"][:, 1:]
    chosen, rejected = outputs.log_probs[:, -mask.shape[1] :].sum(1).chunk(2)
    lengths = mask.sum(1).chunk(2)
    return PairBatch(chosen, rejected, inputs["ref_chosen_logps"], inputs["ref_rejected_logps"], *lengths)
