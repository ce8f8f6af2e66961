"""What the tokens of a forward attend to: to each other, or to what a cache holds as well.

A layer hands over its queries, and the keys and values of the new tokens; it does not know which it is.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import TORCH, Kernels
from .kv_cache import KVCache


class Attending(Protocol):
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [B, W, H, d], key and value [B, T, kv_heads, d] of the new tokens -> [B, W, H, d]."""
        ...


@dataclass(frozen=True)
class Within:
    """No cache: the tokens of the forward are all there is. mask [1 or B, 1, W, T], 0 or -inf."""

    mask: Tensor

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        grouped = key.shape[2] < query.shape[2]
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), self.mask, enable_gqa=grouped
        )
        return mixed.transpose(1, 2)


@dataclass(frozen=True)
class Behind:
    """The first counts[r] tokens of row r of the forward stand behind what row rows[r] of a cache holds."""

    cache: KVCache
    rows: list[int]
    counts: list[int]
    masks: list[Tensor | None]  # of every row [W, n]; n: what can be read of the cache's row, and the new tokens
    kernels: Kernels = TORCH

    def only(self, wanted: Tensor | None) -> Behind:
        """For the last layer, where the queries wanted [R, W] alone are asked."""
        if wanted is None:
            return self
        masks = [mask if mask is None else mask[of_row] for mask, of_row in zip(self.masks, wanted, strict=True)]
        return dataclasses.replace(self, masks=masks)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.kernels.kv_append(self.cache, layer, self.rows, self.counts, key, value)
        return self.kernels.decode_attention(query, self.cache, layer, self.rows, self.counts, self.masks)


def seen(
    positions: Tensor, first: int, held: int, ancestors: Tensor | None, window: int | None, dtype: torch.dtype
) -> Tensor | None:
    """The mask [W, n] of a row that holds tokens first .. held - 1 of its text, with T new tokens behind them.

    Queries and new tokens are the same T = W at first; `ancestors` bool [T, T] says which of the new each sees, in
    order where None. positions int64 [T] are theirs. None where every query sees everything.
    """
    T = len(positions)
    if T == 1 and (window is None or held + 1 - first <= window):
        return None
    if ancestors is None:
        ancestors = torch.ones(T, T, dtype=torch.bool, device=positions.device).tril()
    open_ = torch.cat((ancestors.new_ones(T, held - first), ancestors), 1)
    if window is not None:
        at = torch.cat((torch.arange(first, held, device=positions.device), positions))
        open_ = open_ & (positions[:, None] - at < window)
    return torch.zeros_like(open_, dtype=dtype).masked_fill_(~open_, float("-inf"))
