"""Draft and verify: a cheap drafter guesses K tokens, one target forward checks them all.

Every step: the drafter proposes K tokens; ONE target forward over sequence and draft gives the K+1 distributions that
follow the sequence and each draft token; the rule of verify.py says how many are accepted and what follows. A step
costs one target forward and gives between 1 and K+1 tokens of exactly the target's distribution (Leviathan et al. 2023,
Algorithm 1; Chen et al. 2023, Algorithm 2).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from common.device import synchronize

from .context import visible, window_start
from .drafting import Draft, Drafter
from .model import Transformer
from .sampling import probabilities
from .sequence import Sequence
from .verify import RandomSource, Verdict, random_source, verify


@dataclass(frozen=True)
class StepStats:
    """What one step did for one sequence. Times are of the whole step, which a batch shares, in milliseconds.

    Draft tokens past an EOS, a stop string or the token limit count as neither proposed nor accepted.
    """

    k: int  # draft tokens asked for
    proposed: int  # draft tokens that the target looked at
    accepted: int
    emitted: int  # tokens that the sequence gained
    draft_ms: float
    verify_ms: float
    accept_ms: float
    kv_ms: float = 0.0  # nothing is cached yet
    rss_mib: float | None = None  # of the process after the step, where it was asked for


@dataclass(frozen=True)
class Step:
    """One round of the loop, with all that was decided in it."""

    sequences: list[Sequence]
    starts: list[int]  # output length of each sequence before the step
    draft: Draft
    target_probs: Tensor  # [R, K+1, V]
    verdict: Verdict
    stats: list[StepStats]


def block_width(sequence: Sequence, k: int, context: int) -> int:
    """Return how many tokens to draft: at most k, none past the token limit, and none past a jump of the window.

    The token limit leaves room for the token that follows the draft, so one less than what remains is useful.
    """
    remaining = sequence.params.max_new_tokens - len(sequence.tokens)
    length, width = sequence.length, min(k, remaining - 1)
    if length + width <= context:
        return width
    while width > 0 and window_start(length + width, context) != window_start(length, context):
        width -= 1
    return width


@torch.inference_mode()
def target_logits(model: Transformer, texts: list[list[int]], drafts: list[list[int]]) -> Tensor:
    """Compute the logits after each text and each of its draft tokens, [R, K+1, V], in one right-padded forward.

    K is the longest draft; shorter rows repeat their last position.
    """
    windows = [visible(text + draft, model.config.context) for text, draft in zip(texts, drafts, strict=True)]
    longest, K = max(map(len, windows)), max(map(len, drafts))
    device = model.embedding.weight.device
    padded = torch.tensor([window + [0] * (longest - len(window)) for window in windows], device=device)
    wanted = [
        [min(len(window) - len(draft) - 1 + j, len(window) - 1) for j in range(K + 1)]
        for window, draft in zip(windows, drafts, strict=True)
    ]
    return model.logits(model.hidden(padded, wanted=torch.tensor(wanted, device=device)))


def speculative_step(
    model: Transformer,
    drafter: Drafter,
    sequences: list[Sequence],
    k: int,
    source: RandomSource,
) -> Step:
    """Draft, verify, accept, for every given sequence at once; each takes its tokens and may end."""
    device = model.embedding.weight.device
    widths = [block_width(sequence, k, model.config.context) for sequence in sequences]
    K = max(widths)
    began = time.perf_counter()
    draft = drafter.propose(sequences, K)
    synchronize(device)
    drafted = time.perf_counter()

    drafts = [row[:width] for row, width in zip(draft.tokens.tolist(), widths, strict=True)]
    logits = target_logits(model, [s.prompt + s.tokens for s in sequences], drafts)  # [R, K+1, V]
    synchronize(device)
    verified = time.perf_counter()

    # Penalties see at each position what plain decoding would have seen there: the output, and the draft up to it.
    params = [s.params for s in sequences for _ in range(K + 1)]
    prompts = [s.prompt for s in sequences for _ in range(K + 1)]
    outputs = [s.tokens + new[:j] for s, new in zip(sequences, drafts, strict=True) for j in range(K + 1)]
    target_probs = probabilities(logits.flatten(0, 1), params, prompts, outputs).view(*logits.shape)
    verdict = verify(
        draft.tokens.to(device),
        draft.probs,
        target_probs,
        torch.tensor(widths, device=device),
        torch.tensor([s.key for s in sequences], device=device),
        torch.tensor([s.length for s in sequences], device=device),
        source,
    )
    accepted, next_tokens = verdict.accepted.tolist(), verdict.next_tokens.tolist()
    starts, gained = [len(s.tokens) for s in sequences], []
    for sequence, new, kept, following in zip(sequences, drafts, accepted, next_tokens, strict=True):
        before = len(sequence.tokens)
        for token in [*new[:kept], following]:
            if not sequence.append(token):
                break
        gained.append(len(sequence.tokens) - before)
    drafter.observe(accepted)
    done = time.perf_counter()

    times = {
        "draft_ms": (drafted - began) * 1e3,
        "verify_ms": (verified - drafted) * 1e3,
        "accept_ms": (done - verified) * 1e3,
    }
    stats = []
    for width, kept, emitted in zip(widths, accepted, gained, strict=True):
        cut = emitted <= kept  # the text ended inside the accepted part
        stats.append(
            StepStats(
                k=width,
                proposed=emitted if cut else width,
                accepted=min(kept, emitted),
                emitted=emitted,
                **times,
            )
        )
    return Step(sequences, starts, draft, target_probs, verdict, stats)


def speculative_decode(
    model: Transformer,
    drafter: Drafter,
    sequences: list[Sequence],
    k: int,
    source: RandomSource | None = None,
) -> Iterator[Step]:
    """Decode a batch to its end by draft and verify. Acceptance is ragged: every row advances at its own pace."""
    source = source or random_source(sequence.params for sequence in sequences)
    while active := [sequence for sequence in sequences if sequence.finish_reason is None]:
        yield speculative_step(model, drafter, active, k, source)
