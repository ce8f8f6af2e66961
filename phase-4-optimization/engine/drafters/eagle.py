"""EAGLE: one more decoder layer that predicts the target's next states (Li et al. 2024; Li et al. 2025, EAGLE-3).

At position i the layer reads the embedding of token x_{i+1} and the target's state h_i, from which x_{i+1} was drawn.
It predicts the state h_{i+1}, and the target's output matrix turns that into a distribution of x_{i+2}. For the next
draft token the layer reads its own prediction instead of a state. EAGLE-3 adds the states of several layers, and
training on the layer's own predictions.

Only the layer's inputs at the last positions of each sequence are cached. For one draft token keys and values are
computed for all of them, everything else for one position.
"""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from typing import Annotated, Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from common.philox import Purpose

from ..config import ModelConfig
from ..drafting import Brancher, Draft, Frontier, Outcome, Stop
from ..model import Block, Rotation, Transformer, Wanted, make_norm
from ..sequence import Sequence
from ..shapes import padded_length
from ..tree import Tree
from ..verify import RandomSource
from .chains import ChainBuilder
from .memory import StateDrafter


@dataclass(frozen=True)
class EagleShape:
    ffn_width: Annotated[int, Field(ge=1, le=2**20)]  # bounds are those of a file: see heads.py
    reach: Annotated[int, Field(ge=1, le=2**20)] = 256  # positions that the attention covers, its own included
    taps: tuple[int, ...] = ()  # target layers whose outputs are read besides the last state


class EagleHead(nn.Module):
    """The layer. Positions count from its first input: with RoPE only distances matter."""

    kind = "eagle"

    def __init__(self, shape: EagleShape, target: ModelConfig) -> None:
        super().__init__()
        self.shape, self.taps = shape, shape.taps
        self.config = dataclasses.replace(target, layers=1, ffn_width=shape.ffn_width, windows=(None,))
        width = target.width
        self.reduce = nn.Linear(width * (1 + len(shape.taps)), width, bias=False) if shape.taps else None
        self.token_norm, self.state_norm = make_norm(self.config), make_norm(self.config)
        self.join = nn.Linear(2 * width, width, bias=False)
        self.block = Block(self.config)
        self.norm = make_norm(self.config)

    def describe(self) -> dict[str, Any]:
        return asdict(self.shape)

    def read(self, states: Tensor) -> Tensor:
        """Reduce the target's states [..., F] to one feature vector [..., D] per position."""
        feature: Tensor = states if self.reduce is None else self.reduce(states)
        return feature

    def inputs(self, embedded: Tensor, features: Tensor) -> Tensor:
        """Join each token's embedding and the feature it was drawn from, both [..., D], to the input [..., D]."""
        wide = embedded.dtype  # autocast narrows matrix products only, not norms and the residual stream
        joined: Tensor = self.join(torch.cat((self.token_norm(embedded), self.state_norm(features.to(wide))), -1))
        return joined.to(wide)

    def forward(self, inputs: Tensor, rotation: Rotation | None, mask: Tensor, wanted: Wanted | None) -> Tensor:
        """Predict features [B, T or W, D] from inputs [B, T, D]; the mask is that of Attention."""
        predicted: Tensor = self.norm(self.block(inputs, rotation, mask, wanted))
        return predicted


