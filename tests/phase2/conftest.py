"""Tools of the proof: a walker that visits every outcome of a loop, and models small enough for that."""

from __future__ import annotations

import types
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import phase2
from common.philox import Purpose
from phase2.model import Embedding
from tests.support.mutants import mutated

Law = dict[Any, float]


class TableModel(phase2.Transformer):
    """A language model whose next-token logits depend on the last token alone: a table [V, V]."""

    def __init__(self, table: Tensor, context: int = 64) -> None:
        nn.Module.__init__(self)
        self.config = phase2.ModelConfig(
            family="table", vocab_size=len(table), layers=1, width=1, heads=1, kv_heads=1, head_dim=1, ffn_width=1,
            context=context, norm="rms", norm_eps=0.0, positions="rope", activation="silu", gated=False,
        )  # fmt: skip
        self.embedding = Embedding(1, 1)  # only its device and dtype are read
        self.table = table

    def hidden(self, tokens: Tensor, positions: Tensor | None = None, wanted: Tensor | None = None) -> Tensor:
        return (tokens if wanted is None else tokens.gather(1, wanted))[..., None]

    def logits(self, hidden: Tensor) -> Tensor:
        return self.table[hidden[..., 0]]


class Walker:
    """Replaces the random numbers of a loop, and takes every branch in turn.

    A sample branches over all possible tokens, a decision over yes and no, each with its probability. Decisions that
    share a key share one uniform number, as with keyed noise: the interval that an earlier decision has found for the
    number holds for a later one.
    """

    def __init__(self) -> None:
        self._script: list[int] = []
        self._taken: list[tuple[int, int]] = []

    def law(self, run: Callable[[Walker], Any]) -> Law:
        """Return the probability of every result of `run`."""
        law: Law = defaultdict(float)
        while True:
            self._taken, self.weight = [], 1.0
            self._intervals: dict[tuple[int, ...], tuple[float, float]] = {}
            result = run(self)
            law[result] += self.weight
            while self._taken and self._taken[-1][0] == self._taken[-1][1] - 1:
                self._taken.pop()
            if not self._taken:
                return dict(law)
            self._script = [choice for choice, _ in self._taken[:-1]] + [self._taken[-1][0] + 1]

    def _branch(self, weights: list[float]) -> int:
        at = len(self._taken)
        choice = self._script[at] if at < len(self._script) else 0
        self._taken.append((choice, len(weights)))
        self.weight *= weights[choice]
        return choice

    def draw(self, probs: Tensor, keys: Tensor, positions: Tensor, purpose: Purpose) -> Tensor:
        tokens = []
        for row in probs:
            possible = row.nonzero()[:, 0].tolist()
            tokens.append(possible[self._branch(row[possible].tolist())])
        return torch.tensor(tokens, dtype=torch.long)

    def decide(self, probability: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
        decided = torch.zeros_like(probability, dtype=torch.bool)
        for row in range(len(probability)):
            for column in range(probability.shape[1]):
                key = (*keys[row].tolist(), int(positions[row, column]))
                low, high = self._intervals.get(key, (0.0, 1.0))
                p = float(probability[row, column])
                if p >= high or p <= low:
                    decided[row, column] = p >= high
                    continue
                share = (p - low) / (high - low)
                yes = self._branch([share, 1 - share]) == 0
                decided[row, column] = yes
                self._intervals[key] = (low, p) if yes else (p, high)
        return decided


def total_variation(a: Law, b: Law) -> float:
    return sum(abs(a.get(key, 0.0) - b.get(key, 0.0)) for key in a.keys() | b.keys()) / 2


def plain_law(target: phase2.Transformer, params: Any, ending: Any, prompt: list[int]) -> Law:
    """Return the distribution of plain decoding's output."""

    def run(walker: Walker) -> tuple[int, ...]:
        return tuple(phase2.generate(target, [prompt], params, ending, sampler=walker)[0].tokens)

    return Walker().law(run)


def speculative_law(
    target: phase2.Transformer,
    draft: phase2.Transformer,
    params: Any,
    ending: Any,
    prompt: list[int],
    k: int,
    parts: Any = phase2,
) -> Law:
    """Return the distribution of speculative decoding's output. `parts` may hold a mutated drafter or loop."""

    def run(walker: Walker) -> tuple[int, ...]:
        sequence = phase2.Sequence(prompt, params, ending)
        drafter = parts.ModelDrafter(draft, walker)
        for _ in parts.speculative_decode(target, drafter, [sequence], k, walker):
            pass
        return tuple(sequence.tokens)

    return Walker().law(run)


def tables(
    size: int, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 1.0, context: int = 64
) -> list[TableModel]:
    """Make a target and a draft that partly agree."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(size, size, generator=generator, dtype=torch.float64) * scale
    draft = target + torch.randn(size, size, generator=generator, dtype=torch.float64) * scale
    return [TableModel(table.to(dtype), context) for table in (target, draft)]


def layered(windows: tuple[int | None, ...], seed: int) -> phase2.Transformer:
    """Make a small model over three tokens whose layers have these windows; the weights depend on the seed alone."""
    config = phase2.ModelConfig(
        family="mistral", vocab_size=3, layers=len(windows), width=8, heads=2, kv_heads=1, head_dim=4, ffn_width=8,
        context=64, norm="rms", norm_eps=1e-5, positions="rope", activation="silu", gated=True, windows=windows,
    )  # fmt: skip
    model, generator = phase2.Transformer(config).double().eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.6)
    return model


@pytest.fixture(scope="session")
def proof() -> types.SimpleNamespace:
    """Return the tools above, for test files (which cannot import this one)."""
    return types.SimpleNamespace(
        TableModel=TableModel,
        Walker=Walker,
        layered=layered,
        mutated=mutated,
        plain_law=plain_law,
        speculative_law=speculative_law,
        tables=tables,
        total_variation=total_variation,
    )
