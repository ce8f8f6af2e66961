"""`rms_norm` and `add_rms_norm`: see norm.cu."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .support import FORMATS, address, floating, of_dtype, on_device, rows_of, same_shape, stream_of


def _check(op: str, x: Tensor, weight: Tensor, residual: Tensor | None) -> ModuleType:
    floating(op, x=x)
    of_dtype(op, x.dtype, weight=weight, residual=residual)
    same_shape(op, "weight", weight, x.shape[-1])
    if residual is not None:
        same_shape(op, "residual", residual, *x.shape)
    return on_device(op, x=x, weight=weight, residual=residual)


def _run(op: str, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor | None]:
    library = _check(op, x, weight, residual)
    rows, others = rows_of(x), None if residual is None else rows_of(residual)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = None if residual is None else torch.empty_like(out)
    library.rms_norm(
        FORMATS[x.dtype], address(rows), address(others), address(weight.contiguous()), address(out), address(total),
        len(rows), x.shape[-1], rows.stride(0), 0 if others is None else others.stride(0), eps, stream_of(x),
    )  # fmt: skip
    return out, total


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension of [..., D]; statistics in float32."""
    return _run("rms_norm", x, None, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (norm of x + residual, x + residual), with the sum rounded to its dtype."""
    out, total = _run("add_rms_norm", x, residual, weight, eps)
    assert total is not None
    return out, total
