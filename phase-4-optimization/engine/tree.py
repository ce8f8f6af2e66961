"""A tree of guesses: several continuations of one text, checked by one target forward.

A chain is the tree in which every node has one child. Nodes are numbered so that parents come before their children;
among the children of one node, the first drawn comes first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tree:
    """tokens[i] follows tokens[parents[i]], or the text itself where parents[i] is -1.

    `probs` [N+1, V] are the distributions that the children were drawn from without replacement: row 0 for the children
    of the text, row 1 + i for those of node i. None where the children were chosen, not drawn; `chosen_from[node]` [V]
    is then the drafter's distribution in which the children of a node (of the text: -1) are the likeliest.
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
        """Of every node: 1 for a child of the text."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return depths

    @property
    def depth(self) -> int:
        return max(self.depths, default=0)

    def children(self, node: int) -> list[int]:
        """The children of a node (of the text: -1), in the order in which they were drawn."""
        return [child for child, parent in enumerate(self.parents) if parent == node]

    def line(self, node: int) -> list[int]:
        """The tokens from the text down to this node, its own included."""
        above = self.line(self.parents[node]) if self.parents[node] >= 0 else []
        return [*above, self.tokens[node]]

    def branches(self, nodes: list[int]) -> tuple[Tree, list[int]]:
        """The tree of these nodes and their ancestors alone, and the nodes' numbers in it (the text stays -1)."""
        wanted: set[int] = set()
        for node in nodes:
            while node >= 0 and node not in wanted:
                wanted.add(node)
                node = self.parents[node]
        kept = sorted(wanted)
        place = {node: at for at, node in enumerate(kept)} | {-1: -1}
        tree = Tree([self.tokens[node] for node in kept], [place[self.parents[node]] for node in kept])
        return tree, [place[node] for node in nodes]

    def ancestors(self) -> Tensor:
        """bool [N, N]: whether node (row) descends from, or is, node (column)."""
        related = torch.eye(len(self.parents), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                related[node] |= related[parent]
        return related
