"""EAGLE: one more decoder layer that predicts the target's next states (Li et al. 2024; Li et al. 2025, EAGLE-3).

At position i the layer reads the embedding of token x_{i+1} and the target's state h_i, from which x_{i+1} was drawn.
It predicts the state h_{i+1}, and the target's output matrix turns that into a distribution of x_{i+2}. For the next
draft token the layer reads its own prediction instead of a state. EAGLE-3 adds the states of several layers, and
training on the layer's own predictions.

The layer has a cache of its own, which holds keys and values of its inputs at the sequence's positions.
"""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from typing import Annotated, Any
from weakref import WeakKeyDictionary

import torch
from pydantic import Field
from torch import Tensor, nn

from ..attention import AttentionBackend, CachedAttention
from ..config import ModelConfig
from ..drafting import Brancher, Draft, Frontier, Stop
from ..kernels.key_ranges import Paths
from ..kernels.metadata import attention_metadata
from ..kv_cache import CacheShape, StaticCache
from ..model import Block, Rotation, Transformer, Wanted, make_norm
from ..sequence import Sequence
from ..transfers import Upload
from ..tree import Tree
from ..verify import RandomSource
from .chains import ChainBuilder
from .memory import StateDrafter

GUESSES = 4 * 64  # of one draft: a dynamic tree may extend four nodes on each of its levels, and keep few of them


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

    def forward(
        self, inputs: Tensor, rotation: Rotation | None, backend: AttentionBackend, wanted: Wanted | None
    ) -> Tensor:
        """inputs [B, T, D] -> the predicted features [B, T or W, D]."""
        predicted: Tensor = self.norm(self.block(inputs, rotation, backend, wanted))
        return predicted


class Lookahead:
    """The layer over one sequence and the growing tree of draft tokens after it; a chain is a tree.

    Keys and values of the sequence's inputs stay in a cache of the layer's own; those of draft tokens are dropped when
    the next draft begins.
    """

    def __init__(self, head: EagleHead, target: Transformer, capacity: int) -> None:
        config, weight = head.config, target.embedding.weight
        shape = CacheShape(1, config.kv_heads, config.head_dim)
        self.cache = StaticCache(shape, 1, capacity, weight.dtype, weight.dtype, weight.device)
        self.head, self.target, self.device = head, target, weight.device
        self.upload = Upload(weight.device)
        self.end = 0  # position in the sequence before which all inputs are in the cache, or were forgotten
        self.confirmed = 0  # inputs in the cache that are no guesses

    def has_room(self, inputs: int) -> bool:
        return self.confirmed + inputs + GUESSES <= self.cache.capacity

    def begin(self, inputs: Tensor, end: int) -> Tensor:
        """Predict the feature [1, D] after the sequence's new inputs [n, D], which end at a position."""
        self.cache.truncate(0, self.confirmed)
        places = range(self.confirmed, self.confirmed + len(inputs))
        last = torch.tensor([[len(inputs) - 1]], device=self.device)
        self.predicted = self._predict(inputs, places, None, last)
        self.confirmed, self.end = self.confirmed + len(inputs), end
        self.rows = {-1: -1}  # node of the tree -> index of its cached guess; -1: the sequence's last input
        self.lines: list[list[int]] = []  # for every cached guess: the indices of its ancestors, and its own
        return self.predicted

    def extend(self, tree: Tree, nodes: list[int]) -> Tensor:
        """Add nodes whose parents were added before, and predict the features [n, D] after them."""
        before = len(self.lines)
        for node in nodes:
            above = self.rows[tree.parents[node]]
            self.rows[node] = len(self.lines)
            self.lines.append([*(self.lines[above] if above >= 0 else []), len(self.lines)])
        read = self.predicted[[self.rows[tree.parents[node]] + 1 for node in nodes]]
        tokens = torch.tensor([tree.tokens[node] for node in nodes], device=self.device)
        inputs = self.head.inputs(self.target.embedding(tokens), read)

        lines = self.lines[before:]
        places = [self.confirmed - 1 + len(line) for line in lines]
        at = range(places[0], places[0] + 1) if len(nodes) == 1 else torch.tensor(places, device=self.device)
        is_chain = len(nodes) == 1 and len(lines[0]) == len(self.lines)
        added = self._predict(inputs, at, None if is_chain else (self.confirmed, lines), None)
        self.predicted = torch.cat((self.predicted, added))
        return added

    def _predict(self, inputs: Tensor, places: Tensor | range, paths: Paths | None, wanted: Tensor | None) -> Tensor:
        """Predict [n, D] after inputs [n, D] at these places, or after those wanted alone; they stay in the cache."""
        rotation, reach = None, self.head.shape.reach
        metadata = attention_metadata(self.cache, [0], [len(inputs)], self.upload, windows={reach}, paths=[paths])
        if self.head.config.positions == "rope":
            rotation = self.target.rotation_of(places, inputs, metadata.ends[0])
        behind = CachedAttention(metadata, metadata.ranges[reach], self.target.kernels)
        asked = None if wanted is None else (torch.zeros_like(wanted), wanted)
        predicted: Tensor = self.head(inputs[None], rotation, behind.only(wanted), asked)
        self.cache.keep(0, list(range(len(inputs))))
        return predicted[0]


