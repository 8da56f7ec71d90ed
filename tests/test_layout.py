"""The shared layout's parts: the plan of a packed row, its attention, its head, and where it is not used."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, VeraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from trl import DPOConfig
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer import utils as trl
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head

from sp2dpo.train import layout
from sp2dpo.train.layout import head, kernels, miniature
from sp2dpo.train.layout.attention import by_segment
from sp2dpo.train.layout.row import Row, causal_mask
from students import ARCHITECTURES, make_student

FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")
SHAPE = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99}


def batch_of(pairs: list[tuple[list[int], list[int], list[int]]], max_length: int | None = None) -> dict[str, Tensor]:
    """TRL's batch of (prompt, chosen, rejected) token ids."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    collator = DataCollatorForPreference(pad_token_id=0, max_length=max_length)
    batch: dict[str, Tensor] = collator([dict(zip(names, pair, strict=True)) for pair in pairs])
    return batch


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(5, 90, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPT, SAME = tokens(20, 0), tokens(6, 1)
BATCHES: dict[str, Any] = {
    "responses that begin alike": ([(PROMPT, [*SAME, 7, 8], [*SAME, 9]), (PROMPT[:9], [5], tokens(25, 2))], None),
    "identical responses": ([(PROMPT, SAME, SAME)], None),
    "one response a prefix of the other": ([(PROMPT, SAME, SAME[:2]), (PROMPT, SAME[:3], SAME)], None),
    "prompts that fill the length": ([(PROMPT, SAME, [7]), (PROMPT[:19], SAME, [7, 8])], 20),
    "cut to one token": ([(PROMPT, SAME, tokens(9, 3))], 21),
    "nothing in common": ([([], [5, 6, 7], [8, 9]), ([], [5, 6], [8, 9, 10])], None),
}


def seen_by_each(plan: dict[str, Tensor]) -> list[list[int]]:
    """For each token of the row, the places of the row that it attends to."""
    seen: list[list[int]] = [[] for _ in range(plan["input_ids"].size(1))]
    ends = zip(plan["query_ends"].tolist(), plan["key_ends"].tolist(), strict=True)
    start, key_start = next(ends)
    for end, key_end in ends:
        keys = plan["keys"][key_start:key_end].tolist()
        for place in range(start, end):
            seen[place] = keys[: len(keys) - (end - place) + 1]
        start, key_start = end, key_end
    return seen


# --- plan


def test_the_rejected_response_goes_on_from_the_prompt_and_does_not_see_the_chosen_one() -> None:
    plan = layout.plan(batch_of([([11, 12, 13], [21, 22], [31, 32])]))
    assert plan["input_ids"].tolist() == [[11, 12, 13, 21, 22, 31, 32]]
    assert plan["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 4]]
    assert plan["lengths"].tolist() == [[3, 2, 2]]
    rows = ["".join("1" if k in seen else "0" for k in range(7)) for seen in seen_by_each(plan)]
    assert rows == ["1000000", "1100000", "1110000", "1111000", "1111100", "1110010", "1110011"]


def test_the_last_common_token_predicts_the_first_token_of_both_responses() -> None:
    plan = layout.plan(batch_of([([11, 12], [21, 22], [31])]))
    assert plan["predictors"].tolist() == [[1, 2, 1]]
    assert plan["labels"].tolist() == [[21, 22, 31]]


def test_a_token_that_both_responses_begin_with_is_scored_once_and_counted_for_both() -> None:
    plan = layout.plan(batch_of([([11], [21, 22], [21, 32])]))
    assert plan["labels"].tolist() == [[21, 22, 32]]
    assert plan["sources"].tolist() == [0, 1, 0, 2]
    assert plan["targets"].tolist() == [0, 1, 2, 3]


answers = st.lists(st.integers(1, 3), min_size=1, max_size=6)
drawn = st.lists(st.tuples(st.lists(st.integers(1, 3), max_size=5), answers, answers), min_size=1, max_size=4)


@given(drawn, st.none() | st.integers(2, 9))
def test_every_completion_token_is_predicted_from_its_own_sequence_and_nothing_else(
    pairs: list[tuple[list[int], list[int], list[int]]], max_length: int | None
) -> None:
    batch = batch_of(pairs, max_length)
    plan = layout.plan(batch)
    rows, columns = batch["input_ids"].size(0), batch["input_ids"].size(1) - 1
    seen = seen_by_each(plan)
    ids, positions = plan["input_ids"][0], plan["position_ids"][0]
    cells = batch["completion_mask"][:, 1:].reshape(-1).nonzero()[:, 0]
    assert sorted(plan["targets"].tolist()) == cells.tolist()
    for source, target in zip(plan["sources"].tolist(), plan["targets"].tolist(), strict=True):
        row, column = divmod(target, columns)
        assert plan["labels"][0, source] == batch["input_ids"][row, column + 1]
        places = seen[plan["predictors"][0, source]]
        assert ids[places].tolist() == batch["input_ids"][row, : column + 1].tolist()
        assert positions[places].tolist() == list(range(column + 1))
    assert rows == 2 * len(plan["lengths"])
    assert plan["lengths"].sum() == len(ids) <= batch["attention_mask"].sum()


@given(drawn)
def test_the_row_has_each_pair_s_longest_common_prefix_once(
    pairs: list[tuple[list[int], list[int], list[int]]],
) -> None:
    plan = layout.plan(batch_of(pairs))
    for (prompt, chosen, rejected), lengths in zip(pairs, plan["lengths"].tolist(), strict=True):
        first, second = prompt + chosen, prompt + rejected
        common = next((n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
        prefix = min(len(first), len(second)) if common is None else common
        assert lengths == [prefix, len(first) - prefix, len(second) - prefix]


def test_a_plan_is_whole_numbers_in_tensors_that_survive_pickling() -> None:
    plan = layout.plan(batch_of(*BATCHES["responses that begin alike"]))
    again = pickle.loads(pickle.dumps(plan))
    assert plan.keys() == again.keys()
    assert all(torch.equal(plan[name], again[name]) and not plan[name].is_floating_point() for name in plan)


# --- the model


def fused(architecture: str, **more: Any) -> Any:
    model = make_student(architecture, **more).eval()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"))
    return model


def scores(model: Any, batch: dict[str, Tensor], **more: Any) -> Any:
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return model(**inputs, labels=labels, fused_lm_head=True, use_cache=False, **more)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", BATCHES)
def test_what_the_packed_row_gives_is_what_the_padded_rows_give(
    case: str, architecture: str, implementation: str
) -> None:
    batch = batch_of(*BATCHES[case])
    model = fused(architecture)
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        want = scores(model, batch)
        layout.install(model)
        got = scores(model, batch, **{layout.KEY: layout.plan(batch)})
    for name in FIELDS:
        assert torch.allclose(getattr(got, name).float(), getattr(want, name).float(), atol=2e-5), name
    assert got.loss.item() == pytest.approx(want.loss.item(), rel=1e-5)


def test_attention_layers_are_called_on_the_packed_row_only() -> None:
    model = fused("llama")
    layout.install(model)
    lengths: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: lengths.append(args[0].size(1)))
    batch = batch_of(*BATCHES["responses that begin alike"])
    scores(model, batch, **{layout.KEY: layout.plan(batch)})
    scores(model, batch)
    assert lengths == [20 + 6 + 2 + 1 + 9 + 1 + 25, 34]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generation_and_files_are_as_before(architecture: str, implementation: str, tmp_path: Path) -> None:
    model = fused(architecture)
    model.set_attn_implementation(implementation)
    prompts = {"input_ids": torch.tensor([PROMPT, PROMPT[::-1]]), "attention_mask": torch.ones(2, 20, dtype=torch.long)}

    def look(name: str) -> tuple[Any, ...]:
        written = model.generate(**prompts, max_new_tokens=8, do_sample=False)
        model.save_pretrained(tmp_path / name)
        return written, model(**prompts).logits, (tmp_path / name / "config.json").read_text(encoding="utf-8")

    before = look("before")
    layout.install(model)
    batch = batch_of(*BATCHES["responses that begin alike"])
    scores(model, batch, **{layout.KEY: layout.plan(batch)}).log_probs.sum().backward()
    after = look("after")
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert before[2] == after[2]
    assert "sp2dpo" not in after[2]
    assert model.config.get_text_config()._attn_implementation == implementation


def test_a_batch_with_a_layout_gives_logits_on_padded_rows_where_logits_are_asked_for() -> None:
    model = fused("llama")
    layout.install(model)
    batch = batch_of(*BATCHES["responses that begin alike"])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(model(**inputs, **{layout.KEY: layout.plan(batch)}).logits, model(**inputs).logits)


def test_installing_twice_is_installing_once() -> None:
    model = fused("llama")
    layout.install(model)
    forward = model.forward
    layout.install(model)
    layout.install(get_peft_model(model, LoraConfig(target_modules=["q_proj"])))
    assert model.forward == forward
    assert len(model.base_model._forward_hooks) == 1


def test_a_failure_in_a_layer_leaves_its_own_attention_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fused("llama")
    layout.install(model)
    batch = batch_of(*BATCHES["responses that begin alike"])
    monkeypatch.setattr(model.model.layers[1].self_attn, "is_causal", False)
    with pytest.raises(Exception, match="not causal"):
        scores(model, batch, **{layout.KEY: layout.plan(batch)})
    assert all(layer.self_attn.config is model.config for layer in model.model.layers)
    assert trl._ChunkedLogProbFunction is ChunkedLogProbFunction


def test_under_autocast_the_packed_row_differs_from_padded_rows_by_rounding_only() -> None:
    model = fused("qwen3")
    batch = batch_of(*BATCHES["responses that begin alike"])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        want = scores(model, batch).log_probs
        layout.install(model)
        got = scores(model, batch, **{layout.KEY: layout.plan(batch)}).log_probs
    assert 0 < (got - want).norm() / want.norm() < 0.02


# --- attention


def test_a_mask_is_made_once_for_all_layers() -> None:
    plan = layout.plan(batch_of(*BATCHES["responses that begin alike"]))
    row = Row.of(plan, {})
    query, key, value = (torch.randn(1, heads, plan["input_ids"].size(1), 8) for heads in (4, 2, 2))
    by_segment(query, key, value, row, 0.3, None)
    masks = dict(row._masks)
    by_segment(query, key, value, row, 0.3, None)
    assert masks
    assert all(row._masks[key] is mask for key, mask in masks.items())
    assert len(row._masks) == len(masks)


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_attention_by_segment_is_attention_under_the_whole_mask(window: int | None) -> None:
    plan = layout.plan(batch_of(*BATCHES["responses that begin alike"]))
    places = plan["position_ids"][0]
    allowed = torch.zeros(len(places), len(places), dtype=torch.bool)
    for place, seen in enumerate(seen_by_each(plan)):
        allowed[place, [k for k in seen if window is None or places[place] - places[k] < window]] = True
    query, key, value = (torch.randn(1, heads, len(places), 8) for heads in (4, 2, 2))
    want = scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=0.3, enable_gqa=True)
    got = by_segment(query, key, value, Row.of(plan, {}), 0.3, window)
    assert torch.allclose(got, want.transpose(1, 2), atol=1e-6)


CPU = torch.device("cpu")


def test_a_kernel_that_aligns_queries_with_the_first_keys_is_found_out() -> None:
    def top_left(query: Tensor, key: Tensor, value: Tensor, row: Row, scale: float, window: int | None) -> Tensor:
        parts, start = [], 0
        for (end, key_start), key_end in zip(
            zip(row.query_ends[1:], row.key_ends[:-1], strict=True), row.key_ends[1:], strict=True
        ):
            keys = row.keys[key_start:key_end]
            mask = causal_mask(int(end - start), int(end - start), window, query)
            mask = torch.nn.functional.pad(mask, (0, len(keys) - mask.size(1)), value=float("-inf"))
            parts.append(
                scaled_dot_product_attention(
                    query[:, :, start:end], key[:, :, keys], value[:, :, keys], mask, scale=scale, enable_gqa=True
                )
            )
            start = end
        return torch.cat(parts, dim=2).transpose(1, 2)

    assert kernels.agrees(by_segment, CPU, torch.float32, 4, 2, 16) < 1e-6
    assert kernels.agrees(top_left, CPU, torch.float32, 4, 2, 16) > 10 * kernels.TOLERANCE


def varlen_on_a_cpu(
    query: Tensor, key: Tensor, value: Tensor, *ends: Any, scale: float, window_size: Any, enable_gqa: bool = False
) -> Tensor:
    """What the interface of a variable-length kernel promises, written out; causal from the last key."""
    assert enable_gqa or query.size(1) == key.size(1)
    query_ends, key_ends, longest_query, longest_key = ends
    parts = []
    for n in range(len(query_ends) - 1):
        asked, keys = slice(*query_ends[n : n + 2].tolist()), slice(*key_ends[n : n + 2].tolist())
        q, k, v = (x.transpose(0, 1)[None] for x in (query[asked], key[keys], value[keys]))
        assert 0 < q.size(2) <= longest_query
        assert k.size(2) <= longest_key
        mask = causal_mask(q.size(2), k.size(2), window_size[0] + 1 if window_size[0] >= 0 else None, q)
        parts.append(scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(parts)


def varlen_of_an_older_torch(*given: Any, scale: float, window_size: Any) -> Tensor:
    return varlen_on_a_cpu(*given, scale=scale, window_size=window_size)


@pytest.mark.parametrize("varlen", [varlen_on_a_cpu, varlen_of_an_older_torch])
def test_variable_length_kernels_are_given_the_segments(monkeypatch: pytest.MonkeyPatch, varlen: Any) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    assert kernels.agrees(kernels._torch_varlen(), CPU, torch.float32, 4, 2, 16) < 1e-6


def test_a_kernel_that_cannot_be_used_is_named_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    assert kernels._first_right(CPU, torch.bfloat16, 4, 2, 16) is None
    assert "torch.nn.attention.varlen: " in caplog.text
    assert "flash_attn: ModuleNotFoundError" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_variable_length_kernel_of_this_gpu_agrees_with_explicit_masks() -> None:
    found = kernels.kernels(torch.device("cuda", 0), 8, 4, 64)
    assert torch.bfloat16 in found


# --- head


@pytest.mark.parametrize(
    "outputs", [("log_probs",), ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")]
)
def test_the_head_in_tiles_gives_what_trl_s_gives(outputs: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_TILE", 32 * 300)
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(70, 16, generator=draw), 0.3 * torch.randn(300, 16, generator=draw)
    targets = torch.randint(300, (70,), generator=draw)
    upstream = torch.randn(2, 70, generator=draw)

    def run() -> list[Tensor | None]:
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        fields = trl._ChunkedLogProbFunction.apply(leaves[0], leaves[1], None, targets, 1.0, 128, None, 1.0, outputs)
        total = (fields[0] * upstream[0]).sum()
        if fields[1] is not None:
            total = total + (fields[1] * upstream[1]).sum()
        return [*fields, *torch.autograd.grad(total, leaves)]

    want = run()
    with head.in_tiles(CPU):
        assert trl._ChunkedLogProbFunction is not ChunkedLogProbFunction
        got = run()
    assert trl._ChunkedLogProbFunction is ChunkedLogProbFunction
    for ours, theirs in zip(got, want, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.allclose(ours.float(), theirs.float(), atol=1e-5)  # type: ignore[union-attr]


def test_a_soft_capped_head_is_left_to_trl() -> None:
    hidden, weight, targets = torch.randn(5, 8), torch.randn(30, 8), torch.arange(5)
    given_all = (hidden, weight, None, targets, 1.0, 128, 5.0, 1.0, ("log_probs",))
    with head.in_tiles(CPU):
        capped = trl._ChunkedLogProbFunction.apply(*given_all)[0]
    logits = 5.0 * torch.tanh(hidden @ weight.T / 5.0)
    assert torch.allclose(capped, logits.log_softmax(1)[torch.arange(5), targets], atol=1e-5)


# --- where padded rows are used


def arguments(folder: Path, **more: Any) -> Any:
    return DPOConfig(output_dir=str(folder), use_cpu=True, bf16=False, **more)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_the_paper_s_students_can_use_it_and_no_random_number_is_drawn(
    architecture: str, adapted: bool, tmp_path: Path
) -> None:
    model = make_student(architecture)
    if adapted:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], lora_dropout=0.1))
    before = torch.get_rng_state()
    assert layout.why_not(model, arguments(tmp_path)) is None
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"truncation_mode": "keep_end"}, "truncation_mode is 'keep_end'"),
        ({"pad_to_multiple_of": 8}, "pad_to_multiple_of asks for padded rows"),
        ({"torch_compile": True}, "torch_compile would compile anew for every batch"),
    ],
)
def test_a_setting_that_needs_padded_rows_is_named(setting: dict[str, Any], reason: str, tmp_path: Path) -> None:
    args = arguments(tmp_path)
    for name, value in setting.items():
        setattr(args, name, value)
    assert layout.why_not(make_student("llama"), args) == reason


