"""`--show`: the origin of every token, in colours or brackets, and a histogram of accepted tokens per step."""

from __future__ import annotations

import sys
from collections import Counter

from rich.console import Console
from rich.text import Text
from rich.tree import Tree as Drawing

from common.tokenizer import IncrementalDecoder, Tokenizer

from .steps import Step

STYLES = {"accepted": "green", "corrected": "underline red", "bonus": "cyan"}
MARKS = {"accepted": ("[", "]"), "corrected": ("{", "}"), "bonus": ("<", ">")}
LEGEND = {
    "accepted": "draft tokens that were accepted",
    "corrected": "the target's own in place of a rejected token",
    "bonus": "the target's own after a fully accepted draft",
}


def print_tree(step: Step, tokenizer: Tokenizer) -> None:
    """Print the first sequence's tree on stderr, with the accepted tokens and the next token."""
    tree, path = step.trees[0], step.paths[0]
    root = Drawing(Text(f"{len(path.nodes)} of {len(tree.tokens)} nodes accepted", "bold"))
    drawn = {-1: root}
    for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True)):
        text = repr(tokenizer.token_text(token))
        accepted = node in path.nodes
        label = Text(f"{text} accepted", STYLES["accepted"]) if accepted else Text(text, "dim")
        drawn[node] = drawn[parent].add(label)
    following = f"{tokenizer.token_text(path.next_token)!r} follows"
    drawn[path.nodes[-1] if path.nodes else -1].add(Text(following, "bold cyan"))
    console = Console(stderr=True, highlight=False)
    console.print()  # the text on stdout ended within a line
    console.print(root)


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
        end = step.starts[0] + stats.emitted  # the sequence may be some steps ahead
        new = sequence.tokens[step.starts[0] : end]
        nodes = step.paths[0].nodes
        whole = not step.trees[0].children(nodes[-1] if nodes else -1)
        for i, token in enumerate(new):
            kind = "accepted" if i < stats.accepted else "bonus" if whole else "corrected"
            self.console.print(self._marked(self.decoder.push(token), kind), end="")
        if sequence.finish_reason is not None and end == len(sequence.tokens):
            self.console.print(Text(self.decoder.flush()))

    def histogram(self) -> None:
        """Print on stderr how many steps had each number of accepted tokens. Prints nothing before the first step."""
        total = sum(self.lengths.values())
        for length in range(max(self.lengths, default=-1) + 1):
            share = self.lengths[length] / total
            print(f"{length:3} accepted: {self.lengths[length]:5} steps {'#' * round(50 * share)}", file=sys.stderr)
