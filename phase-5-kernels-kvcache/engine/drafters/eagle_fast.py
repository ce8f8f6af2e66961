"""EAGLE's drafter with its layer in C++: a whole chain in one call, a tree level by level.

State and cache of the drafter are those of eagle.py; only the computation differs.

    python generate.py --kernels cpp --drafter eagle --prompt "from pathlib import"
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.philox import Purpose

from ..drafting import Draft, Stop
from ..drawing import Drawing
from ..kv_cache import StaticCache
from ..model import Transformer
from ..sequence import Sequence
from ..tree import Tree
from ..verify import RandomSource
from .chains import ChainBuilder
from .eagle import EagleDrafter, EagleHead, Lookahead

if TYPE_CHECKING:
    from ..kernels.cpp import CppEagle


class FastLookahead(Lookahead):
    """A Lookahead whose cache the C++ kernels write."""

    def __init__(self, fast: CppEagle, head: EagleHead, target: Transformer, capacity: int) -> None:
        super().__init__(head, target, capacity)
        self.fast = fast

    def begin(self, inputs: Tensor, end: int) -> Tensor:
        self._began(len(inputs), end, self.fast.begin(self._without_guesses(), 0, inputs))
        return self.predicted

    def draw(self, tokens: list[int], features: Tensor, end: int, count: int, how: Drawing) -> tuple[list[int], Tensor]:
        """Draft a chain after the sequence's new tokens; return its tokens and their distributions [count, V]."""
        drawn, probs, predicted = self.fast.draft(
            self._without_guesses(), 0, tokens, features, count, how.params,
            sample=how.key[1], position=how.position, noise=how.purpose,
        )  # fmt: skip
        self._began(len(tokens), end, predicted)
        return drawn, probs

    def _without_guesses(self) -> StaticCache:
        cache, certain = self.cache, self.confirmed
        cache.truncate(0, certain)
        return cache

    def _began(self, count: int, end: int, predicted: Tensor) -> None:
        self.cache.keep(0, list(range(count)))
        self.confirmed, self.end, self.predicted = self.confirmed + count, end, predicted
        self.rows, self.parents = {-1: -1}, list[int]()
        self.entered = predicted[:0]  # inputs of the draft tokens

    def extend(self, tree: Tree, nodes: list[int]) -> Tensor:
        """Compute nodes of a tree. Earlier nodes are computed again: the tree mask applies within one step."""
        for node in nodes:
            self.rows[node] = len(self.parents)
            self.parents.append(self.rows[tree.parents[node]])
        above = [self.rows[tree.parents[node]] + 1 for node in nodes]
        entering = self.fast.inputs([tree.tokens[node] for node in nodes], self.predicted[above])
        self.entered = torch.cat([self.entered, entering])
        added = self.fast.extend(self.cache, 0, self.entered, self.parents, len(nodes))
        self.predicted = torch.cat([self.predicted, added])
        return added


class FastEagleDrafter(EagleDrafter):
    """An EagleDrafter in C++; its drafts differ by rounding only."""

    def __init__(
        self, fast: CppEagle, target: Transformer, head: EagleHead, source: RandomSource, noise: Purpose = Purpose.DRAFT
    ) -> None:
        super().__init__(target, head, source, noise)
        self.fast = fast

    @torch.inference_mode()
    def propose(self, sequences: list[Sequence], widths: list[int], stop: Stop | None = None) -> Draft:
        """Draft chains in C++ if no `stop` may end them and the random numbers are keyed; otherwise as EagleDrafter."""
        chains = ChainBuilder(sequences, widths, self.source, self.noise, stop)
        rows = chains.open()
        for row in rows:
            sequence = sequences[row]
            drawing = Drawing(sequence.params, self.source, sequence.key, sequence.length, self.noise)
            if stop is not None or not drawing.keyed or not self.ready(sequence):
                return super().propose(sequences, widths, stop)
            layer, new = self._layer(sequence)
            assert isinstance(layer, FastLookahead)
            tokens, features = self._read(sequence, max(new, 1))
            if not new:  # asked again for the same sequence: feed its last input once more
                layer.confirmed -= 1
            drawn, probs = layer.draw(tokens, features, sequence.length - 1, widths[row], drawing)
            chains.take(row, drawn, None if sequence.params.greedy else probs)
        return chains.draft()

    def _make_layer(self, capacity: int) -> Lookahead:
        return FastLookahead(self.fast, self.head, self.target, capacity)

    def _logits(self, features: Tensor) -> Tensor:
        return self.fast.logits(features)

    def inputs(self, sequence: Sequence, last: int) -> Tensor:
        return self.fast.inputs(*self._read(sequence, last))
