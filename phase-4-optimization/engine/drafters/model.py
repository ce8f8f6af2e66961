"""A drafter that is a smaller model with the same vocabulary, one forward per draft token."""

from __future__ import annotations

from torch import Tensor

from common.philox import Purpose

from ..drafting import Brancher, Draft, Frontier, Stop
from ..forward import next_logits
from ..model import Transformer
from ..sequence import Sequence
from ..target import target_forward
from ..verify import RandomSource
from .chains import ChainBuilder


class ModelDrafter(Brancher):
    """Draws with the target's sampling parameters; `noise` is the purpose of its random numbers."""

    deepest = 64

    def __init__(self, model: Transformer, source: RandomSource, noise: Purpose = Purpose.DRAFT) -> None:
        self.model, self.source, self.noise = model, source, noise

    def propose(self, sequences: list[Sequence], widths: list[int], stop: Stop | None = None) -> Draft:
        chains = ChainBuilder(sequences, widths, self.source, self.noise, stop)
        while rows := chains.open():
            logits = next_logits(self.model, [sequences[row].prompt + chains.output(row) for row in rows])
            for row, of_row in zip(rows, logits, strict=True):
                chains.draw(row, of_row)
        return chains.draft()

    def ready(self, sequence: Sequence) -> bool:
        return True

    def expand(self, frontiers: list[Frontier]) -> list[Tensor]:
        """Run one forward of the draft over the sequences, the nodes, and their ancestors."""
        texts = [frontier.sequence.prompt + frontier.sequence.tokens for frontier in frontiers]
        branches = [frontier.tree.branches(frontier.nodes) for frontier in frontiers]
        trees = [tree for tree, _ in branches]
        logits = target_forward(self.model, texts, trees).logits
        return [of_row[[node + 1 for node in nodes]] for of_row, (_, nodes) in zip(logits, branches, strict=True)]
