"""The layout of matrices in memory: several fused into one, for one product, and input-major on a CPU.

The rows of query, key and value are concatenated into one matrix, those of gate and up into another. Files keep them
separate: checkpoints do, and heads that were trained in another phase.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .config import ModelConfig


class Place(NamedTuple):
    """The rows of a tensor that hold a single matrix or vector."""

    name: str  # of the tensor, which may be fused
    rows: slice  # of the tensor
    shape: tuple[int, ...]  # of the single matrix or vector


def fused_matrices(config: ModelConfig) -> dict[str, dict[str, int]]:
    """Map each fused matrix of a layer to its parts, in order, with their output features."""
    kv = config.kv_heads * config.head_dim
    fused = {"attention.qkv": {"attention.query": config.heads * config.head_dim, "attention.key": kv}}
    fused["attention.qkv"]["attention.value"] = kv
    if config.gated:
        fused["ffn.gate_up"] = {"ffn.gate": config.ffn_width, "ffn.up": config.ffn_width}
    return fused


def places(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Place]:
    """Map the name of every single matrix or vector to its place in the model's tensors."""
    found = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        fused = next((fused for fused in fused_matrices(config) if f".{module}".endswith(f".{fused}")), None)
        if fused is None:
            found[name] = Place(name, slice(None), tuple(tensor.shape))
            continue
        start = 0
        for part, size in fused_matrices(config)[fused].items():
            shape = (size, *tensor.shape[1:])
            found[f"{module.removesuffix(fused)}{part}.{kind}"] = Place(name, slice(start, start + size), shape)
            start += size
    return found


def split(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Split the model's fused tensors into the single ones that files have."""
    return {name: tensors[place.name][place.rows] for name, place in places(tensors, config).items()}


def reserve(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate a tensor without filling it. A float32 matrix [out, in] on a CPU is input-major, as GPT-2's Conv1D is.

    It is contiguous along `out`. For the few rows of a short sequence the CPU's matrix product is up to three times as
    fast that way: it adds whole rows of the matrix instead of computing dot products. If the stride is a multiple of
    4096 bytes, all elements of a column map to the same few sets of the cache; 16 more numbers per row spread them.
    In 16 bits, where a CPU lacks the instructions, an input-major product takes five to eight times as long.
    """
    if device.type != "cpu" or len(shape) != 2 or dtype != torch.float32:
        return torch.empty(shape, dtype=dtype, device=device)
    gap = 16 if shape[0] * dtype.itemsize % 4096 == 0 else 0
    return torch.empty(shape[1], shape[0] + gap, dtype=dtype)[:, : shape[0]].T


def fill(place: Tensor, values: Tensor) -> None:
    """Copy values into a tensor from `reserve`, and cast them to its dtype.

    For an input-major matrix the values are transposed first, in the file's dtype: that is faster than strided writes.
    """
    if place.ndim == 2 and place.stride(0) < place.stride(1):
        place, values = place.T, values.T.contiguous()
    place.copy_(values)


def give_back_freed() -> None:
    """Return freed memory between live tensors to the operating system (glibc only)."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def lay_out(module: nn.Module) -> None:
    """Give all matrices of a module's linear layers the layout of `reserve`; those that have it are not copied."""
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            weight = linear.weight
            place = reserve(tuple(weight.shape), weight.dtype, weight.device)
            if place.stride() != weight.stride():
                linear.weight = nn.Parameter(place, requires_grad=False)
                fill(linear.weight, weight)
