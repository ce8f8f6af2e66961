"""The drafter of phase 2: a smaller model of the same vocabulary, asked once for every token."""

from __future__ import annotations

from torch import Tensor

from common.philox import Purpose

from ..drafting import Draft, Outcome, Stop
from ..generate import next_logits
from ..model import Transformer
from ..sampling import SamplingParams
from ..sequence import Sequence
from ..target import target_forward
from ..tree import Tree
from ..verify import RandomSource
from .chains import ChainBuilder


class ModelDrafter:
    """Draws through the same sampling parameters as the target; `noise` says with which random numbers."""

    taps: tuple[int, ...] | None = None
    deepest = 64

    def __init__(
        self, model: Transformer, params: SamplingParams, source: RandomSource, noise: Purpose = Purpose.DRAFT
    ) -> None:
        self.model, self.params, self.source, self.noise = model, params, source, noise

    def propose(self, sequences: list[Sequence], widths: list[int], stop: Stop | None = None) -> Draft:
        chains = ChainBuilder(sequences, widths, self.params, self.source, self.noise, stop)
        while rows := chains.open():
            logits = next_logits(self.model, [sequences[row].prompt + chains.output(row) for row in rows])
            for row, of_row in zip(rows, logits, strict=True):
                chains.draw(row, of_row)
        return chains.draft()

    def ready(self, sequence: Sequence) -> bool:
        return True

    def expand(self, sequence: Sequence, tree: Tree, nodes: list[int]) -> Tensor:
        """One forward of the draft over text, nodes, and what lies above the nodes."""
        branches, places = tree.branches(nodes)
        logits = target_forward(self.model, [sequence.prompt + sequence.tokens], [branches]).logits[0]
        return logits[[place + 1 for place in places]]

    def known(self, sequence: Sequence) -> int:
        return sequence.length

    def observe(self, outcome: Outcome) -> None:
        """Nothing is kept between steps, so there is nothing to roll back."""
