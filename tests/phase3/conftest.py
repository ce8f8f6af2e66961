"""The tools of the proof: models small enough for a walker (support/walker.py) to visit every outcome of a loop.

`Proof(engine)` holds them for one phase's engine package; later phases make their own from it.
"""

from __future__ import annotations

import sys
import types
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import phase3
from common.philox import Purpose
from tests.support.mutants import mutated
from tests.support.walker import Law, Walker


class TableModel(nn.Module):
    """A language model whose next-token logits depend on the last token alone: a table [V, V].

    Its hidden state is that token as a one-hot vector, and the table is its head. So states can be extrapolated, as one
    drafter does.
    """

    def __init__(self, config: Any, embedding: nn.Module, table: Tensor) -> None:
        super().__init__()
        self.config, self.table = config, table
        self.embedding = embedding  # loops read device and dtype from it

    def states(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        wanted: Tensor | None = None,
        masks: Any = None,
        taps: tuple[int, ...] = (),
    ) -> tuple[Tensor, Tensor | None]:
        seen = tokens if wanted is None else tokens.gather(1, wanted)
        return nn.functional.one_hot(seen, len(self.table)).to(self.table), None

    def hidden(self, tokens: Tensor, positions: Tensor | None = None, wanted: Tensor | None = None) -> Tensor:
        return self.states(tokens, positions, wanted)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.table

    def mask(self, length: int, like: Tensor, window: int | None) -> Tensor:
        return torch.full((length, length), float("-inf"), dtype=like.dtype).triu(1)


def total_variation(a: Law, b: Law) -> float:
    return sum(abs(a.get(key, 0.0) - b.get(key, 0.0)) for key in a.keys() | b.keys()) / 2


@dataclass
class Favourite:
    """A drafter without distributions: after token t always t + 1."""

    size: int  # vocabulary size
    engine: Any
    taps = None

    def propose(self, sequences: list[Any], widths: list[int], stop: Any = None) -> Any:
        rows = [
            [((s.prompt + s.tokens)[-1] + 1 + i) % self.size for i in range(max(widths))] for s in sequences
        ]  # padding beyond a row's width must never be read
        return self.engine.Draft(torch.tensor(rows, dtype=torch.long).view(len(rows), max(widths)), None, widths)

    def states_from(self, sequence: Any) -> int:
        return int(sequence.length)

    def observe(self, outcome: Any) -> None: ...


@dataclass
class Replay:
    """A controller that returns the given K one after the other."""

    ks: list[int]
    step: int = -1
    ends_early: ClassVar = False

    def next_k(self) -> int:
        self.step += 1
        return self.ks[self.step % len(self.ks)]

    def stop(self, draft_probs: Tensor) -> bool:
        return False

    def observe(self, step: Any) -> None: ...


@dataclass(frozen=True)
class Proof:
    """The tools for one engine."""

    engine: Any

    def table_model(self, table: Tensor, context: int = 64) -> TableModel:
        config = self.engine.ModelConfig(
            family="table", vocab_size=len(table), layers=1, width=1, heads=1, kv_heads=1, head_dim=1, ffn_width=1,
            context=context, norm="rms", norm_eps=0.0, positions="rope", activation="silu", gated=False,
        )  # fmt: skip
        return TableModel(config, nn.Embedding(1, 1), table)

    def tables(
        self, size: int, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 1.0, context: int = 64
    ) -> tuple[TableModel, TableModel]:
        """Make a target and a draft with similar distributions."""
        generator = torch.Generator().manual_seed(seed)
        target = torch.randn(size, size, generator=generator, dtype=torch.float64) * scale
        draft = target + torch.randn(size, size, generator=generator, dtype=torch.float64) * scale
        return self.table_model(target.to(dtype), context), self.table_model(draft.to(dtype), context)

    def layered(self, windows: tuple[int | None, ...], seed: int) -> Any:
        """Make a small Transformer over three tokens whose layers have these windows, with seeded weights."""
        config = self.engine.ModelConfig(
            family="mistral", vocab_size=3, layers=len(windows), width=8, heads=2, kv_heads=1, head_dim=4, ffn_width=8,
            context=64, norm="rms", norm_eps=1e-5, positions="rope", activation="silu", gated=True, windows=windows,
        )  # fmt: skip
        model, generator = self.engine.Transformer(config).double().eval(), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.6)
        return model

    def plain_law(self, target: Any, params: Any, prompt: list[int], ending: Any = None) -> Law:
        """Compute the distribution of plain decoding's output."""

        def run(walker: Walker) -> tuple[int, ...]:
            return tuple(self.engine.generate(target, [prompt], params, ending, source=walker)[0].tokens)

        return Walker().law(run)

    def histories(
        self,
        target: Any,
        drafter: Callable[[Walker, Purpose], Any],
        params: Any,
        prompt: list[int],
        policy: Any,
        controller: Callable[[], Any],
        ending: Any = None,
        loop: Any = None,
    ) -> Law:
        """Compute the probability of every (tokens, drafted by step, accepted by step) of speculative decoding.

        `drafter` is called with the random numbers and the purpose of the policy's draft noise. `loop` may be a mutant
        of speculative.py.
        """

        def run(walker: Walker) -> tuple[tuple[int, ...], ...]:
            sequence = self.engine.Sequence(prompt, params, ending or self.engine.Ending())
            guess = drafter(walker, policy.draft_noise)
            decode = (loop or self.engine).decode
            steps = [s.stats[0] for s in decode(target, guess, [sequence], policy, controller, walker)]
            return tuple(sequence.tokens), tuple(s.depth for s in steps), tuple(s.accepted for s in steps)

        return Walker().law(run)

    def law(self, *arguments: Any, **named: Any) -> Law:
        """Compute the distribution of speculative decoding's output; arguments as for histories()."""
        law: Law = defaultdict(float)
        for (tokens, _, _), weight in self.histories(*arguments, **named).items():
            law[tokens] += weight
        return dict(law)

    def model_drafter(self, draft: TableModel, parts: Any = None) -> Callable[[Walker, Purpose], Any]:
        """Return a factory of ModelDrafter; `parts` may be a mutant of drafters/model.py."""
        return lambda walker, noise: (parts or self.engine).ModelDrafter(draft, walker, noise)

    def favourite(self, size: int) -> Callable[[Walker, Purpose], Any]:
        return lambda walker, noise: Favourite(size, self.engine)

    def mutated(self, name: str, *changes: tuple[str, str], **names: Any) -> types.ModuleType:
        """Load a module of the engine with pieces of its source replaced, then some of its names."""
        return mutated(sys.modules[f"{self.engine.__name__}.{name}"], *changes, **names)

    Walker = Walker
    Replay = Replay
    total_variation = staticmethod(total_variation)


@pytest.fixture(scope="session")
def proof() -> Proof:
    """Provide the tools above to test files, which cannot import this file."""
    return Proof(phase3)
