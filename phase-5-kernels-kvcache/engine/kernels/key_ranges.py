"""The keys that each query sees, as ranges of logical positions: the order in which attention kernels visit them.

A mask [W, n] says which columns (tokens of the row, in memory order) a query sees. In a chain a query sees one range of
positions. In a tree it sees a range, then its own ancestors, which are scattered in memory. These are listed, so that a
kernel visits the j-th key of a path at the position that it would have without the other branches. The blocks over
which a kernel sums begin at fixed positions, so a token's sums are the same in a tree and in a chain.

Masks are on the device, and reading one makes the host wait for all work submitted before. The masks of chains are
slices of one table, so the address of such a mask tells its content, and verifying a chain waits for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from common.errors import UserError

from .metadata import AttentionMetadata

FEW = 64  # most tokens of a step, those of a large tree


def in_order(T: int, before: int, like: Tensor) -> Tensor:
    """Return the mask [T, before + T] of T new tokens, each of which sees all earlier ones: a slice of a table."""
    columns = max(256, 1 << before.bit_length())
    return staircase(columns, like.dtype, like.device)[:T, columns - before : columns + T]


@lru_cache(maxsize=8)
def staircase(columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return [FEW, columns + FEW]: zeros, then -inf for later tokens."""
    later = torch.full((FEW, FEW), float("-inf"), dtype=dtype, device=device).triu(1)
    return torch.cat((later.new_zeros(FEW, columns), later), 1)


def is_in_order(mask: Tensor, before: int) -> bool:
    """Return True if a mask is that slice of the table, or its first columns. Does not read the mask."""
    table = in_order(1, before, mask)
    return mask.data_ptr() == table.data_ptr() and mask.stride() == table.stride()


@dataclass(frozen=True)
class KeyRanges:
    """For R rows of W queries: query w of row r sees the positions lo .. end - 1, int32 [R, W] each.

    With `lines` (int32 [R, W, L]), a position p >= base[r] means the token at position lines[r, w, p - base[r]].
    """

    lo: Tensor
    end: Tensor
    furthest: int  # no query sees a position from here on
    base: Tensor | None = None  # int32 [R]
    lines: Tensor | None = None

    def of_row(self, r: int) -> KeyRanges:
        """Return the ranges of one row."""
        base, lines = (None if each is None else each[r : r + 1] for each in (self.base, self.lines))
        return KeyRanges(self.lo[r : r + 1], self.end[r : r + 1], self.furthest, base, lines)


def key_ranges(op: str, metadata: AttentionMetadata, masks: list[Tensor | None], W: int) -> KeyRanges:
    """Return the ranges of masks[r], [W, n] or None for all keys. They are computed once for the layers of one window.

    UserError, naming the op, for masks of a wrong number or shape.
    """
    key = W, id(masks)
    if key not in metadata.ranges:  # the masks are stored too, so that no other list takes their id
        metadata.ranges[key] = masks, _make(op, metadata, masks, W)
    return metadata.ranges[key][1]


def _make(op: str, metadata: AttentionMetadata, masks: list[Tensor | None], W: int) -> KeyRanges:
    if len(masks) != len(metadata.row_list):
        raise UserError(f"{op}: {len(masks)} masks; expected {len(metadata.row_list)}, one per row")
    lo, end, trees = list[list[int]](), list[list[int]](), dict[int, Tensor]()
    for row, (mask, first, stop) in enumerate(zip(masks, metadata.first, metadata.ends, strict=True)):
        length, begins, ends = metadata.lengths[row], [first] * W, [stop] * W
        if mask is not None:
            if mask.shape != (W, stop - first):
                wanted = [W, stop - first]
                raise UserError(f"{op}: the mask of row {row} has shape {list(mask.shape)}; expected {wanted}")
            if is_in_order(mask, length - first):
                ends = [min(length + w + 1, stop) for w in range(W)]
            else:
                visible = mask == 0
                each = list(zip(*_extent(visible), strict=True))
                begins = [first + begin for begin, _, _ in each]
                ends = [first + begin + number for begin, _, number in each]
                if any(begin + number != last for begin, last, number in each):  # a query does not see all between
                    trees[row] = visible
        lo.append(begins)
        end.append(ends)
    device, furthest = metadata.rows.device, max((max(each, default=0) for each in end), default=0)
    table = torch.tensor([lo, end], dtype=torch.int32, device=device).view(2, len(masks), W)
    paths = _lines(metadata, trees, lo, end, W) if trees else (None, None)
    return KeyRanges(table[0], table[1], furthest, *paths)


def _extent(visible: Tensor) -> list[list[int]]:
    """Return for each query of bool [W, n] its first column, the column after its last, and how many it sees.

    The host waits for the result.
    """
    columns = torch.arange(1, visible.shape[1] + 1, device=visible.device)
    last = (visible * columns).amax(1)  # 0 for a query that sees nothing
    count = visible.sum(1)
    begin = torch.where(count > 0, visible.int().argmax(1), last)
    found: list[list[int]] = torch.stack((begin, last, count)).tolist()
    return found


def _lines(
    metadata: AttentionMetadata, trees: dict[int, Tensor], lo: list[list[int]], end: list[list[int]], W: int
) -> tuple[Tensor, Tensor]:
    """Return base and lines. The base of a row without a tree is past all that the row sees."""
    base, listed = [max(of_row, default=0) for of_row in end], dict[tuple[int, int], list[int]]()
    for row, visible in trees.items():
        first, queries = metadata.first[row], visible.tolist()
        base[row] = first + min(_first_gap(query, lo[row][w] - first) for w, query in enumerate(queries))
        for w, query in enumerate(queries):
            seen = [first + column for column, sees in enumerate(query) if sees]
            listed[row, w] = [0] * max(0, lo[row][w] - base[row]) + [p for p in seen if p >= base[row]]
    longest = max(map(len, listed.values()))
    lines = [[listed.get((row, w), []) for w in range(W)] for row in range(len(base))]
    padded = [[line + [0] * (longest - len(line)) for line in of_row] for of_row in lines]
    device = metadata.rows.device
    return torch.tensor(base, dtype=torch.int32, device=device), torch.tensor(padded, dtype=torch.int32, device=device)


def _first_gap(visible: list[bool], begin: int) -> int:
    """Return the first column from `begin` on that is not visible."""
    return next((at for at in range(begin, len(visible)) if not visible[at]), len(visible))
