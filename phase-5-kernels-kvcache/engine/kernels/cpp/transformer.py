"""A Transformer whose forwards over a static cache run in C++: the loops and the runners need not know.

fast = CppTransformer(loaded.model, "bfloat16", threads=2)
runner = make_runner(fast, KVOptions("static"), rows=1, tokens=300)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.errors import UserError

from ...attending import Behind
from ...kv_cache import StaticCache
from ...model import Transformer
from .model import CppModel
from .weights import Weights


class CppTransformer(Transformer):
    """Shares the modules of `model`, and computes with packed copies of them. Arguments as for CppModel."""

    def __init__(
        self,
        model: Transformer,
        weights: Weights = "float32",
        threads: int | None = None,
        *,
        head: Weights | None = None,
        exact_activations: bool | None = None,
        release: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.fast = CppModel(model, weights, threads, head=head, exact_activations=exact_activations, release=release)
        self.config, self.embedding, self.norm, self.head = model.config, model.embedding, model.norm, model.head
        self.layers, self.kernels = model.layers, model.kernels
        if model.config.positions == "learned":
            self.positions = model.positions
        self._tables = None

    def states(
        self,
        tokens: Tensor,
        positions: Tensor | range | None = None,
        wanted: Tensor | None = None,
        mask: Tensor | None = None,
        taps: tuple[int, ...] = (),
        cached: Behind | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As Transformer.states, over a static cache. UserError without one."""
        if cached is None:
            raise UserError("the C++ kernels go on from a cache: use --kv static, or --kernels torch")
        if (reason := self.fast.why_not_cache(cached.cache)) is not None:
            raise UserError(reason)
        cache = cached.cache
        assert isinstance(cache, StaticCache)
        R, T = tokens.shape
        texts = [row[:count] for row, count in zip(tokens.tolist(), cached.counts, strict=True)]
        trees = [parents_of(mask_, count) for mask_, count in zip(cached.masks, cached.counts, strict=True)]
        chains = all(is_chain(parents) for parents in trees)
        asked = [list(range(T))] * R if wanted is None else wanted.tolist()
        # Each row's padding repeats its last token: what is there is not read.
        at = [[min(position, count - 1) for position in row] for row, count in zip(asked, cached.counts, strict=True)]
        starts = [sum(cached.counts[:row]) for row in range(R)]
        every = sorted({start + position for start, row in zip(starts, at, strict=True) for position in row})
        stepped = self.fast.step(
            cache, texts, rows=cached.rows, parents=None if chains else trees, wanted=every, taps=taps, logits=False,
            hidden=True,
        )  # fmt: skip
        assert stepped.hidden is not None
        if R == 1 and every == at[0]:
            return stepped.hidden[None], None if stepped.tapped is None else stepped.tapped[None]
        place = {number: row for row, number in enumerate(every)}
        index = torch.tensor(
            [[place[start + position] for position in row] for start, row in zip(starts, at, strict=True)]
        )
        return stepped.hidden[index], None if stepped.tapped is None else stepped.tapped[index]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> logits [..., V], float32."""
        return self.fast.logits(hidden)


def parents_of(mask: Tensor | None, count: int) -> list[int]:
    """The parent of each of a row's new tokens, from what they see: the last of the new ones before them."""
    if mask is None or count == 1:
        return list(range(-1, count - 1))
    sees = mask[:count, -count:] == 0
    if bool((sees == torch.ones(count, count, dtype=torch.bool).tril()).all()):
        return list(range(-1, count - 1))
    return [
        max((other for other, seen in enumerate(row[:at]) if seen), default=-1) for at, row in enumerate(sees.tolist())
    ]


def is_chain(parents: Sequence[int]) -> bool:
    return list(parents) == list(range(-1, len(parents) - 1))
