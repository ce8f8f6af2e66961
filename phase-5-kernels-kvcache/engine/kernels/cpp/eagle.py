"""EAGLE's layer in C++: a one-layer model whose inputs are made of tokens and features (see drafters/eagle.py).

layer = CppEagle(head, target, "bfloat16")
cache = layer.new_cache(rows=1, tokens=300)
predicted = layer.begin(cache, 0, inputs)                    # of the sequence's new inputs [n, D]
cache.keep(0, list(range(len(inputs))))
tokens, probs = layer.continue_chain(cache, 0, predicted, 4, params, sample=0, position=sequence.length)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.philox import Purpose

from ...drafters.eagle import EagleHead
from ...kv_cache import StaticCache
from ...model import Transformer
from ...sampling import SamplingParams
from .model import CppModel, Stepped
from .ops import sampling_of
from .weights import KIND_OF, Plan, Weights, set_norm, why_not_model

NO_LIMIT = 2**30


class CppEagle(CppModel):
    """Its cache holds the sequence's inputs; positions count from the first of them."""

    def __init__(
        self,
        head: EagleHead,
        target: Transformer,
        weights: Weights = "float32",
        threads: int | None = None,
        *,
        exact_activations: bool | None = None,
    ) -> None:
        if (reason := why_not_model(target)) is not None:
            raise UserError(reason)
        parts = SimpleNamespace(
            config=dataclasses.replace(head.config, window=head.shape.reach),
            embedding=target.embedding,
            layers=[head.block],
            norm=head.norm,
            head=target.head,
            join=head.join,
        )
        self._parts = parts  # the target's embedding is read where it lies
        self._norms = {"token_norm": head.token_norm, "state_norm": head.state_norm}
        self._prepare(parts, weights, threads, None, exact_activations, release=False)

    def _take_tables(self, model: Any) -> list[Tensor]:
        for name, norm in self._norms.items():
            set_norm(self._engine, -1, name, norm)
        self._engine.set_table("positions", 0, 0, NO_LIMIT)  # learned positions are in the target's states already
        embedding = model.embedding.weight.detach().contiguous()
        self._engine.set_table("embedding", embedding.data_ptr(), KIND_OF[embedding.dtype], len(embedding))
        return [embedding]

    def _more(self, model: Any, weights: Weights) -> list[Plan]:
        return [Plan(-1, "join", model.join, weights, False)]

    def _set(self, plan: Plan, packed: Any) -> None:
        if plan.which == "join":
            self._engine.set_join(packed)
        else:
            super()._set(plan, packed)

    def begin(self, cache: StaticCache, row: int, inputs: Tensor) -> Stepped:
        """The feature predicted behind a sequence's new inputs [n, D], and its logits: [1, D] and [1, V]."""
        return self.step(cache, [[0] * len(inputs)], rows=[row], inputs=inputs, hidden=True)

    def extend(self, cache: StaticCache, row: int, inputs: Tensor, parents: Sequence[int]) -> Stepped:
        """Those of all nodes of a tree behind the sequence, [n, D] and [n, V], from all their inputs [n, D]."""
        nodes = range(len(parents))
        return self.step(
            cache, [[0] * len(parents)], rows=[row], inputs=inputs, parents=[list(parents)], wanted=nodes, hidden=True
        )

    def continue_chain(
        self,
        cache: StaticCache,
        row: int,
        predicted: Stepped,
        count: int,
        params: SamplingParams,
        *,
        sample: int,
        position: int,
        noise: Purpose = Purpose.DRAFT,
    ) -> tuple[list[int], Tensor]:
        """`count` tokens behind what `begin` predicted, and what each was drawn from [count, V], in one call.

        position: of the first of them in the text, for its random number. Their keys and values lie behind the row's
        length, and are not kept. UserError for penalties.
        """
        if params.penalised:
            raise UserError("penalties need the whole text: the C++ kernels draw without them; use --kernels torch")
        assert predicted.hidden is not None
        assert predicted.logits is not None
        probs = torch.empty(count, self.config.vocab_size)
        drawn = self._engine.continue_chain(
            self.view(cache), row, cache.lengths[row], sample, position, count, sampling_of(params), int(noise),
            predicted.hidden.data_ptr(), predicted.logits.data_ptr(), probs.data_ptr(),
        )  # fmt: skip
        return drawn, probs
