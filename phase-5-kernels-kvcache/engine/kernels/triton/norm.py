"""`rms_norm` and `add_rms_norm`: one program per row, so a row's bits do not depend on other rows."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .support import floating, launch, on_device, power, require, rows_of, same_shape

WIDEST = 65536  # most features of a program


@triton.jit
def _norm(x, residual, weight, out, total, x_stride, r_stride, D, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < D
    wide = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        wide += tl.load(residual + row * r_stride + at, mask=inside, other=0.0).to(tl.float32)
        stored = wide.to(total.dtype.element_ty)
        tl.store(total + row * D + at, stored, mask=inside)
        wide = stored.to(tl.float32)  # normalise the rounded sum
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / D + eps)
    scaled = wide * scale * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * D + at, scaled.to(out.dtype.element_ty), mask=inside)


def _check(op: str, x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    on_device(op, x=x, weight=weight, residual=residual)
    floating(op, x=x, weight=weight, residual=residual)
    same_shape(op, "weight", weight, x.shape[-1])
    require(op, x.shape[-1] <= WIDEST, f"x has {x.shape[-1]} features", f"at most {WIDEST}")
    if residual is not None:
        same_shape(op, "residual", residual, *x.shape)
        require(op, residual.dtype == x.dtype, f"residual is {residual.dtype}", f"{x.dtype}, as x")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension of [..., D]; statistics in float32."""
    _check("rms_norm", x, weight, None)
    rows, out = rows_of(x), torch.empty_like(x, memory_format=torch.contiguous_format)
    D = x.shape[-1]
    w = weight.contiguous()
    launch(_norm, (len(rows),), rows, rows, w, out, out, rows.stride(0), 0, D, eps, ADD=False, BLOCK=power(D))
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (norm of x + residual, x + residual), with the sum rounded to its dtype."""
    _check("add_rms_norm", x, weight, residual)
    rows, others = rows_of(x), rows_of(residual)
    out, total = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    strides = rows.stride(0), others.stride(0)
    D = x.shape[-1]
    w = weight.contiguous()
    launch(_norm, (len(rows),), rows, others, w, out, total, *strides, D, eps, ADD=True, BLOCK=power(D))
    return out, total
