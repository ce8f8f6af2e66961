"""Quantisation-aware training: the forward uses four-bit weights, the optimiser updates the full-precision ones.

Rounding has no useful derivative, so the gradient is passed through unchanged (Bengio et al. 2013, the straight-through
estimator). The weights learn values that rounding harms little. The checkpoint holds the weights before rounding;
rounding them to nearest, in groups of 64, gives exactly the weights of the training forward.

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
    """Round to nearest in symmetric int4: float32 [out, in], each weight a level -8 .. 7 times its group's scale.

    The scale is a bfloat16, as in the engine. The weight of largest magnitude gets level -8.
    """
    groups = weight.float().reshape(len(weight), -1, GROUP)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (torch.where(-low > high, low, high) / -8).bfloat16()
    scale = torch.where(scale == 0, 1, scale).float()
    return (torch.round(groups / scale).clamp(-8, 7) * scale).reshape(weight.shape)


class StraightThrough(nn.Module):
    """A parametrisation: the rounded weight in the forward, the identity in the backward."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (round_to_int4(weight) - weight).detach()


def matrices(model: Any) -> list[tuple[str, nn.Linear]]:
    """Return the matrices inside the layers: those that the engine quantises by default."""
    return [(name, module) for name, module in model.model.layers.named_modules() if isinstance(module, nn.Linear)]


def round_forwards(model: Any) -> None:
    """Make the layers compute with rounded weights. UserError names a matrix that groups do not divide."""
    for name, linear in matrices(model):
        if linear.in_features % GROUP:
            raise UserError(f"--qat int4: layers.{name} has {linear.in_features} inputs, no multiple of {GROUP}")
        parametrize.register_parametrization(linear, "weight", StraightThrough())


def restore(model: Any) -> None:
    """Restore plain matrices with the weights before rounding."""
    for _, linear in matrices(model):
        parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)
