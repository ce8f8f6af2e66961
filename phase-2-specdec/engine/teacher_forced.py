"""Acceptance on text that is given: what a drafter is worth where nobody chose the text to suit it.

At each point of a held-out text the drafter proposes from the true prefix and the rule judges; the text then moves on
along the truth, by as many tokens as the step would have given. Sampled output drifts to what the models find easy, and
greedy output loops; both flatter a drafter.
"""

from __future__ import annotations

import torch

from .drafting import Drafter
from .model import Transformer
from .sampling import SamplingParams, probabilities
from .sequence import Ending, Sequence
from .speculative import target_logits
from .verify import RandomSource, verify


def teacher_forced_acceptance(
    model: Transformer,
    drafter: Drafter,
    prompt: list[int],
    truth: list[int],
    params: SamplingParams,
    k: int,
    source: RandomSource,
) -> list[int]:
    """Count the accepted of k draft tokens at each point of `truth`, the text that follows `prompt` (token ids)."""
    sequence, accepted = Sequence(prompt, params, Ending()), []
    device = model.embedding.weight.device
    while len(sequence.tokens) + k < len(truth):
        draft = drafter.propose([sequence], k)
        drafted = draft.tokens.tolist()
        logits = target_logits(model, [prompt + sequence.tokens], drafted)[0]  # [K+1, V]
        outputs = [sequence.tokens + drafted[0][:j] for j in range(k + 1)]
        verdict = verify(
            draft.tokens.to(device),
            draft.probs,
            probabilities(logits, [params] * (k + 1), [prompt] * (k + 1), outputs)[None],
            torch.tensor([k], device=device),
            torch.tensor([sequence.key], device=device),
            torch.tensor([sequence.length], device=device),
            source,
        )
        accepted.append(int(verdict.accepted))
        drafter.observe([accepted[-1]])
        for token in truth[len(sequence.tokens) :][: accepted[-1] + 1]:
            sequence.append(token)
    return accepted
