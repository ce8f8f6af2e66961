"""Policies x temperatures with the draft model at K = 4: speed, and for the lossy ones how far the text is off.

Of every lossy policy over its parameter, two distances that need no sampling (distance.py), and how likely the target
finds what was written. Lossless policies have none: tests/phase3 proves that by enumeration.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch

from common.perplexity import summary, token_nll
from engine.policies import LOSSLESS, Lossy

from .distance import Contexts, first_token_distance, toy_distance
from .runs import Lab, Variant

POLICIES = {
    "policy": "strength: the policy's parameter; typical: epsilon, with delta its square root",
    "perplexity": "of the new tokens under the target at temperature 1, with a bootstrap 95% interval over blocks",
    "first_token_tv": "total variation between the law of the first token that a step emits and the target's, computed "
    "exactly at every position of held-out text, mean; interval by a bootstrap over the prompts",
    "excess_bits": "how many bits per token less likely (negative: likelier) that token is under the target at "
    "temperature 1 than a draw from the target, in expectation, computed at the same positions",
    "toy_tv": "total variation between the laws of whole outputs of 3 tokens at K = 2, by walking all outcomes of the "
    "loop, for a toy pair with a vocabulary of 3, mean over first contexts",
}
DISTANCES = ("first_token_tv", "first_token_tv_low", "first_token_tv_high", "excess_bits")
STRENGTHS: dict[str, tuple[float, ...]] = {  # strict first
    "conf_threshold": (0.5, 0.1, 0.25, 0.02),
    "topk_agree": (1, 5, 2, 20),
    "typical": (0.5, 0.09, 0.25, 0.01),
}


@dataclass(frozen=True)
class Setting:
    """A policy with its parameter, where it has one."""

    policy: str
    strength: float | None = None

    @property
    def label(self) -> str:
        return self.policy if self.strength is None else f"{self.policy} {self.strength:g}"

    @property
    def options(self) -> dict[str, Any]:
        parameters: dict[str, dict[str, Any]] = {
            "conf_threshold": {"tau": self.strength},
            "topk_agree": {"agree_k": self.strength},
            "typical": {"epsilon": self.strength, "delta": math.sqrt(self.strength or 1)},
        }
        return {"policy": self.policy, **parameters.get(self.policy, {})}


def lossy(lab: Lab) -> Iterator[Setting]:
    for policy, strengths in STRENGTHS.items():
        for strength in sorted(strengths[: lab.grid.strengths], reverse=policy != "topk_agree"):
            yield Setting(policy, strength)


def settings(lab: Lab, temperature: float) -> list[Setting]:
    """At temperature 0 the lossless policies are one."""
    lossless = LOSSLESS if temperature else LOSSLESS[-1:]
    return [*map(Setting, lossless), *lossy(lab)]


def perplexity(lab: Lab, variant: Variant) -> dict[str, float]:
    """Of all that the variant wrote, as the target continues the prompts with it."""
    if lab.options.dry_run:
        return dict.fromkeys(("perplexity", "perplexity_low", "perplexity_high"), 1.0)
    model, nll = lab.target.model, []
    written = [pair for run in variant.different for pair in zip(variant.texts, run.tokens, strict=True)]
    for text, tokens in written:
        whole = torch.tensor([*lab.target.tokenizer.encode(text), *tokens], device=lab.device)
        context = model.config.context
        nll.append(token_nll(model, whole, context, context // 2)[-len(tokens) :])
    found = summary(torch.cat(nll))
    return {name: found[name] for name in ("perplexity", "perplexity_low", "perplexity_high")}


def measure_policies(lab: Lab) -> None:
    for temperature in lab.grid.policy_temperatures:
        speeds(lab, temperature)
    distances(lab)


def speeds(lab: Lab, temperature: float) -> None:
    key = {"kind": "policy", "temperature": temperature}
    wanted = settings(lab, temperature)
    if lab.done(**key, policy=wanted[-1].policy, strength=wanted[-1].strength):
        return
    texts = lab.texts()
    plain = lab.variant(texts, draft="none", temperature=temperature)
    runs = {s.label: lab.variant(texts, plain, temperature=temperature, **s.options) for s in wanted}
    rows, _ = lab.speed(f"policies, temperature {temperature:g}", plain, runs)
    for setting in [Setting("plain"), *wanted]:
        variant = runs.get(setting.label, plain)
        columns = {"policy": setting.policy, "strength": setting.strength}
        lab.add(**key, **columns, **rows[setting.label], **perplexity(lab, variant))


def distances(lab: Lab) -> None:
    """Every lossy setting at every temperature, on the same contexts."""
    contexts: Contexts | None = None
    for temperature in lab.grid.policy_temperatures:
        for setting in lossy(lab):
            key = {"kind": "distance", "temperature": temperature}
            key |= {"policy": setting.policy, "strength": setting.strength}
            if lab.done(**key):
                continue
            figures = dict.fromkeys((*DISTANCES, "toy_tv"), 1.0)
            if not lab.options.dry_run:
                contexts = contexts or Contexts.of(lab)
                policy = cast(Lossy, lab.session(temperature=temperature, **setting.options).policy)
                figures = first_token_distance(contexts, policy, temperature, lab.options.seed)
                figures["toy_tv"] = toy_distance(policy, temperature)
            lab.add(**key, **figures)
