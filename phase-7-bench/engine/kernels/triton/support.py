"""Helpers of the kernels: launches, and a matrix product that is also right in the interpreter."""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)  # decided when the kernels are defined
RECORDER: ContextVar[Callable[..., None] | None] = ContextVar("recorder", default=None)  # see offline.py


@triton.jit
def dot(a, b, acc, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return acc + a @ b in float32.

    WIDE, set only in the interpreter, multiplies in float64. The interpreter stores bfloat16 as 16-bit integers and
    multiplies those, which is wrong by orders of magnitude. And it calls a BLAS, in whose float32 products the order of
    a row's sums can depend on the row's place in the tile; rounded from float64 they are the same.
    """
    if WIDE:
        return tl.dot(a.to(tl.float64), b.to(tl.float64), acc.to(tl.float64)).to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


def needs(device: torch.device) -> str | None:
    """Return the device that the kernels need instead of this one; None if they run on it."""
    able = device.type == "cuda" or INTERPRETED or RECORDER.get() is not None
    return None if able else "a CUDA device (or TRITON_INTERPRET=1)"


def power(n: int, least: int = 1) -> int:
    """Return the smallest power of two that is at least n: the size of a tile."""
    return max(least, 1 << (max(1, n) - 1).bit_length())


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch a kernel, unless the grid is empty."""
    recorder = RECORDER.get()
    if recorder is not None:
        recorder(kernel, arguments, constants)
    elif all(grid):
        kernel[grid](*arguments, **constants)
