"""Trees instead of chains: any drafter that can branch, with a shape for its guesses.

- static: the shape is fixed beforehand. At temperature > 0 the children of a node are drawn without replacement, which
  recursive rejection verifies (Sequoia, Chen et al. 2024; RSD, Jeon et al. 2024), and with the target's own noise for
  the policy `coupled`. Otherwise they are the drafter's favourites.
- dynamic: the drafter's confidence decides where the tree grows, under a budget of nodes (EAGLE-2, Li et al. 2024):
  every level extends the `beam` likeliest nodes of the one before that are still within the budget, and of all nodes
  the likeliest are kept. Children are chosen, not drawn; verification treats each as certain.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from common.philox import Purpose

from ..drafting import Brancher, Draft, Outcome, Stop
from ..sampling import SamplingParams, probabilities, ranked
from ..sequence import Sequence
from ..tree import Tree
from ..verify import RandomSource


class TreeDrafter:
    """Makes trees of a drafter's guesses; one sequence after the other."""

    def __init__(self, drafter: Brancher, params: SamplingParams) -> None:
        self.drafter, self.params, self.taps = drafter, params, drafter.taps

    def propose(self, sequences: list[Sequence], widths: list[int], stop: Stop | None = None) -> Draft:
        """widths[r] limits the levels of tree r. `stop` is not asked: a tree's shape says where it ends."""
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
        """The drafter's distributions [n, V] after these nodes."""
        outputs = [sequence.tokens + (tree.line(node) if node >= 0 else []) for node in nodes]
        logits = self.drafter.expand(sequence, tree, nodes)
        return probabilities(logits, params, [sequence.prompt] * len(nodes), outputs)

    @property
    def ranking(self) -> SamplingParams:
        """Parameters under which every token has its probability; at temperature 0 only the first would."""
        return dataclasses.replace(self.params, temperature=1.0) if self.params.greedy else self.params

    def known(self, sequence: Sequence) -> int:
        return self.drafter.known(sequence)

    def observe(self, outcome: Outcome) -> None:
        self.drafter.observe(outcome)


class StaticTreeDrafter(TreeDrafter):
    """`shape[i]` is the parent of node i, -1 for the text: parents first, siblings in the order of their rank."""

    def __init__(
        self,
        drafter: Brancher,
        params: SamplingParams,
        shape: list[int],
        source: RandomSource,
        noise: Purpose,
        drawn: bool,
    ) -> None:
        super().__init__(drafter, params)
        self.shape, self.source, self.noise = Tree([0] * len(shape), shape), source, noise
        self.drawn = drawn and not params.greedy

    def grow(self, sequence: Sequence, levels: int) -> Tree:
        params = self.params if self.drawn else self.ranking
        tokens: list[int] = []
        parents: list[int] = []
        rows: dict[int, Tensor] = {}  # node -> the distribution that its children are from
        frontier = {-1: -1}  # node of the shape -> node of the tree, which is smaller where tokens ran out
        for depth in range(levels):
            open_nodes = {of: node for of, node in frontier.items() if self.shape.children(of)}
            if not open_nodes:
                break
            probs = self.probs(sequence, Tree(tokens, parents), list(open_nodes.values()), params)
            frontier = {}
            for (of, node), row in zip(open_nodes.items(), probs, strict=True):
                rows[node] = row
                wanted = self.shape.children(of)
                for child, token in zip(wanted, self._children(row, len(wanted), sequence, depth), strict=False):
                    frontier[child] = len(tokens)
                    tokens.append(token)
                    parents.append(node)
        if not self.drawn:
            return Tree(tokens, parents, chosen_from=rows)
        nothing = torch.zeros_like(rows[-1])
        return Tree(tokens, parents, torch.stack([rows.get(node, nothing) for node in range(-1, len(tokens))]))

    def _children(self, probs: Tensor, count: int, sequence: Sequence, depth: int) -> list[int]:
        count = min(count, int((probs > 0).sum()))
        if not self.drawn:
            return ranked(probs, count).tolist()
        keys = torch.tensor([[sequence.sample], [sequence.length + depth]], device=probs.device)
        return self.source.draw_several(probs[None], count, keys[0], keys[1], self.noise)[0].tolist()


class DynamicTreeDrafter(TreeDrafter):
    """At most `nodes` nodes, where the product of the drafter's probabilities along the branch is largest."""

    def __init__(self, drafter: Brancher, params: SamplingParams, nodes: int, beam: int = 4) -> None:
        super().__init__(drafter, params)
        self.nodes, self.beam = nodes, beam

    def grow(self, sequence: Sequence, levels: int) -> Tree:
        tokens: list[int] = []
        parents: list[int] = []
        worth: list[float] = []  # of each node, the product of the probabilities down to it
        best_nodes: list[int] = []
        frontier = [-1]
        rows: dict[int, Tensor] = {}  # node -> the drafter's distribution behind it
        for _ in range(levels):
            probs = self.probs(sequence, Tree(tokens, parents), frontier, self.ranking)
            rows.update(zip(frontier, probs, strict=True))
            best = ranked(probs, min(self.beam, probs.shape[1]))
            first = len(tokens)
            for node, values, ids in zip(frontier, probs.gather(1, best).tolist(), best.tolist(), strict=True):
                for value, token in zip(values, ids, strict=True):
                    if value > 0:
                        tokens.append(token)
                        parents.append(node)
                        worth.append(value * (worth[node] if node >= 0 else 1.0))
            # A node outside the budget never comes back, nor do its descendants: none is worth more than its parent.
            best_nodes = sorted(range(len(tokens)), key=lambda node: -worth[node])[: self.nodes]
            frontier = [node for node in best_nodes if node >= first][: self.beam]
            if not frontier:
                break
        kept = sorted(best_nodes)  # their parents are among them
        place = {node: i for i, node in enumerate(kept)} | {-1: -1}
        chosen_from = {place[node]: row for node, row in rows.items() if node in place}
        return Tree([tokens[node] for node in kept], [place[parents[node]] for node in kept], chosen_from=chosen_from)
