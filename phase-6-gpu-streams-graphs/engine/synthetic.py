"""`--synthetic-acceptance`: accept every draft token with one probability, whatever it is, to measure what steps cost.

A text of a chosen acceptance takes the time of a real one: drafting, verification and the acceptance rule do all of
their work, and only the verdict is replaced. The output is no sample of the target's distribution.

    python generate.py --synthetic-acceptance 0.8 --prompt "class Stack:" --json
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from common.philox import Purpose

from .drafting import Draft
from .kernels import TORCH, Kernels
from .kernels.registry import use
from .policies import AcceptancePolicy, DraftRows, TargetProbs, draw_one
from .steps import Path
from .tree import Tree
from .verify import KeyedSource, Verdict

CHANCE = KeyedSource()  # also at temperature 0


@dataclass(frozen=True)
class Synthetic:
    """Lets a policy do its work, and accepts each draft token with probability `acceptance`."""

    inner: AcceptancePolicy
    acceptance: float
    lossless: ClassVar = False

    @property
    def kernels(self) -> Kernels:
        found: Kernels = getattr(self.inner, "kernels", TORCH)
        return found

    @kernels.setter
    def kernels(self, kernels: Kernels) -> None:
        use(self.inner, kernels)

    @property
    def draft_noise(self) -> Purpose:
        return self.inner.draft_noise

    @property
    def draws_children(self) -> bool:
        return self.inner.draws_children

    def verify(self, draft: Draft, target: TargetProbs, rows: DraftRows) -> Verdict:
        self.inner.verify(draft, target, rows)
        widths, keys, positions, source = rows
        R, K = draft.tokens.shape
        columns = torch.arange(K, device=widths.device)
        chances = torch.full((R, K), self.acceptance, device=widths.device)
        passed = CHANCE.decide(chances, keys, positions[:, None] + columns) & (columns < widths[:, None])
        accepted = passed.long().cumprod(dim=1).sum(dim=1)
        following = target.probs[torch.arange(R, device=widths.device), accepted]
        return Verdict(accepted, source.draw(following, keys, positions + accepted, Purpose.SAMPLE), chances)

    def accept_tree(self, tree: Tree, target: TargetProbs, row: DraftRows) -> Path:
        """Go from every node to its first child, as long as chance allows."""
        self.inner.accept_tree(tree, target, row)
        nodes, node = list[int](), -1
        chance = torch.full((1, 1), self.acceptance, device=row.positions.device)
        while children := tree.children(node):
            if not bool(CHANCE.decide(chance, row.keys, row.positions[:, None] + len(nodes))):
                break
            node = children[0]
            nodes.append(node)
        return Path(nodes, draw_one(target.probs[0, node + 1], row, len(nodes)))


def rule_of(policy: AcceptancePolicy) -> AcceptancePolicy:
    """Return the policy whose work is done."""
    return policy.inner if isinstance(policy, Synthetic) else policy
