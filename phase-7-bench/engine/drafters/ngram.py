"""Prompt lookup: propose the tokens that followed an earlier occurrence of the last few (Saxena 2023; LLMA 2023)."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

from common.errors import UserError

from ..drafting import Draft, Drafter, Stop
from ..sequence import Sequence


class NgramIndex:
    """Maps each n-gram of `low` to `high` tokens to its last occurrence. O(high) per added token and per lookup."""

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
        """Return at most `count` tokens that followed the longest suffix seen before; empty if there is none."""
        for size in range(min(self.high, len(self.text)), self.low - 1, -1):
            at = self._after.get(tuple(self.text[-size:]))
            if at is not None:
                return self.text[at : at + count]
        return []


class NgramDrafter(Drafter):
    """Drafts repetitions of the sequence's own text, without a model and at almost no cost."""

    def __init__(self, low: int = 1, high: int = 3) -> None:
        if not 1 <= low <= high:
            raise UserError(f"ngram_min must be at least 1 and at most ngram_max, got {low} and {high}")
        self.low, self.high = low, high
        self._indexes: WeakKeyDictionary[Sequence, NgramIndex] = WeakKeyDictionary()

    def propose(self, sequences: list[Sequence], widths: list[int], stop: Stop | None = None) -> Draft:
        """Look up a continuation for every sequence. `stop` is not called: these tokens have no distribution."""
        drafted = self.find(sequences, widths)
        longest = max(map(len, drafted))
        rows = [row + [0] * (longest - len(row)) for row in drafted]
        tokens = torch.tensor(rows, dtype=torch.long).view(len(rows), longest)
        return Draft(tokens, None, [len(row) for row in drafted])

    def find(self, sequences: list[Sequence], widths: list[int]) -> list[list[int]]:
        """Return a continuation of at most widths[r] tokens for every sequence."""
        return [self._index(each).continuation(width) for each, width in zip(sequences, widths, strict=True)]

    def _index(self, sequence: Sequence) -> NgramIndex:
        index = self._indexes.get(sequence)
        if index is None:
            index = self._indexes[sequence] = NgramIndex(self.low, self.high)
            index.extend(sequence.prompt)
        index.extend(sequence.tokens[len(index.text) - len(sequence.prompt) :])
        return index
