"""EAGLE's drafter with its layer in C++: a whole chain in one call, a tree level by level.

State and cache of the drafter are those of eagle.py; only the computation differs.

    python generate.py --kernels cpp --drafter eagle --prompt "from pathlib import"
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..cpp_runner import drawable
from ..drafting import Draft, Stop
from ..kernels.cpp.model import idle
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
        self.cache.truncate(0, self.confirmed)
        self.predicted = self.fast.begin(self.cache, 0, inputs)
        self.fed(len(inputs), end)
        self.rows, self.parents = {-1: -1}, list[int]()
        self.entered = self.predicted[:0]  # inputs of the draft tokens
        return self.predicted

    def fed(self, count: int, end: int) -> None:
        """Keep `count` inputs that the kernels have written, up to position `end` of the sequence."""
        self.cache.keep(0, list(range(count)))
        self.confirmed, self.end = self.confirmed + count, end

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

    def __init__(self, fast: CppEagle, target: Transformer, head: EagleHead, source: RandomSource) -> None:
        super().__init__(target, head, source)
        self.fast = fast

    @torch.inference_mode()
    def propose(self, sequences: list[Sequence], widths: list[int], stop: Stop | None = None) -> Draft:
        """Draft chains in C++ if no `stop` may end them and the random numbers are keyed; otherwise as EagleDrafter."""
        if stop is not None or not drawable(sequences, self.source):
            return super().propose(sequences, widths, stop)
        counts = [width if self.ready(each) else 0 for each, width in zip(sequences, widths, strict=True)]
        chains = ChainBuilder(sequences, counts, self.source, stop)
        if rows := chains.open():
            asked, counts = [sequences[row] for row in rows], [counts[row] for row in rows]
            tokens, probs = self.fast.propose(self.start(asked, counts, [n + 1 for n in counts]), counts)
            self.finish(counts, [[[]] * len(rows)])
            chains.take(rows, tokens, probs)
        return chains.draft()

    def start(self, sequences: list[Sequence], counts: list[int], limits: list[int]) -> Any:
        """Return a drafter of the library for drafts of counts[r] tokens."""
        batch, states, self._started = list[Any](), list[Tensor](), list[tuple[FastLookahead, int, int] | None]()
        for sequence, count in zip(sequences, counts, strict=True):
            if not count:
                batch.append(idle())
                states.append(torch.empty(0, self.target.config.width * (1 + len(self.head.taps))))
                self._started.append(None)
                continue
            layer, new = self._layer(sequence)
            assert isinstance(layer, FastLookahead)
            if not new:  # asked again for the same sequence: feed its last input once more
                layer.confirmed -= 1
            layer.cache.truncate(0, layer.confirmed)
            tokens, read = self._read(sequence, max(new, 1))
            batch.append(self.fast.sequence(layer.cache, 0, tokens, sequence.params, sequence.key[1], sequence.length))
            states.append(read.float())
            self._started.append((layer, len(read), sequence.length - 1))
        return self.fast.drafter(batch, states, [each.policy.draft_noise for each in sequences])

    def finish(self, counts: list[int], gained: list[list[list[int]]]) -> None:
        """Record the steps after `start`: gained[s][r] are the tokens of sequence r in step s."""
        for row, started in enumerate(self._started):
            if started is not None:
                layer, new, end = started
                more = sum(len(of_step[row]) for of_step in gained[:-1])  # those of the last step are fed by the next
                layer.fed(new + more, end + more)

    def _make_layer(self, capacity: int) -> Lookahead:
        return FastLookahead(self.fast, self.head, self.target, capacity)

    def _logits(self, features: Tensor) -> Tensor:
        return self.fast.logits(features)

    def inputs(self, sequence: Sequence, last: int) -> Tensor:
        tokens, states = self._read(sequence, last)
        return self.fast.inputs(tokens, self.fast.read(states))
