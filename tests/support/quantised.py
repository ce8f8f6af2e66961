"""Writes checkpoints as GPTQ, AWQ and compressed-tensors do, from known levels, zeros and scales."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # index of the number in each four bits of a word, from the lowest


@dataclass(frozen=True)
class Case:
    about: dict[str, Any]  # quantization_config
    group: int = 32  # 0: the whole width
    zeros: bool = False  # other than the middle
    bits: int = 4
    signed: bool = False  # whether scales have either sign, as AutoRound writes them
    shuffled: bool = False  # whether input features of a group are apart (act-order)


def gptq(**keys: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, **keys}


def awq(**keys: Any) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm", **keys}


def compressed(layout: str, activations: Any = None, **weights: Any) -> dict[str, Any]:
    described = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, **weights}
    group = {"targets": ["Linear"], "weights": described, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


CHANNEL: dict[str, Any] = {"strategy": "channel", "group_size": None}
INT8: dict[str, Any] = {"num_bits": 8, **CHANNEL}
CASES = {
    "gptq": Case(gptq()),
    "gptq, zeros": Case(gptq(sym=False), zeros=True),
    "gptq_v2, zeros": Case(gptq(sym=False, checkpoint_format="gptq_v2"), zeros=True),
    "gptq, signed": Case(gptq(), signed=True),
    "gptq, one group": Case(gptq(group_size=-1, desc_act=True), group=0),
    "gptq, groups of 64": Case(gptq(group_size=64), group=64),
    "gptq, act-order": Case(gptq(desc_act=True), shuffled=True),
    "gptq, act-order, zeros": Case(gptq(desc_act=True, sym=False), zeros=True, shuffled=True),
    "awq": Case(awq(), zeros=True),
    "compressed-tensors": Case(compressed("pack-quantized")),
    "compressed-tensors, act-order": Case(compressed("pack-quantized", actorder="group"), shuffled=True),
    "compressed-tensors, zeros": Case(compressed("pack-quantized", symmetric=False), zeros=True),
    "compressed-tensors, channels": Case(compressed("pack-quantized", **CHANNEL), group=0),
    "compressed-tensors, packed int8": Case(compressed("pack-quantized", **INT8), group=0, bits=8),
    "compressed-tensors, int8": Case(compressed("int-quantized", **INT8), group=0, bits=8),
}


def words(numbers: Tensor, bits: int = 4, order: tuple[int, ...] | None = None) -> Tensor:
    """Pack [..., n] -> int32 [..., n * bits / 32], number order[i] of each word in the i-th bits from the lowest."""
    each = 32 // bits
    parts = numbers.long().unflatten(-1, (-1, each))[..., list(order or range(each))]
    packed = (parts << torch.arange(each) * bits).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def stored(case: Case, levels: Tensor, zeros: Tensor, scales: Tensor, group_of: Tensor) -> dict[str, Tensor]:
    """Store a matrix [out, in] in the format; levels from 0, zeros and scales [out, groups], group_of [in]."""
    method = case.about["quant_method"]
    if method == "gptq":
        less = 0 if case.about.get("checkpoint_format") == "gptq_v2" else 1
        return {
            "qweight": words(levels).T.contiguous(),
            "qzeros": words((zeros.T - less) % 16),
            "scales": scales.T.contiguous(),
            "g_idx": group_of.int(),
        }
    if method == "awq":
        return {
            "qweight": words(levels.T, 4, AWQ_ORDER),
            "qzeros": words(zeros.T, 4, AWQ_ORDER),
            "scales": scales.T.contiguous(),
        }
    tensors = {"weight_scale": scales.to(torch.bfloat16)}
    if case.about["format"] == "int-quantized":
        return {**tensors, "weight": (levels - 128).to(torch.int8)}
    tensors |= {"weight_packed": words(levels, case.bits), "weight_shape": torch.tensor(levels.shape)}
    if case.zeros:
        tensors["weight_zero_point"] = words(zeros.T).T.contiguous()
    return {**tensors, "weight_g_idx": group_of.int()} if case.shuffled else tensors


def quantise(case: Case, meant: Path, folder: Path) -> dict[str, Tensor]:
    """Write `meant` to `folder` as the tool would; return its float32 matrices, with which `meant` is overwritten."""
    generator = torch.Generator().manual_seed(5)
    shutil.copytree(meant, folder)
    dense, packed, weights = load_file(meant / "model.safetensors"), dict[str, Tensor](), dict[str, Tensor]()
    for key, tensor in dense.items():
        if ".layers." not in key or tensor.ndim != 2:
            packed[key] = tensor
            continue
        (out, width), top = tensor.shape, 2**case.bits
        size = case.group or width
        levels = torch.randint(0, top, (out, width), generator=generator)
        zeros = torch.full((out, width // size), top // 2)
        if case.zeros:
            zeros = torch.randint(0, top, zeros.shape, generator=generator)
        group_of = torch.arange(width) // size
        if case.shuffled:  # alike for matrices with the same inputs
            group_of = group_of[torch.randperm(width, generator=torch.Generator().manual_seed(width))]
        # float16 represents every bfloat16 of this size.
        scales = ((torch.rand(zeros.shape, generator=generator) + 0.5) / 4 / top).bfloat16().half()
        if case.signed:
            scales *= 1 - 2 * torch.randint(0, 2, scales.shape, generator=generator)
        owner = key.removesuffix(".weight")
        weights[owner] = (levels - zeros[:, group_of]).float() * scales[:, group_of].float()
        dense[key] = weights[owner]
        parts = stored(case, levels, zeros, scales, group_of)
        packed |= {f"{owner}.{kind}": part for kind, part in parts.items()}
    save_file(dense, meant / "model.safetensors", {"format": "pt"})
    save_file(packed, folder / "model.safetensors", {"format": "pt"})
    change(folder, quantization_config=case.about)
    return weights


def change(folder: Path, **keys: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))
