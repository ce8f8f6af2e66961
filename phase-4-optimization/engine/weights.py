"""How matrices lie in memory: several as one, so that one product does their work, and in the order products like.

The outputs of query, key and value stand one below the other in one matrix, those of gate and up in another. Files keep
them apart: that is what checkpoints hold, and heads that were trained in another phase.
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
    """Where a single matrix or vector is kept."""

    name: str  # of the tensor that holds it, perhaps among others
    rows: slice  # of it
    shape: tuple[int, ...]  # of the single one


def fused_matrices(config: ModelConfig) -> dict[str, dict[str, int]]:
    """Of a layer: each fused matrix -> the matrices in it, in order, with their output features."""
    kv = config.kv_heads * config.head_dim
    fused = {"attention.qkv": {"attention.query": config.heads * config.head_dim, "attention.key": kv}}
    fused["attention.qkv"]["attention.value"] = kv
    if config.gated:
        fused["ffn.gate_up"] = {"ffn.gate": config.ffn_width, "ffn.up": config.ffn_width}
    return fused


def places(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Place]:
    """For tensors as the model has them: the name of every single one -> its place."""
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
    """Tensors as the model has them -> each single one, as files have them."""
    return {name: tensors[place.name][place.rows] for name, place in places(tensors, config).items()}


def reserve(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a tensor, not filled. A matrix [out, in] on a CPU is laid out input-major, as GPT-2's Conv1D is.

    Its memory then runs along `out`. For the few rows of a short sequence the CPU's matrix product is up to three times
    as fast that way: it adds whole rows of the matrix instead of gathering dot products. Where a row's bytes are a
    multiple of 4096, all of a column falls into the same few sets of the cache; 16 numbers more per row spread it.
    """
    if device.type != "cpu" or len(shape) != 2:
        return torch.empty(shape, dtype=dtype, device=device)
    gap = 16 if dtype == torch.float32 and shape[0] * dtype.itemsize % 4096 == 0 else 0
    return torch.empty(shape[1], shape[0] + gap, dtype=dtype)[:, : shape[0]].T


def fill(place: Tensor, values: Tensor) -> None:
    """Copy values into memory from `reserve`, and cast them to its dtype.

    A matrix that is laid out input-major is transposed first, in the file's dtype: that is faster than to write across
    strides.
    """
    if place.ndim == 2 and place.stride(0) < place.stride(1):
        place, values = place.T, values.T.contiguous()
    place.copy_(values)


def give_back_freed() -> None:
    """What was freed between tensors that stayed goes back to the system, where the C library can be asked (glibc)."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def lay_out(module: nn.Module) -> None:
    """Give all matrices of a module's linear layers the layout of `reserve`."""
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            weight = linear.weight
            linear.weight = nn.Parameter(reserve(tuple(weight.shape), weight.dtype, weight.device), requires_grad=False)
            fill(linear.weight, weight)
