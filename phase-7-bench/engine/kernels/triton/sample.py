"""`sample` chooses a token from logits on the device: temperature, top-k, top-p, min-p, Gumbel-max with keyed noise.

`probabilities` writes the distributions that are sampled. Nothing is sorted: a bisection over the float32 numbers finds
the threshold of a filter; each step counts the logits above (top-k) or adds the mass below (top-p). Of equal logits at
a threshold, the lowest ids stay.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..tokens import SamplingMetadata
from .noise import gumbel
from .support import launch, power
from .verify import SAMPLE

BLOCK = 4096


@triton.jit
def scaled(logits, first, temperature, V, BLOCK: tl.constexpr):
    """Load a block of logits / temperature in float32, -inf past the end; adding 0 turns -0 into 0."""
    at = first + tl.arange(0, BLOCK)
    x = tl.load(logits + at, mask=at < V, other=float("-inf")).to(tl.float32)
    return tl.div_rn(x, tl.zeros((BLOCK,), tl.float32) + temperature) + 0.0


@triton.jit
def ordered(x):
    """Map float32 to integers of the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def _sample(logits, keys, positions, params, out, V, stride, out_stride, each,
            DRAW: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    """Filter the logits of a row with the params of its sequence, r // each: float64 temperature, top_k, top_p, min_p.

    DRAW: sample one token per row; otherwise `out` receives its probabilities.
    """
    r = tl.program_id(0).to(tl.int64)
    row, mine, params = logits + r * stride, keys + r * 2, params + r // each * 4
    temperature, top_k = tl.load(params).to(tl.float32), tl.load(params + 1).to(tl.int64)
    top_k = tl.where((top_k > 0) & (top_k < V), top_k, V)
    # The mass of the least likely tokens, which is dropped.
    drop, min_p = (1.0 - tl.load(params + 2)).to(tl.float32), tl.load(params + 3).to(tl.float32)
    top = float("-inf")
    for first in range(0, V, BLOCK):
        top = tl.maximum(top, tl.max(scaled(row, first, temperature, V, BLOCK), 0))

    least = tl.full((1,), -2147483648, tl.int64)  # the smallest kept logit, as an ordered integer
    if TOP_K:
        above = ordered(tl.zeros((1,), tl.float32) + top) + 1
        for _ in range(33):
            middle = (least + above) >> 1
            count = tl.zeros((1,), tl.int64)
            for first in range(0, V, BLOCK):
                at = first + tl.arange(0, BLOCK)
                x = ordered(scaled(row, first, temperature, V, BLOCK))
                count += tl.sum(((x >= middle) & (at < V)).to(tl.int64), 0)
            enough = count >= top_k
            least = tl.where(enough, middle, least)
            above = tl.where(enough, above, middle)

    edge, stay = least, tl.zeros((1,), tl.int64)  # how many logits at the edge stay
    # How many logits at the edge top-k drops, and their mass.
    over, excess = tl.zeros((1,), tl.int64), tl.zeros((1,), tl.float32)
    if TOP_K:
        count, share = tl.zeros((1,), tl.int64), tl.zeros((1,), tl.float32)
        for first in range(0, V, BLOCK):
            at = first + tl.arange(0, BLOCK)
            x = scaled(row, first, temperature, V, BLOCK)
            whole = ordered(x)
            count += tl.sum(((whole >= least) & (at < V)).to(tl.int64), 0)
            stay += tl.sum(((whole == least) & (at < V)).to(tl.int64), 0)
            share = tl.maximum(share, tl.max(tl.where(whole == least, tl.exp(x - top), 0.0), 0))
        over = count - top_k
        stay -= over
        excess = over.to(tl.float32) * share
    if TOP_P:
        mass = tl.zeros((1,), tl.float32)
        for first in range(0, V, BLOCK):
            x = scaled(row, first, temperature, V, BLOCK)
            mass += tl.sum(tl.where(ordered(x) >= least, tl.exp(x - top), 0.0), 0)
        mass -= excess
        # Numbers up to `low` are dropped; `edge` stays.
        low, edge = least - 1, ordered(tl.zeros((1,), tl.float32) + top)
        for _ in range(33):
            middle = (low + edge) >> 1
            below = tl.zeros((1,), tl.float32)
            for first in range(0, V, BLOCK):
                x = scaled(row, first, temperature, V, BLOCK)
                whole = ordered(x)
                below += tl.sum(tl.where((whole >= least) & (whole <= middle), tl.exp(x - top), 0.0), 0)
            goes = below - excess <= drop * mass
            low = tl.where(goes & (middle < edge), middle, low)
            edge = tl.where(goes, edge, middle)
        below, share, ties = tl.zeros((1,), tl.float32), tl.zeros((1,), tl.float32), tl.zeros((1,), tl.int64)
        for first in range(0, V, BLOCK):
            at = first + tl.arange(0, BLOCK)
            x = scaled(row, first, temperature, V, BLOCK)
            whole = ordered(x)
            each = tl.exp(x - top)
            below += tl.sum(tl.where((whole >= least) & (whole < edge), each, 0.0), 0)
            share = tl.maximum(share, tl.max(tl.where(whole == edge, each, 0.0), 0))
            ties += tl.sum(((whole == edge) & (at < V)).to(tl.int64), 0)
        lowest = edge == least
        below, ties = tl.where(lowest, 0.0, below - excess), tl.where(lowest, ties - over, ties)
        gone = tl.maximum(drop * mass - below, 0.0)
        gone = tl.floor(gone / tl.where(share > 0.0, share, 1.0)).to(tl.int64)
        stay = ties - tl.minimum(gone, ties - 1)  # at least one stays

    total, passed = tl.zeros((1,), tl.float32), tl.zeros((1,), tl.int64)
    for first in range(0, V, BLOCK):
        x = scaled(row, first, temperature, V, BLOCK)
        whole = ordered(x)
        tie = (whole == edge).to(tl.int64)
        keep = (whole > edge) | ((whole == edge) & (passed + tl.cumsum(tie, 0) <= stay))
        passed += tl.sum(tie, 0)
        each = tl.exp(x - top)
        if MIN_P:
            keep = keep & (each >= min_p)
        total += tl.sum(tl.where(keep, each, 0.0), 0)

    best, most, passed = 0, float("-inf"), tl.zeros((1,), tl.int64)
    for first in range(0, V, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = scaled(row, first, temperature, V, BLOCK)
        whole = ordered(x)
        tie = (whole == edge).to(tl.int64)
        keep = (whole > edge) | ((whole == edge) & (passed + tl.cumsum(tie, 0) <= stay))
        passed += tl.sum(tie, 0)
        p = tl.div_rn(tl.exp(x - top), tl.zeros((BLOCK,), tl.float32) + total)
        if MIN_P:
            keep = keep & (tl.exp(x - top) >= min_p)
        keep = keep & (at < V) & (p > 0.0)
        if DRAW:
            noisy = tl.log(tl.where(keep, p, 1.0)) + gumbel(mine, first, tl.load(positions + r), SAMPLE, BLOCK)
            noisy = tl.where(keep, noisy, float("-inf"))
            here, index = tl.max(noisy, 0), tl.argmax(noisy, 0)
            best = tl.where(here > most, first + index, best)
            most = tl.maximum(here, most)
        else:
            tl.store(out + r * out_stride + at, tl.where(keep, p, 0.0), mask=at < V)
    if DRAW:
        tl.store(out + r * out_stride, tl.cast(best, tl.int64))


def sample(rows: Tensor, metadata: SamplingMetadata, out: Tensor) -> None:
    _filtered(rows, metadata, 1, out, draw=True)


def probabilities(rows: Tensor, metadata: SamplingMetadata, each: int, out: Tensor) -> None:
    _filtered(rows, metadata, each, out, draw=False)


def _filtered(rows: Tensor, metadata: SamplingMetadata, each: int, out: Tensor, draw: bool) -> None:
    (N, V), filters = rows.shape, [mine.filters for mine in metadata.params]
    launch(
        _sample, (N,), rows, metadata.keys.tensor, metadata.positions.tensor, metadata.filters.tensor, out, V,
        rows.stride(0), out.stride(0), each, DRAW=draw, TOP_K=any(0 < k < V for _, k, _, _ in filters),
        TOP_P=any(p < 1 for _, _, p, _ in filters), MIN_P=any(p > 0 for *_, p in filters),
        BLOCK=max(4, min(BLOCK, power(V))),
    )  # fmt: skip
