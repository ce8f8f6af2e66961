"""How far a lossy policy's text is from the target's law: two numbers, both computed, neither sampled.

- On real contexts: at every position of held-out text, the law of the first token that a step emits. With good(x) = 1
  where the policy lets x stand, it is

      law(x) = draft(x) good(x) + (1 - sum of draft good) target(x)

- On a toy: the law of whole outputs of the loop, from a walk through everything that its random numbers could do.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

import engine
from common.philox import Purpose
from common.prompts import load_prompts
from engine.policies import AcceptancePolicy, Lossy
from engine.sampling import probabilities

from .runs import Lab

Law = dict[tuple[int, ...], float]


def emitted_law(draft_probs: Tensor, target_probs: Tensor, good: Tensor) -> Tensor:
    """The law [..., V] of the first token of a step; `good` bool [..., V]."""
    stands = draft_probs * good
    return stands + (1 - stands.sum(-1, keepdim=True)) * target_probs


@dataclass(frozen=True)
class Contexts:
    """What target and draft say after each token of the true continuation of some prompts, logits [T, V] by prompt."""

    target: list[Tensor]
    draft: list[Tensor]

    @staticmethod
    @torch.inference_mode()
    def of(lab: Lab) -> Contexts:
        session, found = lab.session(), Contexts([], [])
        assert session.draft is not None, "the bench asks for a draft model"
        encode = session.loaded.tokenizer.encode
        for prompt in load_prompts("code", "test")[: 2 * lab.grid.spread * lab.options.prompts]:
            text = encode(prompt.text)
            whole = (text + encode(prompt.continuation))[: session.loaded.config.context]
            tokens = torch.tensor([whole], device=lab.device)
            found.target.append(session.loaded.model(tokens)[0, len(text) - 1 :].float())
            found.draft.append(session.draft.model(tokens)[0, len(text) - 1 :].float())
        return found


def first_token_distance(contexts: Contexts, policy: Lossy, temperature: float, seed: int) -> dict[str, float]:
    """Means over contexts of what POLICIES defines; the resamples are of prompts, whose contexts hang together."""
    params = engine.SamplingParams(temperature=temperature)
    of_prompts, excess = [], []
    for logits, guess in zip(contexts.target, contexts.draft, strict=True):
        target_probs = probabilities(logits, params)
        opinion = logits.softmax(-1) if params.greedy else target_probs
        difference = emitted_law(probabilities(guess, params), target_probs, policy.good(opinion)) - target_probs
        of_prompts.append(difference.abs().sum(-1).mean().item() / 2)
        excess.append((difference * -logits.log_softmax(-1) / math.log(2)).sum(-1).mean().item())
    draws = np.random.default_rng(seed).integers(len(of_prompts), size=(2000, len(of_prompts)))
    low, high = np.percentile(np.asarray(of_prompts)[draws].mean(1), [2.5, 97.5])
    return {
        "first_token_tv": float(np.mean(of_prompts)),
        "first_token_tv_low": float(low),
        "first_token_tv_high": float(high),
        "excess_bits": float(np.mean(excess)),
    }


class Walk:
    """Stands in for random numbers, and takes every way through a run in turn, each with its probability."""

    def law(self, run: Callable[[Walk], tuple[int, ...]]) -> Law:
        law: Law = defaultdict(float)
        self.ways: list[
            list[tuple[int, float]]
        ] = []  # at every draw so far: the choices that are left, the taken first
        while True:
            self.at, self.weight = 0, 1.0
            outcome = run(self)
            law[outcome] += self.weight
            while self.ways and len(self.ways[-1]) == 1:
                self.ways.pop()
            if not self.ways:
                return law
            self.ways[-1].pop(0)

    def draw(self, probs: Tensor, samples: Tensor, positions: Tensor, purpose: Purpose) -> Tensor:
        tokens = []
        for row in probs.tolist():
            if self.at == len(self.ways):
                self.ways.append([(token, chance) for token, chance in enumerate(row) if chance > 0])
            token, chance = self.ways[self.at][0]
            self.at += 1
            self.weight *= chance
            tokens.append(token)
        return torch.tensor(tokens, dtype=torch.long)

    def decide(self, probability: Tensor, samples: Tensor, positions: Tensor, trial: int = 0) -> Tensor:
        raise NotImplementedError("lossy policies decide without chance")

    def draw_several(self, probs: Tensor, count: int, samples: Tensor, positions: Tensor, purpose: Purpose) -> Tensor:
        raise NotImplementedError("chains draw one token at a time")


class Table(engine.FakeModel):
    """A model whose next-token logits depend on the last token alone: a table [V, V]."""

    def __init__(self, table: Tensor) -> None:
        super().__init__(len(table), context=64)
        self.table = table

    def logits(self, hidden: Tensor) -> Tensor:
        return self.table[hidden[..., 0] % len(self.table)]  # a context's number ends in its last token


def toy_distance(policy: AcceptancePolicy, temperature: float, size: int = 3) -> float:
    """Total variation between the laws of 3 tokens, plain and by the loop at K = 2, mean over all first contexts."""
    generator = torch.Generator().manual_seed(0)
    target, noise = 2 * torch.randn(2, size, size, generator=generator, dtype=torch.float64)
    models = Table(target), Table(target + noise / 2)
    params = engine.SamplingParams(temperature=temperature, max_new_tokens=3)

    def plain(start: int, walk: Walk) -> tuple[int, ...]:
        return tuple(engine.generate(models[0], [[start]], params, randomness=walk)[0].tokens)

    def speculative(start: int, walk: Walk) -> tuple[int, ...]:
        sequence = engine.Sequence([start], params, engine.Ending())
        drafter = engine.ModelDrafter(models[1], params, walk)
        loop = engine.speculative_decode(
            models[0], drafter, [sequence], params, policy, lambda: engine.FixedController(2), walk
        )
        for _ in loop:
            pass
        return tuple(sequence.tokens)

    distances = []
    for start in range(size):
        one, other = Walk().law(partial(plain, start)), Walk().law(partial(speculative, start))
        distances.append(sum(abs(one.get(tokens, 0) - other.get(tokens, 0)) for tokens in one | other) / 2)
    return sum(distances) / size
