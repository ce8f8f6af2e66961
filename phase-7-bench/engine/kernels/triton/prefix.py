"""`verify_prefix` and `verify_greedy`: the longest prefix of a draft that equals the target's argmax tokens.

Computed from the logits: one program finds the argmax of a row (ties: the lowest id), in blocks of the vocabulary, and
a second kernel counts accepted tokens.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .support import launch, power

BLOCK = 4096


@triton.jit
def highest(scores, V, BLOCK: tl.constexpr):
    """Return the argmax of V scores. Ties: the lowest index. NaN never wins."""
    top = float("-inf")
    best = 0
    for first in range(0, V, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(scores + at, mask=at < V, other=float("-inf")).to(tl.float32)
        x = tl.where(x == x, x, float("-inf"))
        here, index = tl.max(x, 0), tl.argmax(x, 0)
        best = tl.where(here > top, first + index, best)
        top = tl.maximum(here, top)
    return best


@triton.jit
def _choices(scores, out, V, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    tl.store(out + row, highest(scores + row * stride, V, BLOCK).to(tl.int64))


@triton.jit
def _prefix(draft, choices, widths, accepted, following, K, BLOCK: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    here = k < tl.minimum(K, tl.load(widths + r))
    row = choices + r * (K + 1)
    same = tl.load(draft + r * K + k, mask=here, other=-1) == tl.load(row + k, mask=here, other=-2)
    count = tl.min(tl.where(same, BLOCK, k), 0)  # the first rejected token
    count = tl.where(count == BLOCK, BLOCK - 1, count)
    tl.store(accepted + r, count.to(tl.int64))
    tl.store(following + r, tl.load(row + count))


def choices(scores: Tensor, out: Tensor) -> None:
    R, V = scores.shape
    launch(_choices, (R,), scores, out, V, scores.stride(0), BLOCK=min(BLOCK, power(V)))


def prefix(inputs: tuple[Tensor, Tensor, Tensor], outputs: tuple[Tensor, Tensor]) -> None:
    R, K = inputs[0].shape
    launch(_prefix, (R,), *inputs, *outputs, K, BLOCK=power(K + 1))
