"""The drafter of phase 2: a smaller model with the same vocabulary, one forward per draft token.

Its runner may remember what it has seen of every text. After a step the text is another: what was guessed in vain is
gone, and after a draft that stood as a whole its last token is still to be seen. The runner finds out by itself.
"""

from __future__ import annotations

from torch import Tensor

from common.philox import Purpose

from ..drafting import Draft, Outcome, Stop
from ..runner import Drawing, ModelRunner
from ..sampling import SamplingParams
from ..sequence import Sequence
from ..tree import Tree
from ..verify import RandomSource
from .chains import ChainBuilder


class ModelDrafter:
    """Draws with the target's sampling parameters; `noise` is the purpose of its random numbers."""

    taps: tuple[int, ...] | None = None
    deepest = 64

    def __init__(
        self, runner: ModelRunner, params: SamplingParams, source: RandomSource, noise: Purpose = Purpose.DRAFT
    ) -> None:
        self.runner, self.params, self.source, self.noise = runner, params, source, noise

    def propose(self, sequences: list[Sequence], widths: list[int], stop: Stop | None = None) -> Draft:
        chains = ChainBuilder(sequences, widths, self.params, self.source, self.noise, stop)
        if stop is None:
            for row in chains.open():
                sequence = sequences[row]
                how = Drawing(self.params, self.source, sequence.sample, sequence.length, self.noise)
                drawn = self.runner.draw(sequence, sequence.prompt + sequence.tokens, widths[row], how)
                if drawn is not None:
                    chains.take(row, *drawn)
        while rows := chains.open():
            texts = [sequences[row].prompt + chains.output(row) for row in rows]
            logits = self.runner.logits([sequences[row] for row in rows], texts)
            for row, of_row in zip(rows, logits, strict=True):
                chains.draw(row, of_row)
        return chains.draft()

    def ready(self, sequence: Sequence) -> bool:
        return True

    def expand(self, sequence: Sequence, tree: Tree, nodes: list[int]) -> Tensor:
        """Run one forward of the draft over the sequence, the nodes, and their ancestors."""
        branches, numbers = tree.branches(nodes)
        logits = self.runner.step([sequence], [sequence.prompt + sequence.tokens], [branches]).logits[0]
        return logits[[number + 1 for number in numbers]]

    def known(self, sequence: Sequence) -> int:
        return sequence.length

    def observe(self, outcome: Outcome) -> None:
        """What stands is in the texts of the next step; what is finished needs no cache."""
        for sequence in outcome.sequences:
            if sequence.finish_reason is not None:
                self.runner.release(sequence)
