"""Options of the bench, LLMs of this phase and others, and runs of one prompt; used by all sections.

lab.decoder(draft="none", kv="static")(prompt, 0)
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, Self

import torch
from pydantic import Field

import engine
from common.benchmark import BenchOptions, Outcome
from common.device import dtype_name
from common.errors import UserError
from common.harness import Bench, Variant
from common.loops import loop_share
from common.prompts import Prompt
from engine.kernels import cpp
from engine.options import DrafterName

Section = Literal[
    "null", "cache", "speed", "lengths", "verification", "quality", "fast", "rows", "ladder", "peers", "kernels"
]
FIGURES = {
    "speedup": "the baseline's seconds per token / this variant's, in pairs of the same prompt and round",
    "tokens_per_forward": "new tokens / target forwards",
    "acceptance": "accepted / proposed draft tokens",
    "survival": "share of the drafts whose first 1, 2, ... tokens are all accepted",
    "draft_share": "time spent drafting / time of all steps",
    "loop_share": "share of the tokens that end an 8-gram that occurred before in the same output",
    "ttft_ms": "to the first token; mean over the runs",
    "tpot_ms": "(end to end - TTFT) / (tokens - 1), over all runs",
    "instruction_set": "instruction set of the C++ kernels (SPECDEC_CPU_ISA forces one)",
}


class Options(BenchOptions):
    """Measure the KV cache and the C++ kernels: speed, memory, and the cost of verification."""

    max_tokens: int = Field(32, ge=8, description="new tokens per prompt")
    budget: float = Field(25, gt=0, description="or until one comparison has taken so many seconds; see also --rounds")
    only: list[Section] = Field([], description="measure this section alone; repeatable")
    ladder: bool = Field(False, description="the same as --only ladder")
    peers: bool = Field(False, description="the same as --only peers")
    tries: int = Field(1, ge=1, description="of null: how often plain decoding is timed against itself")
    temperatures: list[float] = Field([0.0, 1.0], min_length=1, description="of speed and fast; repeatable")
    k: list[int] = Field([1, 2, 3, 4, 5, 6], min_length=1, description="of fast: draft lengths to choose from")
    drafters: list[DrafterName] = Field(
        ["model", "ngram", "medusa", "eagle"], min_length=1, description="of speed and fast; repeatable"
    )
    draft: str = Field("auto", description="the draft model; auto: the model's own")
    formats: list[Literal["float32", "bfloat16", "float16", "int8", "int4"]] = Field(
        ["float32", "bfloat16", "int8"], min_length=1, description="of fast: number formats of the weights"
    )
    tokens: int = Field(20_000, ge=512, description="of quality: held-out tokens")


class Decoder:
    """Decodes one prompt per call. The LLM is created at the first call, so a dry run loads nothing."""

    def __init__(self, make: Callable[[], Any], figures: Mapping[str, Any] | None = None) -> None:
        self.make, self.figures = cache(make), dict(figures or {})

    def __call__(self, prompt: Prompt | None, round_: int) -> Outcome:
        """Decode a prompt; every round has its own seed."""
        assert prompt is not None
        llm = self.make()
        (sequence,) = llm.sequences([prompt.text], dataclasses.replace(llm.params, seed=llm.options.seed + round_))
        for _ in llm.run([sequence]):
            pass
        progress, tokens = sequence.progress, sequence.tokens
        figures = {"forwards": progress.forwards, **times(sequence), **drafting(sequence.steps), **self.figures}
        figures["looped"] = loop_share(tokens) * len(tokens)
        return Outcome(len(tokens), figures, output=tokens)


def sharing(make: Callable[[], Any], **changed: Any) -> Any:
    """Return an LLM with other options, and the target and the caches of the one that `make` returns.

    Variants of one comparison share the target's weights: two copies of them, at different places in memory, can differ
    by 4% in speed, and what one variant left in the processor's caches is of use to the next.
    """
    llm = make()
    other = copy.copy(llm)
    other.options = llm.options.model_copy(update=changed)
    other.params, other.policy = other.options.sampling_params(), other.options.acceptance_policy()
    other.backends = copy.copy(llm.backends)
    other.backends.options, other.backends.heads = other.options, None
    other.load_drafter()
    return other


def times(sequence: Any) -> dict[str, float]:
    """Return TTFT and the inputs of TPOT."""
    progress = sequence.progress
    return {
        "ttft_ms": progress.first * 1e3,
        "later_ms": (progress.last - progress.first) * 1e3,
        "later_tokens": max(0, len(sequence.tokens) - 1),
    }


def drafting(steps: list[Any]) -> dict[str, Any]:
    """Return counts and times of the drafts of one run."""
    drafts = [step for step in steps if step.depth]
    if not drafts:
        return {}
    return {
        "proposed": sum(step.proposed for step in steps),
        "accepted": sum(step.accepted for step in steps),
        "drafts": len(drafts),
        "survived": [
            sum(step.accepted >= j for step in drafts) for j in range(1, max(step.depth for step in drafts) + 1)
        ],
        "draft_s": sum(step.draft_ms for step in steps) / 1e3,
        "steps_s": sum(step.draft_ms + step.verify_ms + step.accept_ms + step.kv_ms for step in steps) / 1e3,
    }


@dataclass(frozen=True)
class Lab(Bench):
    """A bench with loaded models."""

    options: Options
    loaded: dict[torch.dtype, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of torch models: float32 unless another was asked for."""
        found: torch.dtype = getattr(torch, "float32" if self.options.dtype == "auto" else self.options.dtype)
        return found

    def one_round(self) -> Self:
        """Return a lab with one round over all prompts, for slow sections, unless the user set the length."""
        asked = self.options.model_fields_set & {"rounds", "budget", "precision"}
        return self if asked or self.options.quick else self.with_options(rounds=1)

    def short(self) -> Self:
        """Return a lab with a fifth of the budget, for the cells of a grid."""
        return self.with_options(budget=self.options.budget / 5)

    @property
    def instruction_set(self) -> str:
        return "none" if self.options.dry_run else cpp.chosen_isa()

    def refused(self, section: str, reason: str | None) -> bool:
        """Record the reason as a row and return True, if there is a reason."""
        if reason is not None and not self.options.dry_run:
            self.refuse(section, {}, section, reason)
            return True
        return False

    def load(self) -> engine.LoadedModel:
        if self.dtype not in self.loaded:
            self.loaded[self.dtype] = engine.load(self.options.model, self.dtype, self.device)
        found: engine.LoadedModel = self.loaded[self.dtype]
        return found

    def llm(self, of: Any = engine, **wanted: Any) -> Any:
        """Return an LLM of this phase or of another, with options of its generate.py."""
        chosen = {
            "model": self.options.model,
            "draft": self.options.draft,
            "seed": self.options.seed,
            "max_tokens": self.options.max_tokens,
            "device": self.device.type,
            "threads": self.options.threads or 0,
            "dtype": dtype_name(self.dtype),
            **({"kernels": "torch"} if of is engine else {}),
            **wanted,
        }
        return of.LLM(of.Options(**chosen))

    def decoder(self, of: Any = engine, figures: Mapping[str, Any] | None = None, **wanted: Any) -> Variant:
        return Decoder(lambda: self.llm(of, **wanted), figures)

    def drafting(self, controller: str = "cost", **wanted: Any) -> dict[str, Variant]:
        """Return a variant for every requested drafter, by name."""
        return {
            f"{name}, {controller}": self.decoder(drafter=name, controller=controller, **wanted)
            for name in self.options.drafters
        }


def read_prompt(lab: Lab, prompt: Prompt, most: int | None = None) -> list[int]:
    """Return the token ids of a prompt, at most `most`. UserError for an empty prompt."""
    tokens = lab.load().tokenizer.encode(prompt.text)[:most]
    if not tokens:
        raise UserError(f"prompt {prompt.id} has no tokens")
    return tokens


Measure = Callable[[Lab], None]
