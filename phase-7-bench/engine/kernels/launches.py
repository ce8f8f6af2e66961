"""What a GPU backend supplies: `Launches`, one function per kernel. gpu.py and gpu_tokens.py make the ops of them.

python -c "from engine.kernels.launches import Launches; print(Launches.__doc__)"
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import on_device

PART = 256  # positions that one program of decode_attention visits


class Launches(NamedTuple):
    """The kernels of a backend. Last dimensions are contiguous; results come last, and are allocated.

    linear   op, rows [M, K], matrix, gated, invariant, out [..., N]  invariant: the bits do not depend on other rows
    norm     op, rows, residual or None, weight, eps, out, sum        sum: not written without a residual
    rope     op, rotation
    append   op, layer, metadata, keys, values, rotation or None      rotation: of queries and keys, in the same kernel
    decode   op, part, layer, metadata, ranges, query, out
    prefill  op, layer, metadata, ranges, query, out                  ranges without lines
    choices  scores [R, V], out                                       the argmax; ties: the lowest index
    prefix   (draft_tokens, choices, widths), (accepted, next_tokens)
    verify   (draft_tokens, draft_probs or None, target_probs, widths, keys, positions), random,
             (accepted, next_tokens, ratios)
    sample   rows, metadata, out                                      out may have gaps, here and in the next two
    probabilities   rows, metadata, each, out                         each: rows of a sequence
    draw     probs, keys, positions, each, purpose, first, out
    embed    tokens, draft or None, weight, out
    advance  (at, counts, windows), (at, positions, end, lo)
    """

    needs: Callable[[torch.device], str | None]  # the device that is needed instead, or None
    linear: Callable[..., None]
    norm: Callable[..., None]
    rope: Callable[..., None]
    append: Callable[..., None]
    decode: Callable[..., None]
    prefill: Callable[..., None]
    choices: Callable[..., None]
    prefix: Callable[..., None]
    verify: Callable[..., None]
    sample: Callable[..., None]
    probabilities: Callable[..., None]
    draw: Callable[..., None]
    embed: Callable[..., None]
    advance: Callable[..., None]


class Rotation(NamedTuple):
    """RoPE of x [B, T, H, D] with tables [T, 1, D] or [B, T, 1, D], whose strides are by row (0: shared) and token."""

    x: Tensor
    cos: Tensor
    sin: Tensor
    strides: tuple[int, int]
    out: Tensor


class GpuBackend:
    """A backend's kernels, with the check of the device that all ops share."""

    def __init__(self, name: str, launches: Launches) -> None:
        self.name, self.launch = name, launches

    def _checked(self, op: str, **tensors: Tensor | None) -> str:
        """Check that all tensors are on one device, and that the kernels run there; return the op's name for errors."""
        op = f"{self.name} {op}"
        on_device(op, self.launch.needs, **tensors)
        return op


def results_of_parts(query: Tensor, parts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate what the parts of decode_attention leave to be merged: values [R, W, H, parts, D], maxima and sums."""
    sizes = *query.shape[:3], parts
    mixed = torch.empty(*sizes, query.shape[3], dtype=torch.float32, device=query.device)
    tops, sums = torch.empty(2, *sizes, dtype=torch.float32, device=query.device)
    return mixed, tops, sums
