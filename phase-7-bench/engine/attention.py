"""Attention backends: the tokens of a forward attend to each other, or also to the entries of a cache.

A layer passes its queries, keys and values to a backend, and does not know which one it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import TORCH, Kernels
from .kernels.key_ranges import FEW, KeyRanges
from .kernels.metadata import AttentionMetadata


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
    """Attends to a cache: the tokens of the forward follow its entries, as the metadata says."""

    metadata: AttentionMetadata
    ranges: KeyRanges  # of the metadata, for the window of these layers
    kernels: Kernels = TORCH

    def only(self, wanted: Tensor | None) -> CachedAttention:
        """Return the attention of the last layer, with the queries wanted [R, W] only."""
        return self if wanted is None else CachedAttention(self.metadata, self.ranges.only(wanted), self.kernels)

    @property
    def applies_rope(self) -> bool:
        """Return True if RoPE and the cache append are one fused kernel; torch applies RoPE beforehand."""
        return self.kernels.rope_append is not TORCH.rope_append

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, rotation: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        if rotation is None:
            self.kernels.kv_append(self.metadata, layer, key, value)
        else:
            query = self.kernels.rope_append(self.metadata, layer, query, key, value, *rotation)
        attend = self.kernels.decode_attention if query.shape[1] <= FEW else self.kernels.flash_prefill
        return attend(query, self.metadata, layer, self.ranges)
