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

import torch
from torch import Tensor

from common.philox import Purpose

from ..drafting import Brancher, Draft, Drafter, Outcome, Stop
from ..policies import AcceptancePolicy
from ..sampling import SamplingParams, probabilities, ranked
from ..sequence import Sequence
from ..tree import Tree
from ..verify import RandomSource


class TreeDrafter(Drafter):
    """Drafts trees with a drafter that can branch, one sequence after the other."""

    def __init__(self, drafter: Brancher) -> None:
        self.drafter, self.taps = drafter, drafter.taps

    def use(self, policy: AcceptancePolicy, source: RandomSource) -> None:
        super().use(policy, source)
        self.drafter.use(policy, source)

    def propose(self, sequences: list[Sequence], widths: list[int], stop: Stop | None = None) -> Draft:
        """Draft a tree of at most widths[r] levels for sequence r. `stop` is not called: the shape ends the tree."""
        trees = [
            self.grow(sequence, min(width, self.drafter.deepest))
            if width and self.drafter.ready(sequence)
            else Tree([], [])
            for sequence, width in zip(sequences, widths, strict=True)
        ]
        return Draft(torch.zeros(len(trees), 0, dtype=torch.long), None, [0] * len(trees), trees)

    def grow(self, sequence: Sequence, levels: int) -> Tree:
        raise NotImplementedError

    def probs(self, sequence: Sequence, tree: Tree, nodes: list[int], params: SamplingParams) -> Tensor:
        """Compute the drafter's distributions [n, V] after these nodes."""
        outputs = [sequence.tokens + (tree.line(node) if node >= 0 else []) for node in nodes]
        logits = self.drafter.expand(sequence, tree, nodes)
        return probabilities(logits, [params] * len(nodes), [sequence.prompt] * len(nodes), outputs)

    def states_from(self, sequence: Sequence) -> int:
        return self.drafter.states_from(sequence)

    def observe(self, outcome: Outcome) -> None:
        self.drafter.observe(outcome)


class StaticTreeDrafter(TreeDrafter):
    """Drafts trees of one shape. `shape[i]` is the parent of node i, -1 the root: parents first, siblings by rank."""

    def __init__(self, drafter: Brancher, shape: list[int], source: RandomSource, noise: Purpose, drawn: bool) -> None:
        super().__init__(drafter)
        self.shape, self.source, self.noise = Tree([0] * len(shape), shape), source, noise
        self.drawn = drawn

    def use(self, policy: AcceptancePolicy, source: RandomSource) -> None:
        super().use(policy, source)
        self.drawn = policy.draws_children

    def grow(self, sequence: Sequence, levels: int) -> Tree:
        drawn = self.drawn and not sequence.params.greedy
        params = sequence.params if drawn else ranking(sequence.params)
        tokens: list[int] = []
        parents: list[int] = []
        rows: dict[int, Tensor] = {}  # node -> the distribution of its children
        frontier = {-1: -1}  # node of the shape -> node of the tree, which lacks nodes for tokens of probability 0
        for depth in range(levels):
            open_nodes = {of: node for of, node in frontier.items() if self.shape.children(of)}
            if not open_nodes:
                break
            probs = self.probs(sequence, Tree(tokens, parents), list(open_nodes.values()), params)
            frontier = {}
            for (of, node), row in zip(open_nodes.items(), probs, strict=True):
                rows[node] = row
                wanted = self.shape.children(of)
                for child, token in zip(wanted, self._children(row, len(wanted), sequence, depth, drawn), strict=False):
                    frontier[child] = len(tokens)
                    tokens.append(token)
                    parents.append(node)
        if not drawn:
            return Tree(tokens, parents, chosen_from=rows)
        nothing = torch.zeros_like(rows[-1])
        return Tree(tokens, parents, torch.stack([rows.get(node, nothing) for node in range(-1, len(tokens))]))

    def _children(self, probs: Tensor, count: int, sequence: Sequence, depth: int, drawn: bool) -> list[int]:
        count = min(count, int((probs > 0).sum()))
        if not drawn:
            return ranked(probs[None], count)[0].tolist()
        key, position = (torch.tensor([each], device=probs.device) for each in (sequence.key, sequence.length + depth))
        return self.source.draw_several(probs[None], count, key, position, self.noise)[0].tolist()


class DynamicTreeDrafter(TreeDrafter):
    """Drafts the at most `nodes` nodes with the largest product of draft probabilities along their branch."""

    def __init__(self, drafter: Brancher, nodes: int, beam: int = 4) -> None:
        super().__init__(drafter)
        self.nodes, self.beam = nodes, beam

    def grow(self, sequence: Sequence, levels: int) -> Tree:
        tokens: list[int] = []
        parents: list[int] = []
        worth: list[float] = []  # of each node: the product of the probabilities on its branch
        best_nodes: list[int] = []
        frontier = [-1]
        rows: dict[int, Tensor] = {}  # node -> the drafter's distribution after it
        for _ in range(levels):
            probs = self.probs(sequence, Tree(tokens, parents), frontier, ranking(sequence.params))
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
        return Tree([tokens[node] for node in kept], [number[parents[node]] for node in kept], chosen_from=chosen_from)


def ranking(params: SamplingParams) -> SamplingParams:
    """Return the parameters that rank tokens: temperature 1 instead of 0, where only one token has a probability."""
    return dataclasses.replace(params, temperature=1.0) if params.greedy else params
