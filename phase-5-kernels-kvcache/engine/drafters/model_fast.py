"""The draft model with its whole chain in one call into C++."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from ..drafting import Draft, Stop
from ..drawing import Drawing
from ..sequence import Sequence
from .chains import ChainBuilder
from .model import ModelDrafter

if TYPE_CHECKING:
    from ..cpp_runner import CppRunner


class FastModelDrafter(ModelDrafter):
    """The same tokens; chains that the controller may end early are drawn token by token."""

    def propose(self, sequences: list[Sequence], widths: list[int], stop: Stop | None = None) -> Draft:
        runner = cast("CppRunner", self.runner)
        chains = ChainBuilder(sequences, widths, self.source, self.noise, stop)
        for row in chains.open() if stop is None else []:
            sequence = sequences[row]
            how = Drawing(sequence.params, self.source, sequence.key, sequence.length, self.noise)
            drawn = runner.draw(sequence, sequence.prompt + sequence.tokens, widths[row], how)
            if drawn is not None:
                chains.take(row, *drawn)
        return self.extend(chains)
