"""The parts shared by all sections of the bench: its options, its models, and one run of one prompt.

lab.timed("policies", {"temperature": 1.0}, {"coupled": {"policy": "coupled"}})
lab.timed("drafters", {"temperature": 0.0}, {"ngram chain 4": {"drafter": "ngram", "k": 4}})
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal, Self, get_args

import torch
from pydantic import Field, model_validator

import engine
from common.benchmark import BenchOptions, Outcome
from common.device import dtype_name
from common.errors import UserError
from common.harness import Bench, Variant
from common.loops import loop_share
from common.prompts import Half, Prompt
from engine.options import DrafterName
from engine.policies import LOSSLESS

Section = Literal["drafters", "policies", "controllers", "ngram", "phases"]
Choice = Mapping[str, Any]  # options of generate.py
FAILING = "failing:"  # before a draft's name: its output is negated, so that every draft token is rejected
PLAIN = "plain"
GREEDY_PROMPTS = 12  # least number at temperature 0, where a prompt has one output

SPEED = {
    "speedup": "wall time per token of plain decoding over this variant's, same engine, prompt by prompt in turns; at "
    "temperature > 0 the seed of round r is --seed + r",
    "tokens_per_forward": "new tokens / target forwards",
    "acceptance": "accepted / proposed draft tokens",
    "survival": "share of the drafts whose first 1, 2, ... tokens (of trees: levels) were all accepted",
    "draft_share": "time spent drafting / time of all steps",
    "loop_share": "share of the tokens that end an 8-gram which the same output held before",
}


class Options(BenchOptions):
    """Policies, controllers, drafters and trees, against plain decoding."""

    draft: str = Field("auto", description="the draft model; auto: the model's own")
    max_tokens: int = Field(32, ge=8, description="new tokens per prompt")
    budget: float = Field(
        240, gt=0, description="or until a comparison has taken so many seconds; with fewer prompts: its share of them"
    )
    temperatures: list[float] = Field([0.0, 1.0], description="temperature to measure at; repeatable")
    drafters: list[DrafterName] = Field(list(get_args(DrafterName)), description="drafter to measure; repeatable")
    k: list[int] = Field([], description="draft tokens of chains and of fixed controllers; repeatable")
    nodes: list[int] = Field([16], description="nodes of trees; repeatable")
    only: list[Section] = Field([], description="measure this section alone; repeatable")
    calibrate: bool = Field(False, description="measure acceptance by depth and rank, write tree_acceptance.json")

    @model_validator(mode="after")
    def _values_make_sense(self) -> Self:
        for name, values, good in (
            ("--temperatures", self.temperatures, "numbers from 0 on"),
            ("--k", [k - 1 for k in self.k], "whole numbers from 1 on"),
            ("--nodes", [0 if 1 <= n <= 64 else -1 for n in self.nodes], "whole numbers from 1 to 64"),
        ):
            if not all(0 <= value < float("inf") for value in values):
                raise ValueError(f"{name} takes {good}")
        return self

    @model_validator(mode="after")
    def _calibration_is_whole(self) -> Self:
        if self.calibrate and (self.quick or self.dry_run or self.only or self.output):
            raise ValueError(
                "--calibrate measures nothing else and writes beside the model, so it goes with none of --quick, "
                "--dry-run, --only and --output; --prompts and --max-tokens set its size"
            )
        return self

    @property
    def chains(self) -> list[int]:
        """K of the drafters' chains."""
        return self.k or [4]

    @property
    def fixed(self) -> list[int]:
        """K of the fixed controllers."""
        return self.k or ([2, 4] if self.quick else [2, 4, 6, 8])


class LLM(engine.LLM):
    """An LLM that reuses models loaded by another."""

    def __init__(self, options: engine.Options, loaded: dict[str, engine.LoadedModel]) -> None:
        self._loaded = loaded
        super().__init__(options)

    def _load(self, name: str) -> engine.LoadedModel:
        if name not in self._loaded:
            loaded = super()._load(name.removeprefix(FAILING))
            if name.startswith(FAILING):
                with torch.no_grad():
                    for parameter in loaded.model.norm.parameters():  # negates the logits: likeliest becomes least
                        parameter.neg_()
            self._loaded[name] = loaded
        return self._loaded[name]


def decode(llm: Any, prompt: Prompt, round_: int) -> Outcome:
    """Decode one prompt with an LLM of any phase, and count tokens; only decoding is timed."""
    params = dataclasses.replace(llm.params, seed=llm.options.seed + round_)
    began = time.perf_counter()
    (sequence,) = llm.sequences([prompt.text], params)
    for _ in llm.run([sequence]):
        pass
    seconds, tokens = time.perf_counter() - began, sequence.tokens
    steps = getattr(sequence, "steps", [])  # phase 1's has none
    looped = round(loop_share(tokens) * len(tokens))
    figures = {"forwards": sequence.progress.forwards, "looped": looped} | (counts(steps) if steps else {})
    return Outcome(len(tokens), figures, tokens, seconds)


