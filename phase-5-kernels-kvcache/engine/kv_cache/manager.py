"""Assigns rows of a cache to sequences, and tracks the token ids that each row holds.

Before a forward pass, a row is cut back to the longest prefix that it shares with its sequence. This covers a rejected
draft token, a jump of the window, and a different sequence: the cache always equals a fresh prefill. A new sequence
shares the entries of a row with the same prefix.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from torch import Tensor

from .protocol import KVCache


@dataclass
class CacheEntry:
    """One row of the cache, and its token ids."""

    number: int
    held: list[int] = field(default_factory=list)  # token ids of the entries that the row holds
    states: list[Tensor] = field(default_factory=list)  # hidden states of a prefill that the next step returns
    text: list[int] = field(default_factory=list)  # those that the last forward pass appended, before its draft


class CacheManager:
    """The rows of one model's cache, by owner: any hashable name of a sequence.

    The cache was made for `rows` sequences of at most `tokens` tokens, output included. It may outlive them.
    """

    def __init__(self, cache: KVCache, rows: int, tokens: int = 0) -> None:
        self.cache, self.tokens = cache, tokens
        self.rows: dict[Hashable, CacheEntry] = {}
        self.free = list(range(rows))[::-1]
        self.positions = 0  # positions that the model computed so far

    @property
    def idle(self) -> bool:
        """Return True if no sequence has a row."""
        return not self.rows

    def fits(self, rows: int, tokens: int) -> bool:
        """Return True if so many more sequences of at most so many tokens find room."""
        return rows <= len(self.free) and tokens <= self.tokens

    def begin(self, owner: Hashable, window: list[int], borrow: bool = True) -> CacheEntry:
        """Return the row of a sequence, cut back to its common prefix with window[:-1].

        The last token of the window is always computed. borrow: a new sequence may share the entries of another row;
        False if hidden states are needed as well.
        """
        if owner not in self.rows:
            row = self.rows[owner] = CacheEntry(self.free.pop())
            if borrow:
                self._borrow(row, window)
        row = self.rows[owner]
        self.settle(row, [], [])
        held = len(row.held)
        if held >= len(window) or row.held != window[:held]:
            self._truncate(row, common_prefix(row.held, window[:-1]))
        return row

    def _truncate(self, row: CacheEntry, length: int) -> None:
        if length < self.cache.shortest(row.number):
            length = 0  # the window of the next token is overwritten
        self.cache.truncate(row.number, length)
        del row.held[length:]

    def _borrow(self, row: CacheEntry, window: list[int]) -> None:
        """Fork the row with the longest common prefix, if there is one."""
        others = [other for other in self.rows.values() if other is not row and self.cache.first(other.number) == 0]
        best = max(others, key=lambda other: common_prefix(other.held, window[:-1]), default=None)
        if best is not None and (shared := common_prefix(best.held, window[:-1])):
            self.cache.fork(best.number, row.number)
            row.held = list(best.held)
            self._truncate(row, shared)

    def appended(self, row: CacheEntry, text: list[int], drafted: int = 0) -> None:
        """Record the tokens of the sequence, and the number of draft tokens, that a forward pass has appended."""
        row.text = text
        self.positions += len(text) + drafted
        if not drafted:
            self.settle(row, [], [])

    def keep(self, owner: Hashable, nodes: list[int], tokens: list[int]) -> None:
        """Accept these nodes of the last forward pass's draft, and their tokens."""
        self.settle(self.rows[owner], nodes, tokens)

    def settle(self, row: CacheEntry, nodes: list[int], tokens: list[int]) -> None:
        """Keep the appended tokens of the sequence and these draft nodes; drop the other nodes."""
        if row.text:
            entries = [*range(len(row.text)), *(len(row.text) + node for node in nodes)]
            self.cache.keep(row.number, entries)
            row.held += row.text + tokens
            row.text = []

    def owner(self, number: int) -> Hashable:
        """Return the owner of a row of the cache."""
        return next(owner for owner, row in self.rows.items() if row.number == number)

    def release(self, owner: Hashable) -> None:
        """Free the row of a finished sequence, if it has one."""
        if owner in self.rows:
            row = self.rows.pop(owner)
            self.cache.truncate(row.number, 0)
            self.free.append(row.number)


def common_prefix(left: list[int], right: list[int]) -> int:
    """Return the length of the longest common prefix."""
    if left == right[: len(left)]:
        return len(left)
    return next((at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
