"""The keyed random numbers of common/philox.py inside a kernel, bit for bit.

Philox 4x32-10 (Salmon et al. 2011): ten rounds of two 32 x 32 -> 64 bit products on a counter of four words, with a key
of two words. The counter is (index // 4, position, sample, purpose); the number is word index % 4.
"""

from __future__ import annotations

import triton
import triton.language as tl

# mypy: disable-error-code="no-untyped-def, untyped-decorator"


@triton.jit
def words(block, position, sample, purpose, low, high):
    """Return the four words for counters (block, position, sample, purpose) with the key (low, high); all uint32."""
    a = block
    b = position
    c = sample
    d = purpose
    for _ in tl.static_range(10):
        first = a.to(tl.uint64) * 0xD2511F53
        second = c.to(tl.uint64) * 0xCD9E8D57
        a = (second >> 32).to(tl.uint32) ^ b ^ low
        b = second.to(tl.uint32)
        c = (first >> 32).to(tl.uint32) ^ d ^ high
        d = first.to(tl.uint32)
        low = low + tl.full(low.shape, 0x9E3779B9, tl.uint32)
        high = high + tl.full(high.shape, 0xBB67AE85, tl.uint32)
    return a, b, c, d


@triton.jit
def uniform(word):
    """Return the midpoint of one of 2**23 equal cells of (0, 1), exact in float32."""
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def splat(value, like):
    """Broadcast one word to the shape of `like`."""
    return tl.zeros(like.shape, tl.uint32) + value.to(tl.uint32)


@triton.jit
def gumbel(keys, first, position, purpose: tl.constexpr, BLOCK: tl.constexpr):
    """Return -log(-log(u)) for tokens first .. first + BLOCK - 1; keys: int64 (seed, sample)."""
    blocks = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    seed = tl.load(keys)
    low = splat(seed, blocks)
    high = splat(seed >> 32, blocks)
    sample = splat(tl.load(keys + 1), blocks)
    a, b, c, d = words(blocks, splat(position, blocks), sample, tl.full(blocks.shape, purpose, tl.uint32), low, high)
    # Word w of block n belongs to token 4n + w: join so that the last two dimensions, [2, 2], index w.
    interleaved = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK,))
    return -tl.log(-tl.log(uniform(interleaved)))


@triton.jit
def chance(keys, position, purpose: tl.constexpr):
    """Return the first uniform of (sample, position, purpose)."""
    one = tl.zeros((1,), tl.uint32)
    seed = tl.load(keys)
    low = splat(seed, one)
    high = splat(seed >> 32, one)
    sample = splat(tl.load(keys + 1), one)
    a, _, _, _ = words(one, splat(position, one), sample, tl.full((1,), purpose, tl.uint32), low, high)
    return tl.sum(uniform(a), 0)
