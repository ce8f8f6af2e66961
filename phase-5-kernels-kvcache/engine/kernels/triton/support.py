"""Helpers of the kernels: argument checks, launches, and a matrix product that is also right in the interpreter."""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.device import dtype_name
from common.errors import UserError

INTERPRETED = bool(triton.knobs.runtime.interpret)  # decided when the kernels are defined
RECORDER: ContextVar[Callable[..., None] | None] = ContextVar("recorder", default=None)  # see offline.py
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def dot(a, b, acc, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return acc + a @ b in float32.

    The interpreter stores bfloat16 as 16-bit integers and multiplies those, which is wrong by orders of magnitude.
    WIDE, set only in the interpreter, converts both to float32 first, which changes no value.
    """
    if WIDE:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


def require(op: str, good: bool, wrong: str, right: str) -> None:
    """Raise UserError with what is wrong with an argument and what would be right, unless `good`."""
    if not good:
        raise UserError(f"triton {op}: {wrong}; expected {right}")


def on_device(op: str, **tensors: Tensor | None) -> None:
    """Check that all tensors are on one device on which Triton can run."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    first = next(iter(devices.values()))
    for name, device in devices.items():
        require(op, device == first, f"{name} is on {device}", f"{first}, as {next(iter(devices))}")
    able = first.type == "cuda" or INTERPRETED or RECORDER.get() is not None
    require(op, able, f"{next(iter(devices))} is on {first}", "a CUDA device (or TRITON_INTERPRET=1)")


def floating(op: str, **tensors: Tensor | None) -> None:
    """Check that each tensor is float32, bfloat16 or float16."""
    for name, tensor in tensors.items():
        if tensor is not None:
            wanted = "float32, bfloat16 or float16"
            require(op, tensor.dtype in FLOATS, f"{name} is {dtype_name(tensor.dtype)}", wanted)


def same_shape(op: str, name: str, tensor: Tensor, *shape: int) -> None:
    require(op, tensor.shape == shape, f"{name} has shape {list(tensor.shape)}", str(list(shape)))


def rows_of(x: Tensor) -> Tensor:
    """Reshape [..., D] to [rows, D] with contiguous rows; a view if possible."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


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