def counts(steps: Sequence[Any]) -> dict[str, Any]:
    """Sum the StepStats of one sequence, of which there is at least one."""
    depths = [getattr(stats, "depth", stats.proposed) for stats in steps]  # phase 2 has only chains
    accepted = [stats.accepted for stats, depth in zip(steps, depths, strict=True) if depth]
    return {
        "proposed": sum(stats.proposed for stats in steps),
        "accepted": sum(accepted),
        "drafts": len(accepted),
        "depths": depths,
        "survived": survived(accepted, max(depths)),
        "draft_s": sum(stats.draft_ms for stats in steps) / 1e3,
        "steps_s": sum(stats.draft_ms + stats.verify_ms + stats.accept_ms for stats in steps) / 1e3,
    }


def survived(accepted: Sequence[int], k: int) -> list[int]:
    """Count the drafts whose first 1, 2, ..., k tokens were all accepted."""
    return [sum(each >= j for each in accepted) for j in range(1, k + 1)]


@dataclass(frozen=True)
class Lab(Bench):
    """A bench with its loaded models."""

    options: Options
    draft: str  # the draft model's name
    loaded: dict[str, engine.LoadedModel]

    @property
    def target(self) -> engine.LoadedModel:
        return self.loaded[self.options.model]

    def llm(self, **wanted: Any) -> LLM:
        """Make an LLM with options of generate.py. UserError if a named model or heads are missing."""
        chosen = {
            "model": self.options.model,
            "draft": self.draft,
            "seed": self.options.seed,
            "max_tokens": self.options.max_tokens,
            "device": self.device.type,
            "dtype": dtype_name(self.target.model.embedding.weight.dtype),
            **wanted,
        }
        return LLM(engine.Options(**chosen), self.loaded)

    @cached_property
    def left_out(self) -> dict[str, str]:
        """Drafters that cannot run, with the reasons."""
        found: dict[str, str] = {}
        for name in self.options.drafters:
            try:
                self.llm(drafter=name)
            except UserError as error:
                found[name] = str(error)
        return found

    @property
    def drafters(self) -> list[str]:
        return [name for name in self.options.drafters if name not in self.left_out]

    def prompts_at(self, temperature: float, half: Half = "test") -> list[Prompt]:
        """Return all prompts for samples; a quarter of them, at least GREEDY_PROMPTS, for greedy output."""
        count = self.options.prompts
        return self.prompts(count if temperature else min(count, max(GREEDY_PROMPTS, count // 4)), half)

    def continued(self, count: int) -> list[Prompt]:
        """Return at most `count` prompts with a true continuation."""
        return [prompt for prompt in self.prompts() if prompt.continuation][:count]

    def within(self, share: float) -> Self:
        """Return this bench with a share of --budget for every comparison."""
        return self.with_options(budget=share * self.options.budget)

    def way(self, **wanted: Any) -> Variant:
        """Make a variant that decodes with these options of generate.py; its LLM is made at the first run."""
        llm = cache(lambda: self.llm(**wanted))

        def run(prompt: Prompt | None, round_: int) -> Outcome:
            assert prompt is not None
            return decode(llm(), prompt, round_)

        return run

    def repeats_plain(self, temperature: float, choice: Choice) -> bool:
        """Return True if the output must equal plain decoding's. Half precision may break near ties differently."""
        policy = choice.get("policy", "auto")
        equal = policy in LOSSLESS[1:] or (temperature == 0 and policy in ("auto", *LOSSLESS))
        return equal and self.target.model.embedding.weight.dtype == torch.float32

    def timed(
        self, section: str, cell: Mapping[str, Any], choices: Mapping[str, Choice], prompts: Sequence[Prompt] = ()
    ) -> None:
        """Time some options of generate.py against plain decoding, at the cell's temperature; every run is a row."""
        temperature = cell["temperature"]
        variants = {PLAIN: self.way(draft="none", temperature=temperature)}
        variants |= {label: self.way(temperature=temperature, **choice) for label, choice in choices.items()}
        exact = [label for label, choice in choices.items() if self.repeats_plain(temperature, choice)]
        self.in_turns(section, cell, variants, prompts or self.prompts_at(temperature), exact)

    def in_turns(
        self,
        section: str,
        cell: Mapping[str, Any],
        variants: Mapping[str, Variant],
        prompts: Sequence[Prompt],
        exact: Sequence[str],
    ) -> None:
        """Call `compare` with a share of --budget in proportion to the number of prompts."""
        bench = self.within(min(1.0, len(prompts) / self.options.prompts))
        bench.compare(section, cell, variants, prompts, exact, warmup=1 if self.options.quick else 2)
