"""`--show`: the origin of every token, in colours or brackets, and a histogram of accepted tokens per step."""

from __future__ import annotations

import sys
from collections import Counter

from rich.console import Console
from rich.text import Text

from common.tokenizer import IncrementalDecoder, Tokenizer

from .speculative import Step

STYLES = {"accepted": "green", "corrected": "underline red", "bonus": "cyan"}
MARKS = {"accepted": ("[", "]"), "corrected": ("{", "}"), "bonus": ("<", ">")}
LEGEND = {
    "accepted": "draft tokens that were accepted",
    "corrected": "the target's own in place of a rejected token",
    "bonus": "the target's own after a fully accepted draft",
}


class Show:
    """Prints the first sequence's tokens after each step, marked by what became of the draft.

    A terminal gets colours. A file, a pipe or a terminal without colours gets brackets around every token.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.coloured = self.console.color_system is not None and not self.console.no_color
        self.tokenizer, self.decoder = tokenizer, IncrementalDecoder(tokenizer)
        self.lengths: Counter[int] = Counter()
        legend = Text(" / ").join(self._marked(words, kind) for kind, words in LEGEND.items())
        Console(stderr=True, highlight=False, soft_wrap=True).print(legend)

    def _marked(self, text: str, kind: str) -> Text:
        if self.coloured:
            return Text(text, STYLES[kind])
        before, after = MARKS[kind]
        return Text(f"{before}{text}{after}")

    def step(self, step: Step) -> None:
        sequence, stats = step.sequences[0], step.stats[0]
        self.lengths[stats.accepted] += 1
        if not step.starts[0]:
            self.decoder = IncrementalDecoder(self.tokenizer, sequence.prompt)
        new = sequence.tokens[step.starts[0] :]
        for i, token in enumerate(new):
            kind = "accepted" if i < stats.accepted else "bonus" if stats.accepted == stats.k else "corrected"
            self.console.print(self._marked(self.decoder.push(token), kind), end="")
        if sequence.finish_reason is not None:
            self.console.print(Text(self.decoder.flush()))

    def histogram(self) -> None:
        """Print on stderr how many steps had each number of accepted tokens. Prints nothing before the first step."""
        total = sum(self.lengths.values())
        for length in range(max(self.lengths, default=-1) + 1):
            share = self.lengths[length] / total
            print(f"{length:3} accepted: {self.lengths[length]:5} steps {'#' * round(50 * share)}", file=sys.stderr)