@pytest.mark.parametrize(("name", "kind"), [("cp", "context"), ("sp", "sequence"), ("tp", "tensor")])
def test_parallelism_within_rows_is_named(name: str, kind: str, tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args.parallelism_config = SimpleNamespace(**{"cp_size": 1, "sp_size": 1, "tp_size": 1, f"{name}_size": 2})
    assert layout.why_not(make_student("llama"), args) == f"{kind} parallelism splits the rows"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "PROMPT_TUNING, not LoRA"),
        (VeraConfig(r=2, target_modules=["q_proj"]), "VERA, not LoRA"),
        (LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5]), "aLoRA"),
    ],
    ids=["prompt tuning", "vera", "alora"],
)
def test_an_adapter_other_than_lora_is_named(config: Any, reason: str, tmp_path: Path) -> None:
    reason_given = layout.why_not(get_peft_model(make_student("llama"), config), arguments(tmp_path))
    assert reason_given is not None
    assert reason in reason_given


def test_a_router_loss_is_named_and_a_router_without_one_is_no_obstacle(tmp_path: Path) -> None:
    model = MixtralForCausalLM(MixtralConfig(**SHAPE, num_key_value_heads=1, num_local_experts=2, sliding_window=None))
    assert layout.why_not(model, arguments(tmp_path)) == "a router loss counts the tokens of the rows"
    assert layout.why_not(model, arguments(tmp_path, router_aux_loss_coef=0.0)) is None


