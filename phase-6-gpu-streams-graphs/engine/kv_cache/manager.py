"""Assigns rows of a cache to sequences, and tracks the token ids that each row holds.

Before a forward pass, a row is cut back to the longest prefix that it shares with its sequence. This covers a rejected
draft token, a jump of the window, and a different sequence: the cache always equals a fresh prefill. A new sequence
shares the entries of a row with the same prefix, and in a paged cache known blocks, whose sequences may have ended.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .block_manager import block_name
from .paged import PAGE, OutOfBlocks, PagedCache
from .protocol import KVCache


@dataclass
class CacheEntry:
    """One row of the cache, and its token ids."""

    number: int
    held: list[int] = field(default_factory=list)  # token ids of the entries that the row holds
    start: int = 0  # position in the sequence of the first entry
    names: list[bytes] = field(default_factory=list)  # of its full blocks in a paged cache
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

    def begin(self, owner: Hashable, window: list[int], most: int | None = None) -> CacheEntry:
        """Return the row of a sequence, cut back to its common prefix with window[:-1].

        The last token of the window is always computed. most: how many entries a new sequence may share with others;
        hidden states that are needed as well must be computed.
        """
        if owner not in self.rows:
            row = self.rows[owner] = CacheEntry(self.free.pop())
            self._borrow(row, window[:-1][:most])
        row = self.rows[owner]
        self.settle(row, [], [])
        held = len(row.held)
        if held >= len(window) or row.held != window[:held]:
            self._truncate(row, common_prefix(row.held, window[:-1]))
        return row

    @property
    def free_blocks(self) -> int:
        """Return how many blocks of a paged cache are free."""
        return self.cache.blocks.free if isinstance(self.cache, PagedCache) else 0

    def reserve(self, owner: Hashable, length: int) -> bool:
        """Give the row room for so many tokens in all. False, and nothing changed, if a paged cache has none."""
        number, cache = self.rows[owner].number, self.cache
        try:
            if isinstance(cache, PagedCache) and length > cache.lengths[number]:
                cache.make_room(number, length - cache.lengths[number])
        except OutOfBlocks:
            return False
        return True

    def held_blocks(self, owner: Hashable) -> int:
        """Return how many blocks of a paged cache the row holds."""
        return len(self.cache.tables[self.rows[owner].number]) if isinstance(self.cache, PagedCache) else 0

    def lacking_blocks(self, lengths: Mapping[Any, int]) -> int:
        """Return how many blocks of a paged cache these rows lack together to grow to these lengths.

        Each row that writes to a shared block needs a copy of it, except the last one if no other row holds the block.
        """
        cache, lacking, writers = self.cache, 0, Counter[int]()
        if not isinstance(cache, PagedCache):
            return 0
        for owner, length in lengths.items():
            number = self.rows[owner].number
            table = cache.tables[number]
            lacking += max(0, cache.pages(length) - len(table))
            writers.update(table[at] for at in cache.written(number, length))
        return lacking + sum(min(count, cache.blocks.users[block] - 1) for block, count in writers.items())

    def _truncate(self, row: CacheEntry, length: int) -> None:
        if length < self.cache.shortest(row.number):
            length = 0  # the window of the next token is overwritten
        self.cache.truncate(row.number, length)
        del row.held[length:], row.names[length // PAGE :]

    def _borrow(self, row: CacheEntry, tokens: list[int]) -> None:
        """Begin a row with the longest known prefix of these tokens: of known blocks, or a fork of another row."""
        others = [other for other in self.rows.values() if other is not row and self.cache.first(other.number) == 0]
        best = max(others, key=lambda other: common_prefix(other.held, tokens), default=None)
        shared = 0 if best is None else common_prefix(best.held, tokens)
        if isinstance(self.cache, PagedCache):
            blocks, names = self.cache.blocks.find(tokens, PAGE)
            if len(blocks) * PAGE >= shared:
                self.cache.adopt(row.number, blocks)
                row.held, row.names = tokens[: len(blocks) * PAGE], names
                return
        if best is not None and shared:
            self.cache.fork(best.number, row.number)
            row.held, row.names = list(best.held), list(best.names)
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
            self._name_blocks(row)

    def _name_blocks(self, row: CacheEntry) -> None:
        """Make the row's new full blocks findable for later sequences."""
        if not isinstance(self.cache, PagedCache):
            return
        while (end := (len(row.names) + 1) * PAGE) <= len(row.held):
            name = block_name(row.names[-1] if row.names else b"", row.held[end - PAGE : end])
            self.cache.blocks.set_name(self.cache.tables[row.number][len(row.names)], name)
            row.names.append(name)

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
