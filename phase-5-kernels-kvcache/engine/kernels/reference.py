"""Every op in plain torch: what the others are held against, and what runs where no other can.

python bench.py --only caches
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kv_cache.protocol import KVCache


def times(x: Tensor, other: Tensor) -> Tensor:
    """x * other, in x's memory where no gradient is asked for and it has no gaps.

    A forward reads every weight once, which drives all else out of the caches: what was just written is still there,
    and fresh memory is not.
    """
    return x * other if torch.is_grad_enabled() or not x.is_contiguous() else x.mul_(other)


def linear(layer: nn.Module, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
    """x [..., in] -> [..., out], or the outputs start .. stop alone. The layer knows the format of its matrix."""
    product: Tensor = layer(x) if stop is None else layer(x, start, stop)
    return product


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; the statistics are float32 in every dtype.

    Three passes over x: its length and two products. On a CPU torch's own takes four: a power, its sum, the products.
    """
    if torch.is_grad_enabled():
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    wide = x if x.dtype == torch.float32 else x.float()
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = torch.addcmul(constant(eps, x.device), length, length, value=1 / max(1, x.shape[-1])).rsqrt_()
    normed = (wide * scale).mul_(weight)
    return normed if x.dtype == torch.float32 else normed.to(x.dtype)


@lru_cache(maxsize=64)
def constant(value: float, device: torch.device) -> Tensor:
    """A number where operations take tensors: making one costs what adding it costs."""
    return torch.tensor(value, device=device)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each feature against its partner half a head away: (a, b) -> (a cos - b sin, b cos + a sin).

    x [B, T, H, head_dim]; the tables [T, 1, head_dim] or [B, T, 1, head_dim].
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def kv_append(cache: KVCache, layer: int, rows: list[int], counts: list[int], keys: Tensor, values: Tensor) -> None:
    """Write the first counts[r] of keys and values [R, T, kv_heads, head_dim] behind row rows[r] of the cache."""
    whole = keys.shape[1]
    for at, (row, count) in enumerate(zip(rows, counts, strict=True)):
        if count == whole:
            cache.append(layer, row, keys[at], values[at])
        else:
            cache.append(layer, row, keys[at, :count], values[at, :count])


def decode_attention(
    query: Tensor, cache: KVCache, layer: int, rows: list[int], counts: list[int], masks: list[Tensor | None]
) -> Tensor:
    """query [R, W, H, head_dim] over what the rows hold and the counts[r] tokens just appended -> the same shape.

    masks[r] [W, n] is 0 where a query may look and -inf where not; None where every query sees all. Nothing is read
    that was never written, whatever lies there.
    """
    mixed = [
        attend(query[at], *cache.read(layer, row, count), mask)
        for at, (row, count, mask) in enumerate(zip(rows, counts, masks, strict=True))
    ]
    return mixed[0][None] if len(mixed) == 1 else torch.stack(mixed)


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """One row: query [W, H, head_dim] over keys and values [kv_heads, n, head_dim] -> [W, H, head_dim]."""
    (W, H, d), kv = query.shape, len(keys)
    if W == 1 and mask is None:  # query heads that share a key head are so many queries of it
        return F.scaled_dot_product_attention(query.view(1, kv, H // kv, d), keys[None], values[None]).view(1, H, d)
    whole = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None], keys[None], values[None], mask, enable_gqa=kv < H
    )
    return whole[0].transpose(0, 1)


def verify_prefix(draft_tokens: Tensor, choices: Tensor, widths: Tensor) -> Tensor:
    """How many of draft_tokens [R, K] are the choices [R, K+1] of the target, from the first on: int64 [R]."""
    K = draft_tokens.shape[1]
    stands = (draft_tokens == choices[:, :K]) & (torch.arange(K, device=widths.device) < widths[:, None])
    return stands.long().cumprod(1).sum(1)
