"""Medusa's heads in C++: packed matrices, multiplied by the target's engine (see drafters/medusa.py).

fast = CppMedusa(heads, target, CppModel(target, "bfloat16"))
fast.logits(states[-1:], [token])    # [1, H, V], one row per head
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from common.philox import Purpose

from ...drafters.medusa import MedusaHeads
from ...model import Transformer
from ...quantize import Format, QuantLinear
from ..arguments import address
from .library import library
from .model import CppModel
from .weights import pack, plan, quantised


class CppMedusa:
    """Medusa's heads in the target's weight format, on its threads, with its output matrix.

    format: of the heads' matrices and of a copy of the output matrix instead.
    """

    def __init__(self, heads: MedusaHeads, target: Transformer, beside: CppModel, format: Format | None = None) -> None:
        self.heads, self.beside = heads, beside
        each = range(heads.shape.heads)
        blocks = zip(heads.weight, heads.bias, strict=True)
        wanted: dict[str, list[nn.Module]] = {
            "reduce": [] if heads.reduce is None else [heads.reduce],
            "token": [] if heads.token is None else [heads.token[1]],
            "blocks": [linear(weight[i], bias[i]) for weight, bias in blocks for i in each],
            "mix": [linear(heads.mix[i], None) for i in each],
            "head": [] if format is None or isinstance(target.head, QuantLinear) else [target.head],
        }
        plans = {
            name: [plan(-1, name, quantised(module, format), beside.weights) for module in of]
            for name, of in wanted.items()
        }
        every = [each for of in plans.values() for each in of]
        exact = beside.exact_activations
        arena = library().Arena(sum(each.shape(exact).bytes for each in every) + 64 * len(every))
        self._packed = {name: [pack(each, arena, exact, beside.threads) for each in of] for name, of in plans.items()}

        reduce, token = (self._packed[name] or [None] for name in ("reduce", "token"))
        head = self._packed["head"] or [beside._head]
        norm, eps = None, 0.0
        if heads.token is not None:
            of_token = cast(nn.RMSNorm, heads.token[0])
            norm = of_token.weight.detach().float().contiguous()
            eps = of_token.eps or torch.finfo(of_token.weight.dtype).eps
        self._width = beside.config.width * (1 + len(heads.shape.taps))
        self._medusa = library().Medusa(
            beside._engine, heads.shape.heads, self._width, reduce[0], token[0], address(norm), eps,
            self._packed["blocks"], self._packed["mix"], head[0],
        )  # fmt: skip

    def drafter(self, batch: list[Any], states: Tensor, noise: list[Purpose]) -> Any:
        """Return a drafter of the library over R sequences of the target, from the last state [R, F] of each.

        noise[r]: of the random numbers of sequence r.
        """
        states = states.detach().float().contiguous()
        return library().MedusaDrafter(self._medusa, batch, [int(each) for each in noise], states.data_ptr())

    def logits(self, states: Tensor, tokens: list[int]) -> Tensor:
        """Return the logits [R, H, V] of all heads, from R states [R, F] and the token that was drawn from each."""
        if states.shape != (len(tokens), self._width):
            raise ValueError(f"states must be [{len(tokens)}, {self._width}], and are {list(states.shape)}")
        states = states.detach().float().contiguous()
        logits = torch.empty(len(tokens), self.heads.shape.heads, self.beside.config.vocab_size)
        self._medusa.logits(states.data_ptr(), tokens, logits.data_ptr())
        return logits


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Make a Linear from weight [in, out], the layout of the heads."""
    inputs, outputs = weight.shape
    made = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.T.contiguous(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.flatten(), requires_grad=False)
    return made
