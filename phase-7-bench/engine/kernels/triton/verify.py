"""`draw`: a token from each distribution. `verify_sample`: the acceptance rule of ../../verify.py. Keyed randomness.

A program visits the draft tokens of a row up to the first rejected one. The next token is then sampled: from the target
by Gumbel-max if all were accepted, else from the residual by one uniform and the inverse distribution function in
float64.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from common.philox import Purpose

from .noise import chance, gumbel
from .support import launch, power

BLOCK = 2048
SAMPLE, ACCEPT, RESIDUAL = (tl.constexpr(int(p)) for p in (Purpose.SAMPLE, Purpose.ACCEPT, Purpose.RESIDUAL))


@triton.jit
def drawn(probs, keys, position, V, BLOCK: tl.constexpr):
    """Sample from p by Gumbel-max: argmax of log p plus noise keyed by position and token."""
    top = float("-inf")
    best = 0
    for first in range(0, V, BLOCK):
        at = first + tl.arange(0, BLOCK)
        p = tl.load(probs + at, mask=at < V, other=0.0)
        noisy = tl.log(tl.where(p > 0.0, p, 1.0)) + gumbel(keys, first, position, SAMPLE, BLOCK)
        noisy = tl.where(p > 0.0, noisy, float("-inf"))
        here, index = tl.max(noisy, 0), tl.argmax(noisy, 0)
        best = tl.where(here > top, first + index, best)
        top = tl.maximum(here, top)
    return best


@triton.jit
def remaining(target, draft, token, first, V, DRAFT: tl.constexpr, BLOCK: tl.constexpr):
    """Return a block of max(0, target - draft), computed in float32, as float64; no draft probabilities: one-hot."""
    at = first + tl.arange(0, BLOCK)
    p = tl.load(target + at, mask=at < V, other=0.0)
    if DRAFT:  # noqa: SIM108
        p = tl.maximum(p - tl.load(draft + at, mask=at < V, other=0.0), 0.0)
    else:
        p = tl.where(at == token, 0.0, p)
    return p.to(tl.float64)


@triton.jit
def _verify(tokens, draft, target, widths, keys, positions, accepted, following, ratios, K, V,
            DRAFT: tl.constexpr, CERTAIN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    width = tl.load(widths + r)
    mine = keys + r * 2
    position = tl.load(positions + r)
    count = width * 0
    accepting = width == width
    for k in range(K):
        token = tl.load(tokens + r * K + k)
        ratio = tl.load(target + (r * (K + 1) + k) * V + token)
        if DRAFT:
            ratio = tl.div_rn(ratio, tl.load(draft + (r * K + k) * V + token))
            ratio = tl.where(ratio > 1.0, 1.0, ratio)
        tl.store(ratios + r * K + k, ratio)
        if CERTAIN:  # noqa: SIM108
            accept = ratio > 0.5
        else:
            accept = chance(mine, position + k, ACCEPT) < ratio
        accepting = accepting & accept & (k < width)
        count += accepting.to(tl.int64)
    tl.store(accepted + r, count)
    here = target + (r * (K + 1) + count) * V
    draft_row = draft + (r * K + tl.minimum(count, K - 1)) * V
    token = tl.load(tokens + r * K + count, mask=count < K, other=-1)
    rejected = count < width

    mass = tl.zeros((1,), tl.float64)
    if rejected:
        for first in range(0, V, BLOCK):
            mass += tl.sum(remaining(here, draft_row, token, first, V, DRAFT, BLOCK), 0)
    # Rounding can reject a token whose ratio differs from 1 in the last bit. The residual is then empty, and the next
    # token is sampled from the target. A one-hot draft with an unknown token id leaves the target unchanged.
    whole = rejected & (tl.max(mass, 0) <= 0.0)
    if CERTAIN:
        best = 0
        top = float("-inf")
        for first in range(0, V, BLOCK):
            at = first + tl.arange(0, BLOCK)
            p = tl.load(here + at, mask=at < V, other=-1.0)
            if rejected & (whole == 0):
                p = tl.where(at < V, remaining(here, draft_row, token, first, V, DRAFT, BLOCK).to(tl.float32), -1.0)
            most, index = tl.max(p, 0), tl.argmax(p, 0)
            best = tl.where(most > top, first + index, best)
            top = tl.maximum(most, top)
        tl.store(following + r, tl.cast(best, tl.int64))
    elif rejected:
        if whole:
            for first in range(0, V, BLOCK):
                at = first + tl.arange(0, BLOCK)
                mass += tl.sum(tl.load(here + at, mask=at < V, other=0.0).to(tl.float64), 0)
        limit = tl.sum(mass, 0) * chance(mine, position + count, RESIDUAL).to(tl.float64)
        before = limit * 0.0
        below = count * 0
        for first in range(0, V, BLOCK):
            at = first + tl.arange(0, BLOCK)
            if whole:
                p = tl.load(here + at, mask=at < V, other=0.0).to(tl.float64)
            else:
                p = remaining(here, draft_row, token, first, V, DRAFT, BLOCK)
            reached = before + tl.cumsum(p, 0)
            below += tl.sum(((reached <= limit) & (at < V)).to(tl.int64), 0)
            before += tl.sum(p, 0)
        tl.store(following + r, tl.minimum(below, V - 1))
    else:
        tl.store(following + r, drawn(here, mine, position + count, V, BLOCK).to(tl.int64))


@triton.jit
def _draw(probs, keys, positions, out, V, stride, out_stride, each, first, PURPOSE: tl.constexpr, BLOCK: tl.constexpr):
    """Row n draws at position n % each + first after the one of its sequence, n // each."""
    n = tl.program_id(0).to(tl.int64)
    here, mine = probs + n * stride, keys + n // each * 2
    position = tl.load(positions + n // each) + first + n % each
    if PURPOSE == SAMPLE:
        token = drawn(here, mine, position, V, BLOCK).to(tl.int64)
    else:
        mass = tl.zeros((1,), tl.float64)
        for begin in range(0, V, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            mass += tl.sum(tl.load(here + at, mask=at < V, other=0.0).to(tl.float64), 0)
        limit = tl.sum(mass, 0) * chance(mine, position, PURPOSE).to(tl.float64)
        before = limit * 0.0
        below = n * 0
        for begin in range(0, V, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            p = tl.load(here + at, mask=at < V, other=0.0).to(tl.float64)
            reached = before + tl.cumsum(p, 0)
            below += tl.sum(((reached <= limit) & (at < V)).to(tl.int64), 0)
            before += tl.sum(p, 0)
        token = tl.minimum(below, V - 1)
    tl.store(out + n * out_stride, token)


def draw(probs: Tensor, keys: Tensor, positions: Tensor, each: int, purpose: int, first: int, out: Tensor) -> None:
    N, V = probs.shape
    launch(
        _draw, (N,), probs, keys, positions, out, V, probs.stride(0), out.stride(0),
        each, first, PURPOSE=purpose, BLOCK=max(4, min(BLOCK, power(V))),
    )  # fmt: skip


def verify(
    inputs: tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor],
    random: bool,
    outputs: tuple[Tensor, Tensor, Tensor],
) -> None:
    draft_tokens, draft_probs, target_probs, *rest = inputs
    (R, K), V = draft_tokens.shape, target_probs.shape[-1]
    draft = target_probs if draft_probs is None else draft_probs
    launch(
        _verify, (R,), draft_tokens, draft, target_probs, *rest, *outputs, K, V,
        DRAFT=draft_probs is not None, CERTAIN=not random, BLOCK=max(4, min(BLOCK, power(V))),
    )  # fmt: skip
