"""Checks and layouts of the tensors that kernels take. `op` names the backend and the op, for messages: "cuda rope"."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from common.device import dtype_name
from common.errors import UserError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def require(op: str, good: bool, wrong: str, right: str) -> None:
    """Raise UserError with what is wrong with an argument and what would be right, unless `good`."""
    if not good:
        raise UserError(f"{op}: {wrong}; expected {right}")


def on_device(op: str, needs: Callable[[torch.device], str | None], **tensors: Tensor | None) -> None:
    """Check that all tensors are on one device, and that `needs` names no other device for it."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    first, device = next(iter(devices.items()))
    for name, other in devices.items():
        require(op, other == device, f"{name} is on {other}", f"{device}, as {first}")
    needed = needs(device)
    require(op, needed is None, f"{first} is on {device}", str(needed))


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
