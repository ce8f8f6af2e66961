"""What each query sees, in the form in which the attention kernels walk the keys: by logical position.

A mask [W, n] says which columns (tokens of the row, in the order of memory) a query may look at. Along a chain a query
sees a range of positions. In a tree it sees a range, and behind that its own ancestors, which lie apart in memory; they
are listed, so that the j-th key of its line is met at the position that it would have without the other branches. The
blocks in which keys are added up begin at fixed positions: so a token's sums are the same, in a tree and out of it.

Masks lie on the device, and reading one makes the host wait for all that was asked of it before. The masks of a chain
are parts of one table, so where such a mask lies says what is in it: a step that verifies a chain waits for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from common.errors import UserError

from .metadata import AttentionMetadata

FEW = 64  # tokens of a step, at most: those of a large tree


def in_order(T: int, before: int, like: Tensor) -> Tensor:
    """The mask [T, before + T] of a few tokens that see all before them, and each other in order: part of a table."""
    columns = max(256, 1 << before.bit_length())
    return staircase(columns, like.dtype, like.device)[:T, columns - before : columns + T]


@lru_cache(maxsize=8)
def staircase(columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[FEW, columns + FEW]: zeros, then -inf for later tokens."""
    later = torch.full((FEW, FEW), float("-inf"), dtype=dtype, device=device).triu(1)
    return torch.cat((later.new_zeros(FEW, columns), later), 1)


def is_in_order(mask: Tensor, before: int) -> bool:
    """Whether a mask is that part of the table, or its first columns. Nothing of it is read."""
    table = in_order(1, before, mask)
    return mask.data_ptr() == table.data_ptr() and mask.stride() == table.stride()


@dataclass(frozen=True)
class KeyRanges:
    """For R rows of W queries: query w of row r sees the positions lo .. end - 1, int32 [R, W] each.

    With `lines` (int32 [R, W, L]) those from base[r] on stand for the positions lines[r, w, position - base[r]].
    """

    lo: Tensor
    end: Tensor
    furthest: int  # no query sees a position from here on
    base: Tensor | None = None  # int32 [R]
    lines: Tensor | None = None


def key_ranges(op: str, places: AttentionMetadata, masks: list[Tensor | None], W: int) -> KeyRanges:
    """Computed once per mask: layers of one window share a mask, and layers of different windows have their own."""
    known = places.sights.get((W, id(masks)))
    if known is None:  # the masks are kept with it: no other list takes their id
        known = places.sights[W, id(masks)] = masks, _make(op, places, masks, W)
    found = known[1]
    assert isinstance(found, KeyRanges)
    return found


def _make(op: str, places: AttentionMetadata, masks: list[Tensor | None], W: int) -> KeyRanges:
    if len(masks) != len(places.rows_asked):
        raise UserError(f"{op}: {len(masks)} masks; expected {len(places.rows_asked)}, one per row")
    lo, end, trees = [], [], dict[int, Tensor]()
    each = zip(masks, places.first, places.lengths, places.ends, strict=True)
    for row, (mask, first, held, stop) in enumerate(each):
        if mask is None:
            lo.append([first] * W)
            end.append([stop] * W)
            continue
        wanted = (W, stop - first)
        if mask.shape != wanted:
            raise UserError(f"{op}: the mask of row {row} has shape {list(mask.shape)}; expected {list(wanted)}")
        if is_in_order(mask, held - first):
            lo.append([first] * W)
            end.append([min(held + w + 1, stop) for w in range(W)])
            continue
        open_ = mask == 0
        begins, lasts, numbers = _extent(open_)
        if any(stop - start != number for start, stop, number in zip(begins, lasts, numbers, strict=True)):
            trees[row] = open_
        lo.append([first + start for start in begins])
        end.append([first + start + number for start, number in zip(begins, numbers, strict=True)])
    device = places.rows.device
    furthest = max((max(of_row, default=0) for of_row in end), default=0)
    table = torch.tensor([lo, end], dtype=torch.int32, device=device).view(2, len(masks), W)
    if not trees:
        return KeyRanges(table[0], table[1], furthest)
    return KeyRanges(table[0], table[1], furthest, *_lines(places, trees, lo, end, W))


def _extent(open_: Tensor) -> list[list[int]]:
    """Of what each query sees (bool [W, n]): the first column, the one behind the last, how many. The host waits."""
    columns = torch.arange(1, open_.shape[1] + 1, device=open_.device)
    last = (open_ * columns).amax(1)  # 0 where none is seen
    count = open_.sum(1)
    begin = torch.where(count > 0, open_.int().argmax(1), last)
    found: list[list[int]] = torch.stack((begin, last, count)).tolist()
    return found


def _lines(
    places: AttentionMetadata, trees: dict[int, Tensor], lo: list[list[int]], end: list[list[int]], W: int
) -> tuple[Tensor, Tensor]:
    """base and lines; rows without a tree list nothing, for their base is behind all they see."""
    base, listed = [max(of_row, default=0) for of_row in end], dict[tuple[int, int], list[int]]()
    for row, open_ in trees.items():
        first = places.first[row]
        holes = [_first_hole(of_query, lo[row][w] - first) for w, of_query in enumerate(open_.tolist())]
        base[row] = first + min(holes)
        for w, of_query in enumerate(open_.tolist()):
            seen = [first + column for column, visible in enumerate(of_query) if visible]
            listed[row, w] = [0] * max(0, lo[row][w] - base[row]) + [p for p in seen if p >= base[row]]
    longest = max(len(line) for line in listed.values())
    lines = [[listed.get((row, w), []) for w in range(W)] for row in range(len(base))]
    padded = [[line + [0] * (longest - len(line)) for line in of_row] for of_row in lines]
    device = places.rows.device
    return torch.tensor(base, dtype=torch.int32, device=device), torch.tensor(padded, dtype=torch.int32, device=device)


def _first_hole(visible: list[bool], begin: int) -> int:
    """The first column from `begin` on that is not seen."""
    return next((at for at in range(begin, len(visible)) if not visible[at]), len(visible))


def ranges_of_row(sight: KeyRanges, r: int) -> KeyRanges:
    """Of one row alone."""
    base = None if sight.base is None else sight.base[r : r + 1]
    lines = None if sight.lines is None else sight.lines[r : r + 1]
    return KeyRanges(sight.lo[r : r + 1], sight.end[r : r + 1], sight.furthest, base, lines)
