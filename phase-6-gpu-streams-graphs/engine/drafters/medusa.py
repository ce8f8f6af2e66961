"""Medusa: heads on the target's last hidden state, each predicts one token further ahead (Cai et al. 2024).

Head i = 1 .. H reads h_t, the state from which token t+1 was drawn, and predicts token t+i+1. A head is a few residual
blocks x + SiLU(W x + b), a square matrix M, and the target's output matrix U. In the paper every head has an output
matrix of its own; here it is U M, with a tenth of the weights. (U alone is too weak: x mostly encodes the next token,
and a residual block can hardly remove that.) All heads read the same state, so no head depends on another's token:
heads are cheap, and their accuracy is limited.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..drafting import Brancher, Draft, Frontier, Stop
from ..model import Transformer
from ..sequence import Sequence
from ..verify import RandomSource
from .chains import ChainBuilder
from .memory import StateDrafter


@dataclass(frozen=True)
class MedusaShape:
    heads: Annotated[int, Field(ge=1, le=32)] = 4  # bounds are those of a file: see heads.py
    blocks: Annotated[int, Field(ge=0, le=16)] = 1
    taps: tuple[int, ...] = ()  # target layers whose outputs are read besides the last state; the paper has none
    read_token: bool = False  # read token t+1 too, as Hydra does (Ankner et al. 2024), and the paper does not


class MedusaHeads(nn.Module):
    """The heads, side by side: one batched product per block."""

    kind = "medusa"

    def __init__(self, shape: MedusaShape, width: int) -> None:
        super().__init__()
        self.shape, self.taps = shape, shape.taps
        self.weight = nn.Parameter(torch.empty(shape.blocks, shape.heads, width, width))  # [blocks, H, in, out]
        self.bias = nn.Parameter(torch.zeros(shape.blocks, shape.heads, 1, width))
        self.mix = nn.Parameter(torch.eye(width).repeat(shape.heads, 1, 1))  # [H, in, out]
        self.reduce = nn.Linear(width * (1 + len(shape.taps)), width, bias=False) if shape.taps else None
        self.token = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, width, bias=False)) if shape.read_token else None

    def describe(self) -> dict[str, Any]:
        return asdict(self.shape)

    def forward(self, states: Tensor, embedded: Tensor) -> Tensor:
        """Map states [N, F] and embeddings [N, D] of the tokens after them to the output matrix's input [H, N, D]."""
        x = states[:, : self.weight.shape[-1]]
        if self.reduce is not None:
            x = x + self.reduce(states)
        if self.token is not None:
            x = x + self.token(embedded)
        x = x.expand(self.shape.heads, *x.shape)
        for weight, bias in zip(self.weight, self.bias, strict=True):
            x = x + F.silu(torch.baddbmm(bias, x, weight))
        mixed: Tensor = x @ self.mix
        return mixed


class MedusaDrafter(StateDrafter, Brancher):
    """Drafts with Medusa heads, at most one token per head."""

    def __init__(self, target: Transformer, heads: MedusaHeads, source: RandomSource) -> None:
        super().__init__(target, source, heads.taps, keep=2)  # teacher forcing reads the one before the last
        self.heads = heads
        self.deepest = heads.shape.heads
        self._logits: WeakKeyDictionary[Sequence, Tensor] = WeakKeyDictionary()  # [H, V], of the current draft

    def propose(self, sequences: list[Sequence], widths: list[int], stop: Stop | None = None) -> Draft:
        """Draft chains. The first step of a sequence drafts nothing: its forward gives the first state."""
        chains = ChainBuilder(sequences, widths, self.source, stop)
        if rows := [row for row in chains.open() if self.ready(sequences[row])]:
            for row, of_row in zip(rows, self.level_logits([sequences[row] for row in rows]), strict=True):
                for of_level in of_row[: widths[row]]:
                    if not chains.draw(row, of_level):
                        break
        return chains.draft()

    def ready(self, sequence: Sequence) -> bool:
        states = self.memory.get(sequence)
        return states is not None and len(states) > 0

    @torch.inference_mode()
    def level_logits(self, sequences: list[Sequence]) -> Tensor:
        """Compute the logits [R, H, V] of all heads."""
        states = torch.cat([self._state(sequence) for sequence in sequences])
        last = torch.tensor([last_token(sequence) for sequence in sequences], device=states.device)
        return self.target.logits(self.heads(states, self.target.embedding(last)).transpose(0, 1))

    def _state(self, sequence: Sequence) -> Tensor:
        states = self.memory.get(sequence)
        assert states is not None, "the first step of a sequence has nothing to draft from"
        return states[-1:]

    def expand(self, frontiers: list[Frontier]) -> list[Tensor]:
        """Return the logits of a level: the same for all its nodes. The heads compute all levels with the roots."""
        if new := [frontier.sequence for frontier in frontiers if frontier.nodes == [-1]]:
            self._logits.update(zip(new, self.level_logits(new), strict=True))
        return [
            self._logits[frontier.sequence][[frontier.tree.depths[node] if node >= 0 else 0 for node in frontier.nodes]]
            for frontier in frontiers
        ]


def last_token(sequence: Sequence) -> int:
    return (sequence.tokens or sequence.prompt)[-1]
