"""Helpers of the wrappers: argument checks, and conversion of tensors to the library's arguments."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from common.device import dtype_name
from common.errors import UserError

from .library import emulated, library

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}  # device.cuh
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def require(op: str, good: bool, wrong: str, right: str) -> None:
    """Raise UserError with what is wrong with an argument and what would be right, unless `good`."""
    if not good:
        raise UserError(f"cuda {op}: {wrong}; expected {right}")


def on_device(op: str, **tensors: Tensor | None) -> ModuleType:
    """Check that all tensors are on one device on which kernels can run; return its library."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    first = next(iter(devices.values()))
    for name, device in devices.items():
        require(op, device == first, f"{name} is on {device}", f"{first}, as {next(iter(devices))}")
    able = first.type == "cuda" or (first.type == "cpu" and emulated())
    require(op, able, f"{next(iter(devices))} is on {first}", "a CUDA device")
    if first.type == "cuda":
        now = torch.cuda.current_device()
        require(op, first.index in (None, now), f"the tensors are on {first}", f"the current device, cuda:{now}")
    return library(first)


def floating(op: str, **tensors: Tensor | None) -> None:
    """Check that each tensor is float32, bfloat16 or float16."""
    for name, tensor in tensors.items():
        if tensor is not None:
            wanted = "float32, bfloat16 or float16"
            require(op, tensor.dtype in FLOATS, f"{name} is {dtype_name(tensor.dtype)}", wanted)


def of_dtype(op: str, dtype: torch.dtype, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None:
            require(op, tensor.dtype == dtype, f"{name} is {tensor.dtype}", str(dtype))


def same_shape(op: str, name: str, tensor: Tensor, *shape: int) -> None:
    require(op, tensor.shape == shape, f"{name} has shape {list(tensor.shape)}", str(list(shape)))


def rows_of(x: Tensor) -> Tensor:
    """Reshape [..., D] to [rows, D] with contiguous rows; a view if possible."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def dense(x: Tensor) -> Tensor:
    """Return the tensor with a contiguous last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()


def address(tensor: Tensor | None) -> int:
    """Return the address of the first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def stream_of(tensor: Tensor) -> int:
    """Return torch's current stream for this tensor."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0
