"""Which texts a cache holds: what of a text the model has seen already, and what it still has to.

A row remembers the token ids whose keys and values it holds. Before a forward the row is cut back to what its text
still begins with; so whatever happened to the text (a guess that fell, a window that jumped, another text altogether),
the cache holds what a fresh prefill would give. Texts that begin alike share what one of them has computed.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from .protocol import KVCache


@dataclass
class CacheEntry:
    number: int
    held: list[int] = field(default_factory=list)  # token ids, of which the cache has keys and values
    text: list[int] = field(default_factory=list)  # appended behind them in the last forward, and certain
    draft: list[int] = field(default_factory=list)  # likewise, and guesses


class CacheManager:
    """The rows of one model's cache, by whatever names the loop gives its texts."""

    def __init__(self, cache: KVCache, rows: int) -> None:
        self.cache = cache
        self.rows: dict[Hashable, CacheEntry] = {}
        self.free = list(range(rows))[::-1]
        self.positions = 0  # that went through the model, all in all

    def begin(self, owner: Hashable, window: list[int], borrow: bool = True) -> CacheEntry:
        """The row of a text, cut back to what it shares with the text; its last token is always still to be seen.

        borrow: a new text may begin with what another row has. Not where more is wanted of it than keys and values.
        """
        if owner not in self.rows:
            row = self.rows[owner] = CacheEntry(self.free.pop())
            if borrow:
                self._borrow(row, window)
        row = self.rows[owner]
        self.settle(row, [])
        held = len(row.held)
        if held >= len(window) or row.held != window[:held]:
            self._truncate(row, common_prefix(row.held, window[:-1]))
        return row

    def _truncate(self, row: CacheEntry, length: int) -> None:
        if length < self.cache.shortest(row.number):
            length = 0  # what it would look back on is overwritten
        self.cache.truncate(row.number, length)
        del row.held[length:]

    def _borrow(self, row: CacheEntry, window: list[int]) -> None:
        """Begin with what another row has of the same beginning."""
        others = [other for other in self.rows.values() if other is not row and self.cache.first(other.number) == 0]
        best = max(others, key=lambda other: common_prefix(other.held, window[:-1]), default=None)
        if best is not None and (shared := common_prefix(best.held, window[:-1])):
            self.cache.fork(best.number, row.number)
            row.held = list(best.held)
            self._truncate(row, shared)

    def appended(self, row: CacheEntry, text: list[int], draft: list[int]) -> None:
        """A forward has appended these tokens behind what the row holds."""
        row.text, row.draft = text, draft
        self.positions += len(text) + len(draft)
        if not draft:
            self.settle(row, [])

    def keep(self, owner: Hashable, nodes: list[int]) -> None:
        """Of the last forward's draft, these nodes stand."""
        self.settle(self.rows[owner], nodes)

    def settle(self, row: CacheEntry, nodes: list[int]) -> None:
        if row.text:
            entries = [*range(len(row.text)), *(len(row.text) + node for node in nodes)]
            self.cache.keep(row.number, entries)
            row.held += row.text + [row.draft[node] for node in nodes]
            row.text, row.draft = [], []

    def owner(self, number: int) -> Hashable:
        """Whose text lies in a row of the cache."""
        return next(owner for owner, row in self.rows.items() if row.number == number)

    def release(self, owner: Hashable) -> None:
        """The text is finished: its row, if it had one, is free for another."""
        if owner in self.rows:
            row = self.rows.pop(owner)
            self.cache.truncate(row.number, 0)
            self.free.append(row.number)


def common_prefix(left: list[int], right: list[int]) -> int:
    """How many tokens two texts begin with alike."""
    if left == right[: len(left)]:
        return len(left)
    return next((at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
