"""The drafter of phase 2: a smaller model with the same vocabulary, one forward per draft token.

Its runner may keep a KV cache. The runner compares every text with what its cache holds: rejected tokens are dropped,
and after a fully accepted draft the last draft token is computed with the next step.
"""

from __future__ import annotations

from torch import Tensor

from common.philox import Purpose

from ..drafting import Brancher, Draft, Outcome, Stop
from ..runner import ModelRunner
from ..sequence import Sequence
from ..tree import Tree
from ..verify import RandomSource
from .chains import ChainBuilder


class ModelDrafter(Brancher):
    """Draws with the target's sampling parameters; `noise` is the purpose of its random numbers."""

    deepest = 64

    def __init__(self, runner: ModelRunner, source: RandomSource, noise: Purpose = Purpose.DRAFT) -> None:
        self.runner, self.source, self.noise = runner, source, noise

    def propose(self, sequences: list[Sequence], widths: list[int], stop: Stop | None = None) -> Draft:
        return self.extend(ChainBuilder(sequences, widths, self.source, self.noise, stop))

    def extend(self, chains: ChainBuilder) -> Draft:
        """Draw the tokens that the chains still lack, a forward for each."""
        while rows := chains.open():
            sequences = [chains.sequences[row] for row in rows]
            texts = [chains.sequences[row].prompt + chains.output(row) for row in rows]
            logits = self.runner.forward(list(sequences), texts).logits[:, 0]
            for row, of_row in zip(rows, logits, strict=True):
                chains.draw(row, of_row)
        return chains.draft()

    def ready(self, sequence: Sequence) -> bool:
        return True

    def expand(self, sequence: Sequence, tree: Tree, nodes: list[int]) -> Tensor:
        """Run one forward of the draft over the sequence, the nodes, and their ancestors."""
        branches, numbers = tree.branches(nodes)
        logits = self.runner.forward([sequence], [sequence.prompt + sequence.tokens], [branches]).logits[0]
        return logits[[number + 1 for number in numbers]]

    def observe(self, outcome: Outcome) -> None:
        """Release the caches of finished sequences."""
        for sequence in outcome.sequences:
            if sequence.finish_reason is not None:
                self.runner.release(sequence)
