"""From logits to the distribution that is sampled, and from the distribution to a token.

The order of operations is that of transformers: repetition penalty, presence and frequency penalty, temperature,
top-k, top-p, min-p. Probabilities are float32, whatever the model's dtype. Among equal logits the lower token id comes
first, at temperature 0 and in every filter.

Sampling is Gumbel-max (Gumbel 1954; Maddison et al. 2014): argmax of log p plus Gumbel noise is a sample of p. The
noise is a function of (seed, sample, position, purpose) and the token's id alone (common/philox.py). So a request
gives the same tokens alone, in a batch, or interrupted and started again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from common import philox
from common.errors import UserError

COLDEST = 1e-30  # below it logits / temperature overflow float32, so the token is chosen greedily


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen, and when decoding stops. Temperature 0 is greedy: always the most likely token.

    Penalties (all off by default):
    - repetition (Keskar et al. 2019, CTRL): divides the logit of every token in prompt or output where it is positive,
      and multiplies it where it is negative.
    - presence, frequency (OpenAI's API): subtracted from the logit of a token in the output, once, and once per
      occurrence. The prompt does not count.
    """

    temperature: float = 0.0
    top_k: int = 0  # keep the k most likely tokens; 0: all
    top_p: float = 1.0  # keep the smallest set of tokens that holds this much probability; 1: all
    min_p: float = 0.0  # keep tokens at least this fraction as likely as the most likely one; 0: all
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 64
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        def need(good: bool, name: str, rule: str) -> None:
            if not good:
                raise UserError(f"{name} must be {rule}, got {getattr(self, name)!r}")

        need(0 <= self.temperature < float("inf"), "temperature", "a number of at least 0 (0 is greedy)")
        need(self.top_k >= 0, "top_k", "at least 0 (0 keeps all tokens)")
        need(0 < self.top_p <= 1, "top_p", "in (0, 1] (1 keeps all tokens)")
        need(0 <= self.min_p <= 1, "min_p", "in [0, 1] (0 keeps all tokens)")
        need(-2 <= self.presence_penalty <= 2, "presence_penalty", "in [-2, 2]")
        need(-2 <= self.frequency_penalty <= 2, "frequency_penalty", "in [-2, 2]")
        need(1e-6 <= self.repetition_penalty <= 1e6, "repetition_penalty", "in [1e-6, 1e6] (1 is off)")
        need(self.max_new_tokens >= 1, "max_new_tokens", "at least 1")
        need(all(self.stop), "stop", "strings that are not empty")

    @cached_property
    def greedy(self) -> bool:
        return self.temperature < COLDEST

    @cached_property
    def penalised(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    @cached_property
    def filters(self) -> tuple[float, int, float, float]:
        """Return temperature, top_k, top_p, min_p; a greedy choice is a sample of the likeliest token alone."""
        return (1.0, 1, 1.0, 0.0) if self.greedy else (self.temperature, self.top_k, self.top_p, self.min_p)


class Sampler(Protocol):
    """The source of all randomness of a decoding loop. Tests replace it to walk every possible outcome."""

    def draw(self, probs: Tensor, keys: Tensor, positions: Tensor, purpose: philox.Purpose) -> Tensor:
        """Sample one token per row from probs [R, V]: int64 [R].

        keys int64 [R, 2]: seed and sample of each row's sequence; positions int64 [R].
        """
        ...


@dataclass(frozen=True)
class KeyedSampler:
    """Gumbel-max with the keyed noise of common/philox.py."""

    def draw(self, probs: Tensor, keys: Tensor, positions: Tensor, purpose: philox.Purpose) -> Tensor:
        noise = philox.gumbel(keys[:, 0], keys[:, 1], positions, purpose, probs.shape[-1])
        return (probs.log() + noise).argmax(-1)


def penalise(
    logits: Tensor, params: Rows[SamplingParams], prompts: Rows[Rows[int]], outputs: Rows[Rows[int]]
) -> Tensor:
    """Apply each row's penalties to logits [R, V]; row r follows prompts[r] and the output so far, outputs[r]."""
    logits = logits.clone()
    for row, mine, prompt, output in zip(logits, params, prompts, outputs, strict=True):
        if mine.repetition_penalty != 1:
            seen = torch.tensor(sorted({*prompt, *output}), device=logits.device)
            values = row[seen]
            row[seen] = torch.where(values > 0, values / mine.repetition_penalty, values * mine.repetition_penalty)
        if output and (mine.presence_penalty or mine.frequency_penalty):
            counts = Counter(output)
            tokens = torch.tensor(list(counts), device=logits.device)
            times = torch.tensor(list(counts.values()), device=logits.device, dtype=row.dtype)
            row[tokens] -= mine.presence_penalty + mine.frequency_penalty * times
    return logits


def check_finite(logits: Tensor) -> None:
    """Raise UserError, naming the cause, if logits [..., V] hold NaN or inf. -inf beside finite logits is allowed."""
    if not bool(logits.amax(-1).isfinite().all()):  # the maximum of a row with NaN is NaN
        raise not_finite(logits.dtype)


def not_finite(dtype: torch.dtype) -> UserError:
    """Return the error for logits of this dtype that are not finite, with what to try."""
    if dtype == torch.float16:
        cause, way_out = "numbers overflowed in float16, which ends at 65504", "--dtype bfloat16 or --dtype float32"
    else:
        cause = "a weight, an activation or a cache value overflowed its dtype, or the checkpoint holds such values"
        way_out = "--dtype float32, without narrower formats"
    return UserError(f"the model's logits are not finite: {cause}; try {way_out}")


def most_likely(scores: Tensor, counts: Rows[int]) -> Tensor:
    """Mark the counts[r] largest scores of row r, bool [R, V]; among equal ones those with the lower ids."""
    count = torch.tensor(counts, device=scores.device)[:, None]
    least = scores.topk(max(counts)).values.gather(-1, count - 1)
    above, equal = scores > least, scores == least
    return above | (equal & (equal.cumsum(-1) <= count - above.sum(-1, keepdim=True)))


def ranked(scores: Tensor, count: int) -> Tensor:
    """Return the ids of the `count` largest scores [R, V], largest first, ties by lower id: int64 [R, count]."""
    ids = most_likely(scores, [count] * len(scores)).nonzero()[:, 1].view(-1, count)  # ascending
    return ids.gather(-1, scores.gather(-1, ids).sort(dim=-1, descending=True, stable=True).indices)


def probabilities(
    logits: Tensor, params: Rows[SamplingParams], prompts: Rows[Rows[int]] = (), outputs: Rows[Rows[int]] = ()
) -> Tensor:
    """Return the distributions that are sampled: logits [R, V] -> probabilities [R, V], float32 (float64 stays).

    Each row has its own parameters. prompts and outputs are read only if a penalty is on. At temperature 0 a row is
    one-hot. UserError for logits that are not finite.
    """
    check_finite(logits)
    if logits.dtype != torch.float64:
        logits = logits.float()
    if any(mine.penalised for mine in params):
        logits = penalise(logits, params, prompts, outputs)
    if all(mine.greedy for mine in params):
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    temperature, top_k, top_p, min_p = zip(*(mine.filters for mine in params), strict=True)

    def column(values: Iterable[float]) -> Tensor:
        return torch.tensor(list(values), dtype=logits.dtype, device=logits.device)[:, None]

    V = logits.shape[-1]
    logits = logits / column(temperature)
    if any(0 < k < V for k in top_k):
        counts = [min(k, V) or V for k in top_k]
        logits = logits.masked_fill(~most_likely(logits, counts), float("-inf"))
    if any(p < 1 for p in top_p):
        ascending, order = (each.flip(-1) for each in logits.sort(dim=-1, descending=True, stable=True))
        dropped = ascending.softmax(-1).cumsum(-1) <= column(1 - p for p in top_p)
        dropped[..., -1] = False  # the most likely token is always kept
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), float("-inf"))
    probs = logits.softmax(-1)
    if any(min_p):
        unlikely = probs < column(min_p) * probs.amax(-1, keepdim=True)
        probs = logits.masked_fill(unlikely, float("-inf")).softmax(-1)
    return probs


def choose(
    logits: Tensor,
    params: Rows[SamplingParams],
    sampler: Sampler,
    keys: Rows[tuple[int, int]],
    positions: Rows[int],
    prompts: Rows[Rows[int]],
    outputs: Rows[Rows[int]],
) -> list[int]:
    """Choose the next token of every row: the most likely at temperature 0, else a sample keyed by keys and positions.

    keys: seed and sample of each row's sequence. UserError for logits that are not finite.
    """
    if all(mine.greedy for mine in params):
        check_finite(logits)
        penalised = any(mine.penalised for mine in params)
        best = penalise(logits.float(), params, prompts, outputs) if penalised else logits
        return best.argmax(-1).tolist()
    probs = probabilities(logits, params, prompts, outputs)
    device = logits.device
    at = torch.tensor(keys, device=device), torch.tensor(positions, device=device)
    return sampler.draw(probs, *at, philox.Purpose.SAMPLE).tolist()
