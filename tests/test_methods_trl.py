"""Losses of the catalogue against TRL's own, through its trainers, in loss and gradients of all weights. CPU.

The other side has nothing of TRL: log-probs come from plain logits, one sequence at a time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from datasets import Dataset  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402

from sp2dpo.methods import mean_loss, pair_losses  # noqa: E402
from students import make_student, make_tokenizer  # noqa: E402

ROWS = [
    {"prompt": "What is a dog?", "chosen": " An animal that barks.", "rejected": " A cat, or no."},
    {"prompt": "Write a story.", "chosen": " It was night in the garden.", "rejected": " No. I will not write it."},
    {"prompt": "Add two and two, please.", "chosen": " Four", "rejected": " It is not clear to me, but three?"},
    {"prompt": "The river", "chosen": " runs through the city.", "rejected": " runs"},
]


@pytest.fixture(autouse=True)
def _no_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    size = {"per_device_train_batch_size": len(ROWS), "max_length": 256}
    quiet = {"report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
    exact = {"bf16": False, "use_cpu": True, "gradient_checkpointing": False}
    return {"output_dir": str(folder), **size, **quiet, **exact, **more}


def dpo_trainer(folder: Path, **more: Any) -> Any:
    return DPOTrainer(
        make_student("llama", seed=1).double(),
        make_student("llama", seed=2).double(),
        args=DPOConfig(**settings(folder, **more)),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=make_tokenizer(),
    )


def cpo_trainer(folder: Path, **more: Any) -> Any:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    return CPOTrainer(
        make_student("llama", seed=1).double(),
        args=CPOConfig(cpo_alpha=0.0, **settings(folder, **more)),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=make_tokenizer(),
    )


def flat(values: Any) -> Any:
    return torch.cat([value.flatten() for value in values])


def measured(model: Any, loss: Any) -> tuple[float, Any]:
    """The loss, and the gradient of all weights as one vector."""
    return loss.item(), flat(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


def agree(ours: tuple[float, Any], theirs: tuple[float, Any], rel: float = 1e-6) -> None:
    """The loss, and the gradients in relative L2; DPOTrainer computes log-probs in float32 whatever the model is."""
    assert theirs[1].abs().max() > 1e-3
    assert ours[0] == pytest.approx(theirs[0], rel=rel)
    assert (ours[1] - theirs[1]).norm() <= 10 * rel * theirs[1].norm()


def logps_by_hand(model: Any, ids: Any, labelled: Any) -> Any:
    """Sum of the log-probs of the labelled tokens of each row, whose padding is at its end, (B,)."""
    sums = []
    for row, mask in zip(ids, labelled, strict=True):
        end = int(mask.nonzero().max()) + 1
        logps = torch.log_softmax(model(input_ids=row[None, :end]).logits[0, :-1], -1)
        sums.append(logps.gather(1, row[1:end, None])[:, 0][mask[1:end].bool()].sum())
    return torch.stack(sums)


def of_dpo_batch(trainer: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """Inputs of `pair_losses` for a batch of TRL's: the chosen rows first, then the rejected ones."""
    ids, labelled = batch["input_ids"], batch["completion_mask"]
    chosen, rejected = logps_by_hand(trainer.model, ids, labelled).chunk(2)
    with torch.no_grad():
        ref_chosen, ref_rejected = logps_by_hand(trainer.ref_model, ids, labelled).chunk(2)
    chosen_lengths, rejected_lengths = labelled.sum(1).chunk(2)
    return {
        "chosen_logps": chosen,
        "rejected_logps": rejected,
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
        "chosen_lengths": chosen_lengths,
        "rejected_lengths": rejected_lengths,
    }


def of_cpo_batch(trainer: Any, batch: dict[str, Any]) -> dict[str, Any]:
    inputs = {}
    for side in ("chosen", "rejected"):
        labelled = batch[f"{side}_labels"] != -100
        inputs[f"{side}_logps"] = logps_by_hand(trainer.model, batch[f"{side}_input_ids"], labelled)
        inputs[f"{side}_lengths"] = labelled.sum(1)
    return inputs