class Lookahead:
    """Runs the layer over one sequence and a growing tree of draft tokens; a chain is a tree."""

    def __init__(self, head: EagleHead, target: Transformer, inputs: Tensor) -> None:
        """Start from inputs [n, D] of the sequence's last positions."""
        self.head, self.target, self.inputs, self.confirmed = head, target, inputs, len(inputs)
        self.rows = {-1: -1}  # node of the tree -> index of its added input; -1: the sequence's last input
        self.lines: list[list[int]] = []  # for every added input: the indices of its ancestors, and its own
        self.predicted = self._predict([len(inputs) - 1], [[]])  # [1 + added, D]

    def extend(self, tree: Tree, nodes: list[int]) -> Tensor:
        """Add nodes whose parents were added before, and predict the features [n, D] after them."""
        for node in nodes:
            above = self.rows[tree.parents[node]]
            self.rows[node] = len(self.lines)
            self.lines.append([*(self.lines[above] if above >= 0 else []), len(self.lines)])
        first = len(self.inputs)
        tokens = torch.tensor([tree.tokens[node] for node in nodes], device=self.inputs.device)
        read = self.predicted[[self.rows[tree.parents[node]] + 1 for node in nodes]]
        self.inputs = torch.cat((self.inputs, self.head.inputs(self.target.embedding(tokens), read)))
        added = self._predict(list(range(first, len(self.inputs))), self.lines[-len(nodes) :])
        self.predicted = torch.cat((self.predicted, added))
        return added

    def _predict(self, at: list[int], lines: list[list[int]]) -> Tensor:
        """Predict features [n, D] at n inputs; each attends to the whole sequence and to its own line."""
        n, device = self.confirmed, self.inputs.device
        length = padded_length(len(self.inputs), self.target)
        inputs = F.pad(self.inputs, (0, 0, 0, length - len(self.inputs)))
        mask = inputs.new_full((len(at), length), float("-inf"))
        mask[:, :n] = 0
        for row, line in zip(mask, lines, strict=True):
            row[[n + added for added in line]] = 0
        rotation = None
        if self.head.config.positions == "rope":
            positions = [*range(n), *(n - 1 + len(line) for line in self.lines)]
            positions += [0] * (length - len(positions))
            cos, sin = self.target.rotation(max(positions) + 1, self.inputs)
            rotation = cos[positions], sin[positions]
        wanted = torch.zeros(1, 1, dtype=torch.long, device=device), torch.tensor([at], device=device)
        predicted: Tensor = self.head(inputs[None], rotation, mask[None, None], wanted)
        return predicted[0]


class EagleDrafter(StateDrafter, Brancher):
    """Drafts with an EAGLE layer."""

    deepest = 64

    def __init__(
        self, target: Transformer, head: EagleHead, source: RandomSource, noise: Purpose = Purpose.DRAFT
    ) -> None:
        super().__init__(target, source, noise, head.taps, keep=head.shape.reach)  # of the layer's inputs, not states
        self.head = head
        self._ahead: WeakKeyDictionary[Sequence, Lookahead] = WeakKeyDictionary()  # of the current draft

    def propose(self, sequences: list[Sequence], widths: list[int], stop: Stop | None = None) -> Draft:
        """Draft chains. The first step of a sequence drafts nothing: its forward gives the first states."""
        widths = [width if self.ready(each) else 0 for each, width in zip(sequences, widths, strict=True)]
        chains = ChainBuilder(sequences, widths, self.source, self.noise, stop)
        while rows := chains.open():
            trees = [Tree.chain(chains.tokens[row]) for row in rows]
            ends = [Frontier(sequences[r], tree, [len(tree.tokens) - 1]) for r, tree in zip(rows, trees, strict=True)]
            for row, logits in zip(rows, self.expand(ends), strict=True):
                chains.draw(row, logits[0])
        return chains.draft()

    def ready(self, sequence: Sequence) -> bool:
        inputs = self.memory.get(sequence)
        return inputs is not None and len(inputs) > 0

    @torch.inference_mode()
    def expand(self, frontiers: list[Frontier]) -> list[Tensor]:
        """Run the layer for one sequence after the other, and the output matrix once for all."""
        features = [self._features(frontier) for frontier in frontiers]
        return list(self.target.logits(torch.cat(features)).split([len(of_row) for of_row in features]))

    def _features(self, frontier: Frontier) -> Tensor:
        """Predict the features [n, D] after its nodes. Each level continues the computation of the level before."""
        sequence, nodes = frontier.sequence, frontier.nodes
        if nodes != [-1]:
            return self._ahead[sequence].extend(frontier.tree, nodes)
        inputs = self.memory.get(sequence)
        assert inputs is not None, "the first step of a sequence has nothing to draft from"
        self._ahead[sequence] = Lookahead(self.head, self.target, inputs)
        return self._ahead[sequence].predicted

    @torch.inference_mode()
    def observe(self, outcome: Outcome) -> None:
        """Make the layer's inputs from the states, now that the token after each is known."""
        assert outcome.states is not None, "the loop was not asked for states"
        going = [
            (s, states) for s, states in zip(outcome.sequences, outcome.states, strict=True) if not s.finish_reason
        ]
        inputs = []
        for sequence, states in going:
            following = (sequence.prompt + sequence.tokens)[sequence.length - len(states) :]
            embedded = self.target.embedding(torch.tensor(following, dtype=torch.long, device=states.device))
            inputs.append(self.head.inputs(embedded, self.head.read(states)))
        self.memory.observe(Outcome([sequence for sequence, _ in going], outcome.accepted, inputs))
