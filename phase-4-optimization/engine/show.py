"""`--show`: who wrote which token. Colours in the terminal, marks elsewhere, and how many stood per step."""

from __future__ import annotations

import sys
from collections import Counter

from rich.console import Console
from rich.text import Text
from rich.tree import Tree as Drawing

from common.tokenizer import IncrementalDecoder, Tokenizer

from .speculative import Step

STYLES = {"accepted": "green", "corrected": "red", "bonus": "cyan"}


def print_tree(step: Step, tokenizer: Tokenizer) -> None:
    """On stderr: the first sequence's tree of guesses, with the way that stood."""
    tree, path = step.trees[0], step.paths[0]
    root = Drawing(Text(f"{len(path.nodes)} of {len(tree.tokens)} nodes stood", "bold"))
    drawn = {-1: root}
    for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True)):
        style = STYLES["accepted"] if node in path.nodes else "dim"
        drawn[node] = drawn[parent].add(Text(repr(tokenizer.token_text(token)), style))
    drawn[path.nodes[-1] if path.nodes else -1].add(Text(repr(tokenizer.token_text(path.next_token)), "bold cyan"))
    Console(stderr=True, highlight=False).print(root)


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
        nodes = step.paths[0].nodes
        whole = not step.trees[0].children(nodes[-1] if nodes else -1)
        for i, token in enumerate(new):
            kind = "accepted" if i < stats.accepted else "bonus" if whole else "corrected"
            self.console.print(Text(self.decoder.push(token), STYLES[kind]), end="")
        if sequence.finish_reason is not None:
            self.console.print(self.decoder.flush())

    def histogram(self) -> None:
        """On stderr: for each number of accepted tokens, how many steps had it."""
        total = sum(self.lengths.values())
        for length in range(max(self.lengths, default=0) + 1):
            share = self.lengths[length] / total
            print(f"{length:3} accepted: {self.lengths[length]:5} steps {'#' * round(50 * share)}", file=sys.stderr)
