"""A source of random numbers that visits every outcome of a loop.

law = Walker().law(lambda walker: tuple(what_a_loop_writes(walker)))
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from common.philox import Purpose

Law = dict[Any, float]
SLIVER = 1e-15  # a branch this narrow is rounding


class Walker:
    """Replaces the random numbers of a loop, and enumerates all its outcomes.

    Numbers that share a key (seed, sample, position, purpose, trial) are one uniform number, as they are with keyed
    noise: what an earlier use has told about it (an interval) holds for a later one. A draw reads it through the
    inverse distribution function, a decision through a comparison. So a drafter that draws with the noise of plain
    sampling is coupled to it.
    """

    def __init__(self) -> None:
        self._script: list[int] = []
        self._taken: list[tuple[int, int]] = []
        self._known: dict[tuple[int, ...], tuple[float, float]] = {}

    def law(self, run: Callable[[Walker], Any]) -> Law:
        """The probability of every result of `run`."""
        law: Law = defaultdict(float)
        while True:
            self._taken, self._known, self.weight = [], {}, 1.0
            result = run(self)
            law[result] += self.weight
            while self._taken and self._taken[-1][0] == self._taken[-1][1] - 1:
                self._taken.pop()
            if not self._taken:
                return dict(law)
            self._script = [choice for choice, _ in self._taken[:-1]] + [self._taken[-1][0] + 1]

    def _branch(self, weights: list[float]) -> int:
        at = len(self._taken)
        choice = self._script[at] if at < len(self._script) else 0
        self._taken.append((choice, len(weights)))
        self.weight *= weights[choice]
        return choice

    def _pick(self, weights: list[float], *key: int) -> int:
        """Choose the part of [0, 1), divided by the weights, that contains the uniform number of this key."""
        low, high = self._known.get(key, (0.0, 1.0))
        cells, edge, total = [], 0.0, sum(weights)
        for index, weight in enumerate(weights):
            left, edge = edge, edge + weight / total
            begin, end = max(low, left), min(high, edge)
            if end - begin > SLIVER:
                cells.append((index, begin, end))
        index, begin, end = cells[self._branch([(end - begin) / (high - low) for _, begin, end in cells])]
        self._known[key] = begin, end
        return index

    def draw(self, probs: Tensor, keys: Tensor, positions: Tensor, purpose: Purpose) -> Tensor:
        return self.draw_several(probs, 1, keys, positions, purpose)[:, 0]

    def draw_several(self, probs: Tensor, count: int, keys: Tensor, positions: Tensor, purpose: Purpose) -> Tensor:
        """Without replacement: each draw from what the ones before it have left, with a uniform number of its own."""
        rows = []
        for row, key, position in zip(probs.tolist(), keys.tolist(), positions.tolist(), strict=True):
            tokens: list[int] = []
            for trial in range(count):
                tokens.append(self._pick(row, *key, position, int(purpose), trial))
                row[tokens[-1]] = 0.0
            rows.append(tokens)
        return torch.tensor(rows, dtype=torch.long).view(len(rows), count)

    def decide(self, probability: Tensor, keys: Tensor, positions: Tensor, trial: int = 0) -> Tensor:
        decided = [
            [
                self._pick([p, 1 - p], *key, position, int(Purpose.ACCEPT), trial) == 0
                for p, position in zip(row, places, strict=True)
            ]
            for row, key, places in zip(
                probability.clamp(0, 1).tolist(), keys.tolist(), positions.tolist(), strict=True
            )
        ]
        return torch.tensor(decided, dtype=torch.bool).view(probability.shape)
