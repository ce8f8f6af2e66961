"""What the tokens of a forward attend to: to each other, or to what a cache holds as well.

A layer hands over its queries, and the keys and values of the new tokens; it does not know which it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import TORCH, Kernels
from .kv_cache import KVCache

FEW = 64  # tokens of a step, at most: those of a large tree


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


def in_order(T: int, before: int, like: Tensor) -> Tensor:
    """The mask [T, before + T] of a few tokens that see all before them, and each other in order: part of a table."""
    columns = max(256, 1 << before.bit_length())
    return staircase(columns, like.dtype, like.device)[:T, columns - before : columns + T]


@lru_cache(maxsize=8)
def staircase(columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[FEW, columns + FEW]: zeros, and behind them -inf where a later token stands."""
    later = torch.full((FEW, FEW), float("-inf"), dtype=dtype, device=device).triu(1)
    return torch.cat((later.new_zeros(FEW, columns), later), 1)
