"""`verify_prefix`, `verify_greedy`, `verify_sample`, `sample`: see prefix.cu, verify.cu, sample.cu."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from ...sampling import KeyedSampler, Sampler, SamplingParams, penalise
from ...verify import GreedySource, RandomSource, Verdict
from .support import FORMATS, address, floating, of_dtype, on_device, require, rows_of, same_shape, stream_of


def choices_of(op: str, scores: Tensor) -> Tensor:
    """Return the argmax of each row of scores [..., V], int64 [...]. Ties: the lowest index."""
    library = on_device(op, scores=scores)
    floating(op, scores=scores)
    require(op, scores.shape[-1] > 0, "there are no scores", "a vocabulary")
    rows = rows_of(scores)
    out = torch.empty(scores.shape[:-1], dtype=torch.int64, device=scores.device)
    R, V = rows.shape
    found = torch.empty(R * library.choice_parts(V), dtype=torch.int64, device=scores.device)
    library.choices(
        FORMATS[rows.dtype], address(rows), rows.stride(0), R, V, address(found), address(out), stream_of(scores)
    )
    return out


def _count(op: str, draft_tokens: Tensor, choices: Tensor, widths: Tensor, following: bool) -> tuple[Tensor, Tensor]:
    R, K = draft_tokens.shape
    library = on_device(op, draft_tokens=draft_tokens, choices=choices, widths=widths)
    same_shape(op, "choices", choices, R, K + 1)
    same_shape(op, "widths", widths, R)
    of_dtype(op, torch.int64, draft_tokens=draft_tokens, choices=choices, widths=widths)
    draft, choices, widths = draft_tokens.contiguous(), choices.contiguous(), widths.contiguous()
    accepted, found = torch.empty_like(widths), torch.empty_like(widths)
    next_tokens = address(found) if following else 0
    library.prefix(
        address(draft), address(choices), address(widths), address(accepted), next_tokens, R, K, stream_of(widths)
    )
    return accepted, found


def verify_prefix(draft_tokens: Tensor, choices: Tensor, widths: Tensor) -> Tensor:
    """Return how many leading draft_tokens [R, K] equal the target's choices [R, K+1]: int64 [R]."""
    return _count("verify_prefix", draft_tokens, choices, widths, following=False)[0]


def verify_greedy(draft_tokens: Tensor, scores: Tensor, widths: Tensor) -> tuple[Tensor, Tensor]:
    """Do the same with the argmax of scores [R, K+1, V]; return the counts and the next tokens, both int64 [R]."""
    return _count("verify_greedy", draft_tokens, choices_of("verify_greedy", scores), widths, following=True)


def is_keyed(op: str, source: object) -> bool:
    """Return True for a keyed source, False for a greedy one. UserError for other sources."""
    if isinstance(source, GreedySource):
        return False
    require(op, isinstance(source, KeyedSampler), f"a source of type {type(source).__name__}", "a keyed or greedy one")
    return True


def keyed(keys: Tensor, positions: Tensor) -> Tensor:
    """Return the kernels' keys, int64 [R, 4], from (seed, sample): sample, low and high half of the seed, position."""
    words = keys.new_empty(len(keys), 4)
    words[:, 0], words[:, 1] = keys[:, 1], keys[:, 0] & 0xFFFFFFFF
    words[:, 2], words[:, 3] = (keys[:, 0] >> 32) & 0xFFFFFFFF, positions
    return words


def verify_sample(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    widths: Tensor,
    keys: Tensor,
    positions: Tensor,
    source: RandomSource,
) -> Verdict:
    """Apply the acceptance rule, as verify() does.

    draft_tokens int64 [R, K], draft_probs float32 [R, K, V] or None for one-hot, target_probs float32 [R, K+1, V],
    widths, positions int64 [R], keys int64 [R, 2]. UserError for a source that is neither keyed nor greedy.
    """
    op = "verify_sample"
    random = is_keyed(op, source)
    (R, K), V = draft_tokens.shape, target_probs.shape[-1]
    library = on_device(
        op, draft_tokens=draft_tokens, draft_probs=draft_probs, target_probs=target_probs, widths=widths,
        keys=keys, positions=positions,
    )  # fmt: skip
    same_shape(op, "target_probs", target_probs, R, K + 1, V)
    if draft_probs is not None:
        same_shape(op, "draft_probs", draft_probs, R, K, V)
    of_dtype(op, torch.float32, target_probs=target_probs, draft_probs=draft_probs)
    of_dtype(op, torch.int64, draft_tokens=draft_tokens, widths=widths)
    tokens, target, wide = draft_tokens.contiguous(), target_probs.contiguous(), widths.contiguous()
    draft = None if draft_probs is None else draft_probs.contiguous()
    words = keyed(keys, positions)
    accepted, following = torch.empty_like(wide), torch.empty_like(wide)
    ratios = target.new_empty(R, K)
    library.verify_sample(
        address(tokens), address(draft), address(target), address(wide), address(words), address(accepted),
        address(following), address(ratios), R, K, V, not random, stream_of(target),
    )  # fmt: skip
    return Verdict(accepted, following, ratios)


def sample(
    logits: Tensor,
    params: Rows[SamplingParams],
    sampler: Sampler,
    keys: Rows[tuple[int, int]],
    positions: Rows[int],
    prompts: Rows[Rows[int]],
    outputs: Rows[Rows[int]],
) -> list[int]:
    """Choose the next token of every row of logits [R, V], as choose() does. UserError unless the sampler is keyed."""
    op = "sample"
    library = on_device(op, logits=logits)
    floating(op, logits=logits)
    if any(mine.penalised for mine in params):
        logits = penalise(logits.float(), params, prompts, outputs)
    if all(mine.greedy for mine in params):
        greedy: list[int] = choices_of(op, logits).tolist()
        return greedy
    require(op, is_keyed(op, sampler), "a temperature above 0 and no sampler", "keyed sampler")
    rows = rows_of(logits)
    R, V = rows.shape
    require(op, R == 0 or V > 0, "there are no scores", "a vocabulary")
    require(op, len(params) == R, f"{len(params)} parameters", f"{R}, one for each row")
    device, whole, exact = logits.device, torch.int64, torch.float64
    at = torch.tensor(positions, dtype=whole, device=device)
    words = keyed(torch.tensor(keys, dtype=whole, device=device).view(R, 2), at)
    filters = torch.tensor([mine.filters for mine in params], dtype=exact, device=device).view(R, 4)
    out = torch.empty(R, dtype=torch.int64, device=logits.device)
    library.sample(
        FORMATS[rows.dtype], address(rows), rows.stride(0), address(words), address(out), R, V, address(filters),
        stream_of(logits),
    )  # fmt: skip
    tokens: list[int] = out.tolist()
    return tokens
