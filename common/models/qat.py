"""Quantisation-aware training: the forward sees four-bit weights, the optimiser moves the ones behind them.

Rounding has no useful derivative, so the gradient passes it as if it were not there (Bengio et al. 2013, the
straight-through estimator). The weights learn to lie where rounding does little harm. The checkpoint holds the weights
before rounding; whoever rounds them to nearest, in groups of 64, gets exactly what the training saw.

    python -m common.models.train --init stdlib-10m --qat int4 --steps 200 --lr 2e-4 --out runs/qat
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from common.errors import UserError

GROUP = 64  # input features that share a scale


def round_to_int4(weight: Tensor) -> Tensor:
    """Symmetric int4, round to nearest: float32 [out, in], each weight a level -8 .. 7 times its group's scale.

    The scale is a bfloat16, as the engine stores it. The largest weight is seven steps.
    """
    groups = weight.float().reshape(len(weight), -1, GROUP)
    scale = (groups.abs().amax(-1, keepdim=True) / 7).bfloat16()
    scale = torch.where(scale == 0, 1, scale).float()
    return (torch.round(groups / scale).clamp(-8, 7) * scale).reshape(weight.shape)


class StraightThrough(nn.Module):
    """A parametrisation: the rounded weight forwards, the identity backwards."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (round_to_int4(weight) - weight).detach()


def matrices(model: Any) -> list[tuple[str, nn.Linear]]:
    """Those inside the layers: what the engine quantises unless it is told to take the output matrix too."""
    return [(name, module) for name, module in model.model.layers.named_modules() if isinstance(module, nn.Linear)]


def round_forwards(model: Any) -> None:
    """From here on the layers compute with rounded weights. UserError names a matrix that groups do not divide."""
    for name, linear in matrices(model):
        if linear.in_features % GROUP:
            raise UserError(f"--qat int4: layers.{name} has {linear.in_features} inputs, no multiple of {GROUP}")
        parametrize.register_parametrization(linear, "weight", StraightThrough())


def restore(model: Any) -> None:
    """Plain matrices again, holding the weights as they are before rounding."""
    for _, linear in matrices(model):
        parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)
