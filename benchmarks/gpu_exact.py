"""What training must compute right on a GPU: attention, losses and gradients, optimizer, quantization.

Tiny random models; nothing is downloaded. Without a GPU the same checks run on the CPU, which has no kernel to check.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, PrinterCallback
from trl import DPOConfig, DPOTrainer

from pages import ROOT, Row
from sp2dpo.train import PairwiseDPOConfig, PairwiseDPOTrainer
from sp2dpo.train.layout.attention import by_segment
from sp2dpo.train.layout.kernels import kernels
from sp2dpo.train.layout.plan import plan
from sp2dpo.train.layout.row import Kernel
from sp2dpo.train.layout.row import Row as PackedRow
from sp2dpo.train.student import load_student

sys.path.insert(0, str(ROOT / "tests"))

from students import PROJECTIONS, make_student, make_tokenizer

__all__ = ["Rows", "attention", "exact", "fallback", "found", "optimizer", "qlora", "skipped"]

CUDA: Final = torch.cuda.is_available()
DEVICE: Final = torch.device("cuda" if CUDA else "cpu")
ARCHITECTURES: Final = ("llama", "qwen3", "mistral", "gemma3")

Rows = Iterator[Row]


def found(what: str, good: bool, note: str) -> Row:
    """A row about one thing that was checked."""
    return {"what": what, "state": "ok" if good else "FAILED", "note": note}


def skipped(what: str, why: str) -> Row:
    """A row about a thing that could not be checked here."""
    return {"what": what, "state": "skipped", "note": why}


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    """‖one − other‖ of ‖other‖."""
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).norm() / other.norm())


# Attention -----------------------------------------------------------------------------------------------------------


def attention() -> Rows:
    """The kernels that the shared layout would use, forward and backward, beside one dense mask in fp32."""
    shapes = {"Qwen3, Llama, Mistral": (32, 4, 128), "Gemma 3": (8, 2, 256)} if CUDA else {"tiny": (4, 2, 16)}
    for name, (heads, groups, dim) in shapes.items():
        tried: dict[str, tuple[torch.dtype, Kernel]] = {"float32, by segment": (torch.float32, by_segment)}
        chosen = kernels(DEVICE, heads, groups, dim)
        for dtype, kernel in chosen.items():
            tried[f"{str(dtype).removeprefix('torch.')}, {kernel.__qualname__.split('.')[0].strip('_')}"] = (
                dtype,
                kernel,
            )
        for what, (dtype, kernel) in tried.items():
            for window in (None, 16):
                off = _off_dense(kernel, heads, groups, dim, dtype, window)
                limit = 1e-5 if dtype == torch.float32 else 0.02
                label = f"{name}: {what}, window {window or 'none'}"
                yield found(
                    label, off <= limit, f"off by {off:.1e} (relative L2, output and gradients), at most {limit}"
                )
        for dtype in (torch.bfloat16, torch.float16) if CUDA else ():
            if dtype not in chosen:
                yield found(
                    f"{name}: {dtype}", False, "no variable-length kernel agrees here; one call for each segment"
                )


def _off_dense(kernel: Kernel, heads: int, groups: int, dim: int, dtype: torch.dtype, window: int | None) -> float:

    pairs = [(40, 30, 21), (3, 1, 50), (130, 90, 1), (1, 64, 64)]
    width = max(p + max(c, r) for p, c, r in pairs)
    ids = torch.zeros(2 * len(pairs), width, dtype=torch.long)
    for n, (p, *sides) in enumerate(pairs):
        for side, own in enumerate(sides):
            ids[n + side * len(pairs), : p + own] = torch.tensor([1] * p + [2 + side] * own)
    layout = plan({"input_ids": ids, "attention_mask": ids.sign(), "completion_mask": ids.sign()})
    row = PackedRow.of({name: value.to(DEVICE) for name, value in layout.items()}, kernels={})
    draw = torch.Generator().manual_seed(0)
    tokens = layout["input_ids"].shape[1]
    states = [torch.randn(1, n, tokens, dim, generator=draw) for n in (heads, heads // groups, heads // groups, heads)]
    *states, upstream = (state.to(DEVICE, dtype) for state in states)

    def both(kernel: Kernel, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [state.detach().to(dtype).requires_grad_() for state in states]
        out = kernel(leaves[0], leaves[1], leaves[2], row, dim**-0.5, window)
        return [out, *torch.autograd.grad(out, leaves, upstream.to(dtype).transpose(1, 2))]

    return max(map(relative, both(kernel, dtype), both(_dense, torch.float32)))


def _dense(query: Any, key: Any, value: Any, row: Any, scale: float, window: int | None) -> torch.Tensor:
    """One mask over the whole row: a token sees those of its own sequence that are not after it."""
    pair, part, place = [], [], []
    for n, (p, c, r) in enumerate(row.lengths):
        pair += [n] * (p + c + r)
        part += [0] * p + [1] * c + [2] * r
        place += [*range(p + c), *range(p, p + r)]
    own, side, at = (torch.tensor(column, device=query.device) for column in (pair, part, place))
    seen = (own[:, None] == own) & (at[:, None] >= at) & ((side == 0) | (side[:, None] == side))
    if window is not None:
        seen &= at[:, None] - at < window
    attended = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return attended.transpose(1, 2)


# Losses and gradients ------------------------------------------------------------------------------------------------


def exact() -> Rows:
    """Losses and gradients of the shared layout beside TRL's trainer, run one pair at a time with that pair's β."""
    with tempfile.TemporaryDirectory() as folder:
        for architecture in ARCHITECTURES:
            make_student(architecture, Path(folder) / architecture)
            for bf16 in (False, True):
                want = _one_at_a_time(Path(folder), architecture, bf16)
                off = {name: _off(_ours(Path(folder), architecture, bf16, name), want) for name in ("shared", "padded")}
                loss, gradient = off["shared"]
                limit = max(5e-3, 3 * off["padded"][1]) if bf16 else 1e-5
                note = f"loss off by {loss:.1e}, gradient by {gradient:.1e} (relative L2), at most {limit:.1e}; "
                note += f"padded rows: {off['padded'][0]:.1e}, {off['padded'][1]:.1e}"
                yield found(f"{architecture}, {'bf16' if bf16 else 'fp32'}", max(loss, gradient) <= limit, note)


def pairs(n: int = 4) -> Any:
    """So many pairs of unlike lengths, longer than the windows of the small models; two begin alike."""
    rows = {
        "prompt": [[{"role": "user", "content": "What is the name of the river? " * (1 + i)}] for i in range(n)],
        "chosen": [[{"role": "assistant", "content": "The answer is " + "short. " * (1 + 2 * i)}] for i in range(n)],
        "rejected": [[{"role": "assistant", "content": "The dog. " * (1 + (3 * i) % n)}] for i in range(n)],
        "beta": [0.03 + 0.27 * i / n for i in range(n)],
        "row": [*range(n)],
    }
    return Dataset.from_dict(rows)


def _load(folder: Path) -> Any:

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _arguments(folder: Path, bf16: bool, **keys: Any) -> dict[str, Any]:
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "dataloader_pin_memory": False}
    plain = {"bf16": bf16, "use_cpu": not CUDA, "max_length": 256, "gradient_checkpointing": False}
    return {"output_dir": str(folder / "out"), "per_device_train_batch_size": 4, **quiet, **plain, **keys}


def _trainer(folder: Path, model: Any, data: Any, bf16: bool = False, more: Any = None, **keys: Any) -> Any:

    args = PairwiseDPOConfig(**_arguments(folder, bf16, **{"reference_cache": "off", **keys}))
    trainer = PairwiseDPOTrainer(
        model, args=args, train_dataset=data, processing_class=make_tokenizer(), **(more or {})
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _reference(folder: Path, architecture: str) -> Any:
    """Another model: beside itself every loss would be ln 2."""
    return make_student(architecture, folder / f"{architecture}-reference", seed=1)


def _ours(folder: Path, architecture: str, bf16: bool, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    more = {"ref_model": _reference(folder, architecture)}
    trainer = _trainer(folder, _load(folder / architecture), pairs(), bf16, more, layout=layout)
    return _gradient(trainer, [trainer.train_dataset[i] for i in range(4)])


def _one_at_a_time(folder: Path, architecture: str, bf16: bool) -> tuple[torch.Tensor, torch.Tensor]:

    data = pairs()
    trainer = DPOTrainer(
        _load(folder / architecture),
        ref_model=_reference(folder, architecture),
        args=DPOConfig(**_arguments(folder, bf16)),
        train_dataset=data.select_columns(["prompt", "chosen", "rejected"]),
        processing_class=make_tokenizer(),
    )
    each = []
    for i, beta in enumerate(data["beta"]):
        trainer.beta = beta
        each.append(_gradient(trainer, [trainer.train_dataset[i]]))
    losses, gradients = zip(*each, strict=True)
    return torch.stack(losses).mean(), torch.stack(gradients).mean(dim=0)


def _gradient(trainer: Any, rows: Sequence[Mapping[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of a batch, and its gradient as one vector."""
    if not hasattr(trainer, "prepared"):
        trainer.prepared = trainer.accelerator.prepare(trainer.model)
        trainer.current_gradient_accumulation_steps = 1
    trainer.prepared.zero_grad()
    loss = trainer.training_step(trainer.prepared, trainer.data_collator(rows))
    trained = [p for p in trainer.prepared.parameters() if p.requires_grad]
    return loss.detach(), torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained])


