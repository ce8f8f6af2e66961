"""The keys that each query sees, as ranges of logical positions: the order in which attention kernels visit them.

In a chain a query sees one range of positions. In a tree it sees a range, then its own ancestors, which are scattered
in memory. These are listed, so that a kernel visits the j-th key of a path at the position that it would have without
the other branches. The blocks over which a kernel sums begin at fixed positions, so a token's sums are the same in a
tree and in a chain. Ranges and lines follow from the draft's parents, on the host: no mask is read from the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from ..transfers import Staged, Upload

FEW = 64  # most tokens of a step, those of a large tree
Paths = tuple[int, list[list[int]]]
"""Of a row with a tree: a position, and for every query the tokens on its path, as distances from that position.

The first token of a path is at that position, logically; before it the query sees everything.
"""


def paths_of(start: int, parents: list[int]) -> Paths | None:
    """Return the paths of new tokens from position `start` on; parents[i] is the one that token i follows.

    -1: it follows the cache's last entry. None for a chain.
    """
    lines = list[list[int]]()
    for at, parent in enumerate(parents):
        lines.append([*(lines[parent] if parent >= 0 else []), at])
    return None if parents == list(range(-1, len(parents) - 1)) else (start, lines)


@dataclass
class KeyRanges:
    """For R rows of W queries: query w of row r sees the positions lo .. end - 1, int32 [R, W] each.

    With `lines` (int32 [R, W, L]), a position p >= base[r] (int32 [R]) means the token at lines[r, w, p - base[r]].
    """

    lo: Staged
    end: Staged
    base: Staged | None = None
    lines: Staged | None = None
    simple: list[bool] = field(default_factory=list)  # rows in which every query sees all tokens before it
    masks: list[Tensor | None] | None = None  # of reference.py

    def of_row(self, r: int) -> KeyRanges:
        """Return the ranges of one row."""
        base, lines = (each if each is None else Staged(each.tensor[r : r + 1]) for each in (self.base, self.lines))
        return KeyRanges(Staged(self.lo.tensor[r : r + 1]), Staged(self.end.tensor[r : r + 1]), base, lines)

    def only(self, wanted: Tensor) -> KeyRanges:
        """Return the ranges of the queries wanted [R, W], of chains."""
        assert self.lines is None
        lo, end = (Staged(each.tensor.gather(1, wanted.long())) for each in (self.lo, self.end))
        return KeyRanges(lo, end, simple=[False] * len(wanted))


def key_ranges(
    upload: Upload,
    starts: list[int],
    counts: list[int],
    W: int,
    window: int | None,
    first: list[int],
    paths: list[Paths | None],
) -> KeyRanges:
    """Stage the ranges of R rows of W queries; row r appends counts[r] tokens at position starts[r].

    Queries past a row's count are padding and see what its last one sees. paths[r]: of a tree; None for a chain.
    first[r]: the earliest position that the row still holds.
    """
    lo, end, simple = list[int](), list[int](), list[bool]()
    for start, count, earliest, path in zip(starts, counts, first, paths, strict=True):
        if path is None:
            ends = [*range(start + 1, start + count + 1), *[start + count] * (W - count)]
        else:
            ends = [path[0] + len(line) for line in path[1]]
            ends += ends[-1:] * (W - count)
        begins = [earliest] * W if window is None else [max(earliest, stop - window) for stop in ends]
        simple.append(path is None and begins[-1] == earliest)
        lo += begins
        end += ends
    R = len(starts)
    staged = upload.put(lo, R, W), upload.put(end, R, W)
    if not any(paths):
        return KeyRanges(*staged, simple=simple)
    furthest, lines, base = max(end), list[list[int]](), list[int]()
    for path in paths:
        base.append(furthest if path is None else path[0])  # past all that a row without a tree sees
        of_row = [] if path is None else [[path[0] + at for at in line] for line in path[1]]
        lines += of_row + (of_row[-1:] or [[]]) * (W - len(of_row))
    longest = max(map(len, lines))
    return KeyRanges(*staged, upload.put(base, R), upload.put_rows(lines, longest, R, W), simple)


def masks_of(ranges: KeyRanges, starts: list[int], counts: list[int], first: list[int], like: Tensor) -> None:
    """Set ranges.masks: for every row [W, n], 0 for a visible key and -inf for a hidden one; None if all are visible.

    Columns are the row's n tokens in memory order, from position first[r] on. For plain torch.
    """
    ranges.masks = []
    for r, (start, count, earliest) in enumerate(zip(starts, counts, first, strict=True)):
        W, n = ranges.lo.tensor.shape[1], start + count - earliest
        if ranges.simple[r] and W <= FEW:
            ranges.masks.append(None if W == 1 else in_order(W, start - earliest, like)[:, :n])
            continue
        p = torch.arange(earliest, earliest + n, device=like.device)
        lo, end = ranges.lo.tensor[r, :, None], ranges.end.tensor[r, :, None]
        visible = (p >= lo) & (p < end)
        if ranges.lines is not None and ranges.base is not None:
            base, lines = ranges.base.tensor[r], ranges.lines.tensor[r]
            logical = base + torch.arange(lines.shape[1], device=like.device)
            listed = (logical >= lo) & (logical < end)
            at = torch.where(listed, lines - earliest, n)  # what is not listed goes to a spare column
            tree = visible.new_zeros(W, n + 1).scatter_(1, at.long(), True)[:, :n]
            visible = (visible & (p < base)) | tree
        ranges.masks.append(torch.zeros_like(visible, dtype=like.dtype).masked_fill_(~visible, float("-inf")))


def in_order(T: int, before: int, like: Tensor) -> Tensor:
    """Return the mask [T, before + T] of T new tokens, each of which sees all earlier ones: a slice of a table."""
    columns = max(256, 1 << before.bit_length())
    return staircase(columns, like.dtype, like.device)[:T, columns - before : columns + T]


@lru_cache(maxsize=8)
def staircase(columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return [FEW, columns + FEW]: zeros, then -inf for later tokens."""
    later = torch.full((FEW, FEW), float("-inf"), dtype=dtype, device=device).triu(1)
    return torch.cat((later.new_zeros(FEW, columns), later), 1)
