"""The first weights of heads, and their features on a whole text at once; a draft has those of its last token only.

x = features(heads, target.model, tokens, target_states(target, tokens, heads.taps), depths=4)
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from common.errors import UserError
from engine.drafters.eagle import EagleHead
from engine.drafters.heads import Heads
from engine.drafters.medusa import MedusaHeads
from engine.model import Transformer

HeadInit = Literal["zero", "copy", "random"]


@torch.no_grad()
def initialise(heads: Heads, target: Transformer, how: HeadInit) -> None:
    """Set the weights of heads for a target. UserError for `copy` where the sizes differ."""
    if isinstance(heads, MedusaHeads):
        _initialise_medusa(heads, target, how)
    else:
        _initialise_eagle(heads, target, how)


def _initialise_medusa(heads: MedusaHeads, target: Transformer, how: HeadInit) -> None:
    """zero: each head equals the target's next-token prediction. random: torch's initialisation of a Linear layer.
    copy: the product of the matrices of the target's last feed-forward."""
    width = heads.weight.shape[-1]
    if how == "zero":
        nn.init.zeros_(heads.weight)
    elif how == "random":
        nn.init.uniform_(heads.weight, -(width**-0.5), width**-0.5)
    else:
        ffn = target.layers[-1].ffn
        heads.weight.copy_((ffn.down.weight @ ffn.up.weight).T.expand_as(heads.weight))  # type: ignore[union-attr, operator]
    for added in (heads.reduce, heads.token):
        if added is not None:
            nn.init.zeros_(list(added.parameters())[-1])


def _initialise_eagle(head: EagleHead, target: Transformer, how: HeadInit) -> None:
    """copy: the weights of the target's last layer. random: torch's initialisation of Linear layers. zero: random, but
    both output matrices are 0, so that the layer returns its input."""
    for name, parameter in head.block.named_parameters():
        if parameter.ndim == 2:
            nn.init.kaiming_uniform_(parameter, a=5**0.5)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    if how == "copy":
        if head.config.ffn_width != target.config.ffn_width:
            raise UserError(f"--head-init copy needs --ffn-width {target.config.ffn_width}, as the target's layers")
        head.block.load_state_dict(target.layers[-1].state_dict())
    elif how == "zero":
        nn.init.zeros_(head.block.attention.output.weight)
        nn.init.zeros_(head.block.ffn.down.weight)
    head.norm.load_state_dict(target.norm.state_dict())  # the output matrix expects this scale


def features(heads: Heads, target: Transformer, tokens: Tensor, states: Tensor, depths: int) -> Tensor:
    """Predict features [depths, B, T, D] at the anchors t = 0 .. T-1 of windows [B, W], T = W - depths.

    tokens int64 [B, W], states [B, W, F] as heads.py's `target_states`. Depth d = 1, 2, ... predicts token t + 1 + d,
    through the target's output matrix.
    """
    if isinstance(heads, EagleHead):
        return _eagle_features(heads, target, tokens, states, depths)
    T = tokens.shape[1] - depths
    at, embedded = states[:, :T], target.embedding(tokens[:, 1 : T + 1])
    x: Tensor = heads(at.flatten(0, 1), embedded.flatten(0, 1))[:depths].unflatten(1, at.shape[:2])
    return x


def _eagle_features(head: EagleHead, target: Transformer, tokens: Tensor, states: Tensor, depths: int) -> Tensor:
    """Predict features as above. Depth 1 reads true states only.

    At depth s the input of anchor t joins token x_{t+s} and the feature predicted for it at depth s - 1. Its attention
    covers the same inputs as in a draft: the true ones up to t, and the anchor's own at depths 2 .. s.
    """
    B, W = tokens.shape
    T = W - depths
    embedded = target.embedding(tokens)
    feature = head.read(states[:, :T])
    steps = torch.arange(T, device=tokens.device)
    past, own = steps[:, None] >= steps, steps[:, None] == steps
    group = head.config.heads // head.config.kv_heads
    inputs, found = [], []
    for depth in range(1, depths + 1):
        inputs.append(head.inputs(embedded[:, depth : depth + T], feature))
        seen = torch.cat([past, *[own] * (depth - 1)], -1)  # [T, depth * T]
        mask = feature.new_zeros(seen.shape).masked_fill(~seen, float("-inf"))
        positions = torch.cat([steps + d for d in range(depth)])
        rotation = target.rotation_at(positions, feature) if head.config.positions == "rope" else None
        last = (torch.arange(B, device=tokens.device)[:, None], (steps + (depth - 1) * T).expand(B, T))
        feature = head(torch.cat(inputs, 1), rotation, mask.repeat(group, 1)[None], last)
        found.append(feature)
    return torch.stack(found)
