"""A tree of draft tokens: several continuations of one sequence, verified by one target forward.

A chain is a tree in which every node has at most one child. Parents are numbered before their children, and the
children of a node in the order in which they were drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tree:
    """Holds N draft tokens: tokens[i] follows tokens[parents[i]]; parent -1 is the root, the end of the sequence.

    `probs` [N+1, V] are the distributions from which children were drawn without replacement: row 0 for the children of
    the root, row 1 + i for those of node i. None if the children were chosen, not drawn; `chosen_from[node]` [V] is
    then the draft distribution in which the children of a node (root: -1) are the likeliest.
    """

    tokens: list[int]
    parents: list[int]
    probs: Tensor | None = None
    chosen_from: Mapping[int, Tensor] = field(default_factory=dict, compare=False)

    @staticmethod
    def chain(tokens: list[int]) -> Tree:
        return Tree(tokens, list(range(-1, len(tokens) - 1)))

    @cached_property
    def is_chain(self) -> bool:
        return self.parents == list(range(-1, len(self.parents) - 1))

    @cached_property
    def depths(self) -> list[int]:
        """Return the depth of every node; 1 for a child of the root."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return depths

    @property
    def depth(self) -> int:
        return max(self.depths, default=0)

    def children(self, node: int) -> list[int]:
        """List the children of a node (root: -1), in the order in which they were drawn."""
        return [child for child, parent in enumerate(self.parents) if parent == node]

    def line(self, node: int) -> list[int]:
        """List the tokens on the branch from the root to this node, its own included."""
        above = self.line(self.parents[node]) if self.parents[node] >= 0 else []
        return [*above, self.tokens[node]]

    def branches(self, nodes: list[int]) -> tuple[Tree, list[int]]:
        """Return the tree of these nodes and their ancestors, and the nodes' numbers in it (the root stays -1)."""
        wanted: set[int] = set()
        for node in nodes:
            while node >= 0 and node not in wanted:
                wanted.add(node)
                node = self.parents[node]
        kept = sorted(wanted)
        number = {node: at for at, node in enumerate(kept)} | {-1: -1}
        tree = Tree([self.tokens[node] for node in kept], [number[self.parents[node]] for node in kept])
        return tree, [number[node] for node in nodes]

    def ancestors(self) -> Tensor:
        """Return bool [N, N]: True if the row's node is the column's node or descends from it."""
        related = torch.eye(len(self.parents), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                related[node] |= related[parent]
        return related
