"""Loading the student: dtype, attention and quantization as λ states them, and words for what cannot be loaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from sp2dpo.errors import MissingExtra, ProcessError
from sp2dpo.train.student import load_student, quantization_of
from students import make_student

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A student whose checkpoint is in bfloat16, as those of the paper are."""
    folder = tmp_path_factory.mktemp("student")
    make_student("llama", folder).to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


def test_weights_are_float32_unless_a_dtype_is_given(folder: str) -> None:
    assert load_student(folder).dtype == torch.float32
    assert load_student(folder, init={"dtype": "auto"}).dtype == torch.bfloat16


def test_keys_of_from_pretrained_are_passed_on(folder: str) -> None:
    model = load_student(folder, init={"dtype": "bfloat16", "attn_implementation": "eager"})
    assert (model.dtype, model.config._attn_implementation) == (torch.bfloat16, "eager")


@pytest.mark.parametrize(
    ("init", "words"),
    [
        ({"revision": "abc"}, "give student.revision instead"),
        ({"quantization_config": {}}, "give student.quantization instead"),
        ({"dtype": "bf16"}, "'bf16'; give float32, bfloat16"),
        ({"attn_implementation": "eagr"}, "cannot be loaded: .*eagr"),
        ({"no_such_key": 1}, "cannot be loaded: .*no_such_key"),
    ],
)
def test_a_key_that_does_not_fit_is_told(folder: str, init: dict[str, Any], words: str) -> None:
    with pytest.raises(ProcessError, match=words):
        load_student(folder, init=init)


def test_a_folder_without_a_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(ProcessError, match="cannot be loaded"):
        load_student(str(tmp_path))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"load_in4bit": True}, "unknown key 'student.quantization.load_in4bit'.*'load_in_4bit'"),
        ({"load_in_4bit": "yes"}, "must be a boolean"),
        (NF4 | {"bnb_4bit_compute_dtype": "bf16"}, "refuses it"),
        (NF4 | {"bnb_4bit_quant_type": "nf5"}, "quantizes nothing"),
        ({"bnb_4bit_quant_type": "nf4"}, "quantizes nothing"),
    ],
)
def test_a_quantization_that_is_none_is_told(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ProcessError, match=words):
        quantization_of(keys)


def test_quantization_without_its_package_is_told(monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    monkeypatch.setattr("sp2dpo.train.student.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="bitsandbytes"):
        load_student(folder, quantization=NF4)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_a_quantized_student_has_4_bit_projections(folder: str) -> None:
    model = load_student(folder, quantization=NF4, init={"dtype": "bfloat16"})
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert model.config.quantization_config.bnb_4bit_compute_dtype == torch.bfloat16
