"""What the kernels share: checks of their arguments, and a product that is right in the interpreter too."""

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
    """acc + a @ b in float32.

    The interpreter keeps bfloat16 as 16-bit whole numbers and multiplies those: wrong by orders of magnitude. So there
    (WIDE), and only there, both are widened first, which changes no value.
    """
    if WIDE:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


def require(op: str, good: bool, wrong: str, right: str) -> None:
    """UserError that says what is wrong with an argument, and what would be right."""
    if not good:
        raise UserError(f"triton {op}: {wrong}; expected {right}")


def on_device(op: str, **tensors: Tensor | None) -> None:
    """All tensors on one device, and Triton can run there."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    first = next(iter(devices.values()))
    for name, device in devices.items():
        require(op, device == first, f"{name} is on {device}", f"{first}, as {next(iter(devices))}")
    able = first.type == "cuda" or INTERPRETED or RECORDER.get() is not None
    require(op, able, f"{next(iter(devices))} is on {first}", "a CUDA device (or TRITON_INTERPRET=1)")


def floating(op: str, **tensors: Tensor | None) -> None:
    """Each is float32, bfloat16 or float16."""
    for name, tensor in tensors.items():
        if tensor is not None:
            wanted = "float32, bfloat16 or float16"
            require(op, tensor.dtype in FLOATS, f"{name} is {dtype_name(tensor.dtype)}", wanted)


def same_shape(op: str, name: str, tensor: Tensor, *shape: int) -> None:
    require(op, tensor.shape == shape, f"{name} has shape {list(tensor.shape)}", str(list(shape)))


def rows_of(x: Tensor) -> Tensor:
    """[..., D] as a matrix [rows, D] whose rows have no gaps in them: the same memory where that is possible."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def power(n: int, least: int = 1) -> int:
    """The smallest power of two that holds n: the size of a tile."""
    return max(least, 1 << (max(1, n) - 1).bit_length())


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run a kernel, unless there is nothing to do."""
    recorder = RECORDER.get()
    if recorder is not None:
        recorder(kernel, arguments, constants)
    elif all(grid):
        kernel[grid](*arguments, **constants)
