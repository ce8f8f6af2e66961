"""`verify_prefix` and `verify_greedy`: the longest prefix of a draft that equals the target's argmax tokens.

Computed from the logits: one program finds the argmax of a row (ties: the lowest id), in blocks of the vocabulary, and
a second kernel counts accepted tokens.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .support import floating, launch, on_device, power, require, rows_of, same_shape

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
def _prefix(draft, choices, widths, accepted, following, K, d_row, c_row, NEXT: tl.constexpr, BLOCK: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    here = k < tl.minimum(K, tl.load(widths + r))
    same = tl.load(draft + r * d_row + k, mask=here, other=-1) == tl.load(choices + r * c_row + k, mask=here, other=-2)
    count = tl.min(tl.where(same, BLOCK, k), 0)  # the first rejected token
    count = tl.where(count == BLOCK, BLOCK - 1, count)
    tl.store(accepted + r, count.to(tl.int64))
    if NEXT:
        tl.store(following + r, tl.load(choices + r * c_row + count))


def choices_of(op: str, scores: Tensor) -> Tensor:
    """Return the argmax of each row of scores [..., V]: int64 [...]."""
    on_device(op, scores=scores)
    floating(op, scores=scores)
    require(op, scores.shape[-1] > 0, "there are no scores", "a vocabulary")
    rows = rows_of(scores)
    out = torch.empty(scores.shape[:-1], dtype=torch.int64, device=scores.device)
    launch(_choices, (len(rows),), rows, out, rows.shape[1], rows.stride(0), BLOCK=min(BLOCK, power(rows.shape[1])))
    return out


def _count(op: str, draft_tokens: Tensor, choices: Tensor, widths: Tensor, following: bool) -> tuple[Tensor, Tensor]:
    R, K = draft_tokens.shape
    on_device(op, draft_tokens=draft_tokens, choices=choices, widths=widths)
    same_shape(op, "choices", choices, R, K + 1)
    same_shape(op, "widths", widths, R)
    for name, tensor in (("draft_tokens", draft_tokens), ("choices", choices), ("widths", widths)):
        require(op, tensor.dtype == torch.int64, f"{name} is {tensor.dtype}", "torch.int64")
    draft, choices = draft_tokens.contiguous(), choices.contiguous()
    accepted, found = torch.empty_like(widths), torch.empty_like(widths)
    sizes = {"NEXT": following, "BLOCK": power(K + 1)}
    launch(_prefix, (R,), draft, choices, widths.contiguous(), accepted, found, K, K, K + 1, **sizes)
    return accepted, found


def verify_prefix(draft_tokens: Tensor, choices: Tensor, widths: Tensor) -> Tensor:
    """Return how many leading draft_tokens [R, K] equal the target's choices [R, K+1]: int64 [R]."""
    return _count("verify_prefix", draft_tokens, choices, widths, following=False)[0]


def verify_greedy(draft_tokens: Tensor, scores: Tensor, widths: Tensor) -> tuple[Tensor, Tensor]:
    """Do the same with the argmax of scores [R, K+1, V]; return the counts and the next tokens, both int64 [R]."""
    return _count("verify_greedy", draft_tokens, choices_of("verify_greedy", scores), widths, following=True)
