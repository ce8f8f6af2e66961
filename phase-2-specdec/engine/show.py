"""`--show`: who wrote which token. Colours in the terminal, marks elsewhere, and how many stood per step."""

from __future__ import annotations

import sys
from collections import Counter

from rich.console import Console
from rich.text import Text

from common.tokenizer import IncrementalDecoder, Tokenizer

from .speculative import Step

STYLES = {"accepted": "green", "corrected": "red", "bonus": "cyan"}


class Show:
    """Prints the first sequence's tokens as steps come in, coloured by what became of the draft."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.tokenizer, self.decoder = tokenizer, IncrementalDecoder(tokenizer)
        self.lengths: Counter[int] = Counter()
        legend = Text("draft tokens that stood", STYLES["accepted"])
        legend.append(" / the target's own where one fell", STYLES["corrected"])
        legend.append(" / and after a draft that stood whole", STYLES["bonus"])
        Console(stderr=True, highlight=False).print(legend)

    def step(self, step: Step) -> None:
        sequence, stats = step.sequences[0], step.stats[0]
        self.lengths[stats.accepted] += 1
        if not step.starts[0]:
            self.decoder = IncrementalDecoder(self.tokenizer, sequence.prompt)
        new = sequence.tokens[step.starts[0] :]
        for i, token in enumerate(new):
            kind = "accepted" if i < stats.accepted else "bonus" if stats.accepted == stats.k else "corrected"
            self.console.print(Text(self.decoder.push(token), STYLES[kind]), end="")
        if sequence.finish_reason is not None:
            self.console.print(self.decoder.flush())

    def histogram(self) -> None:
        """On stderr: for each number of accepted tokens, how many steps had it."""
        total = sum(self.lengths.values())
        for length in range(max(self.lengths, default=0) + 1):
            share = self.lengths[length] / total
            print(f"{length:3} accepted: {self.lengths[length]:5} steps {'#' * round(50 * share)}", file=sys.stderr)
