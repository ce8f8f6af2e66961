"""Medusa's heads in C++: packed matrices, multiplied by the target's engine (see drafters/medusa.py).

fast = CppMedusa(heads, CppModel(target, "bfloat16"))
fast.logits(states[-1:], target.embedding(last))    # [H, V], one row per head
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...drafters.medusa import MedusaHeads
from .library import library
from .model import CppModel
from .weights import Plan, pack


class CppMedusa:
    """Medusa's heads in the target's weight format, on its threads; torch adds between the products."""

    def __init__(self, heads: MedusaHeads, beside: CppModel) -> None:
        self.heads, self.beside = heads, beside
        each = range(heads.shape.heads)
        blocks = zip(heads.weight, heads.bias, strict=True)
        wanted: dict[str, list[nn.Module]] = {
            "reduce": [] if heads.reduce is None else [heads.reduce],
            "token": [] if heads.token is None else [heads.token[1]],
            "blocks": [linear(weight[i], bias[i]) for weight, bias in blocks for i in each],
            "mix": [linear(heads.mix[i], None) for i in each],
        }
        plans = {
            name: [Plan(-1, name, cast(nn.Linear, module), beside.weights, False) for module in of]
            for name, of in wanted.items()
        }
        every = [plan for of in plans.values() for plan in of]
        exact = beside.exact_activations
        arena = library().Arena(sum(plan.shape(exact).bytes for plan in every) + 64 * len(every))
        self._packed = {name: [pack(plan, arena, exact, beside.threads) for plan in of] for name, of in plans.items()}

    def _product(self, packed: Any, x: Tensor) -> Tensor:
        """Multiply x [1, inputs] by a packed matrix: [1, D]."""
        out = torch.empty(1, self.beside.config.width)
        self.beside._engine.product(packed, x.data_ptr(), 1, out.data_ptr())
        return out

    def logits(self, states: Tensor, embedded: Tensor) -> Tensor:
        """Return the logits [H, V] of all heads, from a state [1, F] and the embedding [1, D] of the next token."""
        states, H = states.detach().float().contiguous(), self.heads.shape.heads
        x = states[:, : self.beside.config.width]
        for packed in self._packed["reduce"]:
            x = x + self._product(packed, states)
        for packed in self._packed["token"]:
            assert self.heads.token is not None
            x = x + self._product(packed, self.heads.token[0](embedded).float().contiguous())
        rows = [x.contiguous()] * H
        for at, packed in enumerate(self._packed["blocks"]):
            rows[at % H] = rows[at % H] + F.silu(self._product(packed, rows[at % H]))
        mixed = [self._product(packed, row) for packed, row in zip(self._packed["mix"], rows, strict=True)]
        return self.beside.logits(torch.cat(mixed))


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Make a Linear from weight [in, out], the layout of the heads."""
    inputs, outputs = weight.shape
    made = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.T.contiguous(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.flatten(), requires_grad=False)
    return made
