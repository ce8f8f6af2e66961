"""Prompt lookup: what followed the last few tokens when they occurred before (Saxena 2023; Yang et al. 2023, LLMA)."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

from common.errors import UserError

from ..drafting import Draft, Outcome, Stop
from ..sequence import Sequence


class NgramIndex:
    """Where every run of `low` to `high` tokens last ended in a text that grows; O(high) per token, O(1) to look up."""

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = low, high
        self.text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> position of the token that followed it last

    def extend(self, tokens: list[int]) -> None:
        for token in tokens:
            end = len(self.text)
            for size in range(self.low, min(self.high, end) + 1):
                self._after[tuple(self.text[end - size : end])] = end
            self.text.append(token)

    def continuation(self, count: int) -> list[int]:
        """What followed the longest suffix that occurred before, at most `count` tokens; empty where none did."""
        for size in range(min(self.high, len(self.text)), self.low - 1, -1):
            at = self._after.get(tuple(self.text[-size:]))
            if at is not None:
                return self.text[at : at + count]
        return []


class NgramDrafter:
    """Guesses that the text repeats itself. CostModel next to nothing, and knows nothing of the model."""

    taps: tuple[int, ...] | None = None

    def __init__(self, low: int = 1, high: int = 3) -> None:
        if not 1 <= low <= high:
            raise UserError(f"ngram_min must be at least 1 and at most ngram_max, got {low} and {high}")
        self.low, self.high = low, high
        self._indexes: WeakKeyDictionary[Sequence, NgramIndex] = WeakKeyDictionary()

    def propose(self, sequences: list[Sequence], widths: list[int], stop: Stop | None = None) -> Draft:
        """Certain guesses have no distribution to ask `stop` about; it is not asked."""
        drafted = [self._index(s).continuation(width) for s, width in zip(sequences, widths, strict=True)]
        longest = max(map(len, drafted))
        rows = [row + [0] * (longest - len(row)) for row in drafted]
        tokens = torch.tensor(rows, dtype=torch.long).view(len(rows), longest)
        return Draft(tokens, None, [len(row) for row in drafted])

    def _index(self, sequence: Sequence) -> NgramIndex:
        index = self._indexes.get(sequence)
        if index is None:
            index = self._indexes[sequence] = NgramIndex(self.low, self.high)
            index.extend(sequence.prompt)
        index.extend(sequence.tokens[len(index.text) - len(sequence.prompt) :])
        return index

    def known(self, sequence: Sequence) -> int:
        return sequence.length

    def observe(self, outcome: Outcome) -> None:
        """The index reads what stood from the sequence itself."""
