"""Rotary position embeddings (Su et al. 2021, RoFormer) and the ways to extend them to longer contexts.

RoPE rotates each pair of features of a query or key by an angle: position x frequency. The frequencies decrease
geometrically from 1 to 1/theta. A model trained on a short context is extended to a longer one by lowering
frequencies: all of them (`linear`, Chen et al. 2023), or only the slow ones, which made no full rotation during
training (`llama3`, Grattafiori et al. 2024; `yarn`, Peng et al. 2023).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config_rope import RopeConfig


def frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Return angles per position, float32 [head_dim / 2], and the factor that scales cos and sin (1 except in YaRN)."""
    inverse = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.scaling == "linear":
        return inverse / rope.factor, 1.0
    if rope.scaling == "llama3":
        return _llama3(rope, inverse), 1.0
    if rope.scaling == "yarn":
        return _yarn(rope, inverse, head_dim), _yarn_attention_factor(rope)
    return inverse, 1.0


def _llama3(rope: RopeConfig, inverse: Tensor) -> Tensor:
    """Keep fast frequencies, divide slow ones by `factor`, blend between the two wavelength bounds."""
    wavelength = 2 * math.pi / inverse
    turns = rope.original_context / wavelength  # rotations within the original context
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * inverse / rope.factor + blend * inverse


def _yarn(rope: RopeConfig, inverse: Tensor, head_dim: int) -> Tensor:
    """Keep frequencies of more than `beta_fast` rotations, divide those of fewer than `beta_slow` by `factor`."""

    def feature_of(turns: float) -> float:  # the feature with this many rotations
        return head_dim * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = feature_of(rope.beta_fast), feature_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a ramp without a division by zero
    slow = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return inverse / rope.factor * slow + inverse * (1 - slow)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


def rotation_tables(angles: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos, and sin with the sign of each half, of angles [..., head_dim / 2]; both [..., head_dim]."""
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)
