"""`rms_norm` and `add_rms_norm`: one program per row, so a row's bits do not depend on other rows."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..arguments import require
from .support import launch, power

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


def norm(
    op: str, rows: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor, total: Tensor
) -> None:
    D = rows.shape[1]
    require(op, D <= WIDEST, f"x has {D} features", f"at most {WIDEST}")
    others = rows if residual is None else residual
    launch(
        _norm, (len(rows),), rows, others, weight, out, total, rows.stride(0), others.stride(0), D, eps,
        ADD=residual is not None, BLOCK=power(D),
    )  # fmt: skip
