"""What learned heads are trained for, and measured by: how well each depth of a draft matches the target.

All of it is computed on given text. At anchor t the tokens up to t + 1 are known (the last of them was just drawn from
the target's state h_t) and depth d = 1, 2, ... guesses token t + 1 + d, which the target predicts at position t + d.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """First the cross entropy to the target's distribution, then the number of accepted tokens.

    A draft token is accepted with probability 1 - TV = sum min(p, q). Over text x drawn from the target p, a chain
    drawn from q gets past depth j with probability min(1, q_j(x_j) / p_j(x_j)), so

        E[accepted] = sum over d of  prod_{j < d} min(1, q_j(x_j) / p_j(x_j))  *  sum_v min(p_d(v), q_d(v)):

    with `chain` this itself is trained, otherwise the plain mean of 1 - TV over depths.
    """

    accepted: bool  # the second stage
    chain: bool
    decay: float  # weight of a depth relative to the one before, in the first stage

    def __call__(self, probs: Tensor, logits: Tensor, tokens: Tensor) -> Tensor:
        """probs [R, W, V] the target's, logits [K, R, T, V] of the depths, tokens int64 [R, W], T <= W - K."""
        depths, _, T, _ = logits.shape
        if self.accepted:
            passes, survives = acceptance(probs, logits, tokens)
            return 1 - (survives if self.chain else passes).mean()
        weights = [self.decay**d for d in range(depths)]
        losses = [
            -(probs[:, d + 1 : d + 1 + T] * of_depth.log_softmax(-1)).sum(-1).mean()
            for d, of_depth in enumerate(logits.unbind())
        ]
        total: Tensor = sum((w * loss for w, loss in zip(weights, losses, strict=True)), torch.zeros_like(losses[0]))
        return total / sum(weights)


class Overlap(torch.autograd.Function):
    """logits, p [..., V] and token [..., 1] -> sum_v min(p, q) [...] and q(token) [..., 1], with q = softmax(logits).

    Autograd's own way keeps and fills several tensors of the size of the logits; on a CPU most of the time went there.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, p: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        q = logits.softmax(-1)
        at = q.gather(-1, token)
        ctx.save_for_backward(q, p, token, at)
        return torch.minimum(p, q).sum(-1), at

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        q, p, token, at = ctx.saved_tensors
        of_overlap, of_token = grads[0][..., None], grads[1] * at
        moved = q.where(q < p, q.new_zeros(())).mul_(of_overlap)  # q * dL/dq; softmax: dL/dlogits = that - q * its sum
        moved.addcmul_(q, moved.sum(-1, keepdim=True) + of_token, value=-1)
        return moved.scatter_add_(-1, token, of_token), None, None


def acceptance(probs: Tensor, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return [K, R, T]: the chance that each depth's token is accepted if those before it are, and that all are."""
    depths, _, T, _ = logits.shape
    passes, survives = [], []
    reached = torch.ones_like(logits[0, ..., 0])
    for d, of_depth in enumerate(logits.unbind()):
        p = probs[:, d + 1 : d + 1 + T]
        # past the end nothing is read of the last depth's own token
        token = tokens[:, min(d, depths - 2) + 2 :][:, :T, None] if depths > 1 else tokens[:, 1 : 1 + T, None]
        overlap, at = Overlap.apply(of_depth, p, token)  # type: ignore[no-untyped-call]
        passes.append(overlap)
        survives.append(reached * overlap)
        reached = reached * (at / p.gather(-1, token).clamp(min=1e-12))[..., 0].clamp(max=1)
    return torch.stack(passes), torch.stack(survives)
