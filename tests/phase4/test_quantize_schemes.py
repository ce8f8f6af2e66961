"""Quantisation schemes of other tools in config.json: read, or refused by the name of the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import phase4
from common.errors import UserError
from phase4.quantize_schemes import Scheme, read_scheme

GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": True}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
CHANNEL: dict[str, Any] = {"strategy": "channel", "group_size": None}
INT8: dict[str, Any] = {"num_bits": 8, **CHANNEL}
BY_TOKEN = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"}


def compressed(layout: str, activations: Any = None, **weights: Any) -> dict[str, Any]:
    described = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, **weights}
    group = {"targets": ["Linear"], "weights": described, "input_activations": activations}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}}


@pytest.mark.parametrize(
    ("about", "scheme"),
    [
        (GPTQ, Scheme("gptq", 4, 128, zeros_less_one=True)),
        ({**GPTQ, "group_size": -1, "sym": False}, Scheme("gptq", 4, None, asymmetric=True, zeros_less_one=True)),
        ({**GPTQ, "checkpoint_format": "gptq_v2"}, Scheme("gptq", 4, 128)),
        ({**GPTQ, "format": "gptq_v2"}, Scheme("gptq", 4, 128)),
        (AWQ, Scheme("awq", 4, 64, asymmetric=True)),
        ({**AWQ, "version": "GEMM", "modules_to_not_convert": None}, Scheme("awq", 4, 64, asymmetric=True)),
        (compressed("pack-quantized"), Scheme("compressed-tensors", 4, 128)),
        (compressed("pack-quantized", symmetric=False), Scheme("compressed-tensors", 4, 128, asymmetric=True)),
        (compressed("pack-quantized", actorder="weight"), Scheme("compressed-tensors", 4, 128)),
        (compressed("pack-quantized", **CHANNEL), Scheme("compressed-tensors", 4, None)),
        (compressed("int-quantized", **INT8), Scheme("compressed-tensors", 8, None, packed=False)),
        (
            compressed("int-quantized", BY_TOKEN, **INT8),
            Scheme("compressed-tensors", 8, None, packed=False, rounds_activations=True),
        ),
    ],
)
def test_schemes(about: dict[str, Any], scheme: Scheme) -> None:
    assert read_scheme(about) == scheme


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "three bits": ({**GPTQ, "bits": 3}, "'gptq' with bits 3"),
    "eight bits of gptq": ({**GPTQ, "bits": 8}, "'gptq' with bits 8"),
    "groups of 16": ({**GPTQ, "group_size": 16}, "'gptq' with group_size 16"),
    "marlin": ({**GPTQ, "checkpoint_format": "marlin"}, "'gptq' with checkpoint_format 'marlin'"),
    "per module": ({**GPTQ, "dynamic": {"down": {"bits": 8}}}, "'gptq' with dynamic"),
    "gemv": ({**AWQ, "version": "gemv"}, "'awq' with version 'gemv'"),
    "int8 in groups": (compressed("pack-quantized", num_bits=8), "'compressed-tensors' with strategy 'group'"),
    "asymmetric int8": (compressed("int-quantized", **INT8, symmetric=False), "with symmetric False"),
    "float8": (compressed("float-quantized", type="float", **INT8), "with type 'float'"),
    "an unknown order": (compressed("pack-quantized", actorder="other"), "with actorder 'other'"),
    "static activations": (
        compressed("int-quantized", {"num_bits": 8, "type": "int", "dynamic": False}, **INT8), "with dynamic False"
    ),
    "a narrow cache": ({**compressed("pack-quantized"), "kv_cache_scheme": {"num_bits": 8}}, "with kv_cache_scheme"),
    "no groups": ({"quant_method": "compressed-tensors"}, "with config_groups None"),
    "two groups": ({"quant_method": "compressed-tensors", "config_groups": {"a": {}, "b": {}}}, "with config_groups"),
    "fp8": ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "'fp8', which is not read here"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes', which is not read here"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(REFUSED))
def test_other_forms_are_refused_by_config_json_alone(llama_folder: Path, name: str) -> None:
    about, words = REFUSED[name]
    config = json.loads((llama_folder / "config.json").read_text())
    with pytest.raises(UserError, match=words) as error:
        phase4.ModelConfig.from_hf({**config, "quantization_config": about})
    assert "\n" not in str(error.value)
    assert "supported" in str(error.value)