def test_dropout_in_attention_is_named_though_trl_disables_only_the_rest(tmp_path: Path) -> None:
    model = make_student("llama")
    model.model.layers[1].self_attn.attention_dropout = 0.1
    assert layout.why_not(model, arguments(tmp_path)) == "its attention has dropout"


def test_dropout_in_attention_is_found_where_a_model_keeps_it_in_a_module(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=2, n_layer=2, vocab_size=99))
    assert layout.why_not(model, arguments(tmp_path, disable_dropout=False)) == "its attention has dropout"
    assert layout.why_not(model, arguments(tmp_path)) is None


def test_a_model_split_across_devices_is_named(tmp_path: Path) -> None:
    model = make_student("llama")
    model.hf_device_map = {"model": 0, "lm_head": 1}
    assert layout.why_not(model, arguments(tmp_path)) == "it is split across devices"


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, num_key_value_heads=1, head_dim=16)), "takes 'softcap'"),
        (lambda: GptOssForCausalLM(GptOssConfig(**SHAPE, num_key_value_heads=1, head_dim=16)), "takes 's_aux'"),
        (lambda: Mamba2ForCausalLM(_mamba()), "linear_attention"),
        (lambda: Apart(make_student("llama").config), "computes something else on packed rows"),
        (lambda: Deaf(make_student("llama").config), "does not run on packed rows (TypeError"),
        (lambda: Huge(make_student("llama").config), "cannot be made (ValueError: it still has"),
    ],
    ids=["softcap", "sinks", "state space", "attention of its own", "no keywords", "huge"],
)
def test_an_architecture_that_does_not_fit_is_named(model: Any, reason: str, tmp_path: Path) -> None:
    given_reason = layout.why_not(model(), arguments(tmp_path, router_aux_loss_coef=0.0))
    assert given_reason is not None
    assert reason in given_reason


