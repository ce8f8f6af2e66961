"""Chains of drawn tokens for several sequences, each as long as its width and its controller allow."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ..drafting import Draft, Stop
from ..sampling import probabilities
from ..sequence import Sequence
from ..verify import RandomSource


class ChainBuilder:
    """Draws draft tokens row by row, with each sequence's sampling parameters, and keeps their distributions."""

    def __init__(self, sequences: list[Sequence], widths: list[int], source: RandomSource, stop: Stop | None) -> None:
        self.sequences, self.widths, self.source, self.stop = sequences, widths, source, stop
        self.tokens: list[list[int]] = [[] for _ in sequences]
        self.probs: list[list[Tensor]] = [[] for _ in sequences]

    def open(self) -> list[int]:
        """List the rows whose chain is not complete."""
        return [row for row, width in enumerate(self.widths) if len(self.tokens[row]) < width]

    def output(self, row: int) -> list[int]:
        """Return the output of this row's sequence followed by its draft tokens."""
        return self.sequences[row].tokens + self.tokens[row]

    def draw(self, row: int, logits: Tensor) -> bool:
        """Draw one token for a row from logits [V]. False, without a token, if the controller ends the draft."""
        sequence = self.sequences[row]
        probs = probabilities(logits[None], [sequence.params], [sequence.prompt], [self.output(row)])
        asked = probs if not sequence.params.greedy else logits[None].float().softmax(-1)
        if self.stop is not None and self.stop(row, asked[0]):
            self.widths = [len(self.tokens[row]) if r == row else width for r, width in enumerate(self.widths)]
            return False
        if sequence.params.greedy:
            token = probs.argmax(-1)
        else:
            position = sequence.length + len(self.tokens[row])
            key, at = (torch.tensor([each], device=probs.device) for each in (sequence.key, position))
            token = self.source.draw(probs, key, at, sequence.policy.draft_noise)
        self.tokens[row].append(int(token))
        self.probs[row].append(probs[0])
        return True

    def take(self, rows: list[int], tokens: list[list[int]], probs: list[Tensor]) -> None:
        """Take over whole chains of these rows, drawn elsewhere from probs [n, V] each; greedy rows keep none."""
        for row, drawn, of_row in zip(rows, tokens, probs, strict=True):
            self.tokens[row] = drawn
            self.probs[row] = [] if self.sequences[row].params.greedy else list(of_row)

    def draft(self) -> Draft:
        """Stack all rows; shorter ones are padded with token 0, whose probability is never read."""
        longest = max(map(len, self.tokens))
        rows = [row + [0] * (longest - len(row)) for row in self.tokens]
        tokens = torch.tensor(rows, dtype=torch.long).view(len(rows), longest)
        widths = [len(row) for row in self.tokens]
        one = next((row[0] for row in self.probs if row), None)
        if one is None or all(sequence.params.greedy for sequence in self.sequences):
            return Draft(tokens, None, widths)
        if len(self.probs) == 1:
            return Draft(tokens, torch.stack(self.probs[0])[None], widths)
        filler, known = torch.ones_like(one), list[Tensor]()
        for row, mine in zip(tokens.to(one.device), self.probs, strict=True):
            drawn = torch.stack(mine) if mine else one_hot(row, len(one)).to(one.dtype)  # of a greedy sequence
            known.append(torch.cat((drawn, filler.expand(longest - len(drawn), -1))))
        return Draft(tokens, torch.stack(known), widths)
