"""Random numbers that are a function of their use: Philox 4x32-10 in plain torch.

An ordinary generator gives numbers in the order of the calls, so a request's tokens would depend on the rest of the
batch. Philox is a block cipher applied to a counter: there is no state, and every number can be computed alone, in any
order, on any device. Here the counter identifies the number's use, (seed, sample, position, purpose, index). So a
request gets the same numbers alone, in a batch, after a preemption or in another process.

    python -c "import torch; from common.philox import uniforms; r = torch.arange(3); print(uniforms(7, r, r, 0, 4))"

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011; Random123's philox.h.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57  # of words 0 and 2
KEY_STEPS = 0x9E3779B9, 0xBB67AE85  # added to the two key words after each round
MASK = 0xFFFFFFFF
FEW = 16  # up to this many blocks, plain Python is faster than torch


class Purpose(IntEnum):
    """What a random number decides. Two decisions at one position must not share their noise by accident."""

    SAMPLE = 0  # a token of plain sampling
    DRAFT = 1  # a token that a drafter proposes
    ACCEPT = 2  # whether a draft token is accepted
    RESIDUAL = 3  # the token that replaces a rejected one


def _pair(first: int, second: int, like: Tensor) -> Tensor:
    """Return int64 [2, 1, ...] for the two lanes of `like`, [2, ...].

    Filled on the device: a copy from the host would synchronise, and CUDA graphs cannot capture such a copy.
    """
    values = torch.full((2, *(1,) * (like.ndim - 1)), first, device=like.device)
    values[1] = second
    return values


def _encrypt(even: Tensor, odd: Tensor, key: Tensor) -> Tensor:
    """Apply the ten rounds. even: words 0 and 2, odd: words 1 and 3, key: all [2, ...]; returns [..., 4].

    The two halves of the cipher are the lanes of one tensor, and each round uses as few operations as possible: on
    small arrays the time goes into starting operations, not into arithmetic.
    """
    multiplier = _pair(*MULTIPLIERS, like=even)
    key_step = _pair(*KEY_STEPS, like=even)
    even = even & MASK
    for _ in range(ROUNDS):
        # The product of two 32-bit words may wrap past 2**63 to a negative number; its 64 bits are correct. The flip
        # gives each half the product of the other. `odd` and `key` may have bits above the 32nd (so does the shift of a
        # negative product); the one mask clears them all before the next multiplication.
        product = (even * multiplier).flip(0)
        even = (product >> 32).bitwise_xor_(odd).bitwise_xor_(key).bitwise_and_(MASK)
        odd = product
        key = key + key_step
    odd = odd & MASK
    return torch.stack((even[0], odd[0], even[1], odd[1]), dim=-1)


def philox4x32(counter: Tensor, key: tuple[int, int] | Tensor) -> Tensor:
    """Encrypt counters, int64 [..., 4], under keys, [..., 2] or one pair for all: int64 [..., 4].

    Words are 32 bits wide, stored in int64, because torch lacks unsigned arithmetic on some devices. Only the low 32
    bits of inputs count; outputs are in [0, 2**32). Leading dimensions broadcast.
    """
    if isinstance(key, Tensor):
        shape = (counter[..., 0] ^ key[..., 0]).shape  # the broadcast shape
        counter, lanes = counter.expand(*shape, 4).movedim(-1, 0), key.expand(*shape, 2).movedim(-1, 0) & MASK
    else:
        counter = counter.movedim(-1, 0)
        lanes = _pair(key[0] & MASK, key[1] & MASK, like=counter)
    return _encrypt(counter[0::2], counter[1::2], lanes)


def _encrypt_one(counter: tuple[int, ...], seed: int) -> tuple[int, ...]:
    """Apply the same rounds to Python integers: faster than tensor operations for a handful of blocks."""
    a, b, c, d = (word & MASK for word in counter)
    low, high = seed & MASK, (seed >> 32) & MASK
    for _ in range(ROUNDS):
        first, second = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b, c, d = (second >> 32) ^ b ^ low, second & MASK, (first >> 32) ^ d ^ high, first & MASK
        low, high = (low + KEY_STEPS[0]) & MASK, (high + KEY_STEPS[1]) & MASK
    return a, b, c, d


def words(seed: int | Tensor, sample: Tensor, position: Tensor, purpose: int, count: int) -> Tensor:
    """Compute `count` random words for each row: int64 [B, count] in [0, 2**32), on the device of `position`.

    `sample` and `position` are int64 [B], `seed` too, or one number for all rows. The low 32 bits of sample, position
    and purpose count, and the low 64 of the seed, so a seed may be negative. Word i is word i % 4 of the block with
    counter (i // 4, position, sample, purpose) and key (low, high half of the seed): asking for more words never
    changes the first ones.
    """
    if _few(sample, position, count):
        found = _words_one_by_one(seed, sample, position, purpose, count)
        return torch.tensor(found, dtype=torch.int64).view(len(position), count)
    blocks = (count + 3) // 4
    counter = torch.empty(4, len(position), blocks, dtype=torch.int64, device=position.device)
    counter[0] = torch.arange(blocks, device=position.device)
    counter[1] = position[:, None]
    counter[2] = sample[:, None]
    counter[3] = int(purpose) & MASK
    if isinstance(seed, Tensor):
        key = torch.stack((seed & MASK, (seed >> 32) & MASK))[..., None]  # [2, B, 1]
    else:
        key = _pair(seed & MASK, (seed >> 32) & MASK, like=counter)
    return _encrypt(counter[0::2], counter[1::2], key).flatten(1)[:, :count]


def _few(sample: Tensor, position: Tensor, count: int) -> bool:
    """Return whether plain Python is faster than torch for these blocks. ValueError for other shapes."""
    if position.ndim != 1 or sample.shape != position.shape:
        raise ValueError(
            f"sample and position must both be [B]; they are {list(sample.shape)} and {list(position.shape)}"
        )
    if count < 0:
        raise ValueError(f"count must be at least 0, got {count}")
    return position.device.type == "cpu" and len(position) * ((count + 3) // 4) <= FEW


def _words_one_by_one(seed: int | Tensor, sample: Tensor, position: Tensor, purpose: int, count: int) -> list[int]:
    """Return the words of all rows, one row after the other."""
    seeds = seed.tolist() if isinstance(seed, Tensor) else [seed] * len(position)
    rows, blocks = zip(seeds, position.tolist(), sample.tolist(), strict=True), range((count + 3) // 4)
    return [
        word
        for key, p, s in rows
        for word in [w for block in blocks for w in _encrypt_one((block, p, s, int(purpose)), key)][:count]
    ]


def uniforms(seed: int | Tensor, sample: Tensor, position: Tensor, purpose: int, count: int) -> Tensor:
    """Compute uniform numbers in the open interval (0, 1): float32 [B, count], the same bits on every device.

    The upper 23 bits of a word, k, become (k + 0.5) / 2**23: the middle of one of 2**23 equal cells. 2 * k + 1 has at
    most 24 significant bits, as many as a float32 holds, and scaling by a power of two is exact. So nothing is
    rounded, and neither 0 nor 1 can occur. Arguments as for `words`.
    """
    if _few(sample, position, count):
        exact = [((word >> 9) + 0.5) * 2.0**-23 for word in _words_one_by_one(seed, sample, position, purpose, count)]
        return torch.tensor(exact, dtype=torch.float32).view(len(position), count)
    upper = words(seed, sample, position, purpose, count) >> 9
    return upper.to(torch.float32).add_(0.5).mul_(2.0**-23)


def gumbel(seed: int | Tensor, sample: Tensor, position: Tensor, purpose: int, count: int) -> Tensor:
    """Compute standard Gumbel noise -log(-log(u)): float32 [B, count], finite, between -2.82 and 16.64.

    The argmax over tokens of (log-probability + noise) is a sample of the distribution (Gumbel-max). The uniforms are
    the same bits everywhere; a device's `log` may differ in the last place. Arguments as for `words`.
    """
    return uniforms(seed, sample, position, purpose, count).log_().neg_().log_().neg_()
