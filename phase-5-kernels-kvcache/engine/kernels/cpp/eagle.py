"""EAGLE's layer in C++: a one-layer model whose inputs combine tokens and features (see drafters/eagle.py).

layer = CppEagle(head, target, CppModel(target, "bfloat16"))
cache = layer.new_cache(rows=1, tokens=300)
drawn, probs, _ = layer.draft(cache, 0, tokens, features, 4, params, sample=0, position=sequence.length)
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
from ...sampling import SamplingParams
from .model import CppModel, finite_logits
from .ops import sampling_of
from .weights import KIND_OF, Plan, Weights, set_norm

NO_LIMIT = 2**30


class CppEagle(CppModel):
    """EAGLE's layer. Its cache holds the sequence's inputs; positions count from the first input."""

    def __init__(self, head: EagleHead, target: Transformer, beside: CppModel) -> None:
        """Pack the layer. `beside`: the target in C++, whose output matrix, weight format and threads are used."""
        parts = SimpleNamespace(
            config=dataclasses.replace(head.config, windows=(head.shape.reach,)),
            embedding=target.embedding,
            layers=[head.block],
            norm=head.norm,
            head=None,
            join=head.join,
        )
        self._parts = parts  # the target's embedding is read in place
        self._norms = {"token_norm": head.token_norm, "state_norm": head.state_norm}
        self._head = beside._head
        self._prepare(parts, beside.weights, beside.threads, None, beside.exact_activations, release=False)

    def _take_tables(self, model: Any) -> list[Tensor]:
        for name, norm in self._norms.items():
            set_norm(self._engine, -1, name, norm)
        self._engine.set_table("positions", 0, 0, NO_LIMIT)  # the target's states already include learned positions
        embedding = model.embedding.weight.detach().contiguous()
        self._engine.set_table("embedding", embedding.data_ptr(), KIND_OF[embedding.dtype], len(embedding))
        return [embedding]

    def _more(self, model: Any, weights: Weights) -> list[Plan]:
        return [Plan(-1, "join", model.join, weights, False)]

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

    def draft(
        self,
        cache: StaticCache,
        row: int,
        tokens: Sequence[int],
        features: Tensor,
        count: int,
        params: SamplingParams,
        *,
        sample: int,
        position: int,
        noise: Purpose = Purpose.DRAFT,
    ) -> tuple[list[int], Tensor, Tensor]:
        """Draft `count` tokens after a sequence in one call.

        Returns the tokens, the distributions [count, V] that they were drawn from, and the feature [1, D] predicted
        after the sequence.

        tokens: the sequence's tokens that are not in the row yet, at least one, with their features [n, D].
        position: that of the first new token in the sequence, for its random number. Afterwards the row has keys and
        values of the sequence's inputs and of all drafted tokens except the last: `cache.keep` the accepted ones.
        UserError for penalties.
        """
        self._check_sequence(tokens, params)
        features = self._checked(tokens, features)
        probs, predicted = torch.empty(count, self.config.vocab_size), torch.empty(1, self.config.width)
        with finite_logits():
            drawn = self._engine.continue_features(
                self.view(cache), row, cache.lengths[row], list(tokens), sample, position, features.data_ptr(), count,
                sampling_of(params), int(noise), predicted.data_ptr(), probs.data_ptr(),
            )  # fmt: skip
        return drawn, probs, predicted

    def _checked(self, tokens: Sequence[int], features: Tensor) -> Tensor:
        if features.shape != (len(tokens), self.config.width):
            raise ValueError(f"features must be [{len(tokens)}, {self.config.width}], and are {list(features.shape)}")
        return features.detach().float().contiguous()
