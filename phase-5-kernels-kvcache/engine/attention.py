"""What the tokens of a forward attend to: to each other, or to what a cache holds as well.

A layer hands over its queries, and the keys and values of the new tokens; it does not know which it is.
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
    def turns(self) -> bool:
        """Whether it takes queries and keys that were not turned to their positions yet, and turns them itself."""
        ...

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, rotation: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """query [B, W, H, d], key and value [B, T, kv_heads, d] of the new tokens -> [B, W, H, d].

        `rotation` (cos and signed sin) comes with queries and keys that are still to be turned; then W = T.
        """
        ...


@dataclass(frozen=True)
class FullAttention:
    """No cache: the tokens of the forward are all there is. mask [1 or B, 1, W, T], 0 or -inf."""

    mask: Tensor
    turns = False

    @classmethod
    def of(cls, mask: Tensor) -> FullAttention:
        """From a mask [T, T] for all rows, or [B, T, T]."""
        return cls(mask[None, None] if mask.ndim == 2 else mask[:, None])

    def only(self, wanted: Tensor | None) -> FullAttention:
        """Return the attention of the last layer, where only the queries wanted [B, W] are asked."""
        if wanted is None:
            return self
        rows = torch.arange(len(self.mask), device=wanted.device)[:, None]
        return FullAttention(self.mask[rows, 0, wanted][:, None])

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, rotation: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        assert rotation is None, "nothing is appended here that could be turned on its way"
        grouped = key.shape[2] < query.shape[2]
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), self.mask, enable_gqa=grouped
        )
        return mixed.transpose(1, 2)


@dataclass(frozen=True)
class CachedAttention:
    """The first counts[r] tokens of row r of the forward stand behind what row rows[r] of a cache holds."""

    cache: KVCache
    rows: list[int]
    counts: list[int]
    masks: list[Tensor | None]  # of every row [W, n]; n: what can be read of the cache's row, and the new tokens
    kernels: Kernels = TORCH

    def only(self, wanted: Tensor | None) -> CachedAttention:
        """For the last layer, where the queries wanted [R, W] alone are asked."""
        if wanted is None:
            return self
        masks = [mask if mask is None else mask[of_row] for mask, of_row in zip(self.masks, wanted, strict=True)]
        return dataclasses.replace(self, masks=masks)

    @property
    def turns(self) -> bool:
        """Where the turn and the append are one kernel. torch turns queries and keys at once, before: see kernels/."""
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
    """The mask [W, n] of a row that holds tokens first .. held - 1 of its text, with T new tokens behind them.

    Queries and new tokens are the same T = W at first; `ancestors` bool [T, T] says which of the new each sees, in
    order where None. None where every query sees everything.
    """
    T = len(positions)
    if window is not None and max(positions) - first < window:
        window = None  # nothing has slid out of it
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
    """A row's mask [W, before + W] for T queries: those behind W are padding, and see all that there is."""
    if T <= FEW and is_in_order(mask, before):
        return in_order(T, before, mask)[:, : mask.shape[1]]
    return F.pad(mask, (0, 0, 0, T - len(mask)))