@pytest.mark.parametrize(
    ("loss_type", "method", "knobs"),
    [
        ("sigmoid", "dpo", {"beta": 0.1}),
        ("sigmoid", "dpo", {"beta": 0.5}),
        ("ipo", "ipo", {"beta": 0.1}),
        ("ipo", "ipo", {"beta": 0.7}),
        ("robust", "robust", {"beta": 0.1, "label_smoothing": 0.1}),
        ("robust", "robust", {"beta": 0.3, "label_smoothing": 0.4}),
    ],
)
def test_it_is_trl_in_loss_and_gradients(loss_type: str, method: str, knobs: Any, tmp_path: Path) -> None:
    trainer = dpo_trainer(tmp_path, loss_type=[loss_type], **knobs)
    batch = next(iter(trainer.get_train_dataloader()))
    ours = mean_loss(pair_losses(method, **of_dpo_batch(trainer, batch), **knobs))
    agree(measured(trainer.model, ours), measured(trainer.model, trainer.compute_loss(trainer.model, batch)))


def test_sp2dpo_with_one_beta_is_trl_too(tmp_path: Path) -> None:
    trainer = dpo_trainer(tmp_path, beta=0.2)
    batch = next(iter(trainer.get_train_dataloader()))
    signals = {"beta": torch.full((len(ROWS),), 0.2, dtype=torch.float64)}
    ours = mean_loss(pair_losses("sp2dpo", **of_dpo_batch(trainer, batch), signals=signals))
    agree(measured(trainer.model, ours), measured(trainer.model, trainer.compute_loss(trainer.model, batch)))


def test_sp2dpo_is_trl_run_one_pair_at_a_time_with_a_beta_of_its_own(tmp_path: Path) -> None:
    betas = [0.03, 0.3, 0.165, 0.1]
    trainer = dpo_trainer(tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = []
    for n, beta in enumerate(betas):
        trainer.beta = beta
        theirs.append(trainer.compute_loss(trainer.model, one_pair(batch, n)))
    signals = {"beta": torch.tensor(betas, dtype=torch.float64)}
    ours = mean_loss(pair_losses("sp2dpo", **of_dpo_batch(trainer, batch), signals=signals))
    agree(measured(trainer.model, ours), measured(trainer.model, torch.stack(theirs).mean()))


def one_pair(batch: dict[str, Any], n: int) -> dict[str, Any]:
    """Pair n of a batch of TRL's."""
    return {name: values[[n, n + len(values) // 2]] for name, values in batch.items()}


@pytest.mark.parametrize("epsilon", [0.1, 0.45])
def test_cdpo_is_the_sorted_loss_of_trl_where_there_is_but_one_pair_to_sort(epsilon: float, tmp_path: Path) -> None:
    trainer = dpo_trainer(tmp_path, loss_type=["aot"], beta=0.3, label_smoothing=epsilon)
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = [trainer.compute_loss(trainer.model, one_pair(batch, n)) for n in range(len(ROWS))]
    knobs = {"beta": 0.3, "label_smoothing": epsilon}
    ours = mean_loss(pair_losses("cdpo", **of_dpo_batch(trainer, batch), **knobs))
    agree(measured(trainer.model, ours), measured(trainer.model, torch.stack(theirs).mean()))


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize(("beta", "gamma"), [(2.0, 1.0), (10.0, 3.0), (2.5, 0.0)])
def test_simpo_is_trl_in_loss_and_gradients(beta: float, gamma: float, epsilon: float, tmp_path: Path) -> None:
    knobs = {"beta": beta, "label_smoothing": epsilon}
    trainer = cpo_trainer(tmp_path, loss_type="simpo", simpo_gamma=gamma, **knobs)
    batch = next(iter(trainer.get_train_dataloader()))
    ours = mean_loss(pair_losses("simpo", **of_cpo_batch(trainer, batch), gamma=gamma, **knobs))
    agree(measured(trainer.model, ours), measured(trainer.model, trainer.compute_loss(trainer.model, batch)), rel=1e-12)


def test_cdpo_against_a_reference_of_0_is_the_smoothed_loss_of_cpo(tmp_path: Path) -> None:
    knobs = {"beta": 0.3, "label_smoothing": 0.2}
    trainer = cpo_trainer(tmp_path, loss_type="sigmoid", **knobs)
    batch = next(iter(trainer.get_train_dataloader()))
    inputs = of_cpo_batch(trainer, batch)
    zero = torch.zeros(len(ROWS), dtype=torch.float64)
    ours = mean_loss(pair_losses("cdpo", **inputs, ref_chosen_logps=zero, ref_rejected_logps=zero, **knobs))
    agree(measured(trainer.model, ours), measured(trainer.model, trainer.compute_loss(trainer.model, batch)), rel=1e-12)
