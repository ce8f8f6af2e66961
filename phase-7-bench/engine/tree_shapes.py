"""The best fixed shape of a draft tree, from measured acceptance by depth and rank (Sequoia, Chen et al. 2024).

Let a[d][r] be the probability that an accepted node of depth d has its child of rank r accepted. The probability that a
node is accepted is the product of these along its branch, whatever other nodes the tree has. The expected number of
accepted tokens is the sum over all nodes. So the best tree of n nodes has the n nodes with the largest products. They
form a tree, because a node's product is at most its parent's and its earlier sibling's. Sequoia finds the same tree by
dynamic programming over subtrees; here a heap is enough.
"""

from __future__ import annotations

import heapq
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter

from common.errors import UserError
from common.files import read_checked, shown

# For drafters without measured acceptance: six levels of eight ranks, each rank a third of the one before it.
TYPICAL = [[0.65 * 3.0**-rank for rank in range(8)] for _ in range(6)]

Share = Annotated[float, Field(ge=0, le=1)]
Table = Annotated[list[Annotated[list[Share], Field(max_length=1024)]], Field(min_length=1, max_length=64)]
FILE = TypeAdapter(dict[str, Table], config=ConfigDict(strict=True))  # of tree_acceptance.json: by drafter


def measured_acceptance(folder: Path, drafter: str) -> list[list[float]]:
    """Read a[d][r] of a drafter, as `bench.py --calibrate` wrote it into the checkpoint's folder; TYPICAL without it.

    UserError names the file and the value that is not a share.
    """
    file = folder / "tree_acceptance.json"
    table = (read_checked(file, FILE) if file.is_file() else {}).get(drafter, TYPICAL)
    if not any(table[0]):
        raise UserError(f"{file}: {drafter}.0 should hold a share above 0, got {shown(table[0])}: no tree would grow")
    return table


def best_shape(acceptance: list[list[float]], nodes: int) -> list[int]:
    """Return the parents of the best tree with at most this many nodes, level by level, siblings by rank.

    The lengths of `acceptance[d][r]` limit the tree's depth and breadth. A rank with less acceptance than a later one
    is treated as equal to it, so that children keep the drafter's order.
    """
    falling = [[max(row[r:]) for r in range(len(row))] for row in acceptance]
    kept: list[tuple[int, ...]] = []  # a node is written as the ranks on its branch
    waiting: list[tuple[float, tuple[int, ...]]] = [(-falling[0][0], (0,))] if falling and falling[0] else []
    while waiting and len(kept) < nodes:
        value, ranks = heapq.heappop(waiting)
        if value == 0:
            break
        kept.append(ranks)
        depth = len(ranks)
        if ranks[-1] + 1 < len(falling[depth - 1]):
            sibling = (*ranks[:-1], ranks[-1] + 1)
            heapq.heappush(waiting, (value / falling[depth - 1][ranks[-1]] * falling[depth - 1][sibling[-1]], sibling))
        if depth < len(falling) and falling[depth]:
            heapq.heappush(waiting, (value * falling[depth][0], (*ranks, 0)))
    kept.sort(key=lambda ranks: (len(ranks), ranks))
    number = {ranks: i for i, ranks in enumerate(kept)}
    return [number.get(ranks[:-1], -1) for ranks in kept]
