"""Attention backends: the tokens of a forward attend to each other, or also to the entries of a cache.

A layer passes its queries, keys and values to a backend, and does not know which one it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import TORCH, Kernels
from .kernels.key_ranges import FEW, in_order, is_in_order
from .kv_cache import KVCache


class AttentionBackend(Protocol):
    @property
    def applies_rope(self) -> bool:
        """Return True if the backend applies RoPE itself, to queries and keys without it."""
        ...

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, rotation: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """query [B, W, H, d], key and value [B, T, kv_heads, d] of the new tokens -> [B, W, H, d].

        rotation: cos and signed sin, for queries and keys that still lack RoPE; then W = T.
        """
        ...


@dataclass(frozen=True)
class FullAttention:
    """Attends without a cache, among the tokens of the forward. mask [1 or B, 1, W, T], 0 or -inf."""

    mask: Tensor
    applies_rope = False

    @classmethod
    def of(cls, mask: Tensor) -> FullAttention:
        """From a mask [T, T] for all rows, or [B, T, T]."""
        return cls(mask[None, None] if mask.ndim == 2 else mask[:, None])

    def only(self, wanted: Tensor | None) -> FullAttention:
        """Return the attention of the last layer, with the queries wanted [B, W] only."""
        if wanted is None:
            return self
        rows = torch.arange(len(self.mask), device=wanted.device)[:, None]
        return FullAttention(self.mask[rows, 0, wanted][:, None])

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, rotation: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        assert rotation is None, "RoPE is applied before this call"
        grouped = key.shape[2] < query.shape[2]
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), self.mask, enable_gqa=grouped
        )
        return mixed.transpose(1, 2)


@dataclass(frozen=True)
class CachedAttention:
    """Attends to a cache: the first counts[r] tokens of row r of the forward follow the entries of row rows[r]."""

    cache: KVCache
    rows: list[int]
    counts: list[int]
    masks: list[Tensor | None]  # of every row [W, n]; n: readable entries of the cache's row, and the new tokens
    kernels: Kernels = TORCH

    def only(self, wanted: Tensor | None) -> CachedAttention:
        """Return the attention of the last layer, with the queries wanted [R, W] only."""
        if wanted is None:
            return self
        masks = [mask if mask is None else mask[of_row] for mask, of_row in zip(self.masks, wanted, strict=True)]
        return dataclasses.replace(self, masks=masks)

    @property
    def applies_rope(self) -> bool:
        """Return True if RoPE and the cache append are one fused kernel; torch applies RoPE beforehand."""
        return self.kernels.rope_append is not TORCH.rope_append

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, rotation: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        to = self.cache, layer, self.rows, self.counts
        if rotation is None:
            self.kernels.kv_append(*to, key, value)
        else:
            query = self.kernels.rope_append(*to, query, key, value, *rotation)
        attend = self.kernels.decode_attention if query.shape[1] <= FEW else self.kernels.flash_prefill
        return attend(query, self.cache, layer, self.rows, self.counts, self.masks)


def seen(
    positions: Sequence[int], first: int, held: int, ancestors: Tensor | None, window: int | None, like: Tensor
) -> Tensor | None:
    """Return the mask [W, n] of a row that holds tokens first .. held - 1 of its sequence, followed by T new tokens.

    The new tokens are the queries, T = W. ancestors bool [T, T]: which new tokens each sees; None for a chain. Returns
    None if every query sees everything.
    """
    T = len(positions)
    if window is not None and max(positions) - first < window:
        window = None  # it covers all tokens
    if ancestors is None and window is None and T <= FEW:
        return None if T == 1 else in_order(T, held - first, like)
    if ancestors is None:
        ancestors = torch.ones(T, T, dtype=torch.bool, device=like.device).tril()
    open_ = torch.cat((ancestors.new_ones(T, held - first), ancestors), 1)
    if window is not None:
        new = torch.tensor(positions, device=like.device)
        at = torch.cat((torch.arange(first, held, device=like.device), new))
        open_ = open_ & (new[:, None] - at < window)
    return torch.zeros_like(open_, dtype=like.dtype).masked_fill_(~open_, float("-inf"))


def beside_padding(mask: Tensor, T: int, before: int) -> Tensor:
    """Extend a row's mask [W, before + W] to T queries: those past W are padding, and see everything."""
    if T <= FEW and is_in_order(mask, before):
        return in_order(T, before, mask)[:, : mask.shape[1]]
    return F.pad(mask, (0, 0, 0, T - len(mask)))