class EagleDrafter(StateDrafter, Brancher):
    """Drafts with an EAGLE layer."""

    deepest = 64

    def __init__(self, target: Transformer, head: EagleHead, source: RandomSource, cached: bool = True) -> None:
        super().__init__(target, source, head.taps, keep=head.shape.reach)
        self.head, self.cached = head, cached
        self._layers: WeakKeyDictionary[Sequence, Lookahead] = WeakKeyDictionary()

    def propose(self, sequences: list[Sequence], widths: list[int], stop: Stop | None = None) -> Draft:
        """Draft chains. The first step of a sequence drafts nothing: its forward gives the first states."""
        widths = [width if self.ready(each) else 0 for each, width in zip(sequences, widths, strict=True)]
        chains = ChainBuilder(sequences, widths, self.source, stop)
        while rows := chains.open():
            trees = [Tree.chain(chains.tokens[row]) for row in rows]
            ends = [Frontier(sequences[r], tree, [len(tree.tokens) - 1]) for r, tree in zip(rows, trees, strict=True)]
            for row, logits in zip(rows, self.expand(ends), strict=True):
                chains.draw(row, logits[0])
        return chains.draft()

    def ready(self, sequence: Sequence) -> bool:
        states = self.memory.get(sequence, last=1)
        return states is not None and len(states) > 0

    @torch.inference_mode()
    def expand(self, frontiers: list[Frontier]) -> list[Tensor]:
        """Run the layer for one sequence after the other, and the output matrix once for all."""
        features = [self._features(frontier) for frontier in frontiers]
        return list(self._logits(torch.cat(features)).split([len(of_row) for of_row in features]))

    def _logits(self, features: Tensor) -> Tensor:
        return self.target.logits(features)

    def _features(self, frontier: Frontier) -> Tensor:
        """Predict the features [n, D] after its nodes. Each level continues the computation of the level before."""
        sequence, nodes = frontier.sequence, frontier.nodes
        if nodes != [-1]:
            return self._layers[sequence].extend(frontier.tree, nodes)
        layer, new = self._layer(sequence)
        if not new:
            return layer.predicted[:1]
        return layer.begin(self.inputs(sequence, new), sequence.length - 1)

    def _layer(self, sequence: Sequence) -> tuple[Lookahead, int]:
        """Return the layer over this sequence, and how many of the last positions it has yet to read."""
        end, layer = sequence.length - 1, self._layers.get(sequence)
        new = self.head.shape.reach if layer is None else end - layer.end
        if layer is None or not self.cached or new > self.head.shape.reach or not layer.has_room(new):
            longest = min(len(sequence.prompt) + sequence.params.max_new_tokens, self.target.config.context)
            capacity = max(longest, 2 * self.head.shape.reach) + GUESSES
            layer = self._layers[sequence] = self._make_layer(capacity)
            new = self.head.shape.reach
        return layer, new

    def _make_layer(self, capacity: int) -> Lookahead:
        return Lookahead(self.head, self.target, capacity)

    def inputs(self, sequence: Sequence, last: int) -> Tensor:
        """Return the layer's inputs for the last so many positions whose next token is known, [n, D]."""
        tokens, states = self._read(sequence, last)
        embedded = self.target.embedding(torch.tensor(tokens, device=states.device))
        return self.head.inputs(embedded, self.head.read(states))

    def _read(self, sequence: Sequence, last: int) -> tuple[list[int], Tensor]:
        """Return the next token of the last so many positions that have one, and the states they were drawn from."""
        states = self.memory.get(sequence, last)
        assert states is not None, "the first step of a sequence has nothing to draft from"
        return (sequence.prompt + sequence.tokens)[sequence.length - len(states) :], states
