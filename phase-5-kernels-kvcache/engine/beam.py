"""Beam search: keep the few likeliest continuations at every step, and return the best one that ended.

A hypothesis' score is the sum of its log-probabilities, divided by length ** length_penalty when the hypothesis ends
(as in transformers; Wu et al. 2016 use another normaliser). The search stops when no running hypothesis, scored at its
present length, beats the worst ending that was kept.

    beam_search(loaded.model, prompt, SamplingParams(max_new_tokens=32), loaded.ending, beams=4)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .forward import next_logits
from .model import Transformer
from .sampling import SamplingParams, check_finite, ranked
from .sequence import Ending


@dataclass(frozen=True)
class Hypothesis:
    """A continuation and its score: the summed log-probability while running, the normalised one once ended."""

    tokens: list[int]
    score: float
    forwards: int = 0  # model forwards of the whole search; set on the result only


def _expand(model: Transformer, prompt: list[int], running: list[Hypothesis], keep: int) -> list[Hypothesis]:
    """Return the `keep` best one-token extensions of all running hypotheses, best first."""
    sequences = [prompt + hypothesis.tokens for hypothesis in running]
    scores = torch.tensor([hypothesis.score for hypothesis in running])[:, None]
    logits = next_logits(model, sequences)
    check_finite(logits)
    totals = logits.float().log_softmax(-1).cpu() + scores  # [beams, V]
    best = ranked(totals.view(1, -1), min(keep, totals.numel()))[0]
    return [
        Hypothesis([*running[index // totals.shape[1]].tokens, index % totals.shape[1]], score)
        for index, score in zip(best.tolist(), totals.flatten()[best].tolist(), strict=True)
    ]


def beam_search(
    model: Transformer,
    prompt: list[int],
    params: SamplingParams,
    ending: Ending,
    beams: int,
    length_penalty: float = 1.0,
) -> Hypothesis:
    """Return the best of at most `beams` endings. Of `params`, only max_new_tokens and ignore_eos are used."""
    eos = () if params.ignore_eos else ending.eos_ids
    running, ended = [Hypothesis([], 0.0)], list[Hypothesis]()
    steps = 0
    while running:
        steps += 1
        candidates = _expand(model, prompt, running, keep=max(2, 1 + len(eos)) * beams)
        over = [c.tokens[-1] in eos or steps == params.max_new_tokens for c in candidates]
        # An ending counts only among the best `beams` candidates; a worse one would displace a better hypothesis.
        just_ended = [c for c, done in zip(candidates[:beams], over, strict=False) if done]
        ended += [Hypothesis(c.tokens, c.score / steps**length_penalty) for c in just_ended]
        ended = sorted(ended, key=lambda h: -h.score)[:beams]
        running = [c for c, done in zip(candidates, over, strict=True) if not done][:beams]
        full = len(ended) == beams
        if full and running and running[0].score / steps**length_penalty <= ended[-1].score:
            break
    return Hypothesis(ended[0].tokens, ended[0].score, forwards=steps)
