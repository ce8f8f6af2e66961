"""`--kv paged`: memory in pages of 16 tokens that rows take as they grow (Kwon et al. 2023, PagedAttention).

A row is a list of page numbers. Rows with the same beginning share its pages; the first to write into a shared page
copies it (copy-on-write), so a prompt's samples hold the prompt once. Pages come from a free list and return to it.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from common.errors import UserError

from .protocol import CacheShape
from .static import check_truncation
from .storage import Storage

PAGE = 16


class OutOfBlocks(UserError):
    """This row cannot grow; all rows are as they were."""

    def __init__(self, message: str, row: int) -> None:
        super().__init__(message)
        self.row = row
        self.owner: Hashable = None  # whose text it is; a runner knows


class PagedCache:
    """Per layer two tensors [pages, kv_heads, 16, head_dim], and for every row the pages of its tokens in order."""

    def __init__(
        self,
        shape: CacheShape,
        rows: int,
        pages: int,
        dtype: torch.dtype,
        computed: torch.dtype,
        device: torch.device,
    ) -> None:
        self.shape, self.device = shape, device
        size = (pages, shape.kv_heads, PAGE, shape.head_dim)
        self.keys = [Storage(size, dtype, computed, device) for _ in range(shape.layers)]
        self.values = [Storage(size, dtype, computed, device) for _ in range(shape.layers)]
        self.lengths = [0] * rows
        self.tables: list[list[int]] = [[] for _ in range(rows)]
        self.users = [0] * pages  # rows that hold the page
        self.free = list(range(pages))[::-1]

    def length(self, row: int) -> int:
        return self.lengths[row]

    def first(self, row: int) -> int:
        return 0

    def shortest(self, row: int) -> int:
        return 0

    def make_room(self, row: int, tokens: int) -> None:
        """Take the pages that are lacking, and copy what others share of those that will be written."""
        table, start = self.tables[row], self.lengths[row]
        wanted = -(-(start + tokens) // PAGE)
        shared = [at for at in range(start // PAGE, min(len(table), wanted)) if self.users[table[at]] > 1]
        lacking = max(0, wanted - len(table)) + len(shared)
        if lacking > len(self.free):
            raise OutOfBlocks(
                f"out of pages: {lacking} of {PAGE} tokens are needed and {len(self.free)} of {len(self.users)} are "
                "free; give more --kv-pages, fewer prompts at a time, or a smaller --n or --max-tokens",
                row,
            )
        for at in shared:
            mine = self._take()
            for storage in (*self.keys, *self.values):
                storage.move(table[at], mine)
            self.users[table[at]] -= 1
            table[at] = mine
        while len(table) < wanted:
            table.append(self._take())

    def _take(self) -> int:
        page = self.free.pop()
        self.users[page] = 1
        return page

    def _places(self, row: int, positions: list[int]) -> tuple[Tensor, slice, Tensor]:
        pairs = [(self.tables[row][position // PAGE], position % PAGE) for position in positions]
        places = torch.tensor(pairs, dtype=torch.long, device=self.device).view(-1, 2)
        return places[:, 0], slice(None), places[:, 1]

    def append(self, layer: int, row: int, keys: Tensor, values: Tensor) -> None:
        place = self._places(row, list(range(self.lengths[row], self.lengths[row] + len(keys))))
        self.keys[layer].write(place, keys)
        self.values[layer].write(place, values)

    def read(self, layer: int, row: int, new: int) -> tuple[Tensor, Tensor]:
        length = self.lengths[row] + new
        pages = torch.tensor(self.tables[row][: -(-length // PAGE)], dtype=torch.long, device=self.device)
        both = [storage[layer].read(pages).transpose(0, 1).flatten(1, 2) for storage in (self.keys, self.values)]
        return both[0][:, :length], both[1][:, :length]

    def keep(self, row: int, entries: list[int]) -> None:
        start = self.lengths[row]
        if entries != list(range(len(entries))):
            source = self._places(row, [start + entry for entry in entries])
            target = self._places(row, list(range(start, start + len(entries))))
            for storage in (*self.keys, *self.values):
                storage.move(source, target)
        self.lengths[row] += len(entries)
        self._release(row)

    def truncate(self, row: int, length: int) -> None:
        check_truncation(length, self.lengths[row])
        self.lengths[row] = length
        self._release(row)

    def _release(self, row: int) -> None:
        """Give back the pages behind the row's length."""
        table = self.tables[row]
        while len(table) > -(-self.lengths[row] // PAGE):
            page = table.pop()
            self.users[page] -= 1
            if not self.users[page]:
                self.free.append(page)

    def fork(self, row: int, into: int) -> None:
        self.truncate(into, 0)
        self.tables[into] = list(self.tables[row][: -(-self.lengths[row] // PAGE)])
        for page in self.tables[into]:
            self.users[page] += 1
        self.lengths[into] = self.lengths[row]

    def nbytes(self) -> int:
        return sum(storage.nbytes for storage in (*self.keys, *self.values))
