"""`--kv paged`: memory in pages of 16 tokens, allocated as rows grow (Kwon et al. 2023, PagedAttention).

The block table of a row lists its page numbers. Rows with a common prefix share its pages. A write to a shared page
copies the page first (copy-on-write), so all samples of a prompt store it once. block_manager.py counts the users of
each page, and finds the pages of a known prefix.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError

from .block_manager import BlockManager
from .protocol import CacheShape
from .static import InPlaceCache

PAGE = 16


class OutOfBlocks(UserError):
    """A row cannot grow because no page is free; no row was changed."""

    def __init__(self, message: str, row: int) -> None:
        super().__init__(message)
        self.row = row
        self.owner: Hashable = None  # of the row; set by the runner


class PagedCache(InPlaceCache):
    """Per layer two tensors [pages, kv_heads, 16, head_dim], and a block table for every row."""

    def __init__(
        self,
        shape: CacheShape,
        rows: int,
        pages: int,
        dtype: torch.dtype,
        computed: torch.dtype,
        device: torch.device,
        width: int | None = None,
    ) -> None:
        """width: the most pages of a row, by default all."""
        super().__init__(shape, rows, (pages, shape.kv_heads, PAGE, shape.head_dim), dtype, computed, device)
        self.width = pages if width is None else min(width, pages)
        self.tables: list[list[int]] = [[] for _ in range(rows)]
        self.blocks = BlockManager(pages)

    def make_room(self, row: int, tokens: int) -> None:
        """Allocate missing pages, and copy shared pages that will be written. OutOfBlocks if too few are free."""
        table, blocks, length = self.tables[row], self.blocks, self.lengths[row] + tokens
        written, wanted = self.written(row, length), self.pages(length)
        shared = [at for at in written if blocks.users[table[at]] > 1]
        lacking = max(0, wanted - len(table)) + len(shared)
        if lacking > blocks.free:
            raise OutOfBlocks(
                f"out of pages: {lacking} of {PAGE} tokens are needed and {blocks.free} of {len(blocks.users)} are "
                "free; give more --kv-pages, fewer prompts at a time, or a smaller --n or --max-tokens",
                row,
            )
        for at in shared:
            mine = blocks.take()
            for storage in self.stores:
                storage.move(table[at], mine)
            blocks.release(table[at])
            table[at] = mine
        for at in written:
            blocks.forget(table[at])
        while len(table) < wanted:
            table.append(blocks.take())

    def written(self, row: int, length: int) -> range:
        """Return which pages of the row's table are written to when it grows to this length."""
        return range(self.lengths[row] // PAGE, min(len(self.tables[row]), self.pages(length)))

    @staticmethod
    def pages(tokens: int) -> int:
        """Return how many pages so many tokens fill."""
        return -(-tokens // PAGE)

    def forget_all(self) -> None:
        """Forget which prefixes the pages hold; rows keep theirs."""
        for page in range(len(self.blocks.users)):
            self.blocks.forget(page)
        self.blocks.empty += self.blocks.cached
        self.blocks.cached.clear()

    def adopt(self, row: int, pages: list[int]) -> None:
        """Begin an empty row with full pages that hold its first tokens."""
        for page in pages:
            self.blocks.share(page)
        self.tables[row], self.lengths[row] = list(pages), len(pages) * PAGE

    def place(self, row: int, positions: Tensor) -> tuple[Tensor, slice, Tensor]:
        table = torch.tensor(self.tables[row], dtype=torch.long, device=self.device)
        return table[positions // PAGE], slice(None), positions % PAGE

    def append(self, layer: int, row: int, keys: Tensor, values: Tensor) -> None:
        at, slot = divmod(self.lengths[row], PAGE)
        if 0 < len(keys) <= PAGE - slot:  # within a page, a slice needs no index on the device
            place: Any = self.tables[row][at], slice(None), slice(slot, slot + len(keys))
            keys, values = keys.transpose(0, 1), values.transpose(0, 1)
        else:
            place = self.places(row, self.lengths[row], self.lengths[row] + len(keys))
        self.keys[layer].write(place, keys)
        self.values[layer].write(place, values)

    def read(self, layer: int, row: int, new: int) -> tuple[Tensor, Tensor]:
        length = self.lengths[row] + new
        pages = torch.tensor(self.tables[row][: -(-length // PAGE)], dtype=torch.long, device=self.device)
        both = [storage[layer].read(pages).transpose(0, 1).flatten(1, 2) for storage in (self.keys, self.values)]
        return both[0][:, :length], both[1][:, :length]

    def keep(self, row: int, entries: list[int]) -> None:
        super().keep(row, entries)
        self._release(row)

    def truncate(self, row: int, length: int) -> None:
        super().truncate(row, length)
        self._release(row)

    def _release(self, row: int) -> None:
        """Free the pages after the row's length."""
        table = self.tables[row]
        while len(table) > self.pages(self.lengths[row]):
            self.blocks.release(table.pop())

    def fork(self, row: int, into: int) -> None:
        self.truncate(into, 0)
        self.tables[into] = self.tables[row][: self.pages(self.lengths[row])]
        for page in self.tables[into]:
            self.blocks.share(page)
        self.lengths[into] = self.lengths[row]
