"""A drafter that is a smaller model with the same vocabulary, one forward per draft token.

Its runner may keep a KV cache. The runner compares every text with what its cache holds: rejected tokens are dropped,
and after a fully accepted draft the last draft token is computed with the next step.
"""

from __future__ import annotations

from torch import Tensor

from ..drafting import Brancher, Draft, Frontier, Outcome, Stop
from ..runner import ModelRunner
from ..sequence import Sequence
from ..verify import RandomSource
from .chains import ChainBuilder


class ModelDrafter(Brancher):
    """Draws with the target's sampling parameters, and the noise that each sequence's policy asks for."""

    deepest = 64

    def __init__(self, runner: ModelRunner, source: RandomSource) -> None:
        self.runner, self.source = runner, source

    def propose(self, sequences: list[Sequence], widths: list[int], stop: Stop | None = None) -> Draft:
        return self.extend(ChainBuilder(sequences, widths, self.source, stop))

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

    def expand(self, frontiers: list[Frontier]) -> list[Tensor]:
        """Run one forward of the draft over the sequences, the nodes, and their ancestors."""
        sequences = [frontier.sequence for frontier in frontiers]
        branches = [frontier.tree.branches(frontier.nodes) for frontier in frontiers]
        texts = [sequence.prompt + sequence.tokens for sequence in sequences]
        logits = self.runner.forward(list(sequences), texts, [tree for tree, _ in branches]).logits
        return [of_row[[node + 1 for node in nodes]] for of_row, (_, nodes) in zip(logits, branches, strict=True)]

    def observe(self, outcome: Outcome) -> None:
        """Release the caches of finished sequences."""
        for sequence in outcome.sequences:
            if sequence.finish_reason is not None:
                self.runner.release(sequence)
