"""Draft trees instead of chains, for any drafter that can branch.

- static: the shape is fixed beforehand. At temperature > 0 the children of a node are drawn without replacement, for
  recursive rejection (Sequoia, Chen et al. 2024; RSD, Jeon et al. 2024), or with the target's noise for the policy
  `coupled`. Otherwise they are the drafter's likeliest tokens.
- dynamic: the drafter's confidence decides where the tree grows, with a budget of nodes (EAGLE-2, Li et al. 2024).
  Each level extends the `beam` likeliest nodes of the level before that are within the budget; of all nodes the
  likeliest are kept. Children are chosen, not drawn; verification treats each as certain.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator

import torch
from torch import Tensor

from ..drafting import Brancher, Draft, Drafter, Frontier, Outcome, Stop
from ..sampling import SamplingParams, probabilities, ranked
from ..sequence import Sequence
from ..tree import Tree
from ..verify import RandomSource

Growth = Generator[Frontier, Tensor, None]
"""Grows one tree: yields its frontier, is sent the distributions [n, V] after the frontier's n nodes, and so on.

The last frontier has no nodes: its tree is complete.
"""


class TreeDrafter(Drafter):
    """Drafts trees with a drafter that can branch, level by level: one call of `expand` for a level of all trees."""

    def __init__(self, drafter: Brancher) -> None:
        self.drafter, self.taps = drafter, drafter.taps

    def propose(self, sequences: list[Sequence], widths: list[int], stop: Stop | None = None) -> Draft:
        """Draft a tree of at most widths[r] levels for sequence r. `stop` is not called: the shape ends the tree."""
        growing = [
            self.grow(sequence, min(width, self.drafter.deepest) if self.drafter.ready(sequence) else 0)
            for sequence, width in zip(sequences, widths, strict=True)
        ]
        frontiers = [next(tree) for tree in growing]
        while rows := [row for row, frontier in enumerate(frontiers) if frontier.nodes]:
            probs = self.probs([frontiers[row] for row in rows])
            for row, of_row in zip(rows, probs, strict=True):
                frontiers[row] = growing[row].send(of_row)
        trees = [frontier.tree for frontier in frontiers]
        return Draft(torch.zeros(len(trees), 0, dtype=torch.long), None, [0] * len(trees), trees)

    def grow(self, sequence: Sequence, levels: int) -> Growth:
        """Grow a tree of at most `levels` levels for one sequence."""
        raise NotImplementedError

    def probs(self, frontiers: list[Frontier]) -> list[Tensor]:
        """Compute for every frontier the drafter's distributions [n, V] after its n nodes."""
        params, prompts, outputs = list[SamplingParams](), list[list[int]](), list[list[int]]()
        for each in frontiers:
            params += [ranking(each.sequence.params)] * len(each.nodes)
            prompts += [each.sequence.prompt] * len(each.nodes)
            outputs += [each.sequence.tokens + (each.tree.line(node) if node >= 0 else []) for node in each.nodes]
        logits = torch.cat(self.drafter.expand(frontiers))
        return list(probabilities(logits, params, prompts, outputs).split([len(each.nodes) for each in frontiers]))

    def states_from(self, sequence: Sequence) -> int:
        return self.drafter.states_from(sequence)

    def observe(self, outcome: Outcome) -> None:
        self.drafter.observe(outcome)


class StaticTreeDrafter(TreeDrafter):
    """Drafts trees of one shape. `shape[i]` is the parent of node i, -1 the root: parents first, siblings by rank."""

    def __init__(self, drafter: Brancher, shape: list[int], source: RandomSource) -> None:
        super().__init__(drafter)
        self.shape, self.source = Tree([0] * len(shape), shape), source

    def grow(self, sequence: Sequence, levels: int) -> Growth:
        drawn = sequence.policy.draws_children and not sequence.params.greedy
        tokens: list[int] = []
        parents: list[int] = []
        rows: dict[int, Tensor] = {}  # node -> the distribution of its children
        frontier = {-1: -1}  # node of the shape -> node of the tree, which lacks nodes for tokens of probability 0
        for depth in range(levels):
            open_nodes = {of: node for of, node in frontier.items() if self.shape.children(of)}
            if not open_nodes:
                break
            probs = yield Frontier(sequence, Tree(tokens, parents), list(open_nodes.values()))
            frontier = {}
            for (of, node), row in zip(open_nodes.items(), probs, strict=True):
                rows[node] = row
                wanted = self.shape.children(of)
                for child, token in zip(wanted, self._children(row, len(wanted), sequence, depth, drawn), strict=False):
                    frontier[child] = len(tokens)
                    tokens.append(token)
                    parents.append(node)
        tree = Tree(tokens, parents, chosen_from=rows)
        if drawn and tokens:
            nothing = torch.zeros_like(rows[-1])
            tree = Tree(tokens, parents, torch.stack([rows.get(node, nothing) for node in range(-1, len(tokens))]))
        yield Frontier(sequence, tree, [])

    def _children(self, probs: Tensor, count: int, sequence: Sequence, depth: int, drawn: bool) -> list[int]:
        count = min(count, int((probs > 0).sum()))
        if not drawn:
            return ranked(probs[None], count)[0].tolist()
        key, position = (torch.tensor([each], device=probs.device) for each in (sequence.key, sequence.length + depth))
        return self.source.draw_several(probs[None], count, key, position, sequence.policy.draft_noise)[0].tolist()


class DynamicTreeDrafter(TreeDrafter):
    """Drafts the at most `nodes` nodes with the largest product of draft probabilities along their branch."""

    def __init__(self, drafter: Brancher, nodes: int, beam: int = 4) -> None:
        super().__init__(drafter)
        self.nodes, self.beam = nodes, beam

    def grow(self, sequence: Sequence, levels: int) -> Growth:
        tokens: list[int] = []
        parents: list[int] = []
        worth: list[float] = []  # of each node: the product of the probabilities on its branch
        best_nodes: list[int] = []
        frontier = [-1]
        rows: dict[int, Tensor] = {}  # node -> the drafter's distribution after it
        for _ in range(levels):
            probs = yield Frontier(sequence, Tree(tokens, parents), frontier)
            rows.update(zip(frontier, probs, strict=True))
            best = ranked(probs, min(self.beam, probs.shape[1]))
            first = len(tokens)
            for node, values, ids in zip(frontier, probs.gather(1, best).tolist(), best.tolist(), strict=True):
                for value, token in zip(values, ids, strict=True):
                    if value > 0:
                        tokens.append(token)
                        parents.append(node)
                        worth.append(value * (worth[node] if node >= 0 else 1.0))
            # Nodes outside the budget are dropped for good: no descendant is worth more than its parent.
            best_nodes = sorted(range(len(tokens)), key=lambda node: -worth[node])[: self.nodes]
            frontier = [node for node in best_nodes if node >= first][: self.beam]
            if not frontier:
                break
        kept = sorted(best_nodes)  # parents of kept nodes are kept
        number = {node: i for i, node in enumerate(kept)} | {-1: -1}
        chosen_from = {number[node]: row for node, row in rows.items() if node in number}
        parents = [number[parents[node]] for node in kept]
        yield Frontier(sequence, Tree([tokens[node] for node in kept], parents, chosen_from=chosen_from), [])


def ranking(params: SamplingParams) -> SamplingParams:
    """Return the parameters that rank tokens: temperature 1 instead of 0, where only one token has a probability."""
    return dataclasses.replace(params, temperature=1.0) if params.greedy else params
