"""The draft model in C++: whole chains of all sequences in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from ..cpp_runner import drawable
from ..drafting import Draft, Stop
from ..kernels.cpp import library
from ..kernels.cpp.model import idle
from ..sequence import Sequence
from .chains import ChainBuilder
from .model import ModelDrafter

if TYPE_CHECKING:
    from ..cpp_runner import CppRunner
    from ..runner import Work


class FastModelDrafter(ModelDrafter):
    """The same tokens; chains that the controller may end early are drawn token by token."""

    def propose(self, sequences: list[Sequence], widths: list[int], stop: Stop | None = None) -> Draft:
        chains = ChainBuilder(sequences, widths, self.source, stop)
        context = self.runner.model.config.context
        fits = all(each.length + width <= context for each, width in zip(sequences, widths, strict=True))
        if stop is None and fits and drawable(sequences, self.source):
            rows = chains.open()
            asked, counts = [sequences[row] for row in rows], [widths[row] for row in rows]
            runner = cast("CppRunner", self.runner)
            tokens, probs = runner.fast.propose(self.start(asked, counts, [n + 1 for n in counts]), counts)
            runner.appended(self._works, [of_row[:-1] for of_row in tokens], 0)
            chains.take(rows, tokens, probs)
        return self.extend(chains)

    def start(self, sequences: list[Sequence], counts: list[int], limits: list[int]) -> Any:
        """Return a drafter of the library for drafts of counts[r] tokens; sequence r gains at most limits[r] tokens.

        UserError if the cache has no room for so many.
        """
        runner = cast("CppRunner", self.runner)
        drafting = [row for row, count in enumerate(counts) if count]
        asked = [sequences[row] for row in drafting]
        self._works: list[Work]
        self._works, batch = runner.begin(asked, [limits[row] - 1 for row in drafting])
        if len(asked) < len(sequences):
            started = iter(batch)
            batch = [next(started) if count else idle() for count in counts]
        purposes = [int(each.policy.draft_noise) for each in sequences]
        return library().ModelDrafter(runner.fast._engine, batch, purposes)

    def finish(self, counts: list[int], gained: list[list[list[int]]]) -> None:
        """Record the steps after `start`: gained[s][r] are the tokens of sequence r in step s."""
        held = list[list[int]]()
        for row, count in enumerate(counts):
            if count:
                tokens = [token for of_step in gained for token in of_step[row]]
                whole = len(gained[-1][row]) > count  # of a draft that was accepted whole, the last token is not cached
                held.append(tokens[: -2 if whole else -1])
        cast("CppRunner", self.runner).appended(self._works, held, 0)
