"""Heads on the target's last hidden state that guess one token each, several steps ahead (Cai et al. 2024, Medusa).

h_t, the state that gave token t+1, is also read by head i = 1 .. H, which predicts token t+i+1. A head is a few
residual steps x + SiLU(W x + b), a square matrix M, and then the target's output matrix U. The paper gives every head
an output matrix of its own; here it is U M, which is a tenth of the size. (U alone would not do: x says most of all
which token comes next, and a residual step can hardly unsay it.) All heads read the same state, so no head knows what
the one before it guessed: that makes them cheap, and it bounds how good they can be.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from common.errors import UserError
from common.philox import Purpose

from ..drafting import Draft, Outcome, Stop
from ..model import Transformer
from ..sampling import SamplingParams
from ..sequence import Sequence
from ..tree import Tree
from ..verify import RandomSource
from .chains import ChainBuilder
from .memory import StateMemory

HeadInit = Literal["zero", "copy", "random"]


@dataclass(frozen=True)
class MedusaShape:
    heads: Annotated[int, Field(ge=1, le=32)] = 4  # bounds are those of a file: see heads.py
    blocks: Annotated[int, Field(ge=0, le=16)] = 1
    taps: tuple[int, ...] = ()  # layers whose outputs the heads read beside the last state; the paper has none
    read_token: bool = False  # and token t+1, which is known; the paper's do not (Ankner et al. 2024, Hydra, do)


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

    @torch.no_grad()
    def initialise(self, target: Transformer, how: HeadInit) -> None:
        """zero: each head begins as the target's own next-token prediction. random: as torch begins a Linear layer.
        copy: with the matrices of the target's last feed-forward, multiplied into one."""
        width = self.weight.shape[-1]
        if how == "zero":
            nn.init.zeros_(self.weight)
        elif how == "random":
            nn.init.uniform_(self.weight, -(width**-0.5), width**-0.5)
        else:
            ffn = target.layers[-1].ffn
            if not isinstance(ffn.down, nn.Linear):  # type: ignore[union-attr]
                raise UserError("--head-init copy needs a target that is not quantised; use zero or random")
            up = ffn.gate_up.weight.chunk(2)[1] if ffn.gated else ffn.up.weight  # type: ignore[union-attr, operator]
            self.weight.copy_((ffn.down.weight @ up).T.expand_as(self.weight))  # type: ignore[union-attr, operator]
        for added in (self.reduce, self.token):
            if added is not None:
                nn.init.zeros_(list(added.parameters())[-1])

    def forward(self, states: Tensor, embedded: Tensor) -> Tensor:
        """States [N, F], embeddings [N, D] of the tokens after them -> what the output matrix reads, [H, N, D]."""
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

    def features(self, target: Transformer, tokens: Tensor, states: Tensor, depths: int) -> Tensor:
        """For training: [depths, B, T, D] at the anchors t = 0 .. T-1 of windows [B, W], T = W - depths.

        Depth d = 1, 2, ... is read by the target's output matrix as the prediction of token t + 1 + d.
        """
        T = tokens.shape[1] - depths
        at, embedded = states[:, :T], target.embedding(tokens[:, 1 : T + 1])
        x: Tensor = self(at.flatten(0, 1), embedded.flatten(0, 1))[:depths].unflatten(1, at.shape[:2])
        return x


class MedusaDrafter:
    """Drafts at most as many tokens as there are heads."""

    def __init__(
        self,
        target: Transformer,
        heads: MedusaHeads,
        params: SamplingParams,
        source: RandomSource,
        noise: Purpose = Purpose.DRAFT,
    ) -> None:
        self.target, self.heads = target, heads
        self.params, self.source, self.noise = params, source, noise
        self.taps: tuple[int, ...] | None = heads.taps
        self.deepest = heads.shape.heads
        self.memory = StateMemory(keep=2)  # one is read; teacher_forced.py asks while the last token is unseen

    def propose(self, sequences: list[Sequence], widths: list[int], stop: Stop | None = None) -> Draft:
        """Nothing in the first step of a sequence, which gives the state."""
        chains = ChainBuilder(sequences, widths, self.params, self.source, self.noise, stop)
        for row, (sequence, width) in enumerate(zip(sequences, widths, strict=True)):
            for of_level in self.level_logits(sequence)[:width] if self.ready(sequence) else []:
                if not chains.draw(row, of_level):
                    break
        return chains.draft()

    def ready(self, sequence: Sequence) -> bool:
        states = self.memory.get(sequence)
        return states is not None and len(states) > 0

    @torch.inference_mode()
    def level_logits(self, sequence: Sequence) -> Tensor:
        """What every head says, [H, V]."""
        states = self.memory.get(sequence)
        assert states is not None, "the first step of a sequence has nothing to draft from"
        last = torch.tensor((sequence.prompt + sequence.tokens)[-1:], device=states.device)
        return self.target.logits(self.heads(states[-1:], self.target.embedding(last))[:, 0])

    def expand(self, sequence: Sequence, tree: Tree, nodes: list[int]) -> Tensor:
        """Logits [n, V] of what follows these nodes: the same for all nodes of a level."""
        levels = [tree.depths[node] if node >= 0 else 0 for node in nodes]
        return self.level_logits(sequence)[levels]

    def known(self, sequence: Sequence) -> int:
        return self.memory.known(sequence)

    def observe(self, outcome: Outcome) -> None:
        self.memory.observe(outcome)
