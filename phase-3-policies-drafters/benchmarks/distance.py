"""The distance of a lossy policy's output from the target's law: two numbers, both computed exactly.

- On real contexts: at every position of held-out text, the law of the first token that a step emits. With good(x) = 1
  if the policy accepts x, it is

      law(x) = draft(x) good(x) + (1 - sum of draft good) target(x)

- On a toy pair of models: the law of whole outputs of the loop, by enumerating all results of its random numbers.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import engine
from common.philox import Purpose
from common.prompts import Prompt
from engine.policies import AcceptancePolicy, Lossy
from engine.sampling import probabilities

Law = dict[tuple[int, ...], float]


def emitted_law(draft_probs: Tensor, target_probs: Tensor, good: Tensor) -> Tensor:
    """Compute the law [..., V] of the first token of a step; `good` bool [..., V]."""
    accepted = draft_probs * good
    return accepted + (1 - accepted.sum(-1, keepdim=True)) * target_probs


@dataclass(frozen=True)
class Contexts:
    """Logits [T, V] of target and draft at each position of a prompt's true continuation."""

    target: Tensor
    draft: Tensor

    @staticmethod
    @torch.inference_mode()
    def of(target: engine.LoadedModel, draft: engine.LoadedModel, prompt: Prompt) -> Contexts:
        text, device = target.tokenizer.encode(prompt.text), target.model.embedding.weight.device
        whole = (text + target.tokenizer.encode(prompt.continuation))[: target.config.context]
        tokens = torch.tensor([whole], device=device)
        both = (loaded.model(tokens)[0, len(text) - 1 :].float() for loaded in (target, draft))
        return Contexts(*both)


def first_token_distance(contexts: Contexts, policy: Lossy, temperature: float) -> dict[str, float]:
    """Compute the figures that POLICIES defines, as means over the contexts of one prompt."""
    params, logits = engine.SamplingParams(temperature=temperature), contexts.target
    target_probs = probabilities(logits, [params] * len(logits))
    opinion = logits.softmax(-1) if params.greedy else target_probs
    law = emitted_law(probabilities(contexts.draft, [params] * len(logits)), target_probs, policy.good(opinion))
    bits = ((law - target_probs) * -logits.log_softmax(-1) / math.log(2)).sum(-1)
    distance = (law - target_probs).abs().sum(-1) / 2
    return {"first_token_tv": distance.mean().item(), "excess_bits": bits.mean().item()}


class Walk:
    """Replaces random numbers: enumerates all outcomes of a run, each with its probability."""

    def law(self, run: Callable[[Walk], tuple[int, ...]]) -> Law:
        law: Law = defaultdict(float)
        self.choices: list[list[tuple[int, float]]] = []  # at every draw so far: the current choice, then those left
        while True:
            self.at, self.weight = 0, 1.0
            outcome = run(self)
            law[outcome] += self.weight
            while self.choices and len(self.choices[-1]) == 1:
                self.choices.pop()
            if not self.choices:
                return law
            self.choices[-1].pop(0)

    def draw(self, probs: Tensor, samples: Tensor, positions: Tensor, purpose: Purpose) -> Tensor:
        tokens = []
        for row in probs.tolist():
            if self.at == len(self.choices):
                self.choices.append([(token, chance) for token, chance in enumerate(row) if chance > 0])
            token, chance = self.choices[self.at][0]
            self.at += 1
            self.weight *= chance
            tokens.append(token)
        return torch.tensor(tokens, dtype=torch.long)

    def decide(self, probability: Tensor, samples: Tensor, positions: Tensor, trial: int = 0) -> Tensor:
        raise NotImplementedError("lossy policies decide without random numbers")

    def draw_several(self, probs: Tensor, count: int, samples: Tensor, positions: Tensor, purpose: Purpose) -> Tensor:
        raise NotImplementedError("chains draw one token at a time")


class Table(engine.FakeModel):
    """A model whose next-token logits depend on the last token alone: a table [V, V]."""

    def __init__(self, table: Tensor) -> None:
        super().__init__(len(table), context=64)
        self.table = table

    def logits(self, hidden: Tensor) -> Tensor:
        return self.table[hidden[..., 0] % len(self.table)]  # a context's number modulo V is its last token


def toy_distance(policy: AcceptancePolicy, temperature: float, size: int = 3) -> float:
    """Compute the total variation between the laws of 3 tokens, plain and speculative at K = 2; mean over contexts."""
    generator = torch.Generator().manual_seed(0)
    target, noise = 2 * torch.randn(2, size, size, generator=generator, dtype=torch.float64)
    models = Table(target), Table(target + noise / 2)
    params = engine.SamplingParams(temperature=temperature, max_new_tokens=3)

    def plain(start: int, walk: Walk) -> tuple[int, ...]:
        return tuple(engine.generate(models[0], [[start]], params, source=walk)[0].tokens)

    def speculative(start: int, walk: Walk) -> tuple[int, ...]:
        sequence = engine.Sequence([start], params, engine.Ending())
        drafter = engine.ModelDrafter(models[1], walk)
        loop = engine.decode(models[0], drafter, [sequence], policy, lambda: engine.FixedController(2), walk)
        for _ in loop:
            pass
        return tuple(sequence.tokens)

    distances = []
    for start in range(size):
        one, other = Walk().law(partial(plain, start)), Walk().law(partial(speculative, start))
        distances.append(sum(abs(one.get(tokens, 0) - other.get(tokens, 0)) for tokens in one | other) / 2)
    return sum(distances) / size
