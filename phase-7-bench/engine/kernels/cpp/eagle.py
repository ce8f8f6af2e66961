"""EAGLE's layer in C++: a one-layer model whose inputs combine tokens and features (see drafters/eagle.py).

layer = CppEagle(head, target, CppModel(target, "bfloat16"))
cache = layer.new_cache(rows=1, tokens=300)
sequence = layer.sequence(cache, 0, tokens, params, position=length)
drawn, probs = layer.propose(layer.drafter([sequence], [states], [Purpose.DRAFT]), [4])
cache.keep(0, list(range(len(tokens))))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from common.philox import Purpose

from ...drafters.eagle import EagleHead
from ...kv_cache import StaticCache
from ...model import Transformer
from ...quantize import Format, QuantLinear
from .library import library
from .model import CppModel
from .weights import KIND_OF, Plan, Weights, plan, quantised, set_norm

NO_LIMIT = 2**30


class CppEagle(CppModel):
    """EAGLE's layer. Its cache holds the sequence's inputs; positions count from the first input."""

    def __init__(self, head: EagleHead, target: Transformer, beside: CppModel, format: Format | None = None) -> None:
        """Pack the layer. `beside`: the target in C++, whose output matrix, weight format and threads are used.

        format: of the layer's matrices and of a copy of the output matrix instead.
        """
        parts = SimpleNamespace(
            config=dataclasses.replace(head.config, windows=(head.shape.reach,)),
            embedding=target.embedding,
            layers=[quantised(head.block, format)],
            norm=head.norm,
            head=None if format is None or isinstance(target.head, QuantLinear) else quantised(target.head, format),
            join=quantised(head.join, format),
            reduce=head.reduce and quantised(head.reduce, format),
        )
        self._parts = parts  # the target's embedding is read in place
        self._norms = {"token_norm": head.token_norm, "state_norm": head.state_norm}
        self._head, self._reduce, self._taps = beside._head, None, head.taps
        self._prepare(parts, beside.weights, beside.threads, None, beside.exact_activations, release=False)

    def _take_tables(self, model: Any) -> list[Tensor]:
        for name, norm in self._norms.items():
            set_norm(self._engine, -1, name, norm)
        self._engine.set_table("positions", 0, 0, NO_LIMIT)  # the target's states already include learned positions
        embedding = model.embedding.weight.detach().contiguous()
        self._engine.set_table("embedding", embedding.data_ptr(), KIND_OF[embedding.dtype], len(embedding))
        return [embedding]

    def _more(self, model: Any, weights: Weights) -> list[Plan]:
        both = ("join", model.join), ("reduce", model.reduce)
        return [plan(-1, which, module, weights) for which, module in both if module is not None]

    def _set(self, plan: Plan, packed: Any) -> None:
        if plan.which == "reduce":
            self._reduce = packed
        else:
            super()._set(plan, packed)

    def _finish(self) -> None:
        self._engine.set_matrix(-1, "head", self._head)
        super()._finish()

    def inputs(self, tokens: Sequence[int], features: Tensor) -> Tensor:
        """Return the layer's inputs [n, D]: each token's embedding joined with the feature that it was drawn from."""
        features = self._checked(tokens, features)
        joined = torch.empty(len(tokens), self.config.width)
        self._engine.join(list(tokens), features.data_ptr(), joined.data_ptr())
        return joined

    def begin(self, cache: StaticCache, row: int, inputs: Tensor) -> Tensor:
        """Append a sequence's new inputs [n, D]; return the feature [1, D] predicted after them."""
        return self._features(cache, row, inputs)

    def extend(self, cache: StaticCache, row: int, inputs: Tensor, parents: Sequence[int], new: int) -> Tensor:
        """Compute a tree from all nodes' inputs [n, D]; return the features [new, D] of its last `new` nodes."""
        return self._features(cache, row, inputs, parents=[parents], wanted=range(len(parents) - new, len(parents)))

    def _features(self, cache: StaticCache, row: int, inputs: Tensor, **more: Any) -> Tensor:
        tokens = [[0] * len(inputs)]  # not read: the inputs replace their embeddings
        found = self.step(cache, tokens, rows=[row], inputs=inputs, hidden=True, logits=False, **more).hidden
        assert found is not None
        return found

    def drafter(self, batch: list[Any], states: list[Tensor], noise: list[Purpose]) -> Any:
        """Return a drafter of the library over sequences of this layer, made with `sequence`.

        states[r]: those of the target [n, F] from which sequence r's n new tokens were drawn; of a sequence that is not
        to draft, none. noise[r]: of its random numbers. A sequence's row keeps its inputs: of every proposal, those of
        the new tokens.
        """
        width = self.config.width * (1 + len(self._taps))
        read = torch.cat(states).float().contiguous()
        counts = [len(each) for each in states]
        purposes = [int(each) for each in noise]
        return library().EagleDrafter(self._engine, batch, purposes, self._reduce, width, read.data_ptr(), counts)

    def read(self, states: Tensor) -> Tensor:
        """Reduce the target's states [n, F] to features [n, D]."""
        states = states.detach().float().contiguous()
        if self._reduce is None:
            return states
        features = torch.empty(len(states), self.config.width)
        self._engine.product(self._reduce, states.data_ptr(), len(states), features.data_ptr())
        return features

    def _checked(self, tokens: Sequence[int], features: Tensor) -> Tensor:
        if features.shape != (len(tokens), self.config.width):
            raise ValueError(f"features must be [{len(tokens)}, {self.config.width}], and are {list(features.shape)}")
        return features.detach().float().contiguous()
