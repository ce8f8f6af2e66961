"""C++ runners, generations, drafts and distributions without an LLM."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.philox import Purpose
from phase5.cpp_runner import CppRunner
from phase5.kernels import cpp
from phase5.kernels.cpp import CppModel, library
from phase5.kernels.cpp.model import Cache
from phase5.kernels.cpp.ops import sampling_of
from phase5.kv_cache import KVOptions
from phase5.model import Transformer
from phase5.runner import make_manager
from phase5.sampling import SamplingParams


def make_cpp_runner(model: Transformer, fast: CppModel, options: KVOptions, rows: int, tokens: int) -> CppRunner:
    return CppRunner(model, fast, make_manager(model, options, rows, tokens, torch.float32))


def generate_plain(
    fast: CppModel,
    cache: Cache,
    row: int,
    new_tokens: Sequence[int],
    count: int,
    params: SamplingParams,
    *,
    ends: Sequence[int] = (),
    sample: int = 0,
    position: int | None = None,
) -> list[int]:
    """Decode plainly in one call, up to `count` tokens, or until one of `ends`, which is then the last token."""
    sequence = fast.sequence(cache, row, new_tokens, params, sample, position)
    return [step.next[0] for step in fast.decode([sequence], None, [0], count, ends=ends)[0]]


def draft_chain(
    fast: CppModel,
    cache: Cache,
    row: int,
    new_tokens: Sequence[int],
    count: int,
    params: SamplingParams,
    *,
    sample: int = 0,
    position: int | None = None,
    noise: Purpose = Purpose.DRAFT,
) -> tuple[list[int], Tensor]:
    """Draw `count` tokens, each after the one before, in one call; return them and their distributions [count, V]."""
    sequence = fast.sequence(cache, row, new_tokens, params, sample, position)
    tokens, probs = fast.propose(library().ModelDrafter(fast._engine, [sequence], [int(noise)]), [max(0, count)])
    return tokens[0], probs[0]


def cpp_probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """Return the distribution that is sampled from logits [R, V], without penalties."""
    probs = logits.float().contiguous().clone()
    library().probabilities(cpp.chosen_isa(), probs.data_ptr(), *probs.shape, sampling_of(params))
    return probs
