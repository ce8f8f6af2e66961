"""Measures policies x temperatures with the draft model at K = 4: speed, and the distance of lossy policies.

Every lossy policy has two parameters, each with two exact distances (distance.py) and the perplexity of its output
under the target. Lossless policies have distance 0: tests/phase3 proves that by enumeration.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, cast

import torch

from common.benchmark import Outcome
from common.harness import Variant
from common.perplexity import token_nll
from common.prompts import Prompt
from engine.policies import LOSSLESS, Lossy

from .distance import Contexts, first_token_distance, toy_distance
from .runs import PLAIN, Choice, Lab

POLICIES = {
    "policies": "variant: the policy, with its parameter; typical: epsilon, with delta its square root",
    "perplexity": "of the new tokens under the target at temperature 1",
    "first_token_tv": "total variation between the law of the first token that a step emits and the target's, computed "
    "exactly at every position of a prompt's true continuation; mean of the prompts' means",
    "excess_bits": "how many bits per token less likely (negative: likelier) that token is under the target at "
    "temperature 1 than a draw from the target, in expectation, computed at the same positions",
    "toy_tv": "total variation between the laws of whole outputs of 3 tokens at K = 2, by walking all outcomes of the "
    "loop, for a toy pair with a vocabulary of 3, mean over first contexts",
}
STRENGTHS: dict[str, tuple[float, ...]] = {"conf_threshold": (0.5, 0.1), "topk_agree": (1, 5), "typical": (0.5, 0.09)}


@dataclass(frozen=True)
class Setting:
    """A policy with its parameter, if it has one."""

    policy: str
    strength: float | None = None

    @property
    def label(self) -> str:
        return self.policy if self.strength is None else f"{self.policy} {self.strength:g}"

    @property
    def options(self) -> Choice:
        parameters: dict[str, dict[str, Any]] = {
            "conf_threshold": {"tau": self.strength},
            "topk_agree": {"agree_k": self.strength},
            "typical": {"epsilon": self.strength, "delta": math.sqrt(self.strength or 1)},
        }
        return {"policy": self.policy, **parameters.get(self.policy, {})}


def lossy() -> Iterator[Setting]:
    for policy, strengths in STRENGTHS.items():
        for strength in strengths:
            yield Setting(policy, strength)


def settings(temperature: float) -> list[Setting]:
    """List the policies to measure. At temperature 0 all lossless policies are equal, so one is enough."""
    lossless = LOSSLESS if temperature else LOSSLESS[-1:]
    return [*map(Setting, lossless), *lossy()]


def judged(lab: Lab, run: Variant) -> Variant:
    """Add the negative log likelihood of a variant's tokens under the target to its figures."""

    def also(prompt: Prompt | None, round_: int) -> Outcome:
        assert prompt is not None
        outcome, model = run(prompt, round_), lab.target.model
        whole = torch.tensor([*lab.target.tokenizer.encode(prompt.text), *outcome.output], device=lab.device)
        context = model.config.context
        nll = token_nll(model, whole, context, context // 2)[-len(outcome.output) :]
        return replace(outcome, figures={**outcome.figures, "nll_sum": nll.sum().item()})

    return also


def measure_policies(lab: Lab) -> None:
    for temperature in lab.options.temperatures:
        choices = {PLAIN: {"draft": "none"}} | {s.label: s.options for s in settings(temperature)}
        runs = {label: judged(lab, lab.way(temperature=temperature, **choice)) for label, choice in choices.items()}
        exact = [label for label, choice in choices.items() if lab.repeats_plain(temperature, choice)]
        prompts = lab.prompts_at(temperature)
        lab.in_turns("policies", {"temperature": temperature}, runs, prompts, exact)
    distances(lab)


def distances(lab: Lab) -> None:
    """Compute the distances of every lossy setting at every temperature, prompt by prompt, on the same contexts."""
    prompts, temperatures = lab.continued(lab.options.prompts), lab.options.temperatures
    if not prompts:
        lab.refuse("distance", {}, "", "the prompts have no continuation (in JSONL: `continuation`)")

    @lru_cache(maxsize=1)
    def contexts(prompt: Prompt) -> Contexts:
        return Contexts.of(lab.target, lab.loaded[lab.draft], prompt)

    def computed(policy: Lossy, temperature: float, prompt: Prompt) -> Outcome:
        of_prompt = contexts(prompt)
        return Outcome(len(of_prompt.target), first_token_distance(of_prompt, policy, temperature))

    def toy(policy: Lossy, temperature: float) -> Outcome:
        return Outcome(1, {"toy_tv": toy_distance(policy, temperature)})

    policies: Mapping[tuple[float, str], Lossy] = {
        (temperature, setting.label): cast(Lossy, lab.llm(temperature=temperature, **setting.options).policy)
        for temperature in temperatures
        for setting in lossy()
    }
    for (temperature, label), policy in policies.items():
        lab.count("distance", {"temperature": temperature}, label, None, partial(toy, policy, temperature))
    for prompt in prompts:
        for (temperature, label), policy in policies.items():
            run = partial(computed, policy, temperature, prompt)
            lab.count("distance", {"temperature": temperature}, label, prompt.id, run)
