"""`linear` for a few rows, in blocks of 16 rows: each weight is read once per block.

A decoding step reads every weight with little arithmetic, so memory bandwidth is the limit, and 16 rows cost as much as
one. A single row is computed as one of 16, the others zeros, so the order of its sums and its bits are the same in any
batch. If a matrix has few outputs, its inputs are split at fixed positions to fill the GPU, and the parts are added in
order.

Weights: float32, bfloat16, float16, or int8 and int4 as quantize.py stores them, converted in registers.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import require
from ..matrix import Matrix
from .support import INTERPRETED, dot, launch, power

TILE = 16  # rows
BUSY = 256  # programs that fill a large GPU


@triton.jit
def _product(x, w, scales, zeros, factor, n, m, N, M, k_from, k_to, K, x_stride, w_stride, k_stride,
             KIND: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, FACTOR: tl.constexpr,
             TILE_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Sum x[m] * w[n] over the inputs k_from .. k_to: float32 [TILE_M, BLOCK_N]; int8 without its scales."""
    acc = tl.zeros((TILE_M, BLOCK_N), tl.float32)
    rows = x + m[:, None].to(tl.int64) * x_stride
    kind = x.dtype.element_ty
    if KIND == "int4":
        HALF: tl.constexpr = GROUP // 2
        BYTES: tl.constexpr = BLOCK_K // 2
        lines = w + n[None, :].to(tl.int64) * w_stride
        for k in range(k_from, k_to, BLOCK_K):
            byte = k // 2 + tl.arange(0, BYTES)
            group = byte // HALF
            low = group * GROUP + byte % HALF  # a byte holds two inputs, half a group apart
            good = byte < k_to // 2
            packed = tl.load(lines + byte[:, None], mask=good[:, None] & (n < N)[None, :], other=0)
            of_group = n[None, :].to(tl.int64) * (K // GROUP) + group[:, None]
            grid = good[:, None] & (n < N)[None, :]
            scale = tl.load(scales + of_group, mask=grid, other=0.0).to(tl.float32)
            zero = 8.0
            if ZEROS:
                zero = tl.load(zeros + of_group, mask=grid, other=0.0).to(tl.float32)
            for half in tl.static_range(2):
                at = low + half * HALF
                part = tl.load(rows + at[None, :], mask=(m < M)[:, None] & good[None, :], other=0.0)
                if FACTOR:
                    factors = tl.load(factor + at, mask=good, other=0.0).to(kind).to(tl.float32)
                    part = (part.to(tl.float32) * factors[None, :]).to(kind)
                level = (packed >> (4 * half)) & 15
                acc = dot(part, ((level.to(tl.float32) - zero) * scale).to(kind), acc, WIDE)
    else:
        lines = w + n[None, :].to(tl.int64) * w_stride
        for k in range(k_from, k_to, BLOCK_K):
            at = k + tl.arange(0, BLOCK_K)
            good = at < k_to
            part = tl.load(rows + at[None, :], mask=(m < M)[:, None] & good[None, :], other=0.0)
            if FACTOR:
                factors = tl.load(factor + at, mask=good, other=0.0).to(kind).to(tl.float32)
                part = (part.to(tl.float32) * factors[None, :]).to(kind)
            weights = tl.load(lines + at[:, None] * k_stride, mask=good[:, None] & (n < N)[None, :], other=0)
            if TILE_M == 1:  # not invariant: other bits than for 16 rows
                wide = weights.to(tl.float32) * tl.trans(part).to(tl.float32)
                acc += tl.sum(wide, 0)[None, :]
            else:
                if KIND == "int8":
                    weights = weights.to(tl.float32).to(kind)
                acc = dot(part, weights, acc, WIDE)
    return acc


@triton.jit
def _finish(acc, n, N, scales, bias, INT8: tl.constexpr, BIAS: tl.constexpr):
    if INT8:
        acc = acc * tl.load(scales + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        acc = acc + tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit(do_not_specialize=["M"])  # the same code for 1 row and for 16
def _linear(x, w, scales, zeros, factor, bias, out, M, N, K, x_stride, w_stride, k_stride, inner,
            KIND: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, FACTOR: tl.constexpr, BIAS: tl.constexpr,
            GATED: tl.constexpr, SPLIT: tl.constexpr, TILE_M: tl.constexpr, BLOCK_N: tl.constexpr,
            BLOCK_K: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Compute y = x w. GATED: N is half of the outputs, out[n] = silu(y[n]) y[n + N]. SPLIT: out [SPLIT, M, N] sums."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * TILE_M + tl.arange(0, TILE_M)
    part = tl.program_id(2)
    k_from = part * inner
    k_to = tl.minimum(k_from + inner, K)
    acc = _product(x, w, scales, zeros, factor, n, m, N, M, k_from, k_to, K, x_stride, w_stride, k_stride,
                   KIND, GROUP, ZEROS, FACTOR, TILE_M, BLOCK_N, BLOCK_K, WIDE)  # fmt: skip
    inside = (m < M)[:, None] & (n < N)[None, :]
    index = m[:, None].to(tl.int64) * N + n[None, :]
    if SPLIT > 1:
        tl.store(out + part.to(tl.int64) * M * N + index, acc, mask=inside)
    else:
        acc = _finish(acc, n, N, scales, bias, KIND == "int8", BIAS)
        if GATED:
            second = tl.where(n < N, n + N, 2 * N)
            up = _product(x, w, scales, zeros, factor, second, m, 2 * N, M, k_from, k_to, K, x_stride, w_stride,
                          k_stride, KIND, GROUP, ZEROS, FACTOR, TILE_M, BLOCK_N, BLOCK_K, WIDE)  # fmt: skip
            up = _finish(up, second, 2 * N, scales, bias, KIND == "int8", BIAS)
            small = tl.exp(-tl.abs(acc))  # never overflows
            acc = acc * tl.where(acc < 0.0, small, 1.0) / (1.0 + small) * up
        tl.store(out + index, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def _add_up(parts, scales, bias, out, M, N, INT8: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr,
            TILE_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Add the parts in order."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * TILE_M + tl.arange(0, TILE_M)
    inside = (m < M)[:, None] & (n < N)[None, :]
    index = m[:, None].to(tl.int64) * N + n[None, :]
    acc = tl.zeros((TILE_M, BLOCK_N), tl.float32)
    source = parts + index
    for _ in tl.static_range(SPLIT):
        acc += tl.load(source, mask=inside, other=0.0)
        source += M * N
    acc = _finish(acc, n, N, scales, bias, INT8, BIAS)
    tl.store(out + index, acc.to(out.dtype.element_ty), mask=inside)


def blocks(matrix: Matrix, columns: int) -> tuple[int, int, int, int]:
    """Return (outputs, inputs of a tile, parts, inputs of a part); they depend on the matrix only, not on the rows."""
    wide = {4: 128, 2: 256, 1: 256}[matrix.values.element_size()]
    block_k = min(128 if matrix.kind == "int4" else wide, power(matrix.inputs, 32))
    block_n = 32 if columns >= 32 * BUSY or matrix.kind == "int4" else 16
    if INTERPRETED:  # a large tile takes as long as a small one
        block_n = 128
    parts = 1
    while triton.cdiv(columns, block_n) * parts < BUSY and matrix.inputs >= 4 * parts * block_k and parts < 8:
        parts *= 2
    inner = triton.cdiv(triton.cdiv(matrix.inputs, parts), block_k) * block_k
    return block_n, block_k, triton.cdiv(matrix.inputs, inner), inner


def linear(op: str, rows: Tensor, matrix: Matrix, gated: bool, invariant: bool, out: Tensor) -> None:
    """Not invariant: compute row by row, without padding."""
    require(op, invariant or matrix.kind != "int4", "int4 is computed in tiles of 16 rows only", "another format")
    tile = TILE if invariant else 1
    (M, K), columns = rows.shape, out.shape[-1]
    block_n, block_k, parts, inner = blocks(matrix, columns)
    if gated:  # one program needs both halves, so the inputs are not split
        parts, inner = 1, matrix.inputs
    sums = rows.new_empty(parts, M, columns, dtype=torch.float32) if parts > 1 else out
    tensors = matrix.scales, matrix.zeros, matrix.factor, matrix.bias
    scales, zeros, factor, bias = (rows if tensor is None else tensor for tensor in tensors)  # rows: never read
    launch(
        _linear, (triton.cdiv(columns, block_n), triton.cdiv(M, tile), parts),
        rows, matrix.values, scales, zeros, factor, bias, sums, M, columns, K, rows.stride(0),
        matrix.values.stride(0), matrix.values.stride(-1), inner,
        KIND=matrix.kind, GROUP=matrix.group, ZEROS=matrix.zeros is not None, FACTOR=matrix.factor is not None,
        BIAS=matrix.bias is not None, GATED=gated, SPLIT=parts, TILE_M=tile, BLOCK_N=block_n, BLOCK_K=block_k,
        WIDE=INTERPRETED, num_warps=4, num_stages=4,
    )  # fmt: skip
    if parts > 1:
        launch(
            _add_up, (triton.cdiv(columns, 64), triton.cdiv(M, TILE)), sums, scales, bias, out, M, columns,
            INT8=matrix.kind == "int8", BIAS=matrix.bias is not None, SPLIT=parts, TILE_M=TILE, BLOCK_N=64,
        )  # fmt: skip
