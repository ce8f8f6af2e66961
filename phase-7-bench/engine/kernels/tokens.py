"""The ops that choose tokens and form the next inputs: their arguments of a step, and their references.

A step's arguments go to the device with its other inputs, in one copy.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.philox import Purpose

from ..sampling import SamplingParams, penalise
from ..sampling import probabilities as distributions
from ..transfers import Staged, Upload
from ..verify import RandomSource

UNLIMITED = 2**30  # the window of a layer that has none


@dataclass(frozen=True)
class SamplingMetadata:
    """How R sequences choose their tokens. On the device: one row of each array for every sequence."""

    params: Rows[SamplingParams]
    source: RandomSource
    keys: Staged  # int64 [R, 2]: seed and sample
    positions: Staged  # int64 [R], of the next token
    filters: Staged  # float64 [R, 4]: SamplingParams.filters
    texts: Rows[tuple[Rows[int], Rows[int]]] | None = None  # prompt and output before each row of logits, for penalties

    @classmethod
    def of(
        cls,
        upload: Upload,
        params: Rows[SamplingParams],
        source: RandomSource,
        keys: Rows[tuple[int, int]],
        positions: Rows[int],
        texts: Rows[tuple[Rows[int], Rows[int]]] | None = None,
    ) -> SamplingMetadata:
        """Stage the arrays. `texts` are read only if a penalty is on."""
        R = len(params)
        staged = upload.put_longs((word for key in keys for word in key), R, 2), upload.put_longs(positions, R)
        filters = upload.put_floats((number for mine in params for number in mine.filters), R, 4)
        return cls(params, source, *staged, filters, texts if any(mine.penalised for mine in params) else None)

    @property
    def greedy(self) -> bool:
        """Return whether every sequence takes its likeliest token."""
        return all(mine.greedy for mine in self.params)

    def each(self, rows: int) -> list[SamplingParams]:
        """Return the parameters of every row of logits: each sequence has as many, one after the other."""
        return [mine for mine in self.params for _ in range(rows // max(1, len(self.params)))]

    def penalised(self, logits: Tensor) -> Tensor:
        """Return logits [N, V] after the penalties."""
        if self.texts is None:
            return logits
        return penalise(logits.float(), self.each(len(logits)), *zip(*self.texts, strict=True))

    @property
    def keyed(self) -> tuple[Tensor, Tensor]:
        return self.keys.tensor, self.positions.tensor


def probabilities(logits: Tensor, rows: SamplingMetadata, out: Tensor | None = None) -> Tensor:
    """Return the distributions float32 [N, V] that are sampled after logits [N, V]; N // R rows for each sequence.

    UserError, from this reference, for logits that are not finite.
    """
    texts = ((), ()) if rows.texts is None else zip(*rows.texts, strict=True)
    probs = distributions(logits, rows.each(len(logits)), *texts)
    return probs if out is None else out.copy_(probs)


def draw(
    probs: Tensor,
    keys: Tensor,
    positions: Tensor,
    source: RandomSource,
    purpose: Purpose,
    first: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """Draw one token from each row of probs [N, V]: int64 [N]. N // R rows, one after the other, are of one sequence.

    keys int64 [R, 2], positions int64 [R]; row n is at the position of its sequence + first + n % (N // R). Gumbel-max
    for the purpose SAMPLE, else one uniform and the inverse distribution function.
    """
    each = len(probs) // max(1, len(keys))
    at = positions[:, None] + first + torch.arange(each, device=keys.device)
    tokens = source.draw(probs, keys[:, None].expand(-1, each, 2).reshape(-1, 2), at.reshape(-1), purpose)
    return tokens if out is None else out.copy_(tokens)


def sample(logits: Tensor, rows: SamplingMetadata, out: Tensor | None = None) -> Tensor:
    """Choose the next token after each row of logits [R, V]: int64 [R], at temperature 0 the likeliest."""
    if rows.greedy:
        tokens = rows.penalised(logits).argmax(-1)
        return tokens if out is None else out.copy_(tokens)
    return draw(probabilities(logits, rows), *rows.keyed, rows.source, Purpose.SAMPLE, out=out)


def embed(weight: Tensor, tokens: Tensor, draft: Tensor | None = None) -> Tensor:
    """Return rows of weight [V, D] for tokens [R, T]: [R, T, D]. -1 - j is token j of the row's draft, int64 [R, K]."""
    if draft is not None:
        drafted = draft.gather(1, (-1 - tokens).clamp(min=0).long())
        tokens = torch.where(tokens < 0, drafted, tokens)
    return F.embedding(tokens, weight)


def advance(at: Tensor, counts: Tensor, W: int, windows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Form the numbers of the next forward of R rows, which appends counts[r] of W tokens after those of the last.

    at int32 [3, R] (rows, starts, counts) as in AttentionMetadata, counts int32 [R], windows int32 [N]. Returns the
    next `at`, positions [R, W], and what each query sees: end [R, W], lo [N, R, W].
    """
    starts = at[1] + at[2]
    steps = torch.arange(1, W + 1, device=at.device, dtype=at.dtype)
    end = starts[:, None] + torch.minimum(steps, counts[:, None])
    lo = (end - windows[:, None, None]).clamp(min=0)
    return torch.stack((at[0], starts, counts)), (end - 1).clamp(min=0), end, lo
