"""The quantisation schemes of other tools' checkpoints: GPTQ, AWQ, compressed-tensors (llm-compressor).

Only `quantization_config` of config.json is read, so that unsupported schemes are refused before weights are
downloaded: other numbers of bits, int8 in groups, FP8, activations with static scales.

python generate.py --model Qwen/Qwen2.5-0.5B-Instruct-AWQ --prompt "The sea"
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from common.errors import UserError

Method = Literal["gptq", "awq", "compressed-tensors"]
METHODS: tuple[Method, ...] = ("gptq", "awq", "compressed-tensors")


@dataclass(frozen=True)
class Scheme:
    """How a tool stores quantised matrices."""

    method: Method
    bits: int  # 4 or 8
    group: int | None  # input features that share a scale, a multiple of 32; None: all of an output feature
    asymmetric: bool = False  # has zero points
    zeros_less_one: bool = False  # GPTQ's first layout stores zero - 1
    packed: bool = True  # several numbers in an int32; else int8
    rounds_activations: bool = False  # meant for activations rounded to int8 per token


def read_scheme(about: Mapping[str, Any]) -> Scheme:
    """Read a `quantization_config`. UserError names an unsupported key and its supported values."""
    read = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed}
    return read[about["quant_method"]](about)


def _gptq(about: Mapping[str, Any]) -> Scheme:
    _only(about, "gptq", "bits", 4)
    layout = "checkpoint_format" if about.get("checkpoint_format") is not None else "format"
    _only({"format": "gptq", **about}, "gptq", layout, "gptq", "gptq_v2")
    _only(about, "gptq", "sym", True, False)
    _only({"dynamic": None, **about}, "gptq", "dynamic", None, {})  # other settings for some of the matrices
    _only({"pack_dtype": "int32", **about}, "gptq", "pack_dtype", "int32")
    _only({"is_marlin_format": False, **about}, "gptq", "is_marlin_format", False)
    group = _group("gptq", about.get("group_size"))
    return Scheme("gptq", 4, group, not about["sym"], zeros_less_one=about.get(layout) != "gptq_v2")


def _awq(about: Mapping[str, Any]) -> Scheme:
    _only(about, "awq", "bits", 4)
    _only({"version": about.get("format"), **about}, "awq", "version", "gemm", "GEMM")
    _only(about, "awq", "zero_point", True)
    return Scheme("awq", 4, _group("awq", about.get("group_size")), asymmetric=True)


def _compressed(about: Mapping[str, Any]) -> Scheme:
    name = "compressed-tensors"
    groups = about.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise _refusal(name, "config_groups", groups, "one group of matrices")
    of = next(iter(groups.values()))
    weights = of.get("weights") if isinstance(of, dict) else None
    if not isinstance(weights, dict):
        raise _refusal(name, "config_groups", groups, "a group that describes its weights")
    for key in ("kv_cache_scheme", "transform_config"):
        _only({key: None, **about}, name, key, None, {})
    sparsity = about.get("sparsity_config") or {"format": "dense"}
    if not isinstance(sparsity, dict) or sparsity.get("format") != "dense":
        raise _refusal(name, "sparsity_config", sparsity, "none")
    _only({"output_activations": None, **of}, name, "output_activations", None)
    _only(of, name, "targets", ["Linear"])
    _only(weights, name, "type", "int")
    _only({"dynamic": False, **weights}, name, "dynamic", False, None)
    _only({"actorder": None, **weights}, name, "actorder", None, "weight", "static", "group")
    _only(weights, name, "num_bits", 4, 8)
    _only(weights, name, "symmetric", True, False)
    bits, symmetric = weights["num_bits"], weights["symmetric"]
    layout = {"format": of.get("format") or about.get("format")}
    _only(layout, name, "format", "pack-quantized", *(("int-quantized", "naive-quantized") if bits == 8 else ()))
    _only(weights, name, "strategy", *(("channel",) if bits == 8 else ("group", "channel")))
    if bits == 8 and not symmetric:
        raise _refusal(name, "symmetric", symmetric, "true with 8 bits")
    activations = of.get("input_activations")
    if activations is not None:
        if not isinstance(activations, dict):
            raise _refusal(name, "input_activations", activations, "null, or int8 by token")
        _only(activations, name, "dynamic", True)
        _only(activations, name, "type", "int")
    group = None if weights["strategy"] == "channel" else _group(name, weights.get("group_size"))
    packed = layout["format"] == "pack-quantized"
    return Scheme(
        "compressed-tensors", bits, group, not symmetric, packed=packed, rounds_activations=activations is not None
    )


def _group(method: str, size: Any) -> int | None:
    """Read a group size. -1 means one scale per output feature, and gives None."""
    if not isinstance(size, int) or isinstance(size, bool) or (size != -1 and (size < 32 or size % 32)):
        raise _refusal(method, "group_size", size, "-1, or a multiple of 32")
    return None if size == -1 else size


def _only(about: Mapping[str, Any], method: str, key: str, *supported: Any) -> None:
    value = about.get(key)
    if not any(type(value) is type(each) and value == each for each in supported):
        raise _refusal(method, key, value, " or ".join(map(repr, supported)))


def _refusal(method: str, key: str, value: Any, supported: str) -> UserError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return UserError(
        f"the model is quantised by {method!r} with {key} {shown} in quantization_config of config.json, which is not "
        f"read here; supported is {supported}: or take the model as it was before"
    )