def _mamba() -> Any:
    return Mamba2Config(
        hidden_size=32, num_heads=4, head_dim=16, state_size=8, n_groups=1, num_hidden_layers=2, vocab_size=99
    )


class Apart(LlamaForCausalLM):  # type: ignore[misc]
    """Attention that is not looked up by name: every token sees all before it in its row."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            attention = layer.self_attn
            layer.self_attn.forward = lambda hidden_states, attention=attention, **_: (
                attention.o_proj(attention.q_proj(hidden_states).cumsum(1)),
                None,
            )


class Deaf(LlamaForCausalLM):  # type: ignore[misc]
    """A backbone that takes no further keywords."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        forward = self.model.forward
        self.model.forward = lambda input_ids, attention_mask, use_cache: forward(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache
        )


class Huge(LlamaForCausalLM):  # type: ignore[misc]
    """It has a table that no setting of a configuration makes smaller."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.table = torch.nn.Embedding(10**6, 100, device="meta")


def test_a_trl_without_shifted_labels_is_found_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def without(model: Any) -> None:
        add_fused_lm_head(model)
        fused_forward = model.forward

        def forward(*, input_ids: Any, attention_mask: Any, labels: Any, **more: Any) -> Any:
            return fused_forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **more)

        model.forward = forward

    monkeypatch.setattr(miniature, "_known", {})
    monkeypatch.setattr(miniature, "add_fused_lm_head", without)
    reason = layout.why_not(make_student("llama"), arguments(tmp_path))
    assert reason is not None
    assert reason.startswith("LlamaForCausalLM does not run on packed rows (TypeError")


def test_a_verdict_is_reached_once_for_an_architecture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    layout.why_not(make_student("llama"), arguments(tmp_path))
    monkeypatch.setattr(miniature, "_judge", lambda model, dropout: pytest.fail("judged again"))
    assert layout.why_not(make_student("llama"), arguments(tmp_path)) is None


def test_a_saved_student_s_configuration_does_not_name_the_packed_attention(tmp_path: Path) -> None:
    model = fused("gemma3")
    layout.install(model)
    model.save_pretrained(tmp_path)
    assert "attn_implementation" not in json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