def _off(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> tuple[float, float]:
    return relative(one[0], other[0]), relative(one[1], other[1])


def fallback() -> Rows:
    """Padded rows, with a reason, where the shared layout would not be exact; a step goes through there too."""
    vocab = len(make_tokenizer())
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    capped = Gemma2ForCausalLM(Gemma2Config(vocab_size=vocab, num_key_value_heads=1, head_dim=16, **small))
    cases: dict[str, tuple[Any, dict[str, Any]]] = {
        "Gemma 2 (capped attention)": (capped, {}),
        "pad_to_multiple_of: 8": (make_student("qwen3"), {"pad_to_multiple_of": 8}),
    }
    with tempfile.TemporaryDirectory() as folder:
        for what, (model, keys) in cases.items():
            more = {"ref_model": type(model)(model.config)}
            trainer = _trainer(Path(folder), model, pairs(), CUDA, more, layout="auto", max_steps=1, **keys)
            trainer.train()
            loss = trainer.state.log_history[-1]["train_loss"]
            good = trainer.layout == "padded" and bool(trainer.layout_reason)
            yield found(what, good, f"{trainer.layout}: {trainer.layout_reason or 'no reason'}; loss {loss:.3f}")


# Optimizer and quantization ------------------------------------------------------------------------------------------


def optimizer() -> Rows:
    """The paper's paged AdamW beside torch's."""
    if not CUDA or find_spec("bitsandbytes") is None:
        yield skipped("paged_adamw_32bit", "needs CUDA and bitsandbytes")
        return

    with tempfile.TemporaryDirectory() as folder:
        trained = []
        for name in ("adamw_torch", "paged_adamw_32bit"):
            student = make_student("qwen3", Path(folder) / "qwen3")
            keys = {"optim": name, "max_steps": 3, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}
            more = {"ref_model": make_student("qwen3", Path(folder) / "reference")}
            trainer = _trainer(Path(folder), student, pairs(), False, more, **keys)
            before = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
            trainer.train()
            trained.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]) - before.to(DEVICE))
        off = relative(trained[1], trained[0])
        yield found(
            "paged_adamw_32bit", off <= 1e-2, f"three updates off by {off:.1e} (relative L2) from adamw_torch's"
        )


def qlora() -> Rows:
    """4-bit NF4 weights and LoRA, in both layouts."""
    if not CUDA or find_spec("bitsandbytes") is None:
        yield skipped("QLoRA", "needs CUDA and bitsandbytes")
        return

    quantization = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
    with tempfile.TemporaryDirectory() as folder:
        make_student("qwen3", Path(folder) / "qwen3", hidden=128)
        losses = {}
        for layout in ("shared", "padded"):
            student = load_student(str(Path(folder) / "qwen3"), quantization=quantization, init={"dtype": "bfloat16"})
            more = {"peft_config": LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=PROJECTIONS)}
            keys = {"layout": layout, "max_steps": 3, "learning_rate": 1e-3, "logging_steps": 1}
            trainer = _trainer(Path(folder), student, pairs(), True, more, **keys)
            trainer.train()
            losses[layout] = torch.tensor([log["loss"] for log in trainer.state.log_history if "loss" in log])
        off = relative(losses["shared"], losses["padded"])
        yield found("QLoRA", off <= 0.02, f"losses of three steps, shared beside padded, off by {off:.1e}")
