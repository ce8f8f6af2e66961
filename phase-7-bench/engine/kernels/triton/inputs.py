"""`embed` and `advance`: the inputs of a forward, formed on the device."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .support import launch, power


@triton.jit
def _embed(tokens, draft, table, out, T, K, D, DRAFT: tl.constexpr, BLOCK: tl.constexpr):
    """Copy one row of the table: that of an id, or for -1 - j of token j of the row's draft."""
    n = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + n).to(tl.int64)
    if DRAFT:
        drafted = tl.load(draft + n // T * K - 1 - token, mask=token < 0, other=0)
        token = tl.where(token < 0, drafted, token)
    d = tl.arange(0, BLOCK)
    tl.store(out + n * D + d, tl.load(table + token * D + d, mask=d < D, other=0.0), mask=d < D)


@triton.jit
def _advance(at, counts, windows, after, positions, end, lo, R, W, N, BLOCK: tl.constexpr):
    """One program per row."""
    r = tl.program_id(0)
    start = tl.load(at + R + r) + tl.load(at + 2 * R + r)
    count = tl.load(counts + r)
    tl.store(after + r, tl.load(at + r))
    tl.store(after + R + r, start)
    tl.store(after + 2 * R + r, count)
    w = tl.arange(0, BLOCK)
    stop = start + tl.minimum(w + 1, count)
    tl.store(positions + r * W + w, tl.maximum(stop - 1, 0), mask=w < W)
    tl.store(end + r * W + w, stop, mask=w < W)
    for n in range(N):
        tl.store(lo + (n * R + r) * W + w, tl.maximum(stop - tl.load(windows + n), 0), mask=w < W)


def embed(tokens: Tensor, draft: Tensor | None, weight: Tensor, out: Tensor) -> None:
    (R, T), D, K = tokens.shape, weight.shape[1], 0 if draft is None else draft.shape[1]
    others = tokens if draft is None else draft
    launch(_embed, (R * T,), tokens, others, weight, out, T, K, D, DRAFT=draft is not None, BLOCK=power(D))


def advance(inputs: tuple[Tensor, Tensor, Tensor], outputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    _, R, W = outputs[3].shape
    launch(_advance, (R,), *inputs, *outputs, R, W, len(outputs[3]), BLOCK=power(W))
