"""Ops in C++: the next token, and the acceptance rule.

Arguments and results are those of the references in engine/sampling.py and engine/verify.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...sampling import KeyedSampler, Sampler, SamplingParams, check_finite, choose, penalise
from ...verify import GreedySource, RandomSource, Verdict, verify
from ..tokens import SamplingMetadata
from .library import chosen_isa, library

MASK = 2**64 - 1
WHOLE = 2**31 - 1  # larger than any vocabulary


@lru_cache(maxsize=256)
def sampling_of(params: SamplingParams, seed: int | None = None) -> Any:
    """Convert sampling parameters for C++; `seed`, which may be negative, replaces theirs."""
    seed = params.seed if seed is None else seed
    temperature, top_k = 0.0 if params.greedy else params.temperature, min(params.top_k, WHOLE)
    return library().Sampling(temperature, top_k, params.top_p, params.min_p, seed & MASK)


def sample(
    logits: Tensor,
    params: Sequence[SamplingParams],
    sampler: Sampler,
    keys: Sequence[tuple[int, int]],
    positions: Sequence[int],
    prompts: Sequence[Sequence[int]],
    outputs: Sequence[Sequence[int]],
) -> list[int]:
    """Choose the next token of every row of logits [R, V]. With a sampler that is not keyed, torch draws.

    ValueError if not every row has parameters, a key and a position.
    """
    fixed = isinstance(sampler, KeyedSampler) or all(mine.greedy for mine in params)
    if logits.dtype == torch.float64 or not fixed:
        return choose(logits, params, sampler, keys, positions, prompts, outputs)
    check_finite(logits)
    logits = logits.float()
    if any(mine.penalised for mine in params):
        logits = penalise(logits, params, prompts, outputs)
    logits = logits.contiguous()
    if not len(params) == len(keys) == len(positions) == len(logits):
        raise ValueError(
            f"{len(params)} parameters, {len(keys)} keys and {len(positions)} positions for {len(logits)} rows"
        )
    how = [sampling_of(mine, seed) for mine, (seed, _) in zip(params, keys, strict=True)]
    samples = [sample for _, sample in keys]
    tokens: list[int] = library().choose(
        chosen_isa(), logits.data_ptr(), logits.shape[-1], how, samples, list(positions)
    )
    return tokens


def sample_rows(logits: Tensor, rows: SamplingMetadata) -> Tensor:
    """Choose the next token of every row, as the op `sample` does."""
    if not len(logits):
        return torch.empty(0, dtype=torch.int64)
    keys = [(seed, number) for seed, number in rows.keys.tensor.tolist()]
    prompts, outputs = zip(*rows.texts, strict=True) if rows.texts else ((), ())
    tokens = sample(logits, rows.params, rows.source, keys, rows.positions.tensor.tolist(), prompts, outputs)
    return torch.tensor(tokens, dtype=torch.int64)


def verify_sample(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    widths: Tensor,
    keys: Tensor,
    positions: Tensor,
    source: RandomSource,
) -> Verdict:
    """Apply the acceptance rule of engine/verify.py; torch decides if `source` is neither keyed nor greedy.

    ValueError for shapes that do not match, and for draft tokens outside the vocabulary.
    """
    keyed = isinstance(source, KeyedSampler)
    if target_probs.dtype == torch.float64 or not (keyed or isinstance(source, GreedySource)):
        return verify(draft_tokens, draft_probs, target_probs, widths, keys, positions, source)
    (R, K), V = draft_tokens.shape, target_probs.shape[-1]
    fits = target_probs.shape == (R, K + 1, V) and (draft_probs is None or draft_probs.shape == (R, K, V))
    if not fits or not widths.shape == positions.shape == (R,) or keys.shape != (R, 2):
        raise ValueError(f"the shapes of {R} drafts of {K} tokens and of their distributions do not fit together")
    if R and not 0 <= int(widths.min()) <= int(widths.max()) <= K:
        raise ValueError(f"widths must be in 0 .. {K}, the tokens of a draft, and are {widths.tolist()}")
    drafts, targets = draft_tokens.contiguous(), target_probs.float().contiguous()
    probs = None if draft_probs is None else draft_probs.float().contiguous()
    ratios = torch.zeros(R, K)
    found = []
    each = zip(widths.tolist(), keys.tolist(), positions.tolist(), strict=True)
    for row, (width, (seed, sample_), position) in enumerate(each):
        at_probs = 0 if probs is None or not width else probs[row].data_ptr()
        found.append(
            library().verify(
                chosen_isa(), drafts[row].data_ptr(), width, at_probs, targets[row].data_ptr(), targets.shape[-1],
                seed & MASK, sample_, position, not keyed, ratios[row].data_ptr(),
            )
        )  # fmt: skip
    accepted, following = torch.tensor(found, dtype=torch.int64).view(R, 2).unbind(1)
    return Verdict(accepted, following, ratios)
